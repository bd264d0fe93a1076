"""Whole runs in their tiny variants: what they leave, continue, refuse and agree on."""

import csv
import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import equiadapt_jax as ea
from equiadapt_jax import runs
from equiadapt_jax.data import evaluation_batches, open_dataset
from equiadapt_jax.training import config as settings
from equiadapt_jax.training import objective, run
from equiadapt_jax.training.build import build_model
from equiadapt_jax.training.step import create_state, make_optimizer, make_step, place_batch
from equiadapt_jax.training.workdir import read_config
from tests.tiny_runs import SHIPPED, assert_same, command, leaves, shipped


def per_image(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_a_run_with_a_network_as_energy_is_evaluated_with_other_averages(tiny, tmp_path, capsys):
    """Of a chunk that does not divide what another averaging sees."""
    config = dataclasses.replace(tiny(), averaging="weighted", chunk=4)
    scorer = dataclasses.replace(config.scorer, embedding=8)
    terms = {"contrastive_weight": 0.1, "artefact_weight": 0.1}
    adaptation = dataclasses.replace(config.adaptation, **terms)
    config = dataclasses.replace(
        config, canonicalizer="energy", scorer=scorer, adaptation=adaptation
    )
    run.train(config, tmp_path / "run")
    before, after = (ea.load(tmp_path / "run", step=step)[0]["scorer"] for step in (0, 2))
    assert (before["reference"] != after["reference"]).all()
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert {"train/contrastive_loss", "train/artefact_loss"} <= json.loads(lines[-1]).keys()
    found = {}
    for averaging in ("", "sampled2", "single"):
        found[averaging], _ = runs.evaluate(tmp_path / "run", averaging=averaging)
        assert found[averaging]["adapted/changed_rate"] == 0
    again, _ = runs.evaluate(tmp_path / "run", averaging="sampled2", batch_size=7)
    assert again["adapted/accuracy"] == pytest.approx(found["sampled2"]["adapted/accuracy"])


def test_a_scorer_without_training_says_that_the_prior_has_no_effect(tiny, tmp_path, capsys):
    run.train(tiny(canonicalizer="confidence"), tmp_path / "run")
    assert "config.adaptation.prior_weight has no effect" in capsys.readouterr().out


def test_commands_agree_to_the_last_digit(places):
    workdir = places["runs"] / "commands"
    code, output, errors = command(
        "train.py", "--config=configs/digits_vit.py:tiny", f"--workdir={workdir}",
        f"--config.data.data_dir={places['data']}",
        f"--config.pretrain.directory={places['pretrained']}",
    )  # fmt: skip
    assert code == 0, errors
    assert "mean over cyclic4" in output
    assert f"python eval.py --workdir={workdir}" in output
    assert "adapting to cyclic4: 100%" in errors
    code, output, errors = command("eval.py", f"--workdir={workdir}", "--sweep=8")
    assert code == 0, errors
    trained = json.loads((workdir / "metrics.json").read_text())
    evaluated = json.loads((workdir / "eval" / "metrics.json").read_text())
    own = {"scorer/parameters", "train/seconds", "train/images_per_second"}  # fmt: skip
    assert trained.keys() - evaluated.keys() == own
    for name in trained.keys() - own:
        assert trained[name] == evaluated[name], name
    assert evaluated["adapted/changed_rate"] == 0
    assert evaluated["adapted/invariance_error"] == 0
    assert 0 < evaluated["adapted/random_accuracy"] < 1
    assert len([name for name in evaluated if name.startswith("adapted/sweep/")]) == 8
    for name in ("accuracy_against_angle", "canonicalization", "pose_histogram"):
        with Image.open(workdir / "eval" / f"{name}.png") as picture:
            assert min(picture.size) > 300
    rows = per_image(workdir / "eval" / "per_image.csv")
    assert len(rows) == 360 * 4
    right = np.mean([row["adapted"] == row["label"] for row in rows])
    assert right == pytest.approx(evaluated["adapted/group_accuracy"])


def test_a_run_leaves_what_it_did(finished):
    config, dataset = read_config(finished)
    assert config.name == "digits_vit_tiny"
    assert dataset == {
        "classes": [str(i) for i in range(10)], "shape": [24, 24, 1], "version": "digits/1.0.0"
    }  # fmt: skip
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert {"train/loss", "train/prior_loss", "validation/group_accuracy"} <= lines[2].keys()
    kept = {path.name for path in (finished / "checkpoints").iterdir()}
    assert {"0", "2"} <= kept


@pytest.mark.parametrize(
    "path",
    [
        path
        for path in SHIPPED
        # Those that run in tests of their own.
        if path.stem not in ("digits_vit", "rotated_mnist")
        and not shipped(path, "tiny").predictor.weights
    ],
    ids=lambda p: p.stem,
)
def test_every_configuration_runs(path, tiny, tmp_path):
    config = tiny(path.stem)
    figures = run.train(config, tmp_path / "run")
    assert figures["train/images_per_second"] > 0
    metrics, table = runs.evaluate(tmp_path / "run", group="dihedral4", pictures=tmp_path / "eval")
    assert "turned 90° mirrored" in table
    exact, _ = runs.evaluate(tmp_path / "run", group="cyclic4")
    assert exact["adapted/changed_rate"] == 0
    assert exact["adapted/invariance_error"] == 0
    assert {"vanilla/accuracy", "vanilla/group_accuracy", "adapted/accuracy", "adapted/retention",
            "adapted/identity_rate", "adapted/pose_accuracy/r90"} <= exact.keys()  # fmt: skip
    names = {row["image"] for row in per_image(tmp_path / "eval" / "per_image.csv")}
    assert names == {f"test/{label}/{i}.png" for label in ("above", "below") for i in range(5)}
    assert 0 <= metrics["adapted/group_accuracy"] <= 1


def test_other_code_can_use_what_is_loaded(finished):
    params, state, model = ea.load(finished)
    images = jax.random.uniform(jax.random.key(0), (3, 24, 24, 1))
    predict = jax.jit(lambda p, s, x: model.apply(p, s, x)[0][0])
    upright, turned = (
        predict(params, state, images),
        predict(params, state, jnp.rot90(images, 1, (1, 2))),
    )
    np.testing.assert_array_equal(upright, turned)
    vanilla, _, _ = ea.load(finished, step=0)
    assert_same(vanilla["scorer"].keys(), params["scorer"].keys())
    assert any(
        np.any(a != b)
        for a, b in zip(
            jax.tree.leaves(vanilla["predictor"]), jax.tree.leaves(params["predictor"]), strict=True
        )
    )
    with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 7 .* but of \[0, "):
        ea.load(finished, step=7)
    with pytest.raises(FileNotFoundError, match="holds no run"):
        ea.load(finished / "nowhere")


def test_other_turns_splits_and_images_are_evaluated_elsewhere(finished):
    name = runs.evaluation_directory
    assert name(finished) == finished / "eval"
    assert name(finished, "cyclic4", "test") == finished / "eval"
    assert name(finished, "cyclic16") == finished / "eval-cyclic16"
    assert name(finished, split="train[:10%]") == finished / "eval-train-to-10"
    assert name(finished, "dihedral4", "train", "more/photos") == (
        finished / "eval-more-photos-dihedral4-train"
    )
    assert name(finished, averaging="single") == finished / "eval"
    assert name(finished, averaging="top2") == finished / "eval-top2"
    with pytest.raises(FileNotFoundError, match="holds no run"):
        name(finished / "nowhere")


def test_final_figures_over_a_group_of_their_own(tiny, tmp_path):
    with pytest.raises(ValueError, match="Unknown group 'cyclc2'"):
        run.train(tiny(evaluation_group="cyclc2"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    run.train(tiny(evaluation_group="cyclic2"), tmp_path / "run")
    metrics, table = runs.evaluate(tmp_path / "run")
    assert "mean over cyclic2" in table
    assert runs.evaluation_directory(tmp_path / "run", "cyclic2") == tmp_path / "run" / "eval"
    wider, table = runs.evaluate(tmp_path / "run", group="cyclic4")
    assert "mean over cyclic4" in table
    assert wider["adapted/accuracy"] == metrics["adapted/accuracy"]


def test_an_evaluation_averages_otherwise_on_request(finished, tiny, tmp_path):
    params, state, model = ea.load(finished)
    config, _ = read_config(finished)
    source = open_dataset(config.data.name, data_dir=config.data.data_dir).source(config.data.test)
    batches = list(evaluation_batches(source, size=24, how="pad", batch_size=60))
    for averaging, poses in (("top2", 2), ("weighted", None), ("single", 1)):
        metrics, _ = runs.evaluate(finished, averaging=averaging)
        apply = jax.jit(dataclasses.replace(model, poses=poses).apply)
        right = [
            (np.argmax(apply(params, state, b["image"])[0][0], -1) == b["label"])[b["mask"]]
            for b in batches
        ]
        assert metrics["adapted/accuracy"] == pytest.approx(np.mean(np.concatenate(right)))
    with pytest.raises(
        ValueError, match=r"averaging is 'top9': choose .* k from 1 to 4, the order of cyclic4"
    ):
        runs.evaluate(finished, averaging="top9")
    run.train(tiny(mode="vanilla"), tmp_path / "vanilla")
    with pytest.raises(ValueError, match=r"'top2' averages over poses, .* has none, by its mode"):
        runs.evaluate(tmp_path / "vanilla", averaging="top2")


def test_data_of_another_kind_are_refused(places, tiny, folder, tmp_path):
    run.train(tiny("image_folder"), tmp_path / "run")
    for split in ("train", "test"):
        for name in ("above", "below"):
            (tmp_path / "gray" / split / name).mkdir(parents=True)
            with Image.open(folder / "test" / name / "0.png") as picture:
                picture.convert("L").save(tmp_path / "gray" / split / name / "0.png")
    with pytest.raises(ValueError, match=r"images have 3 channels, those of image_folder 1"):
        runs.evaluate(tmp_path / "run", root=str(tmp_path / "gray"))
    (tmp_path / "gray" / "train" / "below").rename(tmp_path / "gray" / "train" / "under")
    (tmp_path / "gray" / "test" / "below").rename(tmp_path / "gray" / "test" / "under")
    with pytest.raises(ValueError, match=r"classes are \['above', 'below'\], those of"):
        runs.evaluate(tmp_path / "run", root=str(tmp_path / "gray"))
    with pytest.raises(ValueError, match="has no split 'tset'"):
        runs.evaluate(tmp_path / "run", split="tset")


@pytest.mark.parametrize("mode", ["frozen", "prior"])
def test_a_frozen_predictor_stays_to_the_bit(mode, tiny, tmp_path):
    run.train(tiny(mode=mode), tmp_path / "run")
    before, after = (ea.load(tmp_path / "run", step=step) for step in (0, 2))
    assert_same(before[0]["predictor"], after[0]["predictor"])
    assert_same(before[1], after[1])
    changed = [
        np.any(a != b)
        for a, b in zip(
            jax.tree.leaves(before[0]["scorer"]), jax.tree.leaves(after[0]["scorer"]), strict=True
        )
    ]
    assert all(changed)


def test_bad_settings_are_found_before_anything_is_removed(finished, tiny, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    before = sorted(path.relative_to(workdir) for path in workdir.rglob("*"))
    config = tiny()
    bad = {
        r"config\.prior\.name is 'mirorr'": {"prior": settings.Prior(name="mirorr")},
        "3 probabilities": {"prior": settings.Prior("categorical", (0.2, 0.3, 0.5))},
        "has no split 'tst'": {"data": dataclasses.replace(config.data, test="tst")},
        r"config\.pretrain\.steps is -1: give 0 or more": {
            "pretrain": dataclasses.replace(config.pretrain, steps=-1)
        },
        r"config\.logging\.every is 0": {"logging": settings.Logging(every=0)},
        r"config\.adaptation\.batch_size is 5000": {
            "adaptation": dataclasses.replace(config.adaptation, batch_size=5000)
        },
        r"kernels \(3, 3, 3\) and strides": {"scorer": settings.Scorer(options={"features": (2,)})},
    }
    for sentence, change in bad.items():
        with pytest.raises(ValueError, match=sentence):
            run.train(dataclasses.replace(config, **change), workdir, overwrite=True)
    assert sorted(path.relative_to(workdir) for path in workdir.rglob("*")) == before


def test_a_mirror_prior_takes_either_pose_for_right(tiny, tmp_path):
    config = tiny(mode="prior", group="dihedral4", prior=settings.Prior(name="mirror"))
    run.train(config, tmp_path / "run")
    metrics, _ = runs.evaluate(tmp_path / "run", pictures=tmp_path / "eval")
    rows = per_image(tmp_path / "eval" / "per_image.csv")
    either = {f"r{angle}": {f"r{angle}", f"r{angle}s"} for angle in (0, 90, 180, 270)}
    upright = [row for row in rows if row["turn"] == "r0"]
    assert metrics["adapted/pose_accuracy/r0"] == pytest.approx(
        np.mean([row["pose"] in either["r0"] for row in upright])
    )
    assert all(
        (row["pose"] in either[row["turn"]]) == bool(int(row["pose_right"]))
        for row in rows
        if row["turn"] in either
    )


def test_a_run_is_loaded_where_data_libraries_are_missing(finished):
    blocked = ["tensorflow_datasets", "grain", "sklearn", "matplotlib", "tifffile", "imagecodecs",
               "PIL", "ml_collections", "torch"]  # fmt: skip
    program = (
        f"import sys; sys.modules.update(dict.fromkeys({blocked}));"
        "import equiadapt_jax as ea, jax, jax.numpy as jnp;"
        "params, state, model = ea.load(sys.argv[1]);"
        "y, _ = jax.jit(model.apply)(params, state, jnp.ones((2, 24, 24, 1))); print(y[0].shape)"
    )
    code, output, errors = command("-c", program, finished)
    assert code == 0, errors
    assert output.strip() == "(2, 10)"


def test_divergence_stops_the_run_and_keeps_the_last_good_checkpoint(tiny, places, tmp_path):
    config = tiny()
    diverging = dataclasses.replace(
        config,
        adaptation=dataclasses.replace(config.adaptation, steps=9, scorer_learning_rate=1e30),
    )
    with pytest.raises(FloatingPointError, match=r"is (nan|inf) at step \d: training stopped"):
        run.train(diverging, tmp_path / "run")
    params, state, _ = ea.load(tmp_path / "run")
    assert all(np.all(np.isfinite(x)) for x in leaves((params, state)).values())


def test_a_workdir_of_another_configuration_is_refused_or_replaced(finished, tiny, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    (workdir / "notes.txt").write_text("mine")
    for name in ("eval-cyclic16", "eval-mine"):
        (workdir / name).mkdir()
    (workdir / "eval-cyclic16" / "report.html").touch()
    config = tiny(seed=1)
    with pytest.raises(ValueError, match=r"other settings \(seed: 0 → 1\): choose another"):
        run.train(config, workdir, resume=True)
    assert_same(ea.load(workdir)[0], ea.load(finished)[0])
    skip = dataclasses.replace(config, pretrain=dataclasses.replace(config.pretrain, steps=0))
    run.train(skip, workdir, overwrite=True)
    assert read_config(workdir)[0].seed == 1
    assert (workdir / "notes.txt").read_text() == "mine"
    assert [path.name for path in workdir.glob("eval*")] == ["eval-mine"]


def test_bad_input_gets_one_sentence_and_an_exit_code(folder, places, tmp_path):
    for split in ("train", "test"):
        (tmp_path / "wide" / split / "a").mkdir(parents=True)
        for i in range(16):
            Image.fromarray(np.full((24, 36), i, np.uint8)).save(
                tmp_path / "wide" / split / "a" / f"{i}.png"
            )
    (tmp_path / "broken.py").write_text(
        "from ml_collections import ConfigDict\ndef get_config(variant=''):\n"
        "    ConfigDict({'a': 1}).frobnicate()\n"
    )
    data = f"--config.data.data_dir={places['data']}"
    own = ["--config=configs/image_folder.py:tiny", data]
    cases = {
        "Unknown group 'cyclic'": ["--config.group=cyclic"],
        "would change the shape of images of 24×36 pixels": [
            *own, f"--config.data.root={tmp_path / 'wide'}", "--config.data.fit=none",
            "--config.data.size=0",
        ],
        "3 channels": [
            "--config=configs/digits_vit.py:tiny", data, "--config.predictor.mean=(0.1,0.2,0.3)",
        ],
        f"cifar10 is not prepared in {places['data']}; run python -m equiadapt_jax.data.prepare": [
            data, "--config.data.name=cifar10",
        ],
        "image_folder needs root=": own,
        "Unknown setting 'step': did you mean 'steps'?": ["--config.adaptation.step=3"],
        "Unknown setting 'grup': did you mean 'group'?": [*own, "--config.grup=cyclic8"],
        "Unknown setting 'bogus'. train.py --explain prints them all.": [*own, "--config.bogus=1"],
        "Unknown variant 'tny' of digits_vit": ["--config=configs/digits_vit.py:tny"],
        "config.seed=one": ["--config.seed=one"],
        "Unknown setting 'optimiser': did you mean 'optimizer'?": ["--config.optimiser.clip=2"],
        f"{tmp_path / 'broken.py'}, line 3, raised AttributeError": [
            f"--config={tmp_path / 'broken.py'}", "--config.seed=1",
        ],
        "config.adaptation.step is not a setting; did you mean --config.adaptation.steps=help?": [
            "--config.adaptation.step=help",
        ],
        "Unknown command line flag 'bogus'": ["--bogus"],
        "There is no configuration file 'configs/nowhere.py'": ["--config=configs/nowhere.py"],
    }  # fmt: skip
    for sentence, arguments in cases.items():
        code, _, errors = command(
            "train.py", *arguments, f"--workdir={tmp_path / 'run'}", TFDS_DATA_DIR=places["data"]
        )
        last = errors.strip().splitlines()[-1]
        assert code == 1, errors
        assert last.startswith("Error: "), errors
        assert sentence in last
        assert "Traceback" not in errors
        assert not (tmp_path / "run" / "checkpoints").exists(), sentence


def test_a_tilde_is_the_home_directory(places, tmp_path):
    """Shells leave it as it is in --workdir=~/runs."""
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "mine.py").write_text("number = 3")
    cases = {
        f"{tmp_path}/run holds checkpoints of a run, but no config.json": [
            "train.py", "--config=configs/digits_vit.py:tiny", "--workdir=~/run",
            f"--config.data.data_dir={places['data']}",
        ],
        f"{tmp_path}/run holds no run": ["eval.py", "--workdir=~/run"],
        f"{tmp_path}/mine.py:number is or returns a int": [
            "eval.py", "--predictor=~/mine.py:number", "--data=digits",
        ],
    }  # fmt: skip
    for sentence, arguments in cases.items():
        code, _, errors = command(*arguments, HOME=tmp_path)
        assert code == 1, errors
        assert sentence in errors.strip().splitlines()[-1]


@pytest.mark.parametrize("scorer", ["group_conv", "features"])
def test_eight_devices_train_as_one_does(scorer, finished, tiny, tmp_path):
    config = tiny()
    if scorer == "features":
        config = tiny(
            "digits_vit", "prior", averaging="weighted",
            canonicalizer="features",
            scorer=settings.Scorer(options={"grid": 2, "hidden": 8}),
        )  # fmt: skip
        run.train(config, finished := tmp_path / "one")
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    program = (
        "import json, sys; from equiadapt_jax.training import config, run; import jax;"
        "assert jax.device_count() == 8;"
        "run.train(config.from_dict(json.load(open(sys.argv[1]))), sys.argv[2])"
    )
    code, _, errors = command(
        "-c", program, tmp_path / "config.json", tmp_path / "run",
        XLA_FLAGS="--xla_force_host_platform_device_count=8",
    )  # fmt: skip
    assert code == 0, errors
    lines = [(path / "metrics.jsonl").read_text() for path in (finished, tmp_path / "run")]
    one, eight = ([json.loads(line) for line in text.splitlines()] for text in lines)
    for a, b in zip(one[1:], eight[1:], strict=True):
        for name in ("train/loss", "train/gradient_norm", "train/parameter_norm"):
            assert a[name] == pytest.approx(b[name], rel=1e-5), name
    start, end, other = (
        leaves(ea.load(path, step=step)[0])
        for path, step in ((finished, 0), (finished, 2), (tmp_path / "run", 2))
    )
    # Adam divides by the gradient's size, so where that is rounding the step is, too: most agree.
    moved = np.concatenate([np.ravel(end[name] - start[name]) for name in end])
    apart = np.concatenate([np.ravel(end[name] - other[name]) for name in end])
    assert np.mean(np.abs(apart) <= 1e-2 * np.abs(moved).max()) > 0.99


def test_a_step_is_compiled_once(tiny, places):
    config = tiny()
    model = build_model(config, 10)
    images = np.random.default_rng(0).uniform(size=(8, 24, 24, 1)).astype(np.float32)
    params, state = model.init(jax.random.key(0), jnp.asarray(images))
    loss = objective.adaptation(
        model, ea.priors.Identity(), prior_weight=1.0, augmentation=config.augmentation,
        turn_inputs=True,
    )  # fmt: skip
    optimizer = make_optimizer(config.optimizer, {"scorer": 1e-3}, 10)
    train_state = create_state(params, state, optimizer, ["scorer"])
    traced = []

    def counted(*arguments):
        traced.append(1)
        return loss(*arguments)

    step = make_step(counted, optimizer, ["scorer"])
    for _ in range(3):
        batch = place_batch({"image": images, "label": np.zeros(8, np.int32)})
        train_state, _ = step(train_state, batch, jax.random.key(0))
    assert len(traced) == 1
    assert int(train_state.step) == 3


def test_accumulated_steps_are_one_of_a_larger_batch():
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.normal(size=(8, 3)).astype(np.float32),
        "label": rng.normal(size=8).astype(np.float32),
    }
    halves = [
        {name: values[part] for name, values in batch.items()}
        for part in (slice(0, 4), slice(4, 8))
    ]
    params = {"scorer": rng.normal(size=3).astype(np.float32)}

    def squares(params, state, batch, *_):
        loss = jnp.square(batch["image"] @ params["scorer"] - batch["label"]).mean()
        return loss, (state, {"loss": loss})

    def trained(accumulate, batches):
        chosen = settings.Optimizer(accumulate=accumulate, warmup=0.2, clip=1e9)
        steps = 6 * accumulate
        optimizer = make_optimizer(chosen, {"scorer": 0.1}, steps)
        state = create_state(params, {}, optimizer, ["scorer"])
        step, seen = make_step(squares, optimizer, ["scorer"]), []
        for n in range(steps):
            state, _ = step(state, place_batch(batches[n % accumulate]), jax.random.key(0))
            seen.append(np.asarray(state.params["scorer"]))
        return seen

    whole, parts = trained(1, [batch]), trained(2, halves)
    np.testing.assert_array_equal(parts[2], parts[1])
    np.testing.assert_array_equal(parts[4], parts[3])
    np.testing.assert_allclose(parts[1::2], whole, rtol=1e-5)
    assert np.abs(whole[-1] - params["scorer"]).max() > 0.1
