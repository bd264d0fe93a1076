"""Rotating and reflecting images, against loops written from the conventions in float64."""

import functools
import math

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis.extra import numpy as hnp
from jax.test_util import check_grads

from equiadapt_jax.actions import images
from equiadapt_jax.groups import Cyclic, Dihedral

EXACT = [Cyclic(1), Cyclic(2), Cyclic(4), Dihedral(1), Dihedral(2), Dihedral(4)]
INTERPOLATED = [Cyclic(8), Dihedral(8), Cyclic(6), Cyclic(16), Dihedral(12), Dihedral(5)]

act = jax.jit(images.act, static_argnames=("pad", "interpolation"))
rotate = jax.jit(images.rotate, static_argnames=("pad", "interpolation"))


def noise(*shape, dtype=np.float32, seed=0):
    return np.random.default_rng(seed).uniform(size=shape).astype(dtype)


def assert_same_bits(actual, expected):
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    unsigned = f"u{actual.dtype.itemsize}"
    np.testing.assert_array_equal(actual.view(unsigned), expected.view(unsigned))


def turn_and_mirror(image, quarters, mirror):
    """A left-right mirror first, then quarter turns counter-clockwise, on the first two axes."""
    return np.rot90(image[:, ::-1] if mirror else image, quarters)


def hat(distance):
    return max(0, 1 - abs(distance))


def keys(distance, a=-0.75):
    """Keys' kernel, equation 15 of his paper with another a."""
    d = abs(distance)
    if d <= 1:
        return (a + 2) * d**3 - (a + 3) * d**2 + 1
    return a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a if d < 2 else 0


KERNELS = {"linear": (hat, 1), "cubic": (keys, 2)}


def loops(image, angle, mirror=0, pad="edge", fill=0.0, interpolation="linear"):
    """Mirror, then turn: sampling one pixel and one channel at a time, in float64.

    Where the edge continues, places outside the image are moved to its border first.

    The value at p, measured from the centre as (x to the right, y down), is that of the image at
    M⁻¹p, where M maps (x, y) to (c·x + s·y, −s·x + c·y) after the mirror (x, y) → (−x, y).
    """
    size_y, size_x, channels = image.shape
    middle_y, middle_x = (size_y - 1) / 2, (size_x - 1) / 2
    c, s = math.cos(angle), math.sin(angle)
    kernel, reach = KERNELS[interpolation]
    out = np.zeros(image.shape)

    def pixel(i, j, channel):
        if 0 <= i < size_y and 0 <= j < size_x:
            return float(image[i, j, channel])
        if pad == "constant":
            return fill
        return float(image[min(max(i, 0), size_y - 1), min(max(j, 0), size_x - 1), channel])

    for i in range(size_y):
        for j in range(size_x):
            x, y = j - middle_x, i - middle_y
            x, y = c * x - s * y, s * x + c * y
            column, row = (-x if mirror else x) + middle_x, y + middle_y
            if pad == "edge":
                column, row = min(max(column, 0), size_x - 1), min(max(row, 0), size_y - 1)
            left, top = math.floor(column), math.floor(row)
            for channel in range(channels):
                out[i, j, channel] = sum(
                    kernel(row - m) * kernel(column - n) * pixel(m, n, channel)
                    for m in range(top + 1 - reach, top + 1 + reach)
                    for n in range(left + 1 - reach, left + 1 + reach)
                )
    return out


# ---- sense, order, exactness ----


def test_a_positive_quarter_turn_is_counter_clockwise():
    image = np.zeros((3, 3, 1), np.float32)
    image[1, 2] = 1.0  # to the right of the centre
    for turned in (rotate(image, np.pi / 2), act(Cyclic(4), 1, image), act(Cyclic(8), 2, image)):
        assert turned[0, 1, 0] == 1.0  # above it
        assert turned.sum() == 1.0


def test_a_reflection_swaps_left_and_right_and_comes_before_the_rotation():
    image = np.arange(6, dtype=np.float32).reshape(2, 3, 1)
    assert_same_bits(images.reflect(image), image[:, ::-1])
    square = noise(5, 5, 2)
    assert_same_bits(images.reflect(square), act(Dihedral(4), 4, square))
    mirrored_then_turned = np.rot90(square[:, ::-1])
    for group, element in ((Dihedral(4), 5), (Dihedral(8), 10), (Dihedral(12), 15)):
        assert_same_bits(act(group, element, square), mirrored_then_turned)


def test_reflect_chooses_per_image():
    batch = noise(4, 3, 5, 2)
    where = np.array([True, False, False, True])
    expected = np.where(where[:, None, None, None], batch[:, :, ::-1], batch)
    assert_same_bits(jax.jit(images.reflect)(batch, where), expected)
    assert_same_bits(images.reflect(batch, False), batch)
    assert_same_bits(
        images.reflect((255 * batch).astype(np.uint8)), (255 * batch[:, :, ::-1]).astype(np.uint8)
    )


@pytest.mark.parametrize("size", [6, 7])
def test_rotating_by_quarter_turns_moves_pixels_only(size):
    quarters = np.r_[-9:10, -400, 1000]
    angles = np.concatenate(
        [
            (quarters * (np.pi / 2)).astype(np.float32),  # rounded once
            quarters.astype(np.float32) * np.float32(np.pi / 2),  # a rounded π/2, multiplied
            np.float32(2 * np.pi) * (quarters // 4).astype(np.float32),
        ]
    )
    turns = np.concatenate([quarters, quarters, 0 * quarters]) % 4
    image = noise(size, size, 3)
    turned = rotate(np.broadcast_to(image, (angles.size, size, size, 3)), angles)
    for k, actual in zip(turns, turned, strict=True):
        assert_same_bits(actual, np.rot90(image, k))
    assert_same_bits(rotate(image, np.pi / 2), jnp.rot90(image))
    assert_same_bits(rotate(image, 3 * np.pi / 2), np.rot90(image, 3))
    assert_same_bits(rotate(image, 0), image)
    assert (rotate(image, 1e-3) != image).any()


@pytest.mark.parametrize("size", [5, 6])
@pytest.mark.parametrize("group", EXACT, ids=str)
def test_exact_groups_move_pixels_only(group, size):
    image = noise(size, size, 3)
    image[0, 1, 0], image[1, 0, 1], image[2, 1, 2] = np.nan, np.inf, -0.0
    batch = np.broadcast_to(image, (group.order, *image.shape))
    turned = act(group, group.elements(), batch)
    for g in range(group.order):
        expected = turn_and_mirror(image, g % group.n * 4 // group.n, g // group.n)
        assert_same_bits(turned[g], expected)
    whole = (100 * batch[:, 2:, 2:]).astype(np.int16)
    assert act(group, group.elements(), whole).dtype == jnp.int16
    assert_same_bits(
        act(group, group.elements(), whole),
        np.stack(
            [
                turn_and_mirror(whole[0], g % group.n * 4 // group.n, g // group.n)
                for g in range(group.order)
            ]
        ),
    )


@pytest.mark.parametrize("group", INTERPOLATED, ids=str)
def test_lattice_elements_of_interpolating_groups_move_pixels_only(group):
    image = noise(6, 6, 2)
    turned = act(group, group.lattice, np.broadcast_to(image, (len(group.lattice), 6, 6, 2)))
    for q, actual in zip(group.lattice, turned, strict=True):
        quarters = round(4 * (q % group.n) / group.n)
        assert_same_bits(actual, turn_and_mirror(image, quarters, q // group.n))


@pytest.mark.parametrize("size", [6, 7])
@pytest.mark.parametrize("group", [Cyclic(4), Dihedral(4), *INTERPOLATED], ids=str)
@pytest.mark.parametrize("pad", ["edge", "constant"])
@pytest.mark.parametrize("interpolation", ["linear", "cubic"])
def test_left_action_is_exact_with_an_exact_element_on_the_right(group, size, pad, interpolation):
    g, q = (a.ravel() for a in np.meshgrid(np.arange(group.order, dtype=np.int32), group.lattice))
    x = noise(g.size, size, size, 2)
    how = {"pad": pad, "interpolation": interpolation}
    together = act(group, group.compose(g, q), x, **how)
    assert_same_bits(act(group, g, act(group, q, x, **how), **how), together)


@given(
    hnp.arrays(np.int32, (6,), elements=st.integers(0, 7)),
    hnp.arrays(np.int32, (6,), elements=st.integers(0, 7)),
    hnp.arrays(np.float32, (6, 5, 5, 2), elements=st.floats(width=32)),
)
def test_left_action_of_the_exact_group_is_exact(g, h, x):
    group = Dihedral(4)
    assert_same_bits(act(group, g, act(group, h, x)), act(group, group.compose(g, h), x))
    assert_same_bits(act(group, 0, x), x)


def test_groups_of_half_turns_keep_the_shape_of_any_image():
    image = noise(4, 6, 2)
    for g in range(4):
        assert_same_bits(act(Dihedral(2), g, image), turn_and_mirror(image, 2 * (g % 2), g // 2))


def test_an_element_for_all_is_that_element_for_each():
    x = noise(2, 3, 6, 6, 1)
    for group in (Dihedral(4), Dihedral(8)):
        each = act(group, np.full((2, 3), 5, np.int32), x)
        np.testing.assert_allclose(act(group, 5, x), each, atol=1e-6)
    np.testing.assert_allclose(
        rotate(x, 0.3), rotate(x, np.full((2, 3), 0.3, np.float32)), atol=1e-6
    )


@pytest.mark.parametrize("group", [Dihedral(4), Cyclic(6)], ids=str)
def test_orbit_lists_all_images_of_an_image(group):
    x = noise(2, 5, 5, 3)
    orbit = jax.jit(images.orbit)(group, x)
    assert orbit.shape == (2, group.order, 5, 5, 3)
    for g in range(group.order):
        np.testing.assert_allclose(orbit[:, g], act(group, g, x), atol=1e-6)


# ---- interpolation ----


@pytest.mark.parametrize("interpolation", ["linear", "cubic"])
@pytest.mark.parametrize("pad", ["edge", "constant"])
@pytest.mark.parametrize("size", [6, 7])
def test_interpolation_agrees_with_loops(size, pad, interpolation, x64):
    image = noise(size, size, 2, dtype=np.float64)
    angles = np.random.default_rng(1).uniform(-7, 7, 8)
    how = {"pad": pad, "fill": 0.3, "interpolation": interpolation}
    turned = rotate(np.broadcast_to(image, (8, *image.shape)), angles, **how)
    for angle, actual in zip(angles, turned, strict=True):
        np.testing.assert_allclose(actual, loops(image, angle, **how), atol=1e-13)


@pytest.mark.parametrize("interpolation", ["linear", "cubic"])
@pytest.mark.parametrize("pad", ["edge", "constant"])
@pytest.mark.parametrize("group", [Dihedral(8), Dihedral(5), Cyclic(6)], ids=str)
def test_elements_act_as_mirror_and_rotation_by_steps(group, pad, interpolation, x64):
    image = noise(6, 6, 2, dtype=np.float64)
    batch = np.broadcast_to(image, (group.order, *image.shape))
    how = {"pad": pad, "fill": 0.7, "interpolation": interpolation}
    turned = act(group, group.elements(), batch, **how)
    for g in range(group.order):
        expected = loops(image, 2 * np.pi * (g % group.n) / group.n, g // group.n, **how)
        np.testing.assert_allclose(turned[g], expected, atol=1e-13)


@pytest.mark.parametrize("interpolation", ["linear", "cubic"])
def test_sampling_agrees_with_pytorch(interpolation, x64):
    image, angle = noise(9, 9, 2, dtype=np.float64), 0.6
    inverse = [[math.cos(angle), -math.sin(angle), 0], [math.sin(angle), math.cos(angle), 0]]
    nchw = torch.from_numpy(image.transpose(2, 0, 1)[None])
    grid = torch.nn.functional.affine_grid(
        torch.tensor([inverse], dtype=torch.float64), nchw.shape, align_corners=True
    )
    mode = {"linear": "bilinear", "cubic": "bicubic"}[interpolation]
    expected = torch.nn.functional.grid_sample(
        nchw, grid, mode, padding_mode="border", align_corners=True
    )[0]
    actual = rotate(image, angle, interpolation=interpolation)
    inside = np.hypot(*np.mgrid[-4:5, -4:5]) < 4  # outside PyTorch's bicubic border is another
    expected = expected.numpy().transpose(1, 2, 0)
    np.testing.assert_allclose(actual[inside], expected[inside], atol=1e-13)


def test_single_precision_is_close_to_the_loops():
    image = noise(9, 9, 1)
    np.testing.assert_allclose(rotate(image, 0.7), loops(image, np.float32(0.7)), atol=2e-6)


SIZE, PERIOD = 48, 16
# A sum of waves of amplitudes a, with Σ|a| = 1, none shorter than 16 pixels: |ω| ≤ 2π/16. Linear
# interpolation errs by at most (max|f_xx| + max|f_yy|) / 8 ≤ Σ|a| |ω|² / 8 = 0.019.
BOUND = (2 * np.pi / PERIOD) ** 2 / 8


def waves(matrix):
    """The band-limited image turned analytically by a matrix, and the mask of its inner disk."""
    rng = np.random.default_rng(3)
    directions = rng.uniform(0, 2 * np.pi, 6)
    omega = 2 * np.pi / PERIOD * rng.uniform(0.5, 1, (6, 1))
    omega = omega * np.stack([np.cos(directions), np.sin(directions)], -1)
    amplitude, phase = rng.dirichlet(np.ones(6)), rng.uniform(0, 2 * np.pi, 6)
    axis = np.arange(SIZE) - (SIZE - 1) / 2
    points = np.stack(np.meshgrid(axis, axis), -1)  # (x to the right, y down)
    source = points @ np.linalg.inv(matrix).T
    values = (amplitude * np.cos(source @ omega.T + phase)).sum(-1)[..., None]
    # Two steps of interpolation read neighbours up to two pixels away.
    inside = np.hypot(points[..., 0], points[..., 1]) < SIZE / 2 - 3
    return values.astype(np.float32), inside


@pytest.mark.parametrize("group", [Dihedral(8), Cyclic(6)], ids=str)
def test_left_action_holds_up_to_interpolation(group):
    x, inside = waves(np.eye(2))
    matrices = np.asarray(group.matrix(group.elements()), np.float64)
    orbit = act(group, group.elements(), np.broadcast_to(x, (group.order, *x.shape)))
    for g, turned in enumerate(orbit):
        assert np.abs(turned - waves(matrices[g])[0])[inside].max() < BOUND
    # One interpolation of the product, two on the way through h: three times the bound at most.
    for h in range(group.order):
        through = act(group, group.elements(), np.broadcast_to(orbit[h], orbit.shape))
        direct = orbit[group.compose(np.arange(group.order), h)]
        assert np.abs(through - direct)[:, inside].max() < 3 * BOUND
        there_and_back = through[group.inverse(h)]
        assert np.abs(there_and_back - x)[inside].max() < 2 * BOUND
        if h in group.lattice:
            assert_same_bits(act(group, group.inverse(h), orbit[h]), x)


@settings(max_examples=30)
@given(st.floats(-20, 20, width=32))
def test_the_edge_continues(angle):
    turned = rotate(noise(6, 6, 1), angle)
    assert turned.min() >= noise(6, 6, 1).min() - 1e-6
    assert turned.max() <= noise(6, 6, 1).max() + 1e-6
    np.testing.assert_allclose(rotate(np.full((6, 6, 1), 0.7, np.float32), angle), 0.7, atol=1e-6)


def test_the_constant_is_exact_outside():
    fill = np.float32(0.3)
    turned = act(Cyclic(8), 1, 1 + noise(16, 16, 2), pad="constant", fill=0.3)
    axis = np.arange(16) - 7.5
    x, y = np.meshgrid(axis, axis)
    outside = np.maximum(np.abs(x + y), np.abs(x - y)) / np.sqrt(2) > 8.5 + 1e-5
    assert outside.sum() > 20
    assert (np.asarray(turned)[outside] == fill).all()
    assert (np.asarray(turned)[~outside] != fill).all()
    # No rim where nothing is left out: exact elements never see the constant.
    assert_same_bits(
        act(Cyclic(8), 2, noise(16, 16, 2), pad="constant", fill=0.3), np.rot90(noise(16, 16, 2))
    )


@pytest.mark.parametrize("channels", range(1, 14))
def test_any_number_of_channels(channels):
    x = noise(5, 5, 13)
    for group, g in ((Cyclic(8), 3), (Dihedral(4), 5)):
        actual = act(group, g, x[..., :channels])
        np.testing.assert_allclose(actual, act(group, g, x)[..., :channels], atol=1e-6)


# ---- precision ----


@pytest.mark.parametrize("size", [257, 300])
def test_bfloat16_images_are_sampled_at_float32_coordinates(size):
    # bfloat16 counts to 256: in it, pixels past the 256th and half pixels past 128 have no place.
    x = jnp.asarray(noise(size, size, 1), jnp.bfloat16)
    q = np.array([2, 4, 6, 10], np.int32)
    turned = act(Dihedral(8), q, jnp.broadcast_to(x, (4, size, size, 1)))
    for element, actual in zip(q, turned, strict=True):
        expected = turn_and_mirror(np.asarray(x), element % 8 // 2, element // 8)
        assert_same_bits(actual, expected)
    rounded = act(Dihedral(8), 11, x.astype(jnp.float32)).astype(jnp.bfloat16)
    assert_same_bits(act(Dihedral(8), 11, x), rounded)
    assert_same_bits(rotate(x, 0.4), rotate(x.astype(jnp.float32), 0.4).astype(jnp.bfloat16))


CASES = {
    "rotate": lambda x: images.rotate(x, 0.6),
    "rotate exactly": lambda x: images.rotate(x, np.pi / 2),
    "constant": lambda x: images.rotate(x, -2.0, pad="constant", fill=0.5),
    "cubic": lambda x: images.rotate(x, 0.6, interpolation="cubic"),
    "reflect": images.reflect,
    "exact": lambda x: images.act(Dihedral(4), 7, x),
    "interpolated": lambda x: images.act(Dihedral(8), 11, x),
    "orbit": lambda x: images.orbit(Cyclic(6), x),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("case", CASES)
def test_every_action_under_jit_vmap_and_grad(case, dtype, strict):
    function = CASES[case]
    with jax.enable_x64(dtype == "float64"):
        x = jnp.asarray(noise(2, 5, 5, 2), dtype)
        tolerance = {"float32": 1e-6, "bfloat16": 8e-3, "float64": 1e-13}[dtype]
        expected = np.asarray(jax.jit(function)(x), np.float64)
        eagerly = [function] if case == "rotate" else []  # compiles every operation by itself
        for transformed in (jax.jit(jax.vmap(function)), *eagerly):
            actual = transformed(x)
            assert actual.dtype == x.dtype
            np.testing.assert_allclose(np.asarray(actual, np.float64), expected, atol=tolerance)
        gradient = jax.jit(jax.grad(lambda x: function(x).astype(jnp.float32).sum()))(x)
        assert gradient.dtype == x.dtype
        # Every action keeps constants, so its transpose keeps sums; fill takes some away.
        count = expected.size
        total = float(gradient.astype(jnp.float32).sum())
        if case == "constant":
            assert 0 < total < count
        else:
            np.testing.assert_allclose(total, count, rtol=1e-2 if dtype == "bfloat16" else 1e-5)


# ---- derivatives ----


@pytest.mark.parametrize("pad", ["edge", "constant"])
def test_gradient_to_the_image_is_the_transpose(pad, x64):
    size, group, g = 5, Dihedral(8), 13
    basis = np.eye(size * size).reshape(-1, size, size, 1)
    angle = 2 * np.pi * (g % 8) / 8
    dense = np.stack([loops(e, angle, 1, pad) for e in basis]).reshape(size**2, size**2)
    cotangent = noise(size, size, 1, dtype=np.float64)
    _, transpose = jax.vjp(lambda x: act(group, g, x, pad=pad), jnp.asarray(basis[0]))
    expected = (dense @ cotangent.ravel()).reshape(size, size, 1)
    np.testing.assert_allclose(transpose(cotangent)[0], expected, atol=1e-13)


@pytest.mark.parametrize("group", [Dihedral(4), Dihedral(8), Cyclic(6)], ids=str)
def test_dot_products_with_the_transpose_agree(group, x64):
    shape = (group.order, 6, 6, 3)
    x, y = noise(*shape, dtype=np.float64), noise(*shape, dtype=np.float64, seed=1)
    turned, transpose = jax.vjp(lambda x: act(group, group.elements(), x), x)
    back = transpose(y)[0]
    axes = (1, 2, 3)
    np.testing.assert_allclose((turned * y).sum(axes), (x * back).sum(axes), rtol=1e-12)
    if group == Dihedral(4):  # a permutation of pixels: its transpose is its inverse
        assert_same_bits(back, act(group, group.inverse(group.elements()), y))


def test_gradients_agree_with_finite_differences(x64):
    x, angles = noise(2, 7, 7, 2, dtype=np.float64), np.array([0.4, -2.2])
    check_grads(lambda x: rotate(x, angles), (x,), order=1, modes=["rev"], atol=1e-7, rtol=1e-7)
    # In the angle the result has kinks where a sample crosses a pixel; none is within the step.
    check_grads(
        lambda a: rotate(x, a), (angles,), order=1, modes=["rev"], atol=1e-5, rtol=1e-5, eps=1e-7
    )


def test_exact_angles_have_a_derivative(x64):
    x, _ = waves(np.eye(2))
    x = np.asarray(x, np.float64)

    @jax.jit
    @jax.grad
    def slope(angle):
        return (rotate(x, angle) * noise(*x.shape, dtype=np.float64)).sum()

    for k in (0, 1, -2):
        beside = slope(k * np.pi / 2 + 1e-3) / 2 + slope(k * np.pi / 2 - 1e-3) / 2
        assert abs(beside) > 1
        np.testing.assert_allclose(slope(k * np.pi / 2), beside, rtol=0.2)


# ---- compilation and refusals ----


def test_other_elements_do_not_compile_again():
    turn = jax.jit(lambda group, g, x: images.act(group, g, x))
    by_angle = jax.jit(lambda x, angle: images.rotate(x, angle))
    for g in (0, 3, 9):
        elements = np.full(2, g, np.int32)
        turn(Dihedral(8), elements, noise(2, 5, 5, 1, seed=g))
        by_angle(noise(2, 5, 5, 1, seed=g), elements.astype(np.float32))
    assert turn._cache_size() == 1
    assert by_angle._cache_size() == 1


WIDE, SQUARE = noise(2, 4, 6, 1), noise(2, 4, 4, 1)
REFUSED = {
    "rotating what is not square": (
        lambda: images.rotate(WIDE, 0.1), ValueError, "change the shape of images of 4×6 pixels",
    ),
    "turning what is not square": (
        lambda: images.act(Cyclic(4), 1, WIDE), ValueError, "cyclic4 would change .* square first",
    ),
    "a third of a turn": (
        lambda: images.act(Dihedral(3), 0, WIDE), ValueError, "dihedral3 would change",
    ),
    "elements of another shape": (
        lambda: images.act(Cyclic(4), np.zeros(3, np.int32), SQUARE),
        ValueError, r"shape \(3,\), the images \(2, 4, 4, 1\).*of shape \(2,\)",
    ),
    "elements that would broadcast": (
        lambda: images.act(Cyclic(4), np.zeros(1, np.int32), SQUARE), ValueError, r"shape \(1,\)",
    ),
    "angles of another shape": (
        lambda: images.rotate(SQUARE, np.zeros((2, 1), np.float32)), ValueError, r"shape \(2, 1\)",
    ),
    "no channels": (
        lambda: images.rotate(SQUARE[0, ..., 0], 0.1),
        ValueError, r"\(\.\.\., H, W, C\), got \(4, 4\)",
    ),
    "interpolating integers": (
        lambda: images.act(Cyclic(8), 1, SQUARE.astype(np.uint8)), TypeError, "uint8 .* to floats",
    ),
    "rotating integers": (
        lambda: images.rotate(SQUARE.astype(np.int32), 0.0), TypeError, "int32 cannot be interp",
    ),
    "an unknown pad": (
        lambda: images.act(Cyclic(4), 1, SQUARE, pad="reflect"),
        ValueError, "Unknown pad 'reflect': choose one of edge, constant",
    ),
    "an unknown interpolation": (
        lambda: images.rotate(SQUARE, 0.1, interpolation="nearest"),
        ValueError, "Unknown interpolation 'nearest': choose one of linear, cubic",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_done_is_refused_with_a_sentence(case):
    call, error, sentence = REFUSED[case]
    with pytest.raises(error, match=sentence):
        call()


@pytest.mark.parametrize("function", [images.act, images.rotate, images.orbit])
def test_options_are_keyword_only(function):
    arguments = {images.act: (Cyclic(4), 1, SQUARE), images.rotate: (SQUARE, 0.1)}
    with pytest.raises(TypeError, match="positional"):
        function(*arguments.get(function, (Cyclic(4), SQUARE)), "constant")


def test_numpy_and_jax_images_agree():
    turn = functools.partial(images.act, Cyclic(8), 1)
    assert_same_bits(turn(SQUARE), turn(jnp.asarray(SQUARE)))


def test_a_known_exact_element_of_an_interpolating_group_takes_any_dtype():
    whole = SQUARE.astype(np.uint8)
    turned = images.act(Cyclic(8), 2, whole)
    assert turned.dtype == np.uint8
    np.testing.assert_array_equal(turned, np.rot90(whole, 1, (-3, -2)))


def test_turns_of_turns_are_compiled_in_no_time():
    """Choosing among turned images doubles the work with every choice: XLA did not end."""
    group, x = Cyclic(4), np.zeros((6, 24, 24, 1), np.float32)

    def thrice(a, b, c, x):
        return images.act(group, a, images.act(group, b, images.act(group, c, x)))

    g = np.zeros(6, np.int32)
    compiled = jax.jit(thrice).lower(0, g, g, x).compile()
    operations = compiled.as_text().count("gather(")
    assert 1 <= operations <= 3


def test_elements_in_numpy_arrays_are_known_as_others_are():
    x = np.random.default_rng(0).uniform(size=(8, 5, 5, 2)).astype(np.float32)
    g = np.arange(8, dtype=np.int32)
    moved = images.act(Dihedral(4), g, x)
    for i in range(8):
        np.testing.assert_array_equal(moved[i], images.act(Dihedral(4), i, x[i]))
