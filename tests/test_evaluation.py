"""Figures over orbits, against counting by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import equiadapt_jax as ea
from equiadapt_jax.evaluation import GroupTurns, RandomTurns, figures, make_evaluator
from equiadapt_jax.evaluation.measures import all_figures, per_class, reliability

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


def scored(params, state, images):
    logits, pose = predict(params, state, images)
    scores = 3 * images.reshape(images.shape[0], -1)[:, : C4.order]
    return logits, pose, scores


def test_the_probability_of_the_pose_is_a_softmax_of_its_score():
    outcome = make_evaluator(scored, GroupTurns(C4), C4)(WEIGHTS, {}, batches())
    for g in range(4):
        scores = 3 * np.float64(np.rot90(IMAGES, g, (1, 2)).reshape(7, -1)[:, :4])
        weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
        expected = weights[np.arange(7), outcome.pose[:, g]]
        np.testing.assert_allclose(outcome.pose_probability[:, g], expected, rtol=1e-6)
    without = make_evaluator(predict, GroupTurns(C4), C4)(WEIGHTS, {}, batches())
    assert without.pose_probability is None


def test_a_function_of_numpy_arrays_is_evaluated_like_a_traced_one():
    seen = []

    def numpy_only(params, state, images):
        seen.append(type(images))
        return np.einsum("bi,ij->bj", images.reshape(len(images), -1), params), None

    def traced(params, state, images):
        return predict(params, state, images)[0], None

    one = make_evaluator(traced, GroupTurns(D4))(WEIGHTS, {}, batches())
    other = make_evaluator(numpy_only, GroupTurns(D4), traced=False)(WEIGHTS, {}, batches())
    np.testing.assert_array_equal(one.prediction, other.prediction)
    np.testing.assert_allclose(one.confidence, other.confidence, rtol=1e-5)
    assert set(seen) == {np.ndarray}


def test_probabilities_in_the_place_of_logits_are_noticed():
    def softmax(params, state, images):
        return jax.nn.softmax(predict(params, state, images)[0]), None

    def almost(params, state, images):  # but for one image in one pose
        found, corner = softmax(params, state, images)[0], images[:, 0, 0, 0]
        return jnp.where((corner == IMAGES[5, 7, 7, 0])[:, None], found * 1.002, found), None

    def logarithms(params, state, images):
        return jnp.log(softmax(params, state, images)[0]), None

    def single(params, state, images):
        return jnp.ones((len(images), 1)), None

    found = {
        function: make_evaluator(function, GroupTurns(C4), C4)(WEIGHTS, {}, batches()).probabilities
        for function in (softmax, almost, logarithms, single, predict)
    }
    assert [function for function, probable in found.items() if probable] == [softmax]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_are_named(bad):
    def broken(params, state, images):
        mean = images.mean((1, 2, 3))
        corner = jnp.where(images[:, 0, 0, 0] == IMAGES[5, 7, 7, 0], bad, mean)
        return jnp.stack([mean, corner], -1), None

    evaluate = make_evaluator(broken, GroupTurns(C4), name="mine.py:broken")
    with pytest.raises(
        FloatingPointError,
        match=r"Logit 1 of mine.py:broken is -?(nan|inf) for image 5, turned 180",
    ):
        evaluate(0.0, {}, batches())


def test_images_without_a_label_are_named():
    unlabelled = [{**batch, "label": np.where(batch["name"] == "5", -1, 2)} for batch in batches()]
    evaluate = make_evaluator(predict, GroupTurns(C4), C4, name="mine.py:predict")
    with pytest.raises(ValueError, match="Image 5 has no label: evaluate on another --split"):
        evaluate(WEIGHTS, {}, unlabelled)


def test_the_calibration_error_is_that_of_the_paper():
    confidence = RNG.uniform(0.1, 1, (200, 4))
    confidence[0] = [1 / 15, 1.0, 7 / 15, 0.0]  # on the edges of bins
    right = RNG.uniform(size=(200, 4)) < confidence**2
    found = reliability(confidence, right)
    error, images = 0.0, confidence.size
    for m in range(1, 16):
        inside = [
            (c, r)
            for c, r in zip(confidence.ravel(), right.ravel(), strict=True)
            if (m - 1) / 15 < c <= m / 15 or (m == 1 and c == 0)
        ]
        assert found.count[m - 1] == len(inside)
        if inside:
            mean, accuracy = np.mean(inside, axis=0)
            assert found.accuracy[m - 1] == pytest.approx(accuracy)
            assert found.confidence[m - 1] == pytest.approx(mean)
            error += len(inside) / images * abs(accuracy - mean)
        else:
            assert np.isnan(found.accuracy[m - 1])
    assert 0.05 < error < 0.3
    assert found.error == pytest.approx(error)


def test_the_calibration_error_of_known_cases():
    assert reliability(np.full(8, 0.75), np.arange(8) % 4 > 0).error == 0
    assert reliability(np.ones(5), np.zeros(5, bool)).error == 1
    assert reliability(np.array([0.3]), np.array([True])).error == pytest.approx(0.7)


def test_figures_of_each_class_are_counted_by_hand():
    outcome = make_evaluator(predict, GroupTurns(D4), C4)(WEIGHTS, {}, batches())
    found = per_class(outcome, 5)  # of two there are no images
    metrics = all_figures(outcome, ["a", "b/c", "<d>", "none", "é"])
    for label, name in enumerate(["a", "b/c", "<d>"]):
        rows = [i for i in range(7) if LABELS[i] == label]
        right = [[outcome.prediction[i, g] == label for g in range(8)] for i in rows]
        changed = [
            [outcome.prediction[i, g] != outcome.prediction[i, 0] for g in range(1, 8)]
            for i in rows
        ]
        assert found["images"][label] == len(rows)
        assert metrics[f"class/{name}/accuracy"] == pytest.approx(np.mean(right, axis=0)[0])
        assert metrics[f"class/{name}/group_accuracy"] == pytest.approx(np.mean(right))
        assert metrics[f"class/{name}/changed_rate"] == pytest.approx(np.mean(changed))
        left = [outcome.pose[i, 0] == 0 for i in rows]
        assert metrics[f"class/{name}/identity_rate"] == pytest.approx(np.mean(left))
    assert np.isnan(found["accuracy"][3:]).all()
    assert not any("none" in name or "é" in name for name in metrics)
    upright = reliability(outcome.confidence[:, 0], outcome.prediction[:, 0] == LABELS).error
    assert metrics["calibration_error"] == upright
    assert figures(outcome).items() <= metrics.items()
