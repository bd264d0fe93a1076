"""Fields, against functions of the plane that are known, and exact elements bit by bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from equiadapt_jax import outputs, representations
from equiadapt_jax.actions import fields, images
from equiadapt_jax.groups import SO, Cyclic, Dihedral, O
from tests.test_representations import by_hand, names

D4 = Dihedral(4)


def noise(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def field_of(group, name, *shape, channels=3):
    d = () if name == "trivial" else (representations.dimension(group, name),)
    return noise(*shape, *d, channels)


EXACT = [Cyclic(2), Cyclic(4), Cyclic(6), Cyclic(8), *map(Dihedral, (1, 2, 3, 4, 8))]


def shape_for(group):
    """Oblong where the group lets it be."""
    return (4, 5) if group.n <= 2 else (4, 4)


@pytest.mark.parametrize("group", EXACT, ids=str)
def test_exact_elements_are_inverted_to_the_bit_in_every_representation(group):
    """For an element each and one for all, for elements known before tracing and not."""
    act = jax.jit(fields.act, static_argnames="representation")
    g = group.lattice
    for name in names(group):
        x = field_of(group, name, len(g), *shape_for(group))
        canonical = fields.act(group, group.inverse(g), x, representation=name)
        back = outputs.invert(group, jnp.asarray(g), canonical, output=f"field:{name}")
        assert np.asarray(back).tobytes() == x.tobytes(), name
        traced = act(group, group.inverse(g), x, representation=name)
        assert np.asarray(traced).tobytes() == np.asarray(canonical).tobytes(), name
        assert (np.asarray(canonical) != x)[1:].any(axis=tuple(range(1, x.ndim))).all(), name
        one = fields.act(group, group.inverse(int(g[-1])), x[-1], representation=name)
        assert np.asarray(one).tobytes() == np.asarray(canonical[-1]).tobytes(), name


@pytest.mark.parametrize("group", EXACT, ids=str)
def test_exact_elements_are_a_left_action_by_pixel_loops(group):
    """(g·f)(p) = ρ(g) f(g⁻¹·p), a pixel at a time; ρ of reflections from its definition too."""
    height, width = shape_for(group)
    centre = np.array([width - 1, height - 1]) / 2
    for name in names(group):
        x = field_of(group, name, height, width)
        turned = fields.act(
            group, group.lattice, np.stack([x] * len(group.lattice)), representation=name
        )
        for g, found in zip(group.lattice, turned, strict=True):
            rho, move = by_hand(group, g, name), by_hand(group, g, "standard").round()
            expected = np.empty_like(x)
            for row, column in np.ndindex(height, width):
                to = move @ ([column, row] - centre) + centre  # image vectors: x, then y
                there = tuple(int(i) for i in to.round()[::-1])
                value = x[row, column]
                expected[there] = value if name == "trivial" else rho @ value
            np.testing.assert_allclose(found, expected, atol=1e-6, err_msg=f"{name} {g}")


# Smooth fields of the plane, in coordinates from −1 to 1 over the disk.


def smooth(x, y):
    """Two numbers at every place, of low frequency."""
    one = np.cos(2.1 * x - 0.7 * y + 0.3) + 0.5 * x * y
    return np.stack([one, np.sin(1.3 * y + 0.4 * x) - 0.3 * x * x], -1)


SIZE = 48
PLACE = (np.arange(SIZE) - (SIZE - 1) / 2) * 2 / SIZE
INSIDE = PLACE[:, None] ** 2 + PLACE**2 < 0.92  # of the disk, a pixel from its edge


def sample(d, x, y):
    """A field of d numbers, other ones at each place."""
    return np.concatenate([smooth(x + k / d, y) for k in range(-(-d // 2))], -1)[..., :d]


# With elements of SO(2) and O(2) at odd angles, those of a finite group in them.
INTERPOLATED = [
    (group, group)
    for group in [*map(Cyclic, (3, 6, 8, 16)), *map(Dihedral, (3, 6, 8))]
] + [(SO(2), Cyclic(37)), (O(2), Dihedral(37))]  # fmt: skip
NAMES_OF_MATRIX_GROUPS = ["trivial", "sign", "standard", "irrep1_sign", "irrep2", "irrep3_sign"]


@pytest.mark.parametrize(("group", "finite"), INTERPOLATED, ids=str)
def test_known_fields_go_where_the_formula_says_and_back_with_the_error_that_the_docs_state(
    group, finite
):
    """Of every representation, in ±1.5, inside the disk: 0.002 there, 0.003 there and back."""
    elements = np.unique([1, 2, finite.n // 2, finite.order - finite.n // 3, finite.order - 1])
    x, y = np.meshgrid(PLACE, PLACE)
    g = finite.matrix(elements) if group != finite else elements
    all_names = names(group) if group == finite else NAMES_OF_MATRIX_GROUPS
    moves = [by_hand(finite, i, "standard").T for i in elements]  # of g⁻¹
    for name in all_names:
        d = representations.dimension(group, name)
        f = sample(d, x, y)
        assert 1 < np.abs(f[INSIDE]).max() < 1.5
        own = f[..., None] if name != "trivial" else f
        before = np.stack([own.astype(np.float32)] * len(elements))
        there = fields.act(group, g, before, representation=name)
        back = fields.act(group, group.inverse(g), there, representation=name)
        assert np.abs(back - before)[:, INSIDE].max() < 3e-3, name
        for i, m, found in zip(elements, moves, np.asarray(there), strict=True):
            moved = sample(d, m[0, 0] * x + m[0, 1] * y, m[1, 0] * x + m[1, 1] * y)
            expected = moved @ by_hand(finite, i, name).T
            assert np.abs(found.reshape(f.shape) - expected)[INSIDE].max() < 2e-3, (name, i)


@pytest.mark.parametrize("name", ["trivial", "standard", "regular"])
def test_there_and_back_with_keys_kernel_loses_what_the_docs_say(name):
    """Which keeps edges, and not slopes: 0.02 at 45°."""
    group, x, y = Dihedral(8), *np.meshgrid(PLACE, PLACE)
    f = sample(representations.dimension(group, name), x, y)
    f = (f if name == "trivial" else f[..., None]).astype(np.float32)
    how = {"representation": name, "interpolation": "cubic"}
    for g in (1, 9):
        back = fields.act(group, group.inverse(g), fields.act(group, g, f, **how), **how)
        assert np.abs(back - f)[INSIDE].max() < 2e-2


@pytest.mark.parametrize("name", NAMES_OF_MATRIX_GROUPS)
def test_matrix_groups_turn_fields_as_their_finite_subgroups_do(name):
    """Bit for bit where elements are exact, also there and back."""
    x = field_of(O(2), name, 8, 6, 6)
    g = D4.matrix(np.arange(8))
    turned = fields.act(O(2), g, x, representation=name)
    if name not in ("irrep2", "irrep3_sign"):  # of which D4 has one of one dimension, and none
        expected = fields.act(D4, np.arange(8), x, representation=name)
        np.testing.assert_array_equal(turned, expected)
    back = fields.act(O(2), O(2).inverse(g), turned, representation=name)
    assert np.asarray(back).tobytes() == x.tobytes()
    rotations = slice(None, 4)
    turned = fields.act(SO(2), g[rotations], x[rotations], representation=name)
    back = fields.act(SO(2), SO(2).inverse(g[rotations]), turned, representation=name)
    assert np.asarray(back).tobytes() == x[rotations].tobytes()


def test_regular_fields_move_between_elements_too():
    f = noise(5, 5, 8, 2)
    turned = np.asarray(fields.act(D4, 5, f, representation="regular"))
    for h in range(8):
        before = f[:, :, int(D4.compose(D4.inverse(5), h))]
        np.testing.assert_array_equal(turned[:, :, h], images.act(D4, 5, before))


def test_gradients_are_the_inverse_action():
    """Exact elements are orthogonal: the transpose carries back."""
    g, x, cotangent = np.arange(8), noise(8, 4, 4, 2, 1), noise(8, 4, 4, 2, 1, seed=1)
    _, transpose = jax.vjp(lambda f: fields.act(D4, g, f, representation="standard"), x)
    back = fields.act(D4, D4.inverse(g), cotangent, representation="standard")
    np.testing.assert_allclose(transpose(jnp.asarray(cotangent))[0], back, atol=1e-6)


REFUSED = {
    "no axis of components": (
        lambda: fields.act(D4, 0, noise(4, 4, 2), representation="standard"), ValueError,
        r"shape \(4, 4, 2\) are not 'standard' over dihedral4: give \(..., H, W, 2, C\)"),
    "another dimension": (
        lambda: fields.act(D4, 0, noise(4, 4, 4, 1), representation="regular"), ValueError,
        r"not 'regular' over dihedral4: give \(..., H, W, 8, C\)"),
    "a fill that would turn": (
        lambda: fields.act(D4, 0, noise(4, 4, 2, 1), representation="standard", pad="constant",
                           fill=0.5), ValueError, "fill=0.5 around 'standard' .* fill with 0"),
    "not square": (
        lambda: fields.act(D4, 0, noise(4, 6, 2, 1), representation="standard"), ValueError,
        "dihedral4 would change the shape of images of 4×6"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_with_a_sentence(case):
    function, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        function()
