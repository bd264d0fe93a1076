"""Fields, against functions of the plane that are known, and exact elements bit by bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from equiadapt_jax import representations
from equiadapt_jax.actions import fields, images
from equiadapt_jax.groups import Cyclic, Dihedral, O
from tests.test_representations import by_hand

D4 = Dihedral(4)
NAMES = ["trivial", "sign", "standard", "regular", "irrep1", "irrep2", "irrep2_sign"]


def noise(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def field_of(group, name, *shape, channels=3):
    d = () if name == "trivial" else (representations.dimension(group, name),)
    return noise(*shape, *d, channels)


@pytest.mark.parametrize("name", NAMES)
def test_exact_elements_lose_no_bit_there_and_back_per_image_and_for_all(name):
    for group in (Cyclic(4), D4):
        g = np.arange(group.order)
        x = field_of(group, name, group.order, 5, 5)
        y = fields.act(group, group.inverse(g), x, representation=name)
        back = fields.act(group, g, y, representation=name)
        assert np.asarray(back).tobytes() == x.tobytes()
        assert (np.asarray(y) != x)[1:].any(axis=tuple(range(1, x.ndim))).all()
    one = fields.act(D4, 6, x, representation=name)
    each = fields.act(D4, np.full(8, 6), x, representation=name)
    np.testing.assert_array_equal(one, each)


@pytest.mark.parametrize("name", NAMES)
def test_exact_elements_are_a_left_action_by_pixel_loops(name):
    """(g·f)(p) = ρ(g) f(g⁻¹·p), an element and a pixel at a time."""
    size, c = 4, (4 - 1) / 2
    x = field_of(D4, name, size, size).astype(np.float64)
    with jax.enable_x64(True):
        for g in range(8):
            rho, move = by_hand(D4, g, name), by_hand(D4, g, "standard").round()
            expected = np.empty_like(x)
            for row, column in np.ndindex(size, size):
                to = move @ [column - c, row - c] + c  # image vectors: x, then y
                there = tuple(int(i) for i in to.round()[::-1])
                value = x[row, column]
                expected[there] = value if name == "trivial" else rho @ value
            turned = fields.act(D4, g, x, representation=name)
            np.testing.assert_allclose(turned, expected, atol=1e-12)


# Smooth fields of the plane, in coordinates from −1 to 1 over the disk.


def smooth(x, y):
    """Two numbers at every place, of low frequency."""
    one = np.cos(2.1 * x - 0.7 * y + 0.3) + 0.5 * x * y
    return np.stack([one, np.sin(1.3 * y + 0.4 * x) - 0.3 * x * x], -1)


@pytest.mark.parametrize("name", ["standard", "irrep2", "irrep3_sign", "regular"])
@pytest.mark.parametrize("group", [Cyclic(8), Dihedral(8)], ids=str)
def test_known_fields_are_carried_where_the_formula_says(group, name):
    """A field sampled before and after: the error inside the disk is that of interpolation."""
    size = 48
    place = np.arange(size) - (size - 1) / 2
    x, y = np.meshgrid(place, place)
    inside = x**2 + y**2 < (size / 2 - 1) ** 2
    d = representations.dimension(group, name)
    repeats = -(-d // 2)

    def sample(x, y):
        return np.concatenate([smooth(x * 2 / size + k, y * 2 / size) for k in range(repeats)], -1)

    f = sample(x, y)[..., :d]
    elements = [1, 2, 7, group.order - 1]
    for g in elements:
        move = by_hand(group, g, "standard").T  # of g⁻¹
        from_x, from_y = move[0, 0] * x + move[0, 1] * y, move[1, 0] * x + move[1, 1] * y
        expected = sample(from_x, from_y)[..., :d] @ by_hand(group, g, name).T
        turned = fields.act(group, g, f[..., None].astype(np.float32), representation=name)
        error = np.abs(turned[..., 0] - expected)[inside].max()
        assert error < (2e-3 if g % 2 else 1e-5), (g, error)


def test_there_and_back_at_45_degrees_loses_what_the_docs_say():
    """Of a smooth field in ±1.5, inside the disk: at most 0.003, and 0.02 of Keys' kernel."""
    group, size = Cyclic(8), 48
    place = (np.arange(size) - (size - 1) / 2) * 2 / size
    x, y = np.meshgrid(place, place)
    inside = x**2 + y**2 < 0.95
    f = smooth(x, y)[..., None].astype(np.float32)
    assert 1 < np.abs(f[inside]).max() < 1.5
    for interpolation, bound in (("linear", 3e-3), ("cubic", 2e-2)):
        there = fields.act(group, 7, f, representation="standard", interpolation=interpolation)
        back = fields.act(group, 1, there, representation="standard", interpolation=interpolation)
        assert np.abs(back - f)[inside].max() < bound


@pytest.mark.parametrize("name", ["trivial", "standard", "irrep2", "sign"])
def test_matrix_groups_carry_fields_as_their_finite_subgroups_do(name):
    """Bit for bit where elements are exact, also there and back."""
    x = field_of(O(2), name, 8, 6, 6)
    g = D4.matrix(np.arange(8))
    turned = fields.act(O(2), g, x, representation=name)
    if name != "irrep2":  # which for D4 has one dimension
        expected = fields.act(D4, np.arange(8), x, representation=name)
        np.testing.assert_array_equal(turned, expected)
    back = fields.act(O(2), O(2).inverse(g), turned, representation=name)
    np.testing.assert_array_equal(back, x)


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
