"""SO(2) and O(2): their laws in float64, and what their elements do to images."""

import functools
import math

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from jax.test_util import check_grads

from equiadapt_jax import averaging, canonicalization, groups, networks, priors
from equiadapt_jax.actions import images
from equiadapt_jax.groups import SO, Cyclic, Dihedral, O

GROUPS = [SO(2), O(2)]
MIRROR = np.diag([-1.0, 1.0])

act = jax.jit(images.act, static_argnames=("pad", "interpolation"))
compose = jax.jit(lambda group, g, h: group.compose(g, h))
split = jax.jit(lambda group, g: group.split(g))


def turn(angle, mirrored=0, dtype=np.float64):
    """In (x to the right, y down): (x, y) to (c·x + s·y, −s·x + c·y), after a mirror of x."""
    c, s = math.cos(angle), math.sin(angle)
    rotation = np.array([[c, s], [-s, c]])
    return (rotation @ MIRROR if mirrored else rotation).astype(dtype)


def exact(group):
    """Quarter turns, and for O(2) those after a mirror, as integers."""
    quarters = [np.linalg.matrix_power(np.array([[0, 1], [-1, 0]]), k) for k in range(4)]
    mirrored = [q @ MIRROR.astype(int) for q in quarters]
    return quarters + (mirrored if group == O(2) else [])


def sample(group, count=40, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    mirrors = rng.integers(0, 2, count) * (group == O(2))
    angles = rng.uniform(-7, 7, count)
    return np.stack([turn(a, m, dtype) for a, m in zip(angles, mirrors, strict=True)])


def noise(*shape, dtype=np.float32, seed=0):
    return np.random.default_rng(seed).uniform(size=shape).astype(dtype)


# ---- laws ----


@pytest.mark.parametrize("group", GROUPS, ids=str)
def test_group_laws_are_those_of_matrices(group, x64):
    g, h, k = (sample(group, dtype=np.float64, seed=seed) for seed in range(3))
    gh = compose(group, g, h)
    np.testing.assert_allclose(gh, g @ h, atol=1e-14)
    np.testing.assert_allclose(
        compose(group, gh, k), compose(group, g, compose(group, h, k)), atol=1e-14
    )
    np.testing.assert_allclose(group.inverse(g), np.linalg.inv(g), atol=1e-14)
    np.testing.assert_array_equal(compose(group, g, group.identity()), g)
    np.testing.assert_array_equal(group.matrix(g, jnp.float64), g)
    np.testing.assert_array_equal(group.reflects(g), np.linalg.det(g) < 0)
    assert group.reflects(g).dtype == jnp.int32


def test_angles_are_those_of_the_rotation_after_the_mirror(x64):
    angles = np.linspace(-3.1, 3.1, 41)
    rotations = np.stack([turn(a) for a in angles])
    np.testing.assert_allclose(SO(2).rotation(angles), rotations, atol=1e-15)
    np.testing.assert_allclose(SO(2).angle(rotations), angles, atol=1e-14)
    np.testing.assert_allclose(O(2).angle(rotations @ MIRROR), angles, atol=1e-14)
    np.testing.assert_array_equal(O(2).mirrored(rotations), rotations @ MIRROR)
    where = angles > 0
    chosen = np.where(where[:, None, None], rotations @ MIRROR, rotations)
    np.testing.assert_array_equal(O(2).mirrored(rotations, where), chosen)


@given(quarters=st.integers(-9, 9))
def test_quarter_turns_are_exact(quarters):
    expected = np.linalg.matrix_power(np.array([[0, 1], [-1, 0]]), quarters % 4)
    angle = np.float32(quarters * np.pi / 2)
    np.testing.assert_array_equal(SO(2).rotation(angle), expected)


def test_a_rotation_has_the_derivative_of_its_matrix(x64):
    slope = jax.jit(jax.jacfwd(SO(2).rotation))
    for angle in (0.0, 0.3, np.pi / 2, -2.0):
        c, s = math.cos(angle), math.sin(angle)
        np.testing.assert_allclose(slope(angle), [[-s, c], [-c, -s]], atol=1e-14)


@pytest.mark.parametrize("group", GROUPS, ids=str)
def test_split_into_a_small_turn_and_an_exact_element(group):
    g = np.concatenate(
        [sample(group), *(np.float32(turn(k * np.pi / 4))[None] for k in range(8)),
         np.float32(exact(group))]
    )  # fmt: skip
    rest, q = split(group, g)
    lattice = np.float32(exact(O(2)))
    np.testing.assert_array_equal(np.asarray(rest) @ lattice[np.asarray(q)], g)
    assert (np.abs(np.arctan2(rest[:, 0, 1], rest[:, 0, 0])) <= np.pi / 4 + 1e-6).all()
    assert (np.linalg.det(rest) > 0).all()
    for other in np.float32(exact(group)):
        np.testing.assert_array_equal(split(group, compose(group, g, other))[0], rest)


@pytest.mark.parametrize("group", GROUPS, ids=str)
def test_random_elements_are_uniform(group):
    draw = jax.jit(lambda key: group.random(key, (2000,)))
    g = np.asarray(draw(jax.random.key(0)))
    assert g.shape == (2000, 2, 2)
    assert g.dtype == np.float32
    np.testing.assert_allclose(g @ g.swapaxes(1, 2), np.broadcast_to(np.eye(2), g.shape), atol=1e-6)
    counts = np.histogram(np.arctan2(g[:, 0, 1], g[:, 1, 1]), 8, (-np.pi, np.pi))[0]
    assert (np.abs(counts - 250) < 75).all()  # five standard deviations
    share = np.mean(np.linalg.det(g) < 0)
    assert share == 0 if group == SO(2) else abs(share - 0.5) < 0.06


def test_groups_are_static_and_named():
    assert SO(2) == SO(2)
    assert len({SO(2), O(2), Cyclic(4), SO(2)}) == 3
    assert jax.tree.leaves(O(2)) == []
    for group in GROUPS:
        assert groups.from_name(str(group)) == group
        assert group.order is None
        assert not hasattr(group, "n")  # which would be mistaken for a number of rotations
        np.testing.assert_array_equal(group.identity(), np.eye(2))


# ---- refusals ----


@pytest.mark.parametrize("kind", [SO, O])
@pytest.mark.parametrize("d", [1, 3, "2", True, None])
def test_other_dimensions_are_refused(kind, d):
    with pytest.raises(ValueError, match=rf"{kind.__name__}\(d=.*take {kind.__name__}\(2\)"):
        kind(d)


@pytest.mark.parametrize(
    "ask",
    [
        lambda group: group.elements(),
        lambda group: images.orbit(group, jnp.zeros((4, 4, 1))),
        lambda group: canonicalization.select_pose(group, jnp.zeros(4)),
        lambda group: canonicalization.mixture(group, jnp.zeros(4), jnp.zeros((4, 4, 1))),
        lambda group: canonicalization.from_scores(group, jnp.zeros(4), jnp.zeros((4, 4, 1))),
        lambda group: canonicalization.refine(group, jnp.zeros(4)),
        lambda group: canonicalization.canonicalize(
            group, jnp.eye(2), jnp.zeros((4, 4, 1)), jnp.zeros(4)
        ),
        lambda group: averaging.best(group, jnp.zeros(4)),
        lambda group: priors.Categorical((0.5, 0.5)).loss(group, jnp.zeros((1, 2))),
        lambda group: networks.GroupConvNet(group).init(jax.random.key(0), jnp.zeros((1, 4, 4, 1))),
        lambda group: networks.FeatureScorer(group).init(jax.random.key(0), jnp.zeros((1, 4, 4))),
    ],
)
@pytest.mark.parametrize("group", GROUPS, ids=str)
def test_what_counts_elements_says_which_group_to_take(ask, group):
    finite = "cyclic16" if group == SO(2) else "dihedral16"
    with pytest.raises(ValueError, match=rf"needs a finite group, and {group} .*{finite}\."):
        ask(group)


# ---- images ----


@pytest.mark.parametrize("group", GROUPS, ids=str)
@pytest.mark.parametrize("size", [6, 7])
def test_exact_elements_only_move_pixels(group, size):
    x = noise(3, size, size, 2)
    for i, q in enumerate(exact(group)):
        turned = np.rot90(x[:, :, ::-1] if i >= 4 else x, i % 4, axes=(1, 2))
        np.testing.assert_array_equal(act(group, np.float32(q), x), turned)


@settings(max_examples=20)
@given(seed=st.integers(0, 999), index=st.integers(0, 7), pad=st.sampled_from(["edge", "constant"]))
def test_an_exact_element_on_the_right_acts_first_to_the_bit(seed, index, pad):
    x, g = noise(4, 7, 7, 1), sample(O(2), 4, seed=seed)
    q = np.float32(exact(O(2))[index])
    composed = act(O(2), compose(O(2), g, q), x, pad=pad)
    np.testing.assert_array_equal(composed, act(O(2), g, act(O(2), q, x, pad=pad), pad=pad))


@pytest.mark.parametrize(
    ("group", "finite"), [(SO(2), Cyclic(8)), (SO(2), Cyclic(5)), (O(2), Dihedral(8))]
)
def test_they_act_as_the_elements_of_finite_groups(group, finite, x64):
    x = noise(finite.order, 7, 7, 2, dtype=np.float64)
    g = finite.matrix(np.arange(finite.order), jnp.float64)
    expected = act(finite, np.arange(finite.order, dtype=np.int32), x)
    np.testing.assert_allclose(act(group, g, x), expected, atol=1e-13)


def test_they_act_as_rotations_do(x64):
    x, angle = noise(6, 9, 9, 1, dtype=np.float64), np.linspace(-3, 4, 6)
    for how in ({}, {"pad": "constant", "fill": 0.5}, {"interpolation": "cubic"}):
        expected = images.rotate(x, angle, **how)
        np.testing.assert_allclose(
            act(SO(2), SO(2).rotation(angle), x, **how), expected, atol=1e-13
        )


def test_gradients_reach_images_and_angles_through_the_matrix(x64):
    x, weight = noise(2, 6, 6, 1, dtype=np.float64), noise(2, 6, 6, 1, dtype=np.float64, seed=1)

    @functools.partial(jax.jit, static_argnums=0)
    def value(mirrored, angle, x):
        g = O(2).mirrored(O(2).rotation(angle), mirrored)
        return (act(O(2), g, x) * weight).sum()

    for mirrored in (False, True):
        function = functools.partial(value, mirrored)
        check_grads(function, (np.array([0.41, 2.03]), x), 1, ("rev",), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("g", "shape", "error", "sentence"),
    [
        (np.zeros((3,)), (2, 4, 4, 1), ValueError, r"so2 are matrices .* got \(3,\): .*rotation"),
        (np.zeros((3, 2, 2)), (2, 4, 4, 1), ValueError, r"shape \(3,\), the images \(2, 4, 4, 1\)"),
        (np.eye(2), (2, 4, 5, 1), ValueError, "so2 would change the shape of images of 4×5"),
    ],
)
def test_what_does_not_fit_is_refused(g, shape, error, sentence):
    with pytest.raises(error, match=sentence):
        images.act(SO(2), np.float32(g), jnp.zeros(shape))


def test_integers_cannot_be_interpolated():
    with pytest.raises(TypeError, match="convert them to floats"):
        images.act(SO(2), np.eye(2, dtype=np.float32), jnp.zeros((4, 4, 1), jnp.int32))
