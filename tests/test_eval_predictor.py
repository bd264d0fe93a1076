"""Networks of the user's own, evaluated without a run: real networks, real data, wrong input."""

import csv
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import equiadapt_jax as ea
from equiadapt_jax import robustness, runs
from equiadapt_jax.data import open_dataset
from equiadapt_jax.training import run
from tests.tiny_runs import ROOT, shipped

NETWORK = '''
"""Networks as a user may have them."""

import jax
import jax.numpy as jnp
import numpy as np

import equiadapt_jax as ea

WEIGHTS = np.random.default_rng(0).normal(size=(8 * 8, 10)).astype(np.float32)


def with_jax(images):
    return jnp.reshape(images, (images.shape[0], -1)) @ WEIGHTS


def with_numpy(images):
    assert type(images) is np.ndarray and images.dtype == np.float32 and images.flags.writeable
    return np.ascontiguousarray(images).reshape(len(images), -1) @ WEIGHTS


def probabilities(images):
    return jax.nn.softmax(with_jax(images))


def numpy_probabilities(images):
    return np.asarray(probabilities(np.asarray(images)))


def log_probabilities(images):
    return jax.nn.log_softmax(with_jax(images))


def brighter(images):
    """Two classes, bright above or below, found by arrays that JAX cannot trace."""
    images = np.asarray(images, np.float64)
    half = images.shape[1] // 2
    above = images[:, :half].mean((1, 2, 3)) - images[:, half:].mean((1, 2, 3))
    return np.stack([above, -above], -1)


def resnet():
    network = ea.from_linen(
        ea.predictors.ResNet(10, stage_sizes=(1,), block="basic", width=8, stem="cifar")
    )
    params, state = network.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
    return ea.predictors.Pretrained(network, params, state, ea.predictors.Preprocess(0.3, 0.4))


def vit():
    network = ea.from_linen(ea.predictors.ViT(10, patch=4, width=8, depth=1, heads=2))
    params, state = network.init(jax.random.key(1), jnp.zeros((1, 8, 8, 1)))
    return ea.predictors.Pretrained(network, params, state)


ready = vit()
mistaken = ready._replace(network=print)
unprepared = ready._replace(preprocess=0.5)
number = 3


def raising(prediction, maps):
    return {"yes": prediction[:, 0]}["no"]


def spread(prediction, maps):
    assert maps == ()
    return prediction.max(-1) - prediction.min(-1)


def one_by_one(images):
    return images.mean()


def of_other_images(images):
    return images @ np.ones((7, 10), np.float32)


def infinite(images):
    return with_jax(images).at[:, 3].set(jnp.inf)


def with_a_bug(images):
    table = {}
    return table["weights"] @ np.asarray(images)


def needing_two(images, weights):
    return images


def returning_text():
    return "weights"


def failing():
    raise OSError("no weights here")
'''


@pytest.fixture(scope="module")
def network(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("mine") / "my_network.py"
    path.write_text(NETWORK)
    return path


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> str:
    return str(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Colour images, bright above or below, in a split of their own."""
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for name, rows in (("above", slice(0, 6)), ("below", slice(6, 12))):
        (root / "test" / name).mkdir(parents=True)
        for i in range(3):
            pixels = rng.integers(0, 60, (12, 12, 3), dtype=np.uint8)
            pixels[rows] += 150
            Image.fromarray(pixels).save(root / "test" / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, data_dir) -> Path:
    """A run of two steps."""
    base = tmp_path_factory.mktemp("runs")
    config = shipped(ROOT / "configs" / "digits_vit.py", "tiny")
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, data_dir=data_dir),
        pretrain=dataclasses.replace(config.pretrain, directory=str(base / "pretrained")),
    )
    run.train(config, base / "run")
    return base / "run"


def digits(data_dir):
    """The test images at their own size, (360, 8, 8, 1) in [0, 1], and their labels."""
    source = open_dataset("digits", data_dir=data_dir).source("test")
    images = np.stack([example["image"] for example in source]).astype(np.float64) / 255
    return images, np.array([example["label"] for example in source])


def expected(logits_of, images, labels):
    """Accuracy upright, over D4, per element, and the changed rate, without the library."""
    orbit = [np.rot90(x, g, (1, 2)) for x in (images, images[:, :, ::-1]) for g in range(4)]
    predictions = np.stack([logits_of(x).argmax(-1) for x in orbit])
    right = predictions == labels
    return {
        "vanilla/accuracy": right[0].mean(),
        "vanilla/group_accuracy": right.mean(),
        "vanilla/changed_rate": (predictions[1:] != predictions[0]).mean(),
        "vanilla/accuracy/r90": right[1].mean(),
        "vanilla/accuracy/r180s": right[6].mean(),
        "vanilla/class/3/group_accuracy": right[:, labels == 3].mean(),
    }


def test_without_training_the_best_pose_of_an_energy_is_taken(network, data_dir, tmp_path):
    """For functions of JAX and of NumPy arrays, and an energy of the user's own."""
    weights = np.random.default_rng(0).normal(size=(64, 10)).astype(np.float32)
    images, labels = digits(data_dir)
    turned = np.stack([np.rot90(images, -g, (1, 2)).reshape(360, -1) @ weights for g in range(4)])
    ranked = np.sort(turned.astype(np.float64))
    odds = ranked[..., -1] - np.log(np.exp(ranked[..., :-1]).sum(-1))
    chosen = {
        "confidence": odds.argmax(0),
        f"{network}:spread": np.ptp(turned, axis=-1).argmax(0),
    }
    for name, by in (("with_jax", "confidence"), ("with_numpy", f"{network}:spread")):
        metrics, table, verdict = robustness.evaluate(
            f"{network}:{name}", "digits", data_dir=data_dir, adapt_by=by, pictures=tmp_path / name,
        )  # fmt: skip
        best = turned[chosen[by], np.arange(360)].argmax(-1)
        assert metrics["adapted/accuracy"] == pytest.approx((best == labels).mean(), abs=1e-12)
        assert metrics["adapted/group_accuracy"] == pytest.approx(metrics["adapted/accuracy"])
        assert metrics["adapted/changed_rate"] == 0
        assert metrics["adapted/identity_rate"] == pytest.approx((chosen[by] == 0).mean())
        assert metrics["vanilla/accuracy"] == pytest.approx((turned[0].argmax(-1) == labels).mean())
        assert "adapted" in table
        assert "the adapted model" in verdict.lower()
        report = (tmp_path / name / "report.html").read_text(encoding="utf-8")
        assert "no training" in report


def test_a_gate_leaves_upright_inputs_alone(network, data_dir):
    metrics, *_ = robustness.evaluate(
        f"{network}:with_jax", "digits", data_dir=data_dir, adapt_by="entropy", margin=100.0
    )
    assert metrics["adapted/identity_rate"] == 1
    for figure in ("accuracy", "group_accuracy", "changed_rate"):
        assert metrics[f"adapted/{figure}"] == metrics[f"vanilla/{figure}"]


def test_networks_and_runs_are_adapted_without_training(network, workdir, data_dir):
    for predictor, by in ((f"{network}:resnet", "feature_norm"), (str(workdir), "confidence")):
        data = "" if predictor == str(workdir) else "digits"
        metrics, *_ = robustness.evaluate(predictor, data, data_dir=data_dir, adapt_by=by)
        assert metrics["adapted/changed_rate"] == metrics["adapted/invariance_error"] == 0
        assert metrics["vanilla/invariance_error"] > 0
    name = robustness.evaluation_directory(f"{network}:vit", "digits", "cyclic8", adapt_by=by)
    assert name.name == "eval-my_network-vit-digits-cyclic8-confidence"
    name = robustness.evaluation_directory("a.b:c", "digits", adapt_by="entropy", margin=0.25)
    assert name.name == "eval-a.b-c-digits-cyclic4-entropy-margin0.25"


@pytest.mark.parametrize(
    ("adapt_by", "margin", "sentence"),
    [
        ("", 1.0, "--margin=1 is that of --adapt="),
        ("sharpness", 0.0, "--adapt=sharpness is no energy: choose confidence, entropy"),
        ("{network}:sharpness", 0.0, "has no function 'sharpness'"),
        (
            "{network}:raising",
            0.0,
            r"--adapt=.*:raising raised KeyError: 'no' .*my_network.py, line",
        ),
        ("feature_norm", 0.0, "the predictor tells none: choose confidence"),
    ],
)
def test_energies_that_do_not_exist_are_refused(adapt_by, margin, sentence, network, data_dir):
    adapt_by = adapt_by.format(network=network)
    with pytest.raises(ValueError, match=sentence):
        robustness.evaluate(
            f"{network}:with_jax", "digits", data_dir=data_dir, adapt_by=adapt_by, margin=margin
        )


def test_an_energy_is_tried_before_anything_is_evaluated(network, data_dir, tmp_path, monkeypatch):
    def evaluated(*args, **kwargs):
        raise AssertionError("evaluated before the energy was tried")

    monkeypatch.setattr(robustness, "assess", evaluated)
    for name in ("with_jax", "with_numpy"):
        with pytest.raises(ValueError, match=r"raising raised KeyError: 'no'"):
            robustness.evaluate(
                f"{network}:{name}", "digits", data_dir=data_dir, adapt_by=f"{network}:raising"
            )
    with pytest.raises(FileNotFoundError, match=r"no file nowhere.py \(--adapt=nowhere.py:"):
        robustness.evaluate(f"{network}:with_jax", "digits", adapt_by="nowhere.py:energy")


def test_a_file_for_network_and_energy_is_executed_once(data_dir, tmp_path):
    count = tmp_path / "count"
    file = tmp_path / "once_only.py"
    file.write_text(
        f"with open({str(count)!r}, 'a') as file: file.write('x')\n"
        "def network(images): return images.mean((2, 3))[:, :10]\n"
        "def energy(y, maps): return y[:, 0]\n"
    )
    robustness.evaluate(
        f"{file}:network", "digits", data_dir=data_dir, size=10, adapt_by=f"{file}:energy"
    )
    assert count.read_text() == "x"


@pytest.mark.parametrize("name", ["with_jax", "with_numpy"])
def test_a_function_of_jax_or_numpy_is_counted_right(name, network, data_dir, tmp_path, capsys):
    metrics, table, verdict = robustness.evaluate(
        f"{network}:{name}", "digits", group="dihedral4", data_dir=data_dir, pictures=tmp_path,
        sweep=4, random_angles=1,
    )  # fmt: skip
    weights = np.random.default_rng(0).normal(size=(64, 10)).astype(np.float32)
    images, labels = digits(data_dir)
    found = expected(lambda x: x.reshape(len(x), -1) @ weights, images, labels)
    for key, value in found.items():
        assert metrics[key] == pytest.approx(value, abs=1e-12), key
    assert metrics["vanilla/sweep/r90"] == metrics["vanilla/accuracy/r90"]
    assert ("gets NumPy arrays" in capsys.readouterr().out) == (name == "with_numpy")
    assert "adapted" not in table
    assert verdict.startswith("Upright it hardly does better than guessing")
    with (tmp_path / "per_image.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 360 * 8
    assert np.mean([row["vanilla"] == row["label"] for row in rows]) == pytest.approx(
        found["vanilla/group_accuracy"]
    )
    report = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert f"my_network:{name}" in report
    assert "Most confidently broken images" in report


def test_probabilities_are_told_with_the_way_out(network, data_dir, tmp_path):
    found = {}
    for name in ("probabilities", "numpy_probabilities", "log_probabilities", "with_jax"):
        found[name] = robustness.evaluate(
            f"{network}:{name}", "digits", split="test[:20%]", data_dir=data_dir,
            pictures=tmp_path / name,
        )[:2]  # fmt: skip
        said = f"my_network:{name} returned probabilities where logits are needed"
        told = name.endswith("probabilities") and not name.startswith("log")
        table, report = found[name][1], (tmp_path / name / "report.html").read_text("utf-8")
        assert (f"\n\nWarning: {said}" in table) == told
        assert (f"<strong>{said}" in report) == told
        assert ("return the logits, or the logarithms of the probabilities." in table) == told
    # The way out gives the figures of the logits, but for their change, which has another scale.
    logits, logarithms = found["with_jax"][0], found["log_probabilities"][0]
    for key in ("accuracy", "group_accuracy", "changed_rate", "calibration_error"):
        assert logarithms[f"vanilla/{key}"] == pytest.approx(logits[f"vanilla/{key}"], abs=1e-5)
    assert found["probabilities"][0]["vanilla/accuracy"] == logits["vanilla/accuracy"]


@pytest.mark.parametrize("name", ["resnet", "vit", "ready"])
def test_networks_of_the_package_run_behind_their_preprocessing(name, network, data_dir):
    metrics, _, _ = robustness.evaluate(
        f"{network}:{name}", "digits", group="dihedral4", data_dir=data_dir, batch_size=100
    )
    pretrained = robustness.read_predictor(f"{network}:{name}")
    assert isinstance(pretrained, ea.predictors.Pretrained)

    @jax.jit
    def logits(images):
        prepared = (images - 0.3) / 0.4 if name == "resnet" else images
        return pretrained.network.apply(pretrained.params, pretrained.state, prepared)[0]

    images, labels = digits(data_dir)
    found = expected(lambda x: np.asarray(logits(jnp.float32(x))), images, labels)
    for key, value in found.items():
        assert metrics[key] == pytest.approx(value, abs=2 / 360), key  # of rounding in near-ties


def test_an_image_folder_and_a_function_that_jax_cannot_trace(network, folder, data_dir, tmp_path):
    metrics, table, verdict = robustness.evaluate(
        f"{network}:brighter", str(folder), size=8, data_dir=data_dir, pictures=tmp_path,
        batch_size=4,
    )  # fmt: skip
    assert metrics["vanilla/accuracy"] == 1
    assert metrics["vanilla/accuracy/r180"] == 0
    assert metrics["vanilla/class/above/accuracy"] == 1
    assert verdict.startswith("If images come turned like this, you need adaptation")
    assert "accuracy upright" in table
    report = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "called with NumPy arrays" in report
    assert "above" in report


def test_a_run_without_its_adaptation_is_its_vanilla_predictor(workdir, data_dir):
    metrics, _, _ = robustness.evaluate(str(workdir), batch_size=60)
    both, _ = runs.evaluate(workdir)
    vanilla = {name: value for name, value in both.items() if name.startswith("vanilla/")}
    assert metrics == vanilla
    half, _, _ = robustness.evaluate(str(workdir), "digits", split="test[:50%]", data_dir=data_dir)
    assert half.keys() == metrics.keys()
    assert half != metrics


WRONG = {
    "nowhere.py:predict": (FileNotFoundError, "There is no file nowhere.py"),
    "no.such.module:predict": (FileNotFoundError, "There is no module no.such.module"),
    "my_network": (ValueError, "is neither path/to/file.py:name, package.module:name nor"),
    ":predict": (ValueError, "is neither path"),
    "{mine}:predcit": (ValueError, "has no 'predcit'; what it has is with_jax, with_numpy, probab"),
    "{mine}:number": (TypeError, "is or returns a int: a function of images, an"),
    "{mine}:returning_text": (TypeError, "is or returns a str: a function of images"),
    "{mine}:needing_two": (TypeError, "is or returns a function: a function of images"),
    "{mine}:mistaken": (TypeError, "network of Pretrained is a builtin_function_or_method: wrap"),
    "{mine}:unprepared": (TypeError, "preprocess of Pretrained is a float: give a function"),
    "{mine}:failing": (ValueError, r"failing raised OSError: no weights here \(.*my_network.py, l"),
    "{mine}:one_by_one": (ValueError, r"returned shape \(\) for 64 images: logits .* \(64, 10\)"),
    "{mine}:brighter": (ValueError, "returned 2 logits per image, but the data have 10 classes"),
    "{mine}:with_a_bug": (
        ValueError, r"with_a_bug, given images float32 \(64, 8, 8, 1\), raised KeyError: 'weights'",
    ),
    "{mine}:of_other_images": (ValueError, r"of_other_images, given images .* raised ValueError"),
    "{mine}:infinite": (FloatingPointError, "Logit 3 of my_network:infinite is inf for image 0"),
}  # fmt: skip


@pytest.mark.parametrize("predictor", WRONG)
def test_what_does_not_fit_gets_a_sentence(predictor, network, data_dir):
    error, sentence = WRONG[predictor]
    with pytest.raises(error, match=sentence):
        robustness.evaluate(predictor.format(mine=network), "digits", data_dir=data_dir)


def test_a_file_that_fails_itself_is_named_with_the_line(tmp_path, data_dir):
    (tmp_path / "broken_file.py").write_text("import jax\n\nweights = {}['missing']\n")
    with pytest.raises(ValueError, match=r"broken_file.py raised KeyError: .*, line 3;") as caught:
        robustness.evaluate(f"{tmp_path / 'broken_file.py'}:predict", "digits", data_dir=data_dir)
    assert isinstance(caught.value.__cause__, KeyError)


def test_data_that_are_not_there(network, workdir, folder, data_dir, tmp_path):
    predictor = f"{network}:with_jax"
    cases = {
        "digist": "There is no folder or tar 'digist' here, and TFDS has no dataset 'digist'; did",
        str(tmp_path / "photos"): "There is no .*photos",
        "photos.tar.gz": "There is no photos.tar.gz",
        "": "--predictor needs --data=",
    }
    for data, sentence in cases.items():
        with pytest.raises((ValueError, FileNotFoundError), match=sentence):
            robustness.evaluate(predictor, data, data_dir=data_dir)
    with pytest.raises(ValueError, match=r"The run's classes are .* those of image_folder are"):
        robustness.evaluate(str(workdir), str(folder), data_dir=data_dir)


def test_short_names():
    names = {
        "my/network.py:predict": "network:predict",
        "package.module:name": "package.module:name",
        "/no/runs/mine": "mine",
    }
    for predictor, name in names.items():
        assert robustness.display_name(predictor) == name


def test_evaluations_of_other_data_or_turns_lie_elsewhere(workdir, folder, tmp_path):
    (tmp_path / "photos.tar.gz").touch()
    (tmp_path / "here").mkdir()
    name = robustness.evaluation_directory
    found = [
        name("my/net.py:f", "digits"),
        name("my/net.py:f", "digits", "dihedral4", "train"),
        name("my/net.py:f", str(folder), "cyclic8"),
        name("my/net.py:f", f"{folder}/"),
        name("my/net.py:f", f"{tmp_path / 'here'}/.."),
        name("my/net.py:f", str(tmp_path / "photos.tar.gz")),
        name("net.work:f", "mnist/v2:1.0.0", split="test[:50%]"),
        name("net.work:f", "mnist/v2:1.0.0", split="test[50%:]"),
        name(str(workdir)),
    ]
    assert [path.parent for path in found] == [Path("runs")] * len(found)
    assert [path.name for path in found] == [
        "eval-net-f-digits-cyclic4",
        "eval-net-f-digits-dihedral4-train",
        f"eval-net-f-{folder.name}-cyclic8",
        f"eval-net-f-{folder.name}-cyclic4",
        f"eval-net-f-{tmp_path.name}-cyclic4",
        "eval-net-f-photos-cyclic4",
        "eval-net.work-f-mnist-v2-1.0.0-cyclic4-test-to-50",
        "eval-net.work-f-mnist-v2-1.0.0-cyclic4-test-50-to",
        "eval-run-digits-cyclic4",
    ]
    with pytest.raises(ValueError, match="Unknown group 'cyclic'"):
        name("net.work:f", "digits", "cyclic")


def command(*arguments, cwd):
    done = subprocess.run(
        [sys.executable, ROOT / "eval.py", *map(str, arguments)], capture_output=True, text=True,
        cwd=cwd, timeout=300, check=False,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def test_the_command_line(network, folder, data_dir):
    code, output, errors = command(
        "--predictor=my_network.py:brighter", f"--data={folder}", "--size=8", "--group=cyclic8",
        f"--data_dir={data_dir}", "--sweep=8", "--sweep_images=2", "--random_angles=1",
        cwd=network.parent,
    )  # fmt: skip
    assert code == 0, errors
    assert "mean over cyclic8" in output
    assert "you need adaptation" in output
    name = f"eval-my_network-brighter-{folder.name}-cyclic8"
    assert f"Read runs/{name}/report.html first." in output
    directory = network.parent / "runs" / name
    assert {path.name for path in directory.iterdir()} == {
        "accuracy_against_angle.png", "metrics.json", "per_image.csv", "report.html"
    }  # fmt: skip
    metrics = json.loads((directory / "metrics.json").read_text())
    assert metrics["vanilla/accuracy"] == 1
    assert {name.partition("/")[0] for name in metrics} == {"vanilla"}
    assert len([name for name in metrics if name.startswith("vanilla/sweep/")]) == 8


def test_flags_that_do_not_go_together(tmp_path):
    cases = {
        "Give one of two: --workdir=, where": [],
        "Give one of two: --workdir=": ["--workdir=x", "--predictor=y.py:z"],
        "--data does not go with --workdir": ["--workdir=x", "--data=digits"],
        "--root does not go with --predictor": ["--predictor=y.py:z", "--root=photos"],
        "There is no file y.py": ["--predictor=y.py:z", "--data=digits"],
    }
    for sentence, arguments in cases.items():
        code, _, errors = command(*arguments, cwd=tmp_path)
        last = errors.strip().splitlines()[-1]
        assert code == 1, errors
        assert last.startswith("Error: "), errors
        assert sentence in last
        assert "Traceback" not in errors
