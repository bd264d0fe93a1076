"""Frames, refined poses and the priors of SO(2) and O(2), against closed forms."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from equiadapt_jax import canonicalization, priors
from equiadapt_jax.actions import images
from equiadapt_jax.groups import SO, Cyclic, Dihedral, O
from tests.test_matrix_groups import MIRROR, exact, noise, sample, turn

frame = jax.jit(canonicalization.frame, static_argnums=0)
refine = jax.jit(canonicalization.refine, static_argnums=0)
CASES = [(SO(2), 1), (O(2), 2)]


def vectors(count, rows, dtype=np.float64, seed=0):
    return np.random.default_rng(seed).normal(size=(count, rows, 2)).astype(dtype)


def gram_schmidt(first, second):
    """Columns: where right goes and where down goes, of vectors up and right."""
    up = first / np.linalg.norm(first)
    right = second - (second @ up) * up
    return np.stack([right / np.linalg.norm(right), -up], -1)


# ---- frames ----


def test_a_frame_is_what_gram_schmidt_gives(x64):
    v = vectors(50, 2)
    found = frame(O(2), v)
    np.testing.assert_allclose(found, [gram_schmidt(*rows) for rows in v], atol=1e-13)
    assert {-1, 1} == set(np.round(np.linalg.det(found)).astype(int))


def test_a_frame_of_one_vector_turns_up_onto_it(x64):
    v = vectors(50, 1)
    found = np.asarray(frame(SO(2), v))
    up = v[:, 0] / np.linalg.norm(v[:, 0], axis=-1, keepdims=True)
    np.testing.assert_allclose(found @ [0.0, -1.0], up, atol=1e-14)
    np.testing.assert_allclose(np.linalg.det(found), 1, atol=1e-14)


@pytest.mark.parametrize(("group", "rows"), CASES, ids=["so2", "o2"])
def test_frames_turn_with_their_vectors(group, rows, x64):
    v, g = vectors(40, rows), sample(group, 40, np.float64)
    turned = np.einsum("bij,bkj->bki", g, v)
    np.testing.assert_allclose(frame(group, turned), g @ frame(group, v), atol=1e-12)


@pytest.mark.parametrize(("group", "rows"), CASES, ids=["so2", "o2"])
def test_exact_elements_turn_them_to_the_bit(group, rows):
    v = vectors(300, rows, np.float32)
    found = np.asarray(frame(group, v))
    assert found.dtype == np.float32
    np.testing.assert_allclose(
        found @ found.swapaxes(1, 2), np.broadcast_to(np.eye(2), found.shape), atol=3e-7
    )
    for q in np.float32(exact(group)):
        np.testing.assert_array_equal(frame(group, v @ q.T), q @ found)


@pytest.mark.parametrize(("group", "rows"), CASES, ids=["so2", "o2"])
def test_short_vectors_give_the_identity_and_finite_gradients(group, rows):
    slope = jax.jit(jax.grad(lambda v: (frame(group, v) * jnp.arange(4.0).reshape(2, 2)).sum()))
    for v in (np.zeros((rows, 2)), np.full((rows, 2), 1e-7), np.full((rows, 2), 1e-38)):
        v = v.astype(np.float32)
        np.testing.assert_array_equal(frame(group, v), np.eye(2))
        np.testing.assert_array_equal(slope(v), np.zeros((rows, 2)))
    for v in (
        np.full((rows, 2), 2e-6),
        np.full((rows, 2), 1e30),
        np.array([[0, 3.0], [0, 0]])[:rows],
    ):
        assert np.isfinite(frame(group, v.astype(np.float32))).all()
        assert np.isfinite(slope(v.astype(np.float32))).all()


def test_the_frame_has_the_derivative_of_its_angle(x64):
    def angle(v):
        return SO(2).angle(canonicalization.frame(SO(2), v))

    v = np.array([[0.6, -1.7]])
    # For (x, y) = −ρ (sin θ, cos θ) the gradient of θ is (y, −x) / ρ².
    expected = np.array([[v[0, 1], -v[0, 0]]]) / (v**2).sum()
    np.testing.assert_allclose(jax.jit(jax.grad(angle))(v), expected, atol=1e-14)


def test_the_odds_of_a_mirror_follow_the_second_vector(x64):
    v = vectors(30, 2)
    found = jax.jit(canonicalization.mirror_log_odds, static_argnums=0)(O(2), v)
    up = v[:, 0] / np.linalg.norm(v[:, 0], axis=-1, keepdims=True)
    right = np.stack([-up[:, 1], up[:, 0]], -1)
    np.testing.assert_allclose(found, 4 * (v[:, 1] * right).sum(-1), atol=1e-13)
    np.testing.assert_array_equal(found < 0, O(2).reflects(frame(O(2), v)))
    turned = np.einsum("bij,bkj->bki", sample(SO(2), 30, np.float64), v)
    np.testing.assert_allclose(canonicalization.mirror_log_odds(O(2), turned), found, atol=1e-12)
    mirrored = canonicalization.mirror_log_odds(O(2), v * [-1, 1])
    np.testing.assert_allclose(mirrored, -found, atol=1e-12)
    with pytest.raises(ValueError, match=r"so2 has no mirrors .* take O\(2\)"):
        canonicalization.mirror_log_odds(SO(2), vectors(5, 1))


@pytest.mark.parametrize(
    ("group", "shape", "sentence"),
    [
        (SO(2), (3, 2, 2), r"do not span a frame of so2: give \(\.\.\., 1, 2\)"),
        (O(2), (3, 1, 2), r"do not span a frame of o2: give \(\.\.\., 2, 2\)"),
        (SO(2), (2,), r"Vectors of shape \(2,\)"),
        (Cyclic(4), (1, 2), "the group is cyclic4: use select_pose"),
    ],
)
def test_other_vectors_are_refused(group, shape, sentence):
    with pytest.raises(ValueError, match=sentence):
        canonicalization.frame(group, jnp.zeros(shape))


# ---- canonical inputs ----


@pytest.mark.parametrize(("group", "rows"), CASES, ids=["so2", "o2"])
def test_canonical_inputs_of_exactly_turned_images_are_the_same_bits(group, rows):
    x, v = noise(5, 8, 8, 2), vectors(5, rows, np.float32)
    apply = jax.jit(canonicalization.from_vectors, static_argnums=0)
    found = apply(group, v, x)
    assert found.weights is None
    np.testing.assert_array_equal(found.scores, v)
    np.testing.assert_array_equal(found.pose, frame(group, v))
    for q in np.float32(exact(group)):
        turned = apply(group, v @ q.T, images.act(group, q, x))
        np.testing.assert_array_equal(turned.inputs, found.inputs)


def test_what_was_canonicalized_by_an_exact_pose_comes_back_to_the_bit():
    x = noise(8, 7, 7, 1)
    pose = np.float32(exact(O(2)))
    canonical = canonicalization.canonicalize(O(2), pose, x)
    np.testing.assert_array_equal(canonicalization.invert(O(2), pose, canonical), x)
    assert (canonical[1] != x[1]).any()


def test_gradients_reach_the_vectors(x64):
    x, v = noise(1, 8, 8, 1, dtype=np.float64), vectors(1, 1)
    weight = noise(1, 8, 8, 1, dtype=np.float64, seed=3)
    value = jax.jit(lambda v: (canonicalization.from_vectors(SO(2), v, x).inputs * weight).sum())
    slope = jax.grad(value)(v)
    for i in range(2):
        step = np.zeros((1, 1, 2))
        step[0, 0, i] = 1e-6
        numeric = (value(v + step) - value(v - step)) / 2e-6
        np.testing.assert_allclose(slope[0, 0, i], numeric, rtol=1e-6, atol=1e-8)


# ---- poses between elements ----


@pytest.mark.parametrize("group", [Cyclic(16), Cyclic(6), Cyclic(3), Dihedral(8)], ids=str)
def test_the_top_of_a_parabola_is_found(group, x64):
    step = 2 * np.pi / group.n
    for offset in (-0.45, -0.1, 0.0, 0.3):
        for best in range(group.order):
            k, m = best % group.n, best // group.n
            scores = np.full(group.order, -9.0)
            for j in (-1, 0, 1):
                scores[(k + j) % group.n + group.n * m] = -((j - offset) ** 2)
            expected = turn((k + offset) * step, m)
            np.testing.assert_allclose(refine(group, scores), expected, atol=1e-12)


@pytest.mark.parametrize("group", [Cyclic(16), Cyclic(6), Cyclic(5), Dihedral(12)], ids=str)
def test_refined_poses_turn_exactly_with_the_scores(group):
    scores = np.random.default_rng(0).normal(size=(100, group.order)).astype(np.float32)
    found = np.asarray(refine(group, scores))
    assert found.dtype == np.float32
    for q in group.lattice:
        turned = np.empty_like(scores)
        turned[:, group.compose(q, np.arange(group.order))] = scores
        matrix = np.round(group.matrix(q))
        np.testing.assert_array_equal(refine(group, turned), matrix @ found)


def test_equal_scores_have_no_slope_to_follow():
    np.testing.assert_array_equal(refine(Cyclic(8), np.zeros(8, np.float32)), np.eye(2))
    slope = jax.jit(jax.grad(lambda s: refine(Cyclic(8), s).sum()))(np.zeros(8, np.float32))
    np.testing.assert_array_equal(slope, np.zeros(8))
    almost = jnp.array([0.0, 1e-20, 0.0, 0.0])
    slope = jax.grad(lambda s: refine(Cyclic(4), s)[0, 1])(almost)
    assert np.isfinite(slope).all()


def test_refined_poses_make_canonical_inputs():
    x, scores = noise(3, 8, 8, 1), noise(3, 16, seed=2)
    found = canonicalization.from_refined(Cyclic(16), scores, x)
    pose = canonicalization.refine(Cyclic(16), scores)
    np.testing.assert_array_equal(found.pose, pose)
    np.testing.assert_array_equal(found.inputs, images.act(SO(2), jnp.swapaxes(pose, -1, -2), x))
    with pytest.raises(ValueError, match="cyclic2 has no neighbours"):
        canonicalization.refine(Cyclic(2), jnp.zeros(2))


# ---- priors ----


def up(angles):
    """Vectors whose frames turn by these angles."""
    return -np.stack([np.sin(angles), np.cos(angles)], -1)[:, None]


def test_von_mises_is_the_logarithm_of_a_density(x64):
    """Against numerical integrals, relative to the uniform density."""
    angles = np.linspace(0, 2 * np.pi, 720, endpoint=False)
    for kappa, mean in ((0.0, 0.3), (1.7, -0.4), (60.0, 2.0)):
        prior = priors.VonMises(kappa, mean)
        density = np.exp(kappa * np.cos(angles - mean))
        density /= density.mean()
        for i in (0, 100, 555):
            loss = prior.loss(SO(2), up(angles[i : i + 1]))
            np.testing.assert_allclose(loss, -np.log(density[i]), atol=1e-9)


def certain(angle, mirrored):
    """Vectors whose pose is this, and which leave no doubt on which side of the mirror."""
    r = turn(angle, mirrored)
    return np.stack([r @ [0, -1], 20 * r @ [1, 0]])


@pytest.mark.parametrize("mirror", [0.0, 0.3, 0.5, 1.0])
def test_on_o2_each_half_has_the_density_of_the_angle(mirror, x64):
    """Its share of a von Mises distribution of the same width, whatever the share."""
    kappa, mean, count = 30.0, 0.7, 720
    angles = np.linspace(mean - np.pi, mean + np.pi, count, endpoint=False)
    prior = priors.VonMises(kappa, mean, mirror)
    loss = jax.jit(jax.vmap(lambda v: prior.loss(O(2), v)))
    for mirrored, share in ((0, 1 - mirror), (1, mirror)):
        density = np.exp(-loss(np.stack([certain(a, mirrored) for a in angles]))) / 2
        np.testing.assert_allclose(density.mean(), share, atol=1e-9)
        if share:
            variance = (density * (angles - mean) ** 2).sum() / density.sum()
            np.testing.assert_allclose(np.sqrt(variance), 1 / np.sqrt(kappa), rtol=0.02)


def test_of_an_undecided_mirror_the_density_is_the_mean(x64):
    prior, r = priors.VonMises(2.0, 0.4, 0.3), turn(1.1)
    v = np.stack([r @ [0, -1], r @ [0, 3.0]])[None]  # along up: either side
    each = [np.exp(-prior.loss(O(2), certain(1.1, m)[None])) for m in (0, 1)]
    np.testing.assert_allclose(prior.loss(O(2), v), -np.log(np.mean(each)), atol=1e-9)


def test_the_identity_prior_is_one_minus_the_cosine(x64):
    angles = np.array([0.0, 0.5, -2.0, np.pi])
    loss = priors.Identity().loss(SO(2), up(angles))
    np.testing.assert_allclose(loss, np.mean(1 - np.cos(angles)), atol=1e-14)
    for mirrored, sign in ((0, 1), (1, -1)):
        r = turn(0.4, mirrored)
        v = np.stack([r @ [0, -1], 0.7 * r @ [1, 0]])[None]
        expected = 1 - np.cos(0.4) + np.log(1 + np.exp(-sign * 4 * 0.7))
        np.testing.assert_allclose(priors.Identity().loss(O(2), v), expected, atol=1e-14)


@pytest.mark.parametrize("prior", [priors.Identity(), priors.VonMises(3.0, 0.8)], ids=str)
@pytest.mark.parametrize(("group", "rows"), CASES, ids=["so2", "o2"])
def test_an_applied_element_shifts_the_prior(prior, group, rows, x64):
    """The loss of g·x, turned on purpose, is that of x."""
    v, g = vectors(20, rows), sample(group, 20, np.float64)
    turned = np.einsum("bij,bkj->bki", g, v)
    expected = prior.loss(group, v)
    np.testing.assert_allclose(prior.loss(group, turned, applied=g), expected, atol=1e-12)
    one = np.einsum("ij,bkj->bki", g[0], v)
    np.testing.assert_allclose(prior.loss(group, one, applied=g[0]), expected, atol=1e-12)


def test_the_mirror_is_learned_from_the_prior():
    """The loss has a slope that turns the second vector over, where the frame has none."""
    v = np.array([[[0.1, -1.0], [-1.0, 0.3]]], np.float32)  # mirrored
    loss = lambda v: priors.Identity().loss(O(2), v)  # noqa: E731
    start = float(loss(v))
    slope = jax.jit(jax.grad(loss))
    for _ in range(60):
        v = v - 0.3 * slope(v)
    assert start > 0.9
    assert float(loss(v)) < 0.01
    assert int(O(2).reflects(canonicalization.frame(O(2), v))[0]) == 0


@pytest.mark.parametrize("prior", [priors.Identity(), priors.VonMises(2.0)], ids=str)
def test_exactly_mirrored_frames_are_no_plateau(prior, x64):
    """Wherever up is, the slope is not small, and leads to the right pose."""
    rng = np.random.default_rng(0)
    angles = rng.uniform(-3, 3, 200)
    v = np.stack([turn(a, 1) @ np.array([[0, 1.0], [-1, 0]]) for a in angles]).swapaxes(1, 2)
    one = jax.grad(lambda v: prior.loss(O(2), v))
    slope = jax.jit(jax.vmap(one))
    assert np.linalg.norm(slope(v).reshape(200, -1), axis=-1).min() > 1
    for _ in range(600):
        v = v - 0.1 * slope(v)
    pose = frame(O(2), v)
    assert not np.asarray(O(2).reflects(pose)).any()
    assert np.abs(O(2).angle(pose)).max() < 0.02


# ---- priors of refined scores ----


def smooth(group, refined, place, kappa=None):
    """The target by hand: exp(κ cos) over the elements on the same side, κ of one step's width."""
    kappa = kappa or (refined.n / (2 * np.pi)) ** 2
    weights = []
    for i in range(refined.order):
        element = turn(2 * np.pi * (i % refined.n) / refined.n, i // refined.n)
        same = np.linalg.det(element) * np.linalg.det(place) > 0
        weights.append(np.exp(kappa * np.trace(place.T @ element) / 2) if same else 0.0)
    return np.array(weights) / np.sum(weights)


def divergence(target, scores):
    log_p = scores - np.log(np.exp(scores).sum())
    some = target > 0
    return (target[some] * (np.log(target[some]) - log_p[some])).sum()


@pytest.mark.parametrize(("group", "refined"), [(SO(2), Cyclic(12)), (O(2), Dihedral(6))], ids=str)
def test_refined_scores_are_compared_with_a_bump_at_the_applied_pose(group, refined, x64):
    rng = np.random.default_rng(1)
    scores, applied = rng.normal(size=(9, refined.order)), sample(group, 9, np.float64)
    expected = [
        divergence(smooth(group, refined, a), s) for a, s in zip(applied, scores, strict=True)
    ]
    loss = priors.Refined(refined, priors.Identity()).loss(group, scores, applied=applied)
    np.testing.assert_allclose(loss, np.mean(expected), rtol=1e-10)
    wide = priors.Refined(refined, priors.VonMises(5.0, 0.3))
    kappa = 1 / ((2 * np.pi / refined.n) ** 2 + 1 / 5)
    expected = [
        divergence(smooth(group, refined, a @ turn(0.3), kappa), s)
        for a, s in zip(applied, scores, strict=True)
    ]
    np.testing.assert_allclose(
        wide.loss(group, scores, applied=applied), np.mean(expected), rtol=1e-10
    )
    assert priors.Refined(refined, priors.Uniform()).loss(group, scores) == 0


def test_of_a_mirror_that_is_as_likely_the_nearer_side_counts(x64):
    refined = Dihedral(6)
    prior = priors.Refined(refined, priors.VonMises(1e9, mirror=0.5))
    scores = np.random.default_rng(2).normal(size=(1, refined.order))
    each = [divergence(smooth(O(2), refined, turn(0, m)), scores[0]) for m in (0, 1)]
    expected = -np.log(np.mean(np.exp(-np.array(each))))
    np.testing.assert_allclose(prior.loss(O(2), scores), expected, rtol=1e-6)
    best = np.log(smooth(O(2), refined, turn(0, 1)) + 1e-12)[None]
    np.testing.assert_allclose(prior.loss(O(2), best), np.log(2), atol=1e-6)


@pytest.mark.parametrize(("group", "refined"), [(SO(2), Cyclic(16)), (O(2), Dihedral(16))], ids=str)
def test_scores_that_minimise_it_are_refined_to_the_applied_pose(group, refined, x64):
    applied = sample(group, 40, np.float64)
    loss = lambda s: priors.Refined(refined, priors.Identity()).loss(group, s, applied=applied)  # noqa: E731
    scores = np.log(np.stack([smooth(group, refined, a) for a in applied]) + 1e-30)
    np.testing.assert_allclose(loss(scores), 0, atol=1e-9)
    assert np.abs(jax.grad(loss)(scores)).max() < 1e-12
    between = np.asarray(refine(refined, scores)) @ np.linalg.inv(applied)
    assert np.rad2deg(np.abs(SO(2).angle(between))).max() < 0.1
    np.testing.assert_allclose(np.linalg.det(between), 1, atol=1e-12)


def test_a_uniform_prior_prefers_nothing():
    scores = noise(3, 4)
    for group, values in ((Cyclic(4), scores), (SO(2), scores.reshape(6, 1, 2))):
        loss = priors.Uniform().loss(group, values)
        assert loss.dtype == jnp.float32
        assert loss == 0


def test_modes_are_elements_of_the_group():
    assert priors.Identity().modes(Cyclic(4)) == (0,)
    (mode,) = priors.Uniform().modes(SO(2))
    np.testing.assert_array_equal(mode, np.eye(2))
    (mode,) = priors.VonMises(1.0, 0.3).modes(SO(2))
    np.testing.assert_allclose(mode, turn(0.3))
    both = priors.VonMises(1.0, 0.3, 0.5).modes(O(2))
    np.testing.assert_allclose(both, [turn(0.3), turn(0.3) @ MIRROR])


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: priors.VonMises(-1.0), "kappa is -1.0: it must be at least 0"),
        (lambda: priors.VonMises(1.0, math.nan), "angle is nan: give radians"),
        (lambda: priors.VonMises(1.0, mirror=2.0), "mirror is 2.0: give a share"),
        (
            lambda: priors.Refined(Cyclic(8), priors.Identity()).loss(O(2), jnp.zeros((1, 8))),
            "Scores over cyclic8 are none over o2: take dihedral8",
        ),
        (
            lambda: priors.Refined(Dihedral(8), priors.Identity()).loss(SO(2), jnp.zeros((1, 16))),
            "Scores over dihedral8 are none over so2: take cyclic8",
        ),
        (lambda: priors.VonMises(1.0).loss(Cyclic(4), jnp.zeros(4)), "take Categorical"),
        (
            lambda: priors.VonMises(1.0, mirror=0.5).loss(SO(2), jnp.ones((1, 2))),
            "so2 has no mirrors",
        ),
    ],
)
def test_impossible_priors_are_refused(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()


def test_other_priors_are_not_refined():
    with pytest.raises(TypeError, match="is a Categorical: give Identity, Uniform or VonMises"):
        priors.Refined(Cyclic(2), priors.Categorical((0.5, 0.5)))


def test_what_is_not_a_number_is_not_taken_for_upright():
    assert np.isnan(canonicalization.frame(SO(2), jnp.full((1, 2), jnp.nan))).all()


def test_poses_beside_impossible_ones_are_not_refined():
    scores = jnp.array([0.0, -jnp.inf, -jnp.inf, -jnp.inf])
    np.testing.assert_array_equal(canonicalization.refine(Cyclic(4), scores), np.eye(2))
    gradient = jax.grad(lambda s: canonicalization.refine(Cyclic(4), s).sum())(scores)
    assert np.isfinite(gradient).all()
