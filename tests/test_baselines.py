"""The predictor fine-tuned alone, upright or turned, and what is compared with it."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import equiadapt_jax as ea
from equiadapt_jax import runs
from equiadapt_jax.training import config as settings
from equiadapt_jax.training import objective, run
from tests.tiny_runs import assert_same, command, leaves


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def vanilla(tiny, places):
    workdir = places["runs"] / "vanilla"
    run.train(tiny(mode="vanilla"), workdir)
    return workdir


def predictor_model(apply=lambda params, x: x.reshape(x.shape[0], -1) @ params["w"]):
    """A linear predictor of images 6×6×1, behind the trivial group."""
    return ea.adapt(
        ea.groups.Cyclic(1),
        ea.from_function(lambda params, x: jnp.zeros((x.shape[0], 1))),
        ea.from_function(apply, lambda key, x: {"w": jax.random.normal(key, (36, 3))}),
    )


@pytest.mark.parametrize("mode", ["vanilla", "augmentation"])
def test_only_the_predictor_is_trained_and_no_pose_is_told(mode, tiny, tmp_path):
    figures = run.train(tiny(mode=mode), tmp_path / "run")
    assert figures["scorer/parameters"] == 0
    before, after = (ea.load(tmp_path / "run", step=step) for step in (0, 2))
    changed = [
        np.any(a != b)
        for a, b in zip(leaves(before[0]).values(), leaves(after[0]).values(), strict=True)
    ]
    assert all(changed)
    assert before[0]["scorer"] == {}
    metrics, table = runs.evaluate(
        tmp_path / "run", pictures=tmp_path / "eval", sweep=4, random_angles=1, sweep_images=20
    )
    assert not [name for name in metrics if "pose" in name or "identity_rate" in name]
    assert "adapted" in table
    assert "pose" not in table
    report = (tmp_path / "eval" / "report.html").read_text()
    assert "The fine-tuned predictor is right on" in report.replace("\N{NO-BREAK SPACE}", " ")
    assert "<h2>Poses found" not in report
    assert "<h2>Canonicalized images" not in report
    assert "pose" not in (tmp_path / "eval" / "per_image.csv").read_text().splitlines()[0]
    log = lines(tmp_path / "run")
    assert not [name for line in log for name in line if "pose" in name or "prior" in name]
    chosen = {"vanilla": "accuracy", "augmentation": "group_accuracy"}[mode]
    for line in log:
        record = tmp_path / "run" / "checkpoints" / str(line["step"]) / "checkpoint.json"
        saved = json.loads(record.read_text())["figures"]
        assert saved["best_by"] == line[f"validation/{chosen}"]
        assert 0 <= line["validation/group_accuracy"] <= 1
    # What is loaded is the predictor itself.
    params, state, model = ea.load(tmp_path / "run")
    x = jax.random.uniform(jax.random.key(0), (3, 24, 24, 1))
    (logits, canonical), _ = model.apply(params, state, x)
    np.testing.assert_array_equal(canonical.inputs, x)
    np.testing.assert_array_equal(logits, model.predict(params, state, x)[0])


def test_all_modes_start_from_the_same_predictor(vanilla, finished):
    assert_same(ea.load(vanilla, step=0)[0]["predictor"], ea.load(finished, step=0)[0]["predictor"])


def test_a_baseline_resumes_and_has_a_fingerprint_of_its_own(vanilla, tiny, tmp_path):
    run.train(tiny(mode="vanilla"), vanilla, resume=True)
    with pytest.raises(ValueError, match="adaptation.mode: 'vanilla' → 'augmentation'"):
        run.train(tiny(mode="augmentation"), vanilla, resume=True)


@pytest.mark.parametrize("group", [ea.groups.Cyclic(4), ea.groups.Dihedral(4)], ids=str)
def test_augmentation_turns_by_random_elements(group):
    """The loss is that of the predictor on some element of every image's orbit, not all alike."""
    images = jax.random.uniform(jax.random.key(0), (64, 6, 6, 1))
    label = jnp.zeros(64, jnp.int32)
    seen = []

    def remember(params, x):
        seen.append(x)
        return x.reshape(x.shape[0], -1) @ params["w"]

    model = predictor_model(remember)
    params, state = model.init(jax.random.key(1), images)
    seen.clear()
    loss = objective.pretraining(model, settings.Augmentation(), group)
    value, (_, metrics) = loss(params, state, {"image": images, "label": label}, jax.random.key(2))
    (turned,) = seen
    orbit = np.stack(
        [ea.actions.images.act(group, jnp.int32(g), images) for g in range(group.order)]
    )
    matches = (np.abs(orbit - turned).max((2, 3, 4)) == 0).sum(1)
    assert matches.sum() == 64
    assert (matches > 0).all()
    logits = np.asarray(turned).reshape(64, -1) @ np.asarray(params["predictor"]["w"])
    expected = optax.losses.softmax_cross_entropy_with_integer_labels(logits, label).mean()
    assert value == pytest.approx(float(expected), rel=1e-5)
    assert set(metrics) == {"loss", "accuracy"}


def test_augmentation_turns_by_any_angle_where_asked():
    """Of a disk that brightens to the right, whose gradient then points in every direction."""
    place = jnp.arange(6) - 2.5
    images = jnp.broadcast_to((place / 12 + 0.5)[None, None, :, None], (200, 6, 6, 1))
    seen = []

    def remember(params, x):
        seen.append(x)
        return x.reshape(x.shape[0], -1) @ params["w"]

    model = predictor_model(remember)
    params, state = model.init(jax.random.key(1), images)
    seen.clear()
    loss = objective.pretraining(
        model, settings.Augmentation(), ea.groups.Cyclic(4), any_angle=True
    )
    batch = {"image": images, "label": jnp.zeros(200, jnp.int32)}
    loss(params, state, batch, jax.random.key(2))
    inner = np.asarray(seen[0])[:, 2:4, 2:4, 0]
    right = (inner[:, :, 1] - inner[:, :, 0]).mean(1)
    down = (inner[:, 1] - inner[:, 0]).mean(1)
    angle = np.arctan2(down, right) % (2 * np.pi)
    counts, _ = np.histogram(angle, 8, (0, 2 * np.pi))
    assert counts.min() > 10
    away = np.abs((angle + np.pi / 4) % (np.pi / 2) - np.pi / 4)
    assert (away > 0.1).mean() > 0.7  # not only quarter turns


def test_canonicalization_without_prior(tiny, tmp_path):
    config = tiny()
    adaptation = dataclasses.replace(config.adaptation, prior_weight=0.0)
    run.train(dataclasses.replace(config, adaptation=adaptation), tmp_path / "run")
    log = lines(tmp_path / "run")
    assert all(line["train/loss"] == line["train/task_loss"] for line in log[1:])
    metrics, _ = runs.evaluate(tmp_path / "run")
    assert metrics["adapted/changed_rate"] == 0
    moved = [
        np.any(a != b)
        for a, b in zip(
            jax.tree.leaves(ea.load(tmp_path / "run", step=0)[0]["scorer"]),
            jax.tree.leaves(ea.load(tmp_path / "run", step=2)[0]["scorer"]),
            strict=True,
        )
    ]
    assert all(moved)


def test_retention_against_the_predictor_fine_tuned_alike(vanilla, finished, tmp_path):
    code, output, errors = command(
        "eval.py", f"--workdir={finished}", f"--finetuned={vanilla}", f"--output={tmp_path}",
        "--sweep=0", "--random_angles=0",
    )  # fmt: skip
    assert code == 0, errors
    found = json.loads((tmp_path / "metrics.json").read_text())
    alone, _ = runs.evaluate(vanilla)
    for name in ("accuracy", "group_accuracy"):
        assert found[f"finetuned/{name}"] == alone[f"adapted/{name}"]
    assert found["adapted/retention_finetuned"] == (
        found["adapted/group_accuracy"] / alone["adapted/accuracy"]
    )
    sentence = f"{100 * found['finetuned/accuracy']:.2f} % upright"
    assert sentence in output
    assert sentence in (tmp_path / "report.html").read_text()
    without, _ = runs.evaluate(finished)
    assert {n: v for n, v in found.items() if n in without} == without


def test_what_was_not_fine_tuned_alike_is_refused(vanilla, finished, tiny, tmp_path):
    with pytest.raises(ValueError, match=r"is a run of the mode joint: retention is taken against"):
        runs.evaluate(vanilla, finetuned=finished)
    config = tiny(mode="vanilla")
    longer = dataclasses.replace(config.adaptation, steps=3)
    run.train(dataclasses.replace(config, adaptation=longer), tmp_path / "longer")
    with pytest.raises(ValueError, match=r"not fine-tuned alike \(steps × batch_size: 16 → 24\)"):
        runs.evaluate(finished, finetuned=tmp_path / "longer")
    less = dataclasses.replace(config.data, train="train[:50%]")
    run.train(dataclasses.replace(config, data=less), tmp_path / "less")
    with pytest.raises(ValueError, match=r"\(data\.train: 'train' → 'train\[:50%\]'\): train one"):
        runs.evaluate(finished, finetuned=tmp_path / "less")
    code, _, errors = command("eval.py", "--predictor=x.py:f", f"--finetuned={vanilla}")
    assert code == 1
    assert "--finetuned does not go with --predictor" in errors
