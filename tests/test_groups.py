"""The laws of C_n and D_n for any n, against 2×2 matrices made here from the elements' names."""

import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.extra import numpy as hnp

from equiadapt_jax import groups
from equiadapt_jax.groups import Cyclic, Dihedral

FEW = [Cyclic(1), Cyclic(4), Cyclic(6), Dihedral(1), Dihedral(3), Dihedral(4), Dihedral(8)]

any_group = st.builds(
    lambda kind, n: kind(n), st.sampled_from([Cyclic, Dihedral]), st.integers(1, 60)
)


@st.composite
def group_and_elements(draw, count):
    """A group and `count` arrays of elements of one shape."""
    group = draw(any_group)
    element = st.integers(0, group.order - 1)
    shape = draw(hnp.array_shapes(min_dims=0, max_dims=2, max_side=4))
    return group, *(draw(hnp.arrays(np.int32, shape, elements=element)) for _ in range(count))


def matrices(group):
    """Element i is r^(i mod n) · s^(i div n): s mirrors x, r turns by 2π/n counter-clockwise.

    In (x to the right, y down) a counter-clockwise θ maps (x, y) to (c·x + s·y, −s·x + c·y).
    """
    table = []
    for i in range(group.order):
        angle = 2 * np.pi * (i % group.n) / group.n
        rotation = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
        mirror = np.array([[-1.0, 0.0], [0.0, 1.0]])
        table.append(rotation @ (mirror if i // group.n else np.eye(2)))
    return np.array(table)


def named(group, matrix):
    """The element whose matrix this is."""
    distance = np.abs(matrices(group) - matrix[..., None, :, :]).max((-1, -2))
    assert (distance.min(-1) < 1e-9).all()
    return distance.argmin(-1)


@given(group_and_elements(3))
def test_group_laws(case):
    group, g, h, k = case
    compose, e = group.compose, 0
    assert int(group.identity()) == e
    np.testing.assert_array_equal(compose(g, e), g)
    np.testing.assert_array_equal(compose(e, g), g)
    np.testing.assert_array_equal(compose(g, group.inverse(g)), np.zeros_like(g))
    np.testing.assert_array_equal(compose(group.inverse(g), g), np.zeros_like(g))
    np.testing.assert_array_equal(compose(compose(g, h), k), compose(g, compose(h, k)))
    np.testing.assert_array_equal(
        group.inverse(compose(g, h)), compose(group.inverse(h), group.inverse(g))
    )
    for element in (compose(g, h), group.inverse(g)):
        assert element.dtype == np.int32
        assert element.shape == g.shape
        assert ((element >= 0) & (element < group.order)).all()


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 6, 7, 8, 12, 16])
@pytest.mark.parametrize("kind", [Cyclic, Dihedral])
def test_composition_and_inverse_are_those_of_the_matrices(kind, n):
    group, table = kind(n), matrices(kind(n))
    g, h = np.meshgrid(np.arange(group.order), np.arange(group.order), indexing="ij")
    np.testing.assert_array_equal(group.compose(g, h), named(group, table[g] @ table[h]))
    np.testing.assert_array_equal(
        group.inverse(np.arange(group.order)), named(group, np.linalg.inv(table))
    )


def test_dihedral_groups_do_not_commute():
    group = Dihedral(4)
    assert group.compose(1, 4) == 5  # mirror first, then a quarter turn
    assert group.compose(4, 1) == 7  # the other way round: r⁻¹ after the mirror
    assert [group.inverse(g) for g in range(8)] == [0, 3, 2, 1, 4, 5, 6, 7]


@settings(max_examples=8)  # compiles for every group
@given(any_group)
def test_matrix_is_the_standard_representation(group):
    actual = group.matrix(group.elements())
    assert actual.shape == (group.order, 2, 2)
    assert actual.dtype == jnp.float32
    np.testing.assert_allclose(actual, matrices(group), atol=3e-7)
    exact = np.asarray(actual)[group.lattice]
    np.testing.assert_array_equal(exact, np.round(exact))


def test_matrix_has_the_precision_asked_for(x64):
    group = Dihedral(7)
    np.testing.assert_allclose(
        group.matrix(group.elements(), jnp.float64), matrices(group), atol=1e-15
    )


@given(group_and_elements(1))
def test_elements_are_named_by_steps_and_mirror(case):
    group, g = case
    np.testing.assert_array_equal(group.steps(g), g % group.n)
    np.testing.assert_array_equal(group.reflects(g), g // group.n)
    mirror = group.n if isinstance(group, Dihedral) else 0
    if mirror:
        expected = group.compose(group.steps(g), group.reflects(g) * mirror)
        np.testing.assert_array_equal(expected, g)
    else:
        assert not group.reflects(g).any()


@settings(max_examples=8)  # compiles for every group
@given(any_group)
def test_elements_and_order(group):
    assert group.order == group.n * (2 if isinstance(group, Dihedral) else 1)
    assert group.elements().dtype == jnp.int32
    np.testing.assert_array_equal(group.elements(), np.arange(group.order))
    assert group.identity().dtype == jnp.int32
    assert group.identity().shape == ()


@given(any_group)
def test_lattice_is_the_subgroup_whose_matrices_permute_the_axes(group):
    table = matrices(group)
    expected = np.flatnonzero((np.abs(table - np.round(table)) < 1e-9).all((1, 2)))
    np.testing.assert_array_equal(group.lattice, expected)
    products = group.compose(group.lattice[:, None], group.lattice)
    assert set(products.ravel()) == set(group.lattice)


@given(any_group)
def test_split_into_remainder_and_lattice_element(group):
    g = np.arange(group.order, dtype=np.int32)
    remainder, exact = group.split(g)
    np.testing.assert_array_equal(group.compose(remainder, exact), g)
    assert np.isin(exact, group.lattice).all()
    assert not group.reflects(remainder).any()
    # One remainder for a whole left coset: this is what makes act(g∘q, x) = act(g, act(q, x)).
    coset = group.compose(g[:, None], group.lattice)
    np.testing.assert_array_equal(
        group.split(coset)[0], np.broadcast_to(remainder[:, None], coset.shape)
    )
    # The remainder turns by at most half the angle between exact turns: 45° where 4 divides n.
    turn = np.minimum(remainder, group.n - remainder) / group.n
    exact_turns = len(group.lattice) // (group.order // group.n)
    assert (turn <= 0.5 / exact_turns + 1e-12).all()
    np.testing.assert_array_equal(remainder[group.lattice], 0)


def operations(group, g, h):
    """Everything a group computes from elements, as one tree."""
    return {
        "compose": group.compose(g, h),
        "inverse": group.inverse(g),
        "steps": group.steps(g),
        "reflects": group.reflects(g),
        "split": group.split(g),
    }


@pytest.mark.parametrize("group", FEW, ids=str)
def test_integers_arrays_and_tracers_agree(group, strict):
    g, h = (a.ravel().astype(np.int32) for a in np.meshgrid(range(group.order), range(group.order)))
    expected = operations(group, g, h)
    of_integers = [operations(group, int(a), int(b)) for a, b in zip(g, h, strict=True)]
    assert all(type(leaf) is int for leaf in jax.tree.leaves(of_integers))
    stacked = jax.tree.map(lambda *leaves: np.array(leaves), *of_integers)
    operate = functools.partial(operations, group)
    jitted, mapped = jax.jit(operate)(g, h), jax.jit(jax.vmap(operate))(g, h)
    batched = jax.jit(operate)(g[:, None], h[:, None])
    for actual in (stacked, jitted, mapped, jax.tree.map(lambda a: a[:, 0], batched)):
        jax.tree.map(np.testing.assert_array_equal, actual, expected)
    assert all(leaf.dtype == jnp.int32 for leaf in jax.tree.leaves(jitted))


@pytest.mark.parametrize("group", [Cyclic(1), Cyclic(6), Dihedral(3), Dihedral(4)], ids=str)
def test_random_elements_are_uniform(group):
    draw = jax.jit(type(group).random, static_argnums=2)
    per_element = 400
    sample = draw(group, jax.random.key(0), (group.order, per_element))
    assert sample.shape == (group.order, per_element)
    assert sample.dtype == jnp.int32
    counts = np.bincount(np.ravel(sample), minlength=group.order)
    assert counts.size == group.order
    # Each count is binomial around 400 with a standard deviation of at most 20.
    assert (np.abs(counts - per_element) < 100).all()
    np.testing.assert_array_equal(sample, draw(group, jax.random.key(0), sample.shape))
    if group.order > 1:
        assert (sample != draw(group, jax.random.key(1), sample.shape)).any()
    assert group.random(jax.random.key(2)).shape == ()


def test_groups_are_static():
    group = Dihedral(4)
    assert jax.tree.leaves(group) == []
    assert group == Dihedral(4)
    assert hash(group) == hash(Dihedral(4))
    assert len({Cyclic(4), Dihedral(4), Cyclic(8), Cyclic(4)}) == 3
    with pytest.raises(AttributeError):
        group.n = 5

    compose = jax.jit(lambda group, g, h: group.compose(g, h))
    g = jnp.arange(8, dtype=jnp.int32)
    for other in (group, Dihedral(4), Dihedral(2 * 2)):
        np.testing.assert_array_equal(
            compose(other, g, g), group.compose(np.arange(8), np.arange(8))
        )
    assert compose._cache_size() == 1
    compose(Dihedral(8), g, g)
    assert compose._cache_size() == 2


def test_groups_travel_in_a_scan():
    def step(carry, h):
        group, g = carry
        return (group, group.compose(h, g)), g

    start = (Cyclic(6), Cyclic(6).identity())
    (group, g), path = jax.lax.scan(step, start, jnp.full(8, 5, jnp.int32))
    assert group == Cyclic(6)
    assert int(g) == 40 % 6
    np.testing.assert_array_equal(path, -np.arange(8) % 6)


@given(any_group)
def test_names_round_trip(group):
    assert groups.from_name(str(group)) == group


@pytest.mark.parametrize(
    "name", ["c4", "cyclic", "cyclic0", "cyclic-4", "Dihedral4", "cyclic4 ", ""]
)
def test_unknown_names_are_refused(name):
    with pytest.raises(ValueError, match="Unknown group .*cyclic4, cyclic8 or dihedral4"):
        groups.from_name(name)


@given(group_and_elements(2), st.integers(-3, 3))
def test_integers_beyond_the_order_are_those_modulo_it(case, times):
    group, g, h = case
    beyond = g + times * group.order
    for method in (group.inverse, group.steps, group.reflects):
        np.testing.assert_array_equal(method(beyond), method(g))
    np.testing.assert_array_equal(group.compose(beyond, h), group.compose(g, h))
    np.testing.assert_array_equal(group.compose(h, beyond), group.compose(h, g))
    for one, other in zip(group.split(beyond), group.split(g), strict=True):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(group.matrix(beyond), group.matrix(g))


def test_numpy_integers_are_integers():
    assert Cyclic(np.int64(4)) == Cyclic(4)
    assert type(Cyclic(np.int64(4)).n) is int


@pytest.mark.parametrize("kind", [Cyclic, Dihedral])
@pytest.mark.parametrize("n", [0, -4, 2.0, True, "4", None])
def test_orders_that_do_not_exist_are_refused(kind, n):
    with pytest.raises(ValueError, match=rf"{kind.__name__}\(n=.*integer of at least 1"):
        kind(n)
