"""Matrices of elements, against their laws and against loops of complex numbers."""

import cmath
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from equiadapt_jax import representations
from equiadapt_jax.actions import vectors
from equiadapt_jax.groups import SO, Cyclic, Dihedral, O

GROUPS = [kind(n) for kind in (Cyclic, Dihedral) for n in (2, 3, 4, 6, 8, 16)]
C4, D4 = Cyclic(4), Dihedral(4)
ORDERS = [f"irrep{k}{sign}" for k in range(5) for sign in ("", "_sign")]


def names(group):
    irreducible = [f"irrep{k}{sign}" for k in range(group.n // 2 + 1) for sign in ("", "_sign")]
    return ["trivial", "sign", "standard", "regular", *irreducible]


def by_hand(group, g, name):
    """ρ(g) of an element, from the definition, in float64."""
    steps, mirrored = g % group.n, g // group.n
    if name == "regular":
        rho = np.zeros((group.order, group.order))
        for h in range(group.order):
            rho[group.compose(g, h), h] = 1  # e_h goes to e_{g∘h}
        return rho
    if name in ("trivial", "sign", "standard"):
        name = {"trivial": "irrep0", "sign": "irrep0_sign"}.get(name, name)
    order = 1 if name == "standard" else int(name.removeprefix("irrep").removesuffix("_sign"))
    sign = -1 if mirrored and name.endswith("_sign") else 1
    if name != "standard" and (order == 0 or 2 * order == group.n):
        return np.array([[sign * (-1.0) ** (steps if order else 0)]])
    # A counter-clockwise turn as displayed takes y-down coordinates clockwise: x − iy turns by +θ.
    turn = cmath.exp(2j * cmath.pi * steps * order / group.n)
    columns = []
    for x, y in ((1, 0), (0, 1)):
        z = turn * complex(-x if mirrored else x, -y)
        columns.append([z.real, -z.imag])
    return sign * np.array(columns).T


@pytest.mark.parametrize("group", GROUPS, ids=str)
def test_representations_are_the_definition_and_compose(group, x64):
    g = np.arange(group.order)
    products = np.asarray(group.compose(g[:, None], g))
    for name in names(group):
        rho = np.asarray(representations.matrix(group, g, name, jnp.float64))
        d = representations.dimension(group, name)
        assert rho.shape == (group.order, d, d)
        expected = np.stack([by_hand(group, i, name) for i in g])
        np.testing.assert_allclose(rho, expected, atol=1e-12, err_msg=name)
        product = np.einsum("gij,hjk->ghik", rho, rho)
        np.testing.assert_allclose(rho[products], product, atol=1e-12, err_msg=name)
        assert set(np.unique(rho[group.lattice])) <= {-1, 0, 1}, name


@pytest.mark.parametrize("group", [Cyclic(6), Dihedral(3), Dihedral(4)], ids=str)
def test_the_irreducible_ones_are_all_and_different(group, x64):
    """Characters: orthogonal, and Σ d²/⟨χ, χ⟩ is the order of the group."""
    g = np.arange(group.order)
    irreducible = [n for n in names(group) if n.startswith("irrep")]
    if isinstance(group, Cyclic):
        irreducible = [n for n in irreducible if not n.endswith("_sign")]
    characters, squares = {}, 0.0
    for name in irreducible:
        rho = np.asarray(representations.matrix(group, g, name, jnp.float64))
        character = np.trace(rho, axis1=1, axis2=2)
        if len(rho[0]) == 2 and name.endswith("_sign"):  # equivalent to the one without
            np.testing.assert_allclose(character, characters[name.removesuffix("_sign")])
            continue
        characters[name] = character
        squares += len(rho[0]) ** 2 / np.mean(character**2)
    assert squares == pytest.approx(group.order)
    for one, other in itertools.combinations(characters.values(), 2):
        assert abs(np.mean(one * other)) < 1e-12


def test_vectors_turn_by_their_matrix_wherever_their_axis_is(x64):
    group, rng = Dihedral(6), np.random.default_rng(0)
    g = rng.integers(0, 12, (3, 2))
    for name in ("standard", "sign", "regular", "irrep2", "irrep3"):
        d = representations.dimension(group, name)
        v = rng.normal(size=(3, 2, 5, d))
        expected = np.empty_like(v)
        for i, j in np.ndindex(3, 2):
            expected[i, j] = v[i, j] @ by_hand(group, g[i, j], name).T
        turned = vectors.act(group, g, v, representation=name)
        np.testing.assert_allclose(turned, expected, atol=1e-12)
        moved = vectors.act(group, g, np.swapaxes(v, -1, -2), representation=name, axis=-2)
        np.testing.assert_array_equal(np.swapaxes(moved, -1, -2), turned)
        one = vectors.act(group, 7, v[0, 0], representation=name)
        np.testing.assert_allclose(one, v[0, 0] @ by_hand(group, 7, name).T, atol=1e-12)


def test_standard_vectors_point_where_the_image_shows_them():
    right, up = np.float32([1, 0]), np.float32([0, -1])
    turn, mirror = 1, 4
    np.testing.assert_array_equal(vectors.act(D4, turn, right), up)  # counter-clockwise
    np.testing.assert_array_equal(vectors.act(D4, turn, up), -right)
    np.testing.assert_array_equal(vectors.act(D4, mirror, right), -right)
    np.testing.assert_array_equal(vectors.act(D4, mirror, up), up)


def test_regular_vectors_are_permuted_as_scores_are():
    scores = np.random.default_rng(0).normal(size=(8, 8)).astype(np.float32)
    g = np.arange(8)
    turned = np.asarray(vectors.act(D4, g, scores, representation="regular"))
    for i in g:  # scores(g·x)[g∘i] = scores(x)[i]
        np.testing.assert_array_equal(turned[i][np.asarray(D4.compose(i, g))], scores[i])
    labels = np.arange(8, dtype=np.int32)  # nothing is computed, so integers stay what they are
    moved = vectors.act(D4, 3, labels, representation="regular")
    assert moved.dtype == labels.dtype
    np.testing.assert_array_equal(moved, D4.compose(D4.inverse(3), labels))


def test_exact_elements_change_no_bit_there_and_back_in_any_precision():
    g = np.arange(8)
    v = np.random.default_rng(1).normal(size=(8, 3, 2))
    for dtype in (jnp.float16, jnp.bfloat16, jnp.float32):
        x = jnp.asarray(v, dtype)
        for name in ("standard", "irrep1", "irrep1_sign"):
            back = vectors.act(D4, D4.inverse(g), vectors.act(D4, g, x, representation=name),
                               representation=name)  # fmt: skip
            assert back.dtype == dtype
            assert np.asarray(back).tobytes() == np.asarray(x).tobytes()


V = np.zeros((3, 2), np.float32)
REFUSED = {
    "another name": (lambda: representations.dimension(C4, "vector"), ValueError,
                     "'vector': there are trivial, sign, standard, regular, irrep<k>"),
    "too high an order": (lambda: representations.matrix(C4, 0, "irrep3"), ValueError,
                          "'irrep3' is not irreducible over cyclic4: orders go from 0 to 2"),
    "another length": (lambda: vectors.act(C4, 0, V, representation="regular"), ValueError,
                       r"\(3, 2\) are not 'regular' over cyclic4: axis -1 must have length 4"),
    "elements for other vectors": (lambda: vectors.act(C4, jnp.zeros(2, int), V), ValueError,
                                   r"shape \(2,\) do not fit vectors of shape \(3, 2\)"),
    "integers": (lambda: vectors.act(C4, 0, V.astype(int)), TypeError, "int64 cannot be turned"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_with_a_sentence(case):
    function, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        function()


# ---- SO(2) and O(2) ----


@pytest.mark.parametrize("group", [SO(2), O(2)], ids=str)
def test_matrix_groups_have_the_representations_of_their_finite_subgroups(group, x64):
    """On C_16 or D_16 in them, and they compose at any angle; exact elements are exact."""
    subgroup = Cyclic(16) if group == SO(2) else Dihedral(16)
    inside = subgroup.matrix(np.arange(subgroup.order), jnp.float64)
    keys = jax.random.split(jax.random.key(0))
    angles = [np.asarray(jax.random.uniform(key, (20,), jnp.float64, 0, 7)) for key in keys]
    g, h = (group.rotation(angle) for angle in angles)
    if group == O(2):
        g, h = group.mirrored(g, np.arange(20) % 2), group.mirrored(h, np.arange(20) % 3 == 0)
    for name in ["standard", "sign", "trivial", *ORDERS]:
        rho = representations.matrix(group, inside, name, jnp.float64)
        expected = representations.matrix(subgroup, np.arange(subgroup.order), name, jnp.float64)
        np.testing.assert_allclose(rho, expected, atol=1e-12, err_msg=name)
        np.testing.assert_array_equal(rho[subgroup.lattice], expected[subgroup.lattice])
        one, other, both = (
            np.asarray(representations.matrix(group, m, name, jnp.float64))
            for m in (g, h, group.compose(g, h))
        )
        np.testing.assert_allclose(both, one @ other, atol=1e-12, err_msg=name)
    with pytest.raises(ValueError, match="regular representation needs a finite group, and"):
        representations.dimension(group, "regular")


def test_vectors_turn_by_any_angle_with_a_derivative():
    group, v = SO(2), jnp.float32([1.0, 0.0])
    angle = jnp.float32([0.3, 1.0])
    turned = vectors.act(group, group.rotation(angle), jnp.stack([v, v]), representation="irrep2")
    expected = np.stack([np.cos(2 * angle), -np.sin(2 * angle)], -1)
    np.testing.assert_allclose(turned, expected, rtol=1e-6)
    slope = jax.grad(lambda a: vectors.act(group, group.rotation(a), v, representation="irrep2")[0])
    np.testing.assert_allclose(slope(0.3), -2 * np.sin(0.6), rtol=1e-5)
