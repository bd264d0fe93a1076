"""Averages over poses, against loops over elements and images."""

import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.extra import numpy as hnp

from equiadapt_jax import averaging
from equiadapt_jax.actions import images as image_actions
from equiadapt_jax.groups import Cyclic, Dihedral


def noise(*shape, dtype=np.float32, seed=0):
    return np.random.default_rng(seed).uniform(size=shape).astype(dtype)


def predict(x):
    """Something that no turn leaves alone: every pixel has a weight of its own."""
    weight = noise(*x.shape[1:], 3, seed=7).astype(x.dtype)
    return jnp.tanh(jnp.einsum("nhwc,hwck->nk", x, weight, precision=jax.lax.Precision.HIGHEST))


def by_loops(group, scores, outputs, poses, temperature):
    """The average of `outputs[i][g]`, an image and a pose at a time, in float64."""
    result = []
    for row, output in zip(np.asarray(scores, np.float64), outputs, strict=True):
        chosen = sorted(range(group.order), key=lambda g, row=row: -row[g])[:poses]
        weights = np.exp([(row[g] - row[chosen[0]]) / temperature for g in chosen])
        weights /= weights.sum()
        result.append(sum(w * output[g] for w, g in zip(weights, chosen, strict=True)))
    return np.stack(result)


GROUPS = [Cyclic(1), Cyclic(4), Cyclic(6), Dihedral(4), Dihedral(3)]


@pytest.mark.parametrize("group", GROUPS, ids=str)
@pytest.mark.parametrize("temperature", [0.3, 2.0])
def test_the_average_agrees_with_loops(group, temperature, x64):
    x, scores = noise(3, 6, 6, 2, dtype=np.float64), noise(3, group.order, dtype=np.float64, seed=1)
    turned = [
        [image_actions.act(group, group.inverse(g), image) for g in range(group.order)]
        for image in x
    ]
    outputs = [[np.asarray(predict(image[None]))[0] for image in orbit] for orbit in turned]
    for poses in {1, (group.order + 1) // 2, group.order}:
        expected = by_loops(group, scores, outputs, poses, temperature)
        actual = averaging.weighted(group, scores, x, predict, poses=poses, temperature=temperature)
        np.testing.assert_allclose(actual, expected, atol=1e-12)
        chosen = averaging.best(group, scores, poses=poses, temperature=temperature)
        combined = averaging.combine(*chosen, jnp.asarray(outputs))
        np.testing.assert_allclose(combined, expected, atol=1e-12)


@given(
    hnp.arrays(np.float32, (2, 8), elements=st.floats(-50, 50, width=32)),
    st.integers(1, 8),
    st.floats(0.1, 10),
)
def test_best_poses_are_the_best_and_weights_a_distribution(scores, poses, temperature):
    elements, weights = averaging.best(
        Dihedral(4), jnp.asarray(scores), poses=poses, temperature=temperature
    )
    assert elements.dtype == jnp.int32
    chosen = np.take_along_axis(scores, np.asarray(elements), -1)
    np.testing.assert_array_equal(chosen, -np.sort(-scores)[:, :poses])
    assert all(len(set(row)) == poses for row in np.asarray(elements).tolist())
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-6)
    assert (np.diff(weights) <= 0).all()


@settings(max_examples=20)
@given(st.integers(0, 7), st.integers(0, 100))
def test_exact_turns_leave_every_bit_of_the_average(g, seed):
    group = Dihedral(4)
    x, scores = jnp.asarray(noise(2, 5, 5, 1, seed=seed)), noise(2, 8, seed=seed + 1)
    turned = np.empty_like(scores)
    turned[:, np.asarray(group.compose(g, group.elements()))] = scores
    average = jax.jit(functools.partial(averaging.weighted, group, predict=predict, poses=5))
    one = average(scores, x)
    other = average(turned, image_actions.act(group, g, x))
    np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("chunk", [1, 2, 4])
def test_chunks_change_nothing_but_the_memory(chunk):
    group, x, scores = Cyclic(8), noise(3, 6, 6, 1), noise(3, 8, seed=2)
    how = {"poses": 4, "interpolation": "cubic", "pad": "constant", "fill": 0.2}
    whole = averaging.weighted(group, scores, x, predict, **how)
    part = averaging.weighted(group, scores, x, predict, chunk=chunk, **how)
    np.testing.assert_allclose(part, whole, atol=1e-6)


def memory(group, chunk):
    """Bytes of temporaries of a compiled average with a wide predictor."""
    wide = lambda x: jnp.tanh(x.reshape(x.shape[0], -1) @ jnp.ones((1024, 4096))).sum(-1)  # noqa: E731
    average = functools.partial(averaging.weighted, group, predict=wide, chunk=chunk)
    compiled = jax.jit(average).lower(noise(8, group.order), noise(8, 32, 32, 1)).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_memory_does_not_grow_with_the_group():
    """But by the sorted scores, which are small beside the images."""
    assert memory(Cyclic(64), 1) < 1.2 * memory(Cyclic(8), 1)
    assert memory(Cyclic(64), None) > 4 * memory(Cyclic(64), 1)  # so it is measured


@pytest.mark.parametrize("chunk", [None, 1])
def test_gradients_are_those_of_the_written_out_average(chunk, x64):
    group = Cyclic(6)
    x, scores = noise(2, 5, 5, 1, dtype=np.float64), noise(2, 6, dtype=np.float64, seed=3)

    def written_out(scores, x):
        w = jax.nn.softmax(scores / 0.7, -1)
        turned = [image_actions.act(group, group.inverse(g), x) for g in range(6)]
        return (sum(w[:, g, None] * predict(turned[g]) for g in range(6)) ** 2).sum()

    def averaged(scores, x):
        how = {"temperature": 0.7, "chunk": chunk}
        return (averaging.weighted(group, scores, x, predict, **how) ** 2).sum()

    expected = jax.grad(written_out, (0, 1))(scores, x)
    for actual, wanted in zip(jax.grad(averaged, (0, 1))(scores, x), expected, strict=True):
        np.testing.assert_allclose(actual, wanted, atol=1e-12)


def test_equal_scores_are_group_averaging_and_one_pose_is_canonicalization(x64):
    group, x = Cyclic(4), noise(3, 5, 5, 1, dtype=np.float64)
    mean = averaging.weighted(group, jnp.zeros((3, 4)), x, predict)
    np.testing.assert_allclose(
        mean, np.mean([predict(np.rot90(x, k, (1, 2))) for k in range(4)], 0), atol=1e-12
    )
    scores = np.eye(4)[[2, 0, 3]]
    single = averaging.weighted(group, scores, x, predict, poses=1)
    upright = [np.rot90(image, -k) for image, k in zip(x, (2, 0, 3), strict=True)]
    np.testing.assert_allclose(single, predict(np.stack(upright)), atol=1e-12)


# ---- how poses are weighted ----


@pytest.mark.parametrize("poses", [1, 3, 5, 6])
@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_weightings_are_what_they_are_said_to_be(poses, temperature, x64):
    group, rows = Cyclic(6), noise(4, 6, dtype=np.float64, seed=5)
    how = {"poses": poses, "temperature": temperature}
    for weighting in ("scores", "faded", "equal"):
        elements, weights = averaging.best(group, jnp.asarray(rows), weighting=weighting, **how)
        for row, g, w in zip(rows, elements, weights, strict=True):
            order = sorted(range(6), key=lambda i, row=row: -row[i])
            np.testing.assert_array_equal(g, order[:poses])
            above = np.exp(row[order] / temperature)
            expected = np.ones(poses) if weighting == "equal" else above[:poses]
            if weighting == "faded" and poses < 6:
                expected = expected - above[poses]
            np.testing.assert_allclose(w, expected / expected.sum(), atol=1e-12)


def jump(weighting, poses, scores=(2.0, 1.0, 1.0, -1.0)):
    """By how much the average changes where the second and third of four scores change places."""
    group, outputs = Cyclic(4), jnp.asarray([[1.0, 10.0, -10.0, 5.0]])
    before, after = np.float32([scores]), np.float32([scores])
    before[0, 1] += 1e-5
    after[0, 2] += 1e-5
    one, other = (
        averaging.combine(*averaging.best(group, s, poses=poses, weighting=weighting), outputs)
        for s in (jnp.asarray(before), jnp.asarray(after))
    )
    return float(abs(one - other)[0])


def test_what_is_continuous_where_poses_change_places():
    assert jump("scores", 2) > 1
    assert jump("faded", 2) < 1e-3
    assert jump("scores", None) < 1e-3
    assert jump("scores", 1) < 1e-3  # the best stays the same one
    assert jump("scores", 1, (0.0, 1.0, 1.0, 0.0)) > 1


def test_poses_that_all_tie_fade_alike_with_finite_gradients():
    def first(scores):
        return averaging.best(Cyclic(4), scores, poses=2, weighting="faded")[1][..., 0].sum()

    value, gradient = jax.value_and_grad(first)(jnp.ones((1, 4)))
    assert value == 0.5
    assert jnp.isfinite(gradient).all()


def test_drawn_poses_are_distributed_as_the_softmax(x64):
    scores = jnp.asarray([[0.0, 1.0, -1.0, 0.5]])
    elements, weights = averaging.best(
        Cyclic(4), jnp.tile(scores, (5000, 1)), poses=4, temperature=0.7, weighting="sampled",
        key=jax.random.key(0),
    )  # fmt: skip
    expected = np.exp(np.asarray(scores[0]) / 0.7)
    expected /= expected.sum()
    share = np.bincount(np.asarray(elements).ravel(), minlength=4) / elements.size
    np.testing.assert_allclose(share, expected, atol=4 * np.sqrt(0.25 / elements.size))
    assert elements.dtype == jnp.int32
    assert (weights == 0.25).all()


@pytest.mark.parametrize("weighting", averaging.WEIGHTINGS)
def test_exact_turns_leave_every_bit_whatever_the_weighting(weighting):
    group, x, scores = Dihedral(4), jnp.asarray(noise(3, 5, 5, 1)), noise(3, 8, seed=4)
    key = jax.random.key(3)
    average = jax.jit(
        lambda s, x: averaging.weighted(group, s, x, predict, poses=3, weighting=weighting, key=key)
    )
    for g in range(8):
        turned = np.empty_like(scores)
        turned[:, np.asarray(group.compose(g, group.elements()))] = scores
        other = average(turned, image_actions.act(group, g, x))
        np.testing.assert_array_equal(average(scores, x), other)


def test_the_mean_of_drawn_poses_is_the_weighted_average(x64):
    group, x = Cyclic(4), noise(2, 5, 5, 1, dtype=np.float64) - 0.5
    scores = noise(2, 4, dtype=np.float64, seed=6)
    how = {"poses": 2, "weighting": "sampled"}
    draw = lambda key: averaging.weighted(group, scores, x, predict, key=key, **how)  # noqa: E731
    drawn = jax.vmap(draw)(jax.random.split(jax.random.key(1), 4000))
    expected = averaging.weighted(group, scores, x, predict)
    error = np.abs(drawn.mean(0) - expected)
    assert (error < 4 * drawn.std(0) / np.sqrt(4000)).all()
    np.testing.assert_array_equal(draw(jax.random.key(2)), draw(jax.random.key(2)))


def test_the_mean_over_the_group_needs_no_scores(x64):
    x = noise(3, 5, 5, 1, dtype=np.float64)
    expected = np.mean([predict(np.rot90(x, k, (1, 2))) for k in range(4)], 0)
    np.testing.assert_allclose(averaging.mean(Cyclic(4), x, predict), expected, atol=1e-12)
    np.testing.assert_allclose(averaging.mean(Cyclic(4), x, predict, chunk=2), expected, atol=1e-12)


def test_any_shape_of_output_and_low_precision_inputs():
    group, scores = Cyclic(4), noise(2, 4)
    x = jnp.asarray(noise(2, 4, 4, 1), jnp.bfloat16)
    for output in (lambda x: x.sum((1, 2, 3)), lambda x: x[:, 0, :2, None]):
        averaged = averaging.weighted(group, scores, x, output)
        assert averaged.dtype == jnp.bfloat16
        assert averaged.shape == output(x).shape


C4, SCORES, X = Cyclic(4), noise(2, 4), noise(2, 4, 4, 1)
REFUSED = {
    "scores of another group": (
        lambda: averaging.best(Cyclic(8), SCORES), r"\(2, 4\) do not fit cyclic8.* 8 elements",
    ),
    "no pose": (lambda: averaging.best(C4, SCORES, poses=0), "poses=0: average over 1 to 4"),
    "too many poses": (lambda: averaging.best(C4, SCORES, poses=5), "poses=5: average over 1 to 4"),
    "a temperature of zero": (
        lambda: averaging.best(C4, SCORES, temperature=0.0), "weights is 0.0: it must be positive",
    ),
    "an unknown weighting": (
        lambda: averaging.best(C4, SCORES, weighting="best"), "Unknown weighting 'best': choose",
    ),
    "a draw without a key": (
        lambda: averaging.best(C4, SCORES, weighting="sampled"), "pass key=jax.random.key",
    ),
    "images without scores": (
        lambda: averaging.weighted(C4, SCORES, X[:1], predict), r"\(B, \|G\|\) and \(B, H, W, C\)",
    ),
    "one image": (lambda: averaging.weighted(C4, SCORES[0], X[0], predict), "use jax.vmap"),
    "a chunk that does not divide": (
        lambda: averaging.weighted(C4, SCORES, X, predict, chunk=3), "chunk=3 .* the 4 poses",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_with_a_sentence(case):
    function, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        function()
