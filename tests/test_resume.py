"""Runs that are interrupted, and continued as if they had not been."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import equiadapt_jax as ea
from equiadapt_jax import runs
from equiadapt_jax.data import open_dataset
from equiadapt_jax.training import config as settings
from equiadapt_jax.training import loop, run
from equiadapt_jax.training.build import resolve
from equiadapt_jax.training.checkpoints import Checkpoints
from equiadapt_jax.training.digests import DamagedCheckpoint, seal, unseal
from equiadapt_jax.training.logging import MetricsLog
from equiadapt_jax.training.loop import Stop, Stopped
from equiadapt_jax.training.workdir import only_one, read_config, read_environment
from tests.tiny_runs import ROOT, assert_same, command


def interrupt(monkeypatch, after):
    """Stop training as Ctrl-C would, after so many steps."""
    place, calls = loop.place_batch, []

    def stop(batch):
        calls.append(batch)
        if len(calls) > after:
            raise KeyboardInterrupt
        return place(batch)

    monkeypatch.setattr(loop, "place_batch", stop)


def test_a_resumed_run_ends_like_an_uninterrupted_one(finished, tiny, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt(patch, after=1)
        with pytest.raises(KeyboardInterrupt):
            run.train(tiny(), tmp_path / "run")
    with pytest.raises(ValueError, match="continue it with --resume, replace it with --overwrite"):
        run.train(tiny(), tmp_path / "run")
    run.train(tiny(), tmp_path / "run", resume=True)
    assert_same(ea.load(tmp_path / "run", step=2)[:2], ea.load(finished, step=2)[:2])
    lines = [(path / "metrics.jsonl").read_text() for path in (tmp_path / "run", finished)]
    assert lines[0] == lines[1]


def test_the_pretrained_predictor_is_kept_and_found(finished, tiny, places, monkeypatch, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in places["pretrained"].rglob("*")}
    interrupt(monkeypatch, after=0)  # the first step of all is already one of adaptation
    with pytest.raises(KeyboardInterrupt):
        run.train(tiny(group="cyclic8"), tmp_path / "run")
    checkpoints = {p: t for p, t in before.items() if "checkpoints" in p.parts and p.is_file()}
    assert checkpoints
    assert all(path.stat().st_mtime_ns == time for path, time in checkpoints.items())
    assert (tmp_path / "run" / "checkpoints" / "0").exists()


def test_resuming_a_finished_run_changes_nothing(finished, tiny, places, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    log = (finished / "metrics.jsonl").read_text()
    once = run.train(tiny(), tmp_path / "run", resume=True)
    elsewhere = dataclasses.replace(tiny().pretrain, directory=str(tmp_path / "empty"))
    twice = run.train(
        dataclasses.replace(tiny(), pretrain=elsewhere), tmp_path / "run", resume=True
    )
    assert once == twice
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == log
    assert not (tmp_path / "empty").exists()


@pytest.fixture(scope="module")
def longer(tiny):
    """Four steps of either stage, validated after every second, which alone changes parameters."""
    config = tiny()
    return dataclasses.replace(
        config,
        pretrain=dataclasses.replace(config.pretrain, steps=4),
        adaptation=dataclasses.replace(config.adaptation, steps=4),
        optimizer=dataclasses.replace(config.optimizer, accumulate=2),
        logging=settings.Logging(every=1, evaluate_every=2),
    )


def placed(config, directory):
    """The same run with a pretrained predictor of its own."""
    pretrain = dataclasses.replace(config.pretrain, directory=str(directory / "pretrained"))
    return dataclasses.replace(config, pretrain=pretrain)


@pytest.fixture(scope="module")
def whole(longer, tmp_path_factory):
    """The workdir of such a run that nothing interrupted."""
    directory = tmp_path_factory.mktemp("whole")
    run.train(placed(longer, directory), directory / "run")
    return directory / "run"


def request_after(monkeypatch, stop, batches, validations):
    """Ask to stop once so many training batches and validations have begun."""
    seen = {"place_batch": 0, "checked": 0}
    place, checked = loop.place_batch, stop.checked

    def count(name, limit):
        seen[name] += 1
        if seen[name] == limit:
            stop.request()

    def counted_place(batch):
        count("place_batch", batches)
        return place(batch)

    def counted_checked(batches):
        count("checked", validations)
        return checked(batches)

    monkeypatch.setattr(loop, "place_batch", counted_place)
    monkeypatch.setattr(stop, "checked", counted_checked)


@pytest.mark.parametrize(
    ("batches", "validations", "stage", "step"),
    [
        (0, 1, "pretraining vit", 0),  # while the untrained predictor is validated
        (3, 0, "pretraining vit", 3),
        (4, 0, "pretraining vit", 4),  # the last validation is left undone
        (0, 5, "adapting to cyclic4", 2),
        (7, 0, "adapting to cyclic4", 3),
    ],
)
def test_a_stopped_run_goes_on_as_if_it_had_not_been(
    batches, validations, stage, step, longer, whole, tmp_path, monkeypatch
):
    stopped = placed(longer, tmp_path)
    with monkeypatch.context() as patch:
        stop = Stop()
        request_after(patch, stop, batches, validations)
        with pytest.raises(Stopped, match=f"Stopped {stage} after step {step}, which is saved"):
            run.train(stopped, tmp_path / "run", stop=stop)
    run.train(stopped, tmp_path / "run", resume=True)
    ends = [whole, tmp_path / "run"]
    assert_same(*(ea.load(end, step=4)[:2] for end in ends))
    assert_same(*(ea.load(end)[:2] for end in ends))
    assert len({(end / "metrics.jsonl").read_text() for end in ends}) == 1
    kept = [sorted(path.name for path in (end / "checkpoints").iterdir()) for end in ends]
    assert kept[0] == kept[1] == ["0", "2", "4"]
    records = [
        json.loads((end / "checkpoints" / "4" / "checkpoint.json").read_text()) for end in ends
    ]
    assert records[0]["leaves"] == records[1]["leaves"]


def test_a_request_outside_training_ends_at_once_with_all_saved(finished, tiny, tmp_path):
    stop = Stop()
    with pytest.raises(Stopped, match="nothing was being trained"):
        stop.request()
    shutil.copytree(finished, tmp_path / "run")
    with pytest.raises(Stopped, match="Stopped after adapting to cyclic4, which is saved"):
        run.train(tiny(), tmp_path / "run", resume=True, stop=stop)


def heeds_sigterm(pid):
    """Whether a process has a handler for SIGTERM, from the mask that Linux shows of it."""
    status = Path(f"/proc/{pid}/status").read_text()
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(caught.split()[1], 16) >> (signal.SIGTERM - 1) & 1)


@pytest.mark.parametrize("wait", ["import", "training"])
def test_sigterm_saves_and_exits_with_its_own_code(wait, places, tmp_path):
    workdir = tmp_path / "run"
    arguments = [
        sys.executable, "train.py", "--config=configs/digits_vit.py:tiny", f"--workdir={workdir}",
        f"--config.data.data_dir={places['data']}", f"--config.pretrain.directory={tmp_path}",
        "--config.pretrain.steps=0", "--config.adaptation.steps=1000000",
        "--config.logging.evaluate_every=1000000",
    ]  # fmt: skip
    process = subprocess.Popen(
        arguments, cwd=ROOT, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    deadline = time.monotonic() + 120
    lines = workdir / "metrics.jsonl"
    while wait == "training" and time.monotonic() < deadline:
        if lines.exists() and len(lines.read_text().splitlines()) > 3:
            break
        time.sleep(0.1)
    while wait == "import" and not heeds_sigterm(process.pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 75, errors
    assert "Traceback" not in errors
    if wait == "training":
        last = errors.strip().splitlines()[-1]
        assert last.startswith("Stopped adapting to cyclic4 after step ")
        assert last.endswith("which is saved. Continue with --resume.")
        step = max(int(path.name) for path in (workdir / "checkpoints").iterdir())
        assert f"after step {step}," in last
        logged = [json.loads(line)["step"] for line in lines.read_text().splitlines()]
        assert logged == list(range(step + 1))


@pytest.mark.parametrize(
    "program",
    [
        "def main(): signal.raise_signal(signal.SIGINT)",
        # Where Python would print the exception and go on.
        "gc.callbacks.append(lambda *_: signal.raise_signal(signal.SIGINT))\n"
        "def main(): gc.collect()",
        "def main(): raise ImportError('initialization failed') from KeyboardInterrupt()",
    ],
)
def test_ctrl_c_ends_a_command_without_clearing_up(program):
    start = (
        "import atexit, gc, os, signal\nfrom equiadapt_jax import command_line\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # ignored in the background
        "atexit.register(lambda: os.abort())  # as JAX may that is interrupted while compiling\n"
    )
    code, output, errors = command("-c", f"{start}{program}\ncommand_line.run(main)")
    assert code == 130, errors
    assert errors == "Error: stopped at once; what was saved before is whole.\n"
    assert output == ""


@pytest.mark.parametrize("seconds", [0, 3])
def test_ctrl_c_ends_an_evaluation(seconds, finished, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "eval.py", f"--workdir={finished}", f"--output={tmp_path}",
         "--random_angles=1000"],
        cwd=ROOT, stderr=subprocess.PIPE, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while "jaxlib" not in Path(f"/proc/{process.pid}/maps").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert errors in ("", "Error: stopped at once; what was saved before is whole.\n")
    assert list(tmp_path.iterdir()) == []


def test_a_killed_log_line_is_dropped_and_none_comes_twice(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1}\n{"step": 1.\n[]\n{"step": 2}\n{"step": 3}\n{"st'
    )
    log = MetricsLog(tmp_path, settings.Logging(), after=2)
    for step in (2, 3):
        log(step, {"loss": 0.5})
    log.close()
    assert (tmp_path / "metrics.jsonl").read_text() == (
        '{"step": 1}\n{"step": 2}\n{"step": 3, "loss": 0.5}\n'
    )


def test_other_versions_are_told(finished, tiny, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    values = json.loads((tmp_path / "run" / "config.json").read_text())
    del values["digest"]
    versions = values["environment"]["versions"]
    assert values["environment"]["device"].startswith("1 × cpu, ")
    now = versions["jax"]
    versions["jax"] = "0.9.0"
    (tmp_path / "run" / "config.json").write_text(seal(values))
    with pytest.warns(UserWarning, match=rf"not bit for bit as it would have: jax 0\.9\.0 → {now}"):
        run.train(tiny(), tmp_path / "run", resume=True)
    assert read_environment(tmp_path / "run")["versions"]["jax"] == "0.9.0"


def test_a_damaged_config_is_told(finished, tiny, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    whole = path.read_text()
    rng = np.random.default_rng(0)
    damaged = [
        whole.replace('"seed": 0', '"seed": 1'),
        whole[: len(whole) // 2],
        "[]",
        "{}",
        "null",
    ]
    for bit in rng.integers(0, 7 * len(whole.encode()), 30):
        content = bytearray(whole.encode())
        content[bit // 7] ^= 1 << bit % 7
        damaged.append(content.decode(errors="surrogateescape"))
    for text in damaged:
        path.write_text(text, errors="surrogateescape")
        for use in (ea.load, lambda workdir: run.train(tiny(), workdir, resume=True)):
            with pytest.raises(
                DamagedCheckpoint, match=r"config\.json is damaged, was edited, or is"
            ):
                use(tmp_path / "run")


def test_checkpoints_of_another_run_are_refused(finished, tiny, tmp_path):
    run.train(tiny(seed=7), tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    shutil.copytree(finished / "checkpoints", tmp_path / "run" / "checkpoints")
    for use in (ea.load, lambda workdir: run.train(tiny(seed=7), workdir, resume=True)):
        with pytest.raises(ValueError, match="belongs to a run with other settings"):
            use(tmp_path / "run")


def test_a_new_setting_does_not_estrange_earlier_runs(finished, tiny, tmp_path):
    """A run made before a setting existed lacks it in config.json and in its fingerprint."""
    shutil.copytree(finished, tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    values = json.loads(path.read_text())
    del values["digest"], values["settings"]["optimizer"]["clip"]
    del values["settings"]["predictor"]["remat"]
    path.write_text(seal(values))
    assert_same(ea.load(tmp_path / "run")[:2], ea.load(finished)[:2])
    run.train(tiny(), tmp_path / "run", resume=True)


def test_resuming_and_overwriting_at_once_is_refused(finished, tiny, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    with pytest.raises(ValueError, match="--resume continues a run and --overwrite removes it"):
        run.train(tiny(), tmp_path / "run", resume=True, overwrite=True)
    ea.load(tmp_path / "run", step=2)


def test_two_processes_do_not_train_in_one_directory(finished, tiny, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    with (
        only_one(tmp_path / "run"),
        pytest.raises(
            ValueError, match=rf"Another process is training in {tmp_path / 'run'}: wait"
        ),
    ):
        run.train(tiny(), tmp_path / "run", resume=True)
    run.train(tiny(), tmp_path / "run", resume=True)


def test_a_run_that_was_stopped_at_once_can_be_evaluated(finished, places, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    for step in (1, 2):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / str(step))
    log = tmp_path / "run" / "metrics.jsonl"
    log.write_text(log.read_text().splitlines(keepends=True)[0] + "{damaged}\n")
    metrics, table = runs.evaluate(tmp_path / "run", pictures=tmp_path / "eval")
    assert metrics["vanilla/accuracy"] > 0
    report = (tmp_path / "eval" / "report.html").read_text()
    assert "Learning curves" in report
    unfinished = "This run is unfinished: its latest checkpoint is step 0 of 2. Its best checkpoint"
    assert f"\n\nWarning: {unfinished} is step 0, before any training of its own: what" in table
    assert f'<p class="verdict"><strong>{unfinished}' in report
    assert "<dd>step 0 of 2, unfinished; vanilla is step 0</dd>" in report


def test_a_run_without_any_checkpoint_says_how_to_get_one(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    for left in (tmp_path / "run" / "checkpoints" / "0.unfinished", tmp_path / "run"):
        shutil.rmtree(tmp_path / "run" / "checkpoints", ignore_errors=True)
        left.mkdir(parents=True, exist_ok=True)
        for use in (ea.load, runs.evaluate, lambda workdir: ea.load(workdir, step=0)):
            with pytest.raises(FileNotFoundError) as caught:
                use(tmp_path / "run")
            assert str(caught.value).startswith(
                f"There are no checkpoints in {tmp_path / 'run'}: the run was stopped before its "
                "first one, or has not come so far; continue it with --resume (it was begun by: py"
            )


def test_the_report_tells_of_a_damaged_checkpoint(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    _, table = runs.evaluate(finished, pictures=tmp_path / "eval")
    assert "<dt>damaged</dt>" not in (tmp_path / "eval" / "report.html").read_text()
    assert "unfinished" not in table
    (tmp_path / "run" / "checkpoints" / "2" / "checkpoint.json").write_text("{}")
    with pytest.warns(UserWarning, match="step 1 is used instead"):
        runs.evaluate(tmp_path / "run", pictures=tmp_path / "eval")
    report = (tmp_path / "eval" / "report.html").read_text()
    damaged = re.search(r"<dt>damaged</dt><dd>(.*)</dd>", report)[1]
    assert damaged.startswith(str(tmp_path / "run" / "checkpoints" / "2" / "checkpoint.json"))
    assert damaged.endswith(": step 1 is used instead.")


def test_parts_of_a_run_without_its_settings_are_refused(finished, tiny, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "config.json").unlink()
    with pytest.raises(ValueError, match=r"holds metrics\.jsonl, checkpoints of a run, but no con"):
        run.train(tiny(), tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "checkpoints" / "2").is_dir()


def test_settings_are_kept_with_all_options_of_the_networks(finished):
    config, _ = read_config(finished)
    assert config.predictor.options["depth"] == 1
    assert config.predictor.options["norm_eps"] == 1e-6
    assert config.scorer.options["grid"] == 1


def test_a_run_that_names_its_canonicalizer_as_scorer_is_read_alike(finished, tiny, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    values = unseal(path, {"settings"})
    values["settings"]["scorer"]["name"] = values["settings"].pop("canonicalizer")
    path.write_text(seal(values))
    assert read_config(tmp_path / "run") == read_config(finished)
    run.train(tiny(), tmp_path / "run", resume=True)
    assert "canonicalizer" in unseal(path, {"settings"})["settings"]


@pytest.mark.parametrize("name", ["model/_METADATA", "checkpoint.json"])
def test_a_damaged_pretrained_predictor_is_told(name, tiny, finished, places, tmp_path):
    config = placed(tiny(), tmp_path)
    shutil.copytree(places["pretrained"], tmp_path / "pretrained")
    kept = run._pretrained_directory(
        resolve(config), open_dataset("digits", data_dir=places["data"])
    )
    for step in (1, 2):
        (kept / "checkpoints" / str(step) / name).write_text("{}")
    with pytest.raises(DamagedCheckpoint, match=rf"{kept} is damaged .*remove that directory"):
        run.train(config, tmp_path / "other")


def test_a_run_whose_last_checkpoint_is_damaged_continues_from_the_one_before(
    finished, tiny, tmp_path
):
    shutil.copytree(finished, tmp_path / "run")
    next((tmp_path / "run" / "checkpoints" / "2" / "optimizer").rglob("_METADATA")).unlink()
    with pytest.warns(UserWarning, match=r"_METADATA is missing: continuing from step 1\."):
        run.train(tiny(), tmp_path / "run", resume=True)
    records = [
        json.loads((workdir / "checkpoints" / "2" / "checkpoint.json").read_text())
        for workdir in (finished, tmp_path / "run")
    ]
    assert records[0]["leaves"] == records[1]["leaves"]
    logs = [(workdir / "metrics.jsonl").read_text() for workdir in (finished, tmp_path / "run")]
    assert logs[0] == logs[1]
    assert (tmp_path / "run" / "checkpoints" / "2.damaged").is_dir()
    assert Checkpoints(tmp_path / "run" / "checkpoints", records[0]["fingerprint"]).steps() == [
        0,
        1,
        2,
    ]
