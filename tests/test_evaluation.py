"""Figures over orbits, against counting by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

import equiadapt_jax as ea
from equiadapt_jax.evaluation import GroupTurns, RandomTurns, figures, make_evaluator

C4, C8, D4 = ea.groups.Cyclic(4), ea.groups.Cyclic(8), ea.groups.Dihedral(4)
RNG = np.random.default_rng(0)
IMAGES = RNG.uniform(size=(7, 8, 8, 1)).astype(np.float32)
LABELS = RNG.integers(0, 3, 7).astype(np.int32)
WEIGHTS = RNG.normal(size=(64, 3)).astype(np.float32)


def batches(size=4):
    for start in (0, size):
        index = np.minimum(np.arange(start, start + size), 6)
        mask = np.arange(start, start + size) < 7
        yield {
            "image": IMAGES[index],
            "label": LABELS[index],
            "name": index.astype(str),
            "mask": mask,
        }


def predict(params, state, images):
    flat = images.reshape(images.shape[0], -1)
    logits = flat @ params
    return logits, jnp.argmax(flat[:, : C4.order], -1).astype(jnp.int32)


def test_labels_name_angle_and_mirror():
    assert GroupTurns(C4).labels == ("r0", "r90", "r180", "r270")
    assert GroupTurns(D4).labels[4:] == ("r0s", "r90s", "r180s", "r270s")
    assert GroupTurns(C8).labels[1] == "r45"


def test_every_image_is_seen_once_in_every_pose():
    outcome = make_evaluator(predict, GroupTurns(D4), C4)(WEIGHTS, {}, batches())
    assert outcome.prediction.shape == (7, 8)
    np.testing.assert_array_equal(outcome.label, LABELS)
    assert list(outcome.name) == list("0123456")
    for g in range(8):
        turned = np.rot90(IMAGES if g < 4 else IMAGES[:, :, ::-1], g % 4, (1, 2))
        logits = np.float64(turned.reshape(7, -1)) @ WEIGHTS
        upright = np.float64(IMAGES.reshape(7, -1)) @ WEIGHTS
        np.testing.assert_array_equal(outcome.prediction[:, g], logits.argmax(-1))
        probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        np.testing.assert_allclose(outcome.confidence[:, g], probabilities.max(-1), rtol=1e-5)
        change = np.linalg.norm(logits - upright, axis=-1) / np.linalg.norm(upright, axis=-1)
        np.testing.assert_allclose(outcome.change[:, g], change, atol=1e-5)
        pose = turned.reshape(7, -1)[:, :4].argmax(-1)
        np.testing.assert_array_equal(outcome.pose[:, g], pose)
        np.testing.assert_array_equal(outcome.pose_right[:, g], (pose == g % 4) & (g < 4))


def test_figures_are_means_over_images_and_turns():
    outcome = make_evaluator(predict, GroupTurns(C4), C4)(WEIGHTS, {}, batches())
    found = figures(outcome)
    right = outcome.prediction == LABELS[:, None]
    changed = outcome.prediction[:, 1:] != outcome.prediction[:, :1]
    expected = {
        "accuracy": right[:, 0].mean(),
        "group_accuracy": right.mean(),
        "changed_rate": changed.mean(),
        "invariance_error": outcome.change[:, 1:].mean(),
        "identity_rate": np.mean(outcome.pose[:, 0] == 0),
        "pose_accuracy": np.mean(outcome.pose == np.arange(4)),
        **{f"accuracy/r{90 * g}": right[:, g].mean() for g in range(4)},
        **{f"pose_accuracy/r{90 * g}": np.mean(outcome.pose[:, g] == g) for g in range(4)},
    }
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value), name


def test_an_invariant_function_changes_nothing():
    def mean(params, state, images):
        return jnp.stack([images.mean((1, 2, 3)), images.max((1, 2, 3))], -1), None

    found = figures(make_evaluator(mean, GroupTurns(D4))(0.0, {}, batches()))
    assert found["changed_rate"] == 0
    assert found["invariance_error"] < 1e-6
    assert found["accuracy"] == found["group_accuracy"]
    assert "pose_accuracy" not in found


def test_between_two_elements_either_pose_is_right():
    def pose_of(params, state, images):
        return jnp.zeros((images.shape[0], 2)), jnp.full(images.shape[0], params, jnp.int32)

    evaluate = make_evaluator(pose_of, GroupTurns(C8), C4)
    right = {pose: evaluate(pose, {}, batches()).pose_right[0] for pose in range(4)}
    np.testing.assert_array_equal(right[0], [1, 1, 0, 0, 0, 0, 0, 1])
    np.testing.assert_array_equal(right[1], [0, 1, 1, 1, 0, 0, 0, 0])


def test_random_turns_are_the_same_for_the_same_seed():
    evaluate = {
        seed: make_evaluator(predict, RandomTurns(3, seed), C4)(WEIGHTS, {}, batches())
        for seed in (0, 1)
    }
    again = make_evaluator(predict, RandomTurns(3, 0), C4)(WEIGHTS, {}, batches())
    assert again.labels == ("r0", "random1", "random2", "random3")
    np.testing.assert_array_equal(evaluate[0].confidence, again.confidence)
    assert np.all(evaluate[0].confidence[:, 0] == evaluate[1].confidence[:, 0])
    assert np.any(evaluate[0].confidence[:, 1:] != evaluate[1].confidence[:, 1:])
    assert np.all(evaluate[0].change[:, 0] == 0)
