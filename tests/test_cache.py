"""Features made beforehand: what they hold, and runs that train on them or go on from others."""

import dataclasses
import json
import shutil

import grain
import jax
import numpy as np
import pytest

import equiadapt_jax as ea
from equiadapt_jax.data import array_batches
from equiadapt_jax.groups import Cyclic, Dihedral
from equiadapt_jax.training import build, cache, objective, run, start
from equiadapt_jax.training import config as settings
from equiadapt_jax.training.workdir import read_config
from tests.test_feature_scorer import model, noise
from tests.test_resume import interrupt
from tests.tiny_runs import assert_same

KEY = jax.random.key(0)


def batches(images, size):
    """Batches as `evaluation_batches` gives them, the last one filled up."""
    for first in range(0, len(images), size):
        part = images[first : first + size]
        mask = np.arange(size) < len(part)
        part = np.concatenate([part, np.repeat(part[-1:], size - len(part), 0)])
        yield {"image": part, "label": np.arange(first, first + size) % 3, "mask": mask}


def test_features_are_those_of_the_images_and_of_their_mirrors():
    made, params, state = model(Cyclic(4))
    x = noise(5, 8, 8, 3)
    augmentation = settings.Augmentation(mirror=True)
    kept = cache.make(
        made, params, state, batches(x, 2), 5, key=jax.random.key(0), variants=2,
        augmentation=augmentation,
    )  # fmt: skip
    assert kept["features"].dtype == np.float16
    np.testing.assert_array_equal(kept["label"], np.tile(np.arange(5) % 3, 2))
    np.testing.assert_array_equal(kept["applied"], 0)
    for rows, images in ((slice(0, 5), x), (slice(5, 10), x[:, :, ::-1])):
        features, predictions = made.orbit_features(params, state, images)
        np.testing.assert_allclose(kept["features"][rows], features, atol=4e-3)
        np.testing.assert_allclose(kept["predictions"][rows], predictions, atol=1e-4)
    size = cache.size(made, params, state, x.shape[1:], 10)
    assert size == kept["features"].nbytes + kept["predictions"].nbytes


def test_turned_versions_say_by_what_they_were_turned():
    """On an image that is bright above, the brightest pose tells the turn."""
    group = Cyclic(8)
    made, params, state = model(group, interpolation="cubic")
    bright = np.where(np.mgrid[:8, :8][0] < 4, 1.0, 0.0).astype(np.float32)[..., None]
    x = np.broadcast_to(bright, (40, 8, 8, 3))

    def above(maps, y):  # how bright the upper half of the stem's map is, not what it means
        return (maps[:, :4] - maps[:, 4:]).mean((1, 2, 3))[:, None]

    seeing = dataclasses.replace(
        made,
        features=above,
        predictor=ea.Network(
            made.predictor.init,
            made.predictor.apply,
            lambda p, s, images: (images.mean((1, 2)), images),
        ),
    )
    kept = cache.make(
        seeing, params, state, batches(x, 8), 40, key=jax.random.key(1), turn_inputs=True
    )
    found = kept["features"][..., 0].astype(np.float32).argmax(-1)
    assert len(set(kept["applied"])) == 8
    apart = np.abs((found - kept["applied"] + 4) % 8 - 4)
    assert apart.max() <= 1
    assert (apart == 0).mean() > 0.8
    again = cache.make(
        seeing, params, state, batches(x, 8), 40, key=jax.random.key(1), turn_inputs=True
    )
    assert_same(kept, again)


def test_validation_counts_what_the_model_does():
    made, params, state = model(Cyclic(4))
    x = noise(7, 8, 8, 3)
    kept = cache.make(made, params, state, batches(x, 4), 7, key=jax.random.key(0))
    kept["applied"] = np.arange(7, dtype=np.int32) % 4
    pose, accuracy = cache.make_validation(made, kept, (0,), 3)(params, state)
    (logits, canonical), _ = made.apply(params, state, x)
    assert accuracy == pytest.approx(np.mean(logits.argmax(-1) == kept["label"]))
    assert pose == pytest.approx(np.mean(canonical.pose == kept["applied"]))


def test_validation_of_sampled_poses_does_not_depend_on_the_batch():
    made, params, state = model(Cyclic(4), poses=2, weighting="sampled")
    kept = cache.make(made, params, state, batches(noise(31, 8, 8, 3), 31), 31, key=KEY)
    one, other = (cache.make_validation(made, kept, (0,), n)(params, state) for n in (4, 31))
    assert one == other


def test_validation_counts_mirrored_poses_where_the_prior_has_them():
    made, params, state = model(Dihedral(4))
    x = noise(9, 8, 8, 3)
    kept = cache.make(made, params, state, batches(x, 3), 9, key=KEY, turn_inputs=True)
    pose, _ = cache.make_validation(made, kept, (0, 4), 3)(params, state)
    scores, _ = made.score(params, state, kept["features"].astype(np.float32))
    found = np.asarray(scores).argmax(-1)
    applied = kept["applied"]
    # Any image is as good mirrored, so only the turn counts: that of a∘s is the turn of a.
    right = found % 4 == applied % 4
    assert pose == pytest.approx(right.mean())
    assert len(set(applied // 4)) == 2


def test_batches_of_arrays_go_through_all_rows_and_continue_where_they_stood():
    arrays = {"a": np.arange(10), "b": 2 * np.arange(10)}
    stream = array_batches(arrays, batch_size=5, seed=3)
    first = [next(stream) for _ in range(4)]
    for epoch in (first[:2], first[2:]):
        rows = np.concatenate([batch["a"] for batch in epoch])
        np.testing.assert_array_equal(np.sort(rows), np.arange(10))
        np.testing.assert_array_equal(np.concatenate([b["b"] for b in epoch]), 2 * rows)
    other = array_batches(arrays, batch_size=5, seed=3)
    next(other)
    position, wanted = other.get_state(), next(other)
    again = array_batches(arrays, batch_size=5, seed=3)
    again.set_state(position)
    assert_same(next(again), wanted)
    assert isinstance(stream, grain.DatasetIterator)


@pytest.mark.parametrize(
    "arrays", [{"a": np.arange(3)}, {"a": np.arange(9), "b": np.arange(8)}], ids=["few", "uneven"]
)
def test_arrays_that_make_no_batch_are_refused(arrays):
    with pytest.raises(ValueError, match="give them all the same number, at least that of a batch"):
        array_batches(arrays, batch_size=5, seed=0)


def reading(tiny, mode="prior", **adaptation):
    """A tiny run whose scorer reads features."""
    config = tiny(
        mode=mode,
        canonicalizer="features",
        scorer=settings.Scorer(options={"grid": 2, "hidden": 8}),
        averaging="weighted",
    )
    adaptation = dataclasses.replace(config.adaptation, **adaptation)
    return dataclasses.replace(config, adaptation=adaptation)


@pytest.fixture(scope="module")
def done(tiny, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "features"
    run.train(reading(tiny), workdir)
    return workdir


def test_a_run_on_features_kept_resumes_to_the_bit(tiny, tmp_path, monkeypatch):
    """With turned, mirrored and shifted versions, so that all that is random has to repeat."""
    config = dataclasses.replace(
        reading(tiny, variants=2),
        group="dihedral3",
        augmentation=settings.Augmentation(shift=0.1, mirror=True),
        prior=settings.Prior(name="mirror"),
    )
    run.train(config, tmp_path / "whole")
    with monkeypatch.context() as patch:
        interrupt(patch, after=1)
        with pytest.raises(KeyboardInterrupt):
            run.train(config, tmp_path / "run")
    run.train(config, tmp_path / "run", resume=True)
    both = tmp_path / "run", tmp_path / "whole"
    assert_same(*(ea.load(path, step=2)[:2] for path in both))
    lines = [(path / "metrics.jsonl").read_text() for path in both]
    assert lines[0] == lines[1]
    assert "validation/pose_accuracy" in json.loads(lines[0].splitlines()[-1])


def test_training_keeps_the_predictor_and_changes_the_scorer(done):
    before, after = ea.load(done, step=0)[0], ea.load(done, step=2)[0]
    assert_same(before["predictor"], after["predictor"])
    moved = jax.tree.map(lambda a, b: float(abs(a - b).max()), before["scorer"], after["scorer"])
    assert max(jax.tree.leaves(moved)) > 0


def test_features_too_large_to_keep_are_made_at_each_step(tiny, tmp_path, capsys):
    run.train(reading(tiny, mode="frozen", cache_gigabytes=1e-6), tmp_path / "run")
    assert "cache_gigabytes=1e-06: they are made anew at each step" in capsys.readouterr().out
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert "validation/group_accuracy" in last
    run.train(reading(tiny, mode="frozen"), tmp_path / "kept")
    last = json.loads((tmp_path / "kept" / "metrics.jsonl").read_text().splitlines()[-1])
    assert "train/task_loss" in last


def test_a_run_goes_on_from_another_one(done, tiny, tmp_path):
    config = reading(tiny, mode="joint", start=str(done))
    run.train(config, tmp_path / "run")
    best = ea.load(done)[0]
    assert_same(ea.load(tmp_path / "run", step=0)[0], best)
    params = ea.load(tmp_path / "run", step=2)[0]
    moved = jax.tree.map(lambda a, b: float(abs(a - b).max()), best, params)
    assert min(max(jax.tree.leaves(moved[name])) for name in moved) > 0
    with pytest.raises(ValueError, match="trained its predictor, by the mode joint"):
        run.train(reading(tiny, start=str(tmp_path / "run")), tmp_path / "third")
    kept = json.loads((tmp_path / "run" / "config.json").read_text())
    assert "step" in kept["settings"]["adaptation"]["start_mark"]


def test_a_run_killed_before_its_first_checkpoint_starts_again_from_the_other(done, tiny, tmp_path):
    config = reading(tiny, mode="frozen", start=str(done))
    model = build.build_model(build.resolve(config), 10)
    facts = read_config(done)[1]
    (tmp_path / "checkpoints" / "0.unfinished").mkdir(parents=True)
    marked, networks = start.read_start(build.resolve(config), model, facts, tmp_path, resume=True)
    assert marked.adaptation.start_mark.startswith("step ")
    assert_same(networks[0], ea.load(done)[0])


def test_a_run_that_went_on_is_resumed_without_the_one_it_started_from(
    done, tiny, tmp_path, monkeypatch
):
    begun = tmp_path / "start"
    shutil.copytree(done, begun)
    config = reading(tiny, mode="frozen", start=str(begun))
    run.train(config, tmp_path / "whole")
    with monkeypatch.context() as patch:
        interrupt(patch, after=1)
        with pytest.raises(KeyboardInterrupt):
            run.train(config, tmp_path / "run")
    shutil.rmtree(begun)
    run.train(config, tmp_path / "run", resume=True)
    assert_same(*(ea.load(tmp_path / name, step=2)[:2] for name in ("run", "whole")))


def one_step(model, objective, params, state, batch):
    loss = lambda scorer: objective({**params, "scorer": scorer}, state, batch, KEY)  # noqa: E731
    (value, _), gradient = jax.value_and_grad(loss, has_aux=True)(params["scorer"])
    return value, gradient


@pytest.mark.parametrize("method", ["straight_through", "soft", "predictions"])
def test_training_on_features_kept_is_training_on_images(method):
    """Loss and gradient agree; without dropout, and up to the half precision of features."""
    group = Dihedral(4)
    prior = ea.priors.Categorical((0.5, 0, 0, 0, 0.5, 0, 0, 0))
    made, params, state = model(group, method=method, dropout=0.0, temperature=0.7)
    x = noise(6, 8, 8, 3)
    surer = {"confidence_penalty": 0.3}
    if method != "predictions":
        surer["temperature"] = lambda step: 0.4
    kept = cache.make(made, params, state, batches(x, 6), 6, key=KEY)
    labels = kept["label"]
    none = settings.Augmentation()
    on_images = objective.adaptation(
        made, prior, prior_weight=2.0, augmentation=none, turn_inputs=False, **surer
    )
    on_features = objective.adaptation_from_features(made, prior, prior_weight=2.0, **surer)
    unsure = objective.adaptation_from_features(made, prior, prior_weight=2.0)
    one = one_step(made, on_images, params, state, {"image": x, "label": labels})
    other = one_step(made, on_features, params, state, kept)
    assert float(one[0]) == pytest.approx(float(other[0]), rel=2e-3)
    assert float(one[0]) < float(one_step(made, unsure, params, state, kept)[0]) - 0.1
    scale = max(float(abs(g).max()) for g in jax.tree.leaves(one[1]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-2 * scale), one[1], other[1])


def test_sampled_poses_weigh_the_predictions_that_are_given():
    made, params, state = model(Cyclic(4), method="gumbel", dropout=0.0)
    x = noise(16, 8, 8, 3)
    (logits, canonical), _ = made.apply(params, state, x, train=True, key=KEY)
    _, predictions = made.orbit_features(params, state, x)
    np.testing.assert_allclose(logits, predictions[np.arange(16), canonical.pose], atol=1e-5)
    assert (canonical.pose != canonical.scores.argmax(-1)).any()


def test_a_start_with_other_networks_is_refused(done, tiny, tmp_path):
    config = reading(tiny, start=str(done))
    other = dataclasses.replace(config, group="cyclic8")
    with pytest.raises(ValueError, match="has other networks .*group: 'cyclic4' there, 'cyclic8'"):
        run.train(other, tmp_path / "run")
    with pytest.raises(FileNotFoundError, match="holds no run"):
        run.train(reading(tiny, start=str(tmp_path / "nowhere")), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("averaging", ["double", "top0", "top5", "top"])
def test_an_average_that_does_not_exist_is_refused(averaging, tiny, tmp_path):
    config = dataclasses.replace(reading(tiny), averaging=averaging)
    message = f"config.averaging is '{averaging}': choose single, weighted, mean, or top<k>,"
    with pytest.raises(ValueError, match=message):
        run.train(config, tmp_path / "run")


def test_random_versions_do_not_depend_on_the_batch_they_come_in():
    made, params, state = model(Dihedral(4))
    x = noise(7, 8, 8, 3)
    how = {
        "key": KEY, "variants": 2, "turn_inputs": True,
        "augmentation": settings.Augmentation(scale=0.2, shift=0.1, mirror=True),
    }  # fmt: skip
    small, large = (cache.make(made, params, state, batches(x, n), 7, **how) for n in (2, 7))
    np.testing.assert_array_equal(small["applied"], large["applied"])
    np.testing.assert_allclose(
        small["features"].astype(np.float32), large["features"].astype(np.float32), atol=4e-3
    )
    assert len(np.unique(small["applied"])) > 4
