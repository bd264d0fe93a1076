"""Tiny runs on images in unknown poses, whose prior they estimate."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

import equiadapt_jax as ea
from equiadapt_jax import runs
from equiadapt_jax.data import open_dataset, training_batches
from equiadapt_jax.training import objective, poses, run
from equiadapt_jax.training.digests import DamagedCheckpoint
from equiadapt_jax.training.workdir import read_config
from tests.test_resume import interrupt
from tests.tiny_runs import assert_same

POSES = (0.6, 0.3, 0.1, 0.0)


@pytest.fixture(scope="module")
def estimating(tiny):
    """A run that knows nothing of how its images were turned, at a temperature that falls."""
    config = tiny()
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, poses=POSES),
        prior=dataclasses.replace(config.prior, name="estimated", rounds=2, steps=2),
        adaptation=dataclasses.replace(
            config.adaptation, temperature_end=0.1, confidence_penalty=0.1
        ),
    )


@pytest.fixture(scope="module")
def done(estimating, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("unaligned") / "run"
    return workdir, run.train(estimating, workdir)


def test_a_run_keeps_the_prior_it_found_and_shows_it(done):
    workdir, trained = done
    found = json.loads((workdir / poses.FILE).read_text())["probabilities"]
    assert sum(found) == pytest.approx(1)
    assert found[0] == max(found)
    assert trained["prior/seconds"] > 0
    assert not (workdir / "estimating").exists()
    metrics, table = runs.evaluate(workdir, pictures=workdir / "eval")
    turns = ("r0", "r90", "r180", "r270")
    assert [metrics[f"prior/{turn}"] for turn in turns] == found
    assert "were found in these poses" in table
    report = (workdir / "eval" / "report.html").read_text(encoding="utf-8")
    assert "estimated prior" in report
    assert "training images that it was not" in report
    assert 0.3 < metrics["data/upright_evidence"] < 0.75  # the training images are turned
    assert metrics["data/upright_chance"] == 0.25


def test_images_are_turned_for_training_and_not_for_the_test(estimating, tiny):
    dataset = open_dataset("digits", data_dir=estimating.data.data_dir)
    upright, turned = (
        next(run._evaluation(config, dataset, "train"))["image"] for config in (tiny(), estimating)
    )
    found = [
        [k for k in range(4) if (np.rot90(x, k) == y).all()]
        for x, y in zip(upright, turned, strict=True)
    ]
    share = np.bincount([k[0] for k in found], minlength=4) / len(found)
    np.testing.assert_allclose(share, POSES, atol=0.2)
    assert share[3] == 0


@pytest.mark.parametrize("after", [1, 3])
def test_an_interrupted_estimate_goes_on_as_if_it_had_not_been(
    after, estimating, done, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch:
        interrupt(patch, after=after)
        with pytest.raises(KeyboardInterrupt):
            run.train(estimating, tmp_path / "run")
    assert (tmp_path / "run" / "estimating" / str(after // 2)).is_dir()
    run.train(estimating, tmp_path / "run", resume=True)
    one, other = ((place / poses.FILE) for place in (done[0], tmp_path / "run"))
    assert poses.unseal(one, set())["probabilities"] == poses.unseal(other, set())["probabilities"]
    assert_same(*(ea.load(place.parent, step=2)[:2] for place in (one, other)))


def test_a_prior_that_was_changed_or_lost_is_not_used(done, tmp_path):
    workdir, _ = done
    copy = tmp_path / "run"
    copy.mkdir()
    for name in ("config.json", "checkpoints"):
        (copy / name).symlink_to(workdir / name)
    with pytest.raises(FileNotFoundError, match="has not estimated its prior yet"):
        runs.evaluate(copy)
    text = (workdir / poses.FILE).read_text()
    (copy / poses.FILE).write_text(text.replace("0.", "0.0", 1))
    with pytest.raises(DamagedCheckpoint, match="is damaged, was edited"):
        runs.evaluate(copy)


def test_a_run_whose_prior_was_lost_is_not_resumed_with_another(done, estimating, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(done[0], copy)
    (copy / poses.FILE).unlink()
    with pytest.raises(FileNotFoundError, match="has not estimated its prior yet"):
        run.train(estimating, copy, resume=True)
    assert not (copy / "estimating").exists()


def test_what_a_crash_left_of_the_estimate_is_removed(done, estimating, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(done[0], copy)
    (copy / "estimating" / "0").mkdir(parents=True)
    run.train(estimating, copy, resume=True)
    assert not (copy / "estimating").exists()


def test_the_prior_that_was_found_is_the_one_trained_with(done, estimating):
    """The logged loss of the first step is that of the distribution in the file."""
    workdir, _ = done
    config, _ = read_config(workdir)
    found = json.loads((workdir / poses.FILE).read_text())["probabilities"]
    params, state, model = ea.load(workdir, step=0)
    dataset = open_dataset("digits", data_dir=estimating.data.data_dir)
    batch = next(
        training_batches(
            **poses.open_split(config, dataset, config.data.train),
            batch_size=config.adaptation.batch_size, seed=config.seed,
        )
    )  # fmt: skip
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), 2), 0)

    def prior_loss(prior):
        loss = objective.adaptation(
            model, prior, prior_weight=1.0, augmentation=config.augmentation, turn_inputs=False
        )
        return float(jax.jit(loss)(params, state, batch, key)[1][1]["prior_loss"])

    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    logged = next(line["train/prior_loss"] for line in lines if "train/prior_loss" in line)
    assert prior_loss(ea.priors.Categorical(tuple(found))) == pytest.approx(logged, abs=2e-4)
    assert abs(prior_loss(ea.priors.Identity()) - logged) > 0.01


REFUSED = {
    "probabilities given": ("prior", {"probabilities": POSES}, "are found by the run"),
    "one round": ("prior", {"rounds": 1}, "give at least 2 rounds of at least 1 step"),
    "no steps": ("prior", {"steps": 0}, "give at least 2 rounds of at least 1 step"),
    "poses of another group": (
        "data", {"poses": (0.5, 0.5)}, "2 probabilities and cyclic4 4 elements"),
    "poses that sum to more": (
        "data", {"poses": (0.5, 0.5, 0.5, 0)}, "summing to 1"),
    "mirrored images": ("augmentation", {"mirror": True}, "turns poses the other way round"),
    "no such decay": ("adaptation", {"temperature_decay": "linear"}, "_decay is 'linear': choose"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_settings_that_make_no_sense_are_refused_before_anything_is_written(
    case, estimating, tmp_path
):
    section, change, sentence = REFUSED[case]
    changed = dataclasses.replace(getattr(estimating, section), **change)
    with pytest.raises(ValueError, match=sentence):
        run.train(dataclasses.replace(estimating, **{section: changed}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_another_distribution_has_another_pretrained_predictor(estimating, tiny):
    dataset = open_dataset("digits", data_dir=estimating.data.data_dir)
    finer = dataclasses.replace(estimating, group="dihedral2")
    places = {run._pretrained_directory(c, dataset) for c in (tiny(), estimating, finer)}
    assert len(places) == 3
