"""The derivatives of turned images: against matrices, PyTorch and finite differences."""

import functools
import math

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from jax.test_util import check_grads

from equiadapt_jax.actions import images, sampling
from equiadapt_jax.groups import SO, Cyclic, Dihedral, O

PADS = ("edge", "constant")
INTERPOLATIONS = ("linear", "cubic")
# Between lattice and 45°, at both ends, and so close to the lattice that p(o) nearly is a pixel.
ANGLES = (0.0, 1e-9, -1e-4, 0.02, -0.3, 0.55, -0.78, np.pi / 4, -np.pi / 4)
COUNT = len(ANGLES)
SIZES = (1, 2, 3, 7, 12)


def noise(*shape, dtype=np.float64, seed=0):
    return np.random.default_rng(seed).uniform(size=shape).astype(dtype)


def keys(distance, a=-0.75):
    d = np.abs(distance)
    near, far = (a + 2) * d**3 - (a + 3) * d**2 + 1, a * (d**3 - 5 * d**2 + 8 * d - 4)
    return np.where(d <= 1, near, np.where(d < 2, far, 0))


KERNELS = {"linear": (lambda d: np.maximum(1 - np.abs(d), 0), 1), "cubic": (keys, 2)}


def matrix(size, angle, quarter=0, mirror=0, pad="edge", interpolation="linear"):
    """The whole map of one-channel images as a matrix `(S², S²)`, row by row: it adds into places.

    At p = M⁻¹ o, where M is the mirror (x, y) → (−x, y) and then the turn by quarter · π/2 + angle.
    """
    kernel, reach = KERNELS[interpolation]
    half = (size - 1) / 2
    y, x = (axis.ravel() - half for axis in np.mgrid[:size, :size])
    c, s = math.cos(angle), math.sin(angle)
    column, row = c * x - s * y, s * x + c * y
    for _ in range(quarter % 4):
        column, row = -row, column
    column = (-column if mirror else column) + half
    row = row + half
    if pad == "edge":
        column, row = np.clip(column, 0, size - 1), np.clip(row, 0, size - 1)
    dense = np.zeros((size**2, size**2))
    for i in range(1 - reach, 1 + reach):
        for j in range(1 - reach, 1 + reach):
            m, n = np.floor(row).astype(int) + i, np.floor(column).astype(int) + j
            weight = kernel(row - m) * kernel(column - n)
            if pad == "constant":
                weight = weight * ((m >= 0) & (m < size) & (n >= 0) & (n < size))
            place = np.clip(m, 0, size - 1) * size + np.clip(n, 0, size - 1)
            np.add.at(dense, (np.arange(size**2), place), weight)
    return dense


@functools.partial(jax.jit, static_argnames=("pad", "interpolation"))
def turn(x, angle, quarter=0, mirror=0, fill=0.0, *, pad="edge", interpolation="linear"):
    angle, fill = jnp.asarray(angle), jnp.asarray(fill)
    quarter, mirror = jnp.asarray(quarter, jnp.int32), jnp.asarray(mirror, jnp.int32)
    return sampling.turn(
        pad, interpolation, x, quarter, mirror, jnp.cos(angle), jnp.sin(angle), fill
    )


@functools.partial(jax.jit, static_argnames=("pad", "interpolation"))
def transpose(y, angle, quarter=0, mirror=0, *, pad="edge", interpolation="linear"):
    how = {"pad": pad, "interpolation": interpolation}
    return jax.vjp(lambda x: turn(x, angle, quarter, mirror, 0.5, **how), y)[1](y)[0]


# ---- the image ----


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("pad", PADS)
@pytest.mark.parametrize("size", SIZES)
def test_a_turn_and_its_transpose_are_those_of_the_matrix(size, pad, interpolation, x64):
    x, y = noise(COUNT, size, size, 2), noise(COUNT, size, size, 2, seed=1)
    elements = np.random.default_rng(2).integers(0, 8, COUNT)
    how = {"pad": pad, "interpolation": interpolation}
    place = np.array(ANGLES), elements % 4, elements // 4
    turned, back = turn(x, *place, 0.3, **how), transpose(y, *place, **how)
    for k, (angle, element) in enumerate(zip(ANGLES, elements, strict=True)):
        dense = matrix(size, angle, element % 4, element // 4, **how)
        outside = 0.3 * (1 - dense.sum(1)[:, None])
        expected = dense @ x[k].reshape(-1, 2) + outside
        np.testing.assert_allclose(turned[k].reshape(-1, 2), expected, atol=1e-12)
        np.testing.assert_allclose(
            back[k].reshape(-1, 2), dense.T @ y[k].reshape(-1, 2), atol=1e-12
        )


@settings(max_examples=40)
@given(
    angle=st.floats(-np.pi / 4, np.pi / 4),
    size=st.sampled_from(SIZES),
    pad=st.sampled_from(PADS),
    interpolation=st.sampled_from(INTERPOLATIONS),
    seed=st.integers(0, 999),
)
def test_products_with_the_transpose_agree(angle, size, pad, interpolation, seed):
    rng = np.random.default_rng(seed)
    with jax.enable_x64(True):
        x, y = rng.normal(size=(2, COUNT, size, size, 2))
        place = np.full(COUNT, angle), rng.integers(0, 4, COUNT), rng.integers(0, 2, COUNT)
        how = {"pad": pad, "interpolation": interpolation}
        forward, back = turn(x, *place, **how), transpose(y, *place, **how)
        sums, scale = (1, 2, 3), size**2
        products = (forward * y).sum(sums), (x * back).sum(sums)
        np.testing.assert_allclose(*products, rtol=1e-12, atol=1e-12 * scale)


@pytest.mark.parametrize("group", [Cyclic(2), Dihedral(2)], ids=str)
@pytest.mark.parametrize("shape", [(4, 7), (5, 2), (1, 3)])
def test_moving_what_is_not_square_goes_back_by_its_inverse(group, shape, x64):
    x = noise(group.order, *shape, 2)
    act = jax.jit(lambda x: images.act(group, group.elements(), x))
    turned, back = jax.vjp(act, x)
    for g in range(group.order):
        expected = np.rot90(x[g, :, ::-1] if g >= 2 else x[g], 2 * (g % 2))
        np.testing.assert_array_equal(turned[g], expected)
    np.testing.assert_array_equal(back(turned)[0], x)


def torch_turn(x, angle, pad, mode):
    """Images `(N, S, S, C)` and angles as PyTorch's tensors, and what it makes of them."""
    x = torch.tensor(x.transpose(0, 3, 1, 2), requires_grad=True)
    angle = torch.tensor(angle, requires_grad=True)
    c, s = torch.cos(angle), torch.sin(angle)
    rows = torch.stack([torch.stack([c, -s, 0 * c], -1), torch.stack([s, c, 0 * c], -1)], -2)
    grid = torch.nn.functional.affine_grid(rows, x.shape, align_corners=True)
    turned = torch.nn.functional.grid_sample(x, grid, mode, padding_mode=pad, align_corners=True)
    return x, angle, turned


@pytest.mark.parametrize("size", [8, 11])
@pytest.mark.parametrize(
    ("pad", "interpolation", "theirs"),
    [
        ("edge", "linear", ("border", "bilinear")),
        ("constant", "linear", ("zeros", "bilinear")),
        ("constant", "cubic", ("zeros", "bicubic")),  # its bicubic border is another
    ],
)
def test_values_and_gradients_agree_with_pytorch(size, pad, interpolation, theirs, x64):
    x, y = noise(5, size, size, 3), noise(5, size, size, 3, seed=1)
    angles = np.array([0.1, -0.4, 0.77, 2.3, -1.9])
    theirs_x, theirs_angle, expected = torch_turn(x, angles, *theirs)
    (expected * torch.tensor(y.transpose(0, 3, 1, 2))).sum().backward()

    def ours(x, angle):
        return images.rotate(x, angle, pad=pad, interpolation=interpolation)

    turned, back = jax.vjp(jax.jit(ours), x, angles)
    to_image, to_angle = back(y)
    nhwc = (0, 2, 3, 1)
    np.testing.assert_allclose(turned, expected.detach().permute(nhwc), atol=1e-12)
    np.testing.assert_allclose(to_image, theirs_x.grad.permute(nhwc), atol=1e-12)
    np.testing.assert_allclose(to_angle, theirs_angle.grad, rtol=1e-10, atol=1e-10)


# ---- the angle ----


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("pad", PADS)
def test_derivatives_agree_with_finite_differences_in_both_modes(pad, interpolation, x64):
    x, angles = noise(3, 7, 7, 2), np.array([0.4, -2.2, 1.3])

    @jax.jit
    def turned(x, angle, fill):
        return images.rotate(x, angle, pad=pad, fill=fill, interpolation=interpolation)

    # No sample crosses a line of pixels, where the derivative jumps, within the step.
    check_grads(turned, (x, angles, 0.3), 1, ("fwd", "rev"), atol=1e-5, rtol=1e-5, eps=1e-7)


def central_differences(x, pad):
    """∂/∂θ at θ = 0 of a linearly interpolated image; what is beyond it as for `pad`."""
    size = len(x)
    beyond = np.pad(x, ((1, 1), (1, 1), (0, 0)), "edge" if pad == "edge" else "constant")
    by_row = (beyond[2:, 1:-1] - beyond[:-2, 1:-1]) / 2
    by_column = (beyond[1:-1, 2:] - beyond[1:-1, :-2]) / 2
    y, x = (axis[..., None] - (size - 1) / 2 for axis in np.mgrid[:size, :size])
    return by_row * x - by_column * y


@pytest.mark.parametrize("pad", PADS)
@pytest.mark.parametrize("size", [6, 7])
def test_at_exact_angles_the_derivative_is_the_central_difference(size, pad, x64):
    x = noise(size, size, 2)
    slope = jax.jit(jax.jacfwd(lambda angle: images.rotate(x, angle, pad=pad)))
    back = jax.jit(jax.jacrev(lambda angle: images.rotate(x, angle, pad=pad)))
    for k in range(-1, 4):
        expected = central_differences(np.rot90(x, k), pad)
        for derivative in (slope, back):
            np.testing.assert_allclose(derivative(k * np.pi / 2), expected, atol=1e-12)


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("pad", PADS)
def test_at_exact_poses_the_derivative_is_the_limit_of_both_sides(pad, interpolation, x64):
    """Of a matrix group, mirrored or not, along the rotations."""
    x, y, step = noise(7, 7, 2), noise(7, 7, 2, seed=1), 1e-6

    @jax.jit
    def value(angle, q):
        c, s = jnp.cos(angle), jnp.sin(angle)
        g = O(2).compose(jnp.stack([jnp.stack([c, s]), jnp.stack([-s, c])]), q)
        return (y * images.act(O(2), g, x, pad=pad, interpolation=interpolation)).sum()

    for q in range(8):
        q = Dihedral(4).matrix(q, jnp.float64)
        both_sides = (value(step, q) - value(-step, q)) / (2 * step)
        np.testing.assert_allclose(jax.grad(value)(0.0, q), both_sides, rtol=1e-4)


def test_second_derivatives_in_the_angle_alone_are_defined(x64):
    x, y = noise(6, 6, 1), noise(6, 6, 1, seed=1)

    def value(angle):
        return (y * images.rotate(x, angle, interpolation="cubic") ** 2).sum()

    check_grads(jax.jit(value), (0.31,), 2, ("fwd", "rev"), atol=1e-4, rtol=1e-4, eps=1e-6)


@pytest.mark.parametrize("pad", PADS)
@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_second_derivatives_at_exact_poses_are_symmetric(pad, interpolation, x64):
    """There every place at the border is on a bound."""
    x, y = noise(6, 6, 1), noise(6, 6, 1, seed=1)

    def value(v):
        q = jnp.stack([jnp.stack([v[0], -v[1]]), jnp.stack([v[1], v[0]])])
        return (y * images.act(SO(2), q, x, pad=pad, interpolation=interpolation)).sum()

    for v in ((1.0, 0.0), (0.0, 1.0), (-1.0, 0.0)):
        found = jax.hessian(value)(jnp.array(v))
        assert jnp.abs(found).max() > 1e-3
        np.testing.assert_allclose(found, found.T, atol=1e-9)


def test_mixed_second_derivatives_are_refused_with_a_sentence():
    x = noise(6, 6, 1, dtype=np.float32)

    def of_gradient(angle):
        return (jax.grad(lambda x: (images.rotate(x, angle) ** 2).sum())(x) ** 2).sum()

    for differentiate in (jax.grad, jax.jacfwd):
        with pytest.raises(NotImplementedError, match="not differentiated with respect to the rot"):
            differentiate(of_gradient)(0.3)


# ---- transformations, dtypes, compilation ----


def sum_of_squares(x, angle):
    return (images.rotate(x, angle) ** 2).sum()


def test_gradients_under_vmap_are_those_of_each(x64):
    x, angles = noise(3, 2, 6, 6, 1), np.array([0.2, -0.7, 1.9])
    gradient = jax.jit(jax.grad(sum_of_squares, (0, 1)))
    each = [gradient(a, b) for a, b in zip(x, angles, strict=True)]
    together = jax.jit(jax.vmap(jax.grad(sum_of_squares, (0, 1))))(x, angles)
    for k in range(3):
        np.testing.assert_allclose(together[0][k], each[k][0], atol=1e-13)
        np.testing.assert_allclose(together[1][k], each[k][1], atol=1e-12)
    one_image = jax.jit(jax.vmap(jax.grad(sum_of_squares, (0, 1)), (None, 0)))(x[0], angles)
    one_angle = jax.jit(jax.vmap(jax.grad(sum_of_squares, (0, 1)), (0, None)))(x, angles[0])
    for found in (one_image, one_angle):
        np.testing.assert_allclose(found[0][0], each[0][0], atol=1e-13)
        np.testing.assert_allclose(found[1][0], each[0][1], atol=1e-12)


def test_gradients_through_a_scan_and_rematerialisation(x64):
    x, angles = noise(2, 6, 6, 1), np.array([0.2, -0.7, 1.9])

    def scanned(x, angles):
        step = jax.checkpoint(lambda x, angle: (images.rotate(x, angle), None))
        return (jax.lax.scan(step, x, angles)[0] ** 2).sum()

    def unrolled(x, angles):
        for angle in angles:
            x = images.rotate(x, angle)
        return (x**2).sum()

    found = jax.jit(jax.grad(scanned, (0, 1)))(x, angles)
    expected = jax.jit(jax.grad(unrolled, (0, 1)))(x, angles)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: images.act(Dihedral(4), jnp.arange(2), x),
        lambda x: images.act(Dihedral(8), jnp.arange(2), x),
        lambda x: images.act(O(2), O(2).random(jax.random.key(0), (2,)), x),
    ],
)
def test_forward_mode_is_the_function_itself(function):
    x, tangent = noise(2, 6, 6, 1, dtype=np.float32), noise(2, 6, 6, 1, dtype=np.float32, seed=1)
    _, found = jax.jit(functools.partial(jax.jvp, function))((x,), (tangent,))
    np.testing.assert_allclose(found, jax.jit(function)(tangent), atol=1e-6)


@pytest.mark.parametrize("pad", PADS)
@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_single_precision_is_close_to_double_everywhere(pad, interpolation):
    """Not one pixel off, also where a place is a whole number but for rounding."""
    size, how = 128, {"pad": pad, "interpolation": interpolation}
    angles = np.float32(np.random.default_rng(0).uniform(-np.pi, np.pi, 24))
    x, y = noise(24, size, size, 1), noise(24, size, size, 1, seed=1)

    @jax.jit
    def both(x, y, angles):
        turned, back = jax.vjp(lambda x, a: images.rotate(x, a, **how), x, angles)
        return turned, *back(y)

    single = jax.device_get(both(jnp.float32(x), jnp.float32(y), angles))
    with jax.enable_x64(True):
        double = jax.device_get(both(x, y, np.float64(angles)))
    np.testing.assert_allclose(single[0], double[0], atol=2e-4)
    np.testing.assert_allclose(single[1], double[1], atol=2e-3)
    # Its derivative jumps where a place crosses a line of pixels, which rounding may bring about.
    assert (np.abs(single[2] - double[2]) < 3e-2 * np.abs(double[2]).max()).all()


def test_bfloat16_gradients_are_those_of_float32_rounded():
    x = jnp.asarray(noise(2, 9, 9, 2), jnp.bfloat16)
    y = jnp.asarray(noise(2, 9, 9, 2, seed=1), jnp.bfloat16)

    @jax.jit
    def back(x, y):
        return jax.vjp(lambda x: images.rotate(x, 0.4), x)[1](y)[0]

    expected = back(x.astype(jnp.float32), y.astype(jnp.float32)).astype(jnp.bfloat16)
    np.testing.assert_array_equal(back(x, y), expected)


GRADIENTS = {
    "angle": (lambda x, a: images.rotate(x, a), (0, 1)),
    "constant": (lambda x, a: images.rotate(x, a, pad="constant", fill=0.5), (0, 1)),
    "cubic": (lambda x, a: images.rotate(x, a, interpolation="cubic"), (0, 1)),
    "matrix": (lambda x, a: images.act(SO(2), SO(2).rotation(a), x), (0, 1)),
    "exact elements": (lambda x, a: images.act(Dihedral(4), a.astype(jnp.int32), x), 0),
    "elements": (lambda x, a: images.act(Dihedral(8), a.astype(jnp.int32), x), 0),
    "orbit": (lambda x, a: images.orbit(Cyclic(8), x), 0),
    "under vmap": (jax.vmap(images.rotate), (0, 1)),
}


WITH_BORDERS = set(GRADIENTS) - {"constant", "exact elements"}


def scatters(jaxpr):
    """Equations that write into places, of a program and all that it calls."""
    found = [eqn for eqn in jaxpr.eqns if eqn.primitive.name.startswith("scatter")]
    parameters = [value for eqn in jaxpr.eqns for value in jax.tree.leaves(eqn.params)]
    for program in parameters:
        program = getattr(program, "jaxpr", program)
        if hasattr(program, "eqns"):
            found += scatters(program)
    return found


@pytest.mark.parametrize("case", GRADIENTS)
def test_derivatives_only_read(case):
    function, arguments = GRADIENTS[case]
    x, angles = jnp.zeros((2, 6, 6, 1)), jnp.array([0.3, 1.0])
    gradient = jax.jit(jax.grad(lambda x, a: (function(x, a) ** 2).sum(), arguments))
    jaxpr = jax.make_jaxpr(gradient)(x, angles).jaxpr
    places = [scatter.invars[1].aval.shape for scatter in scatters(jaxpr)]
    assert set(places) == ({(1,)} if case in WITH_BORDERS else set())  # XLA adds one as a slice
    compiled = gradient.lower(x, angles).compile().as_text()
    assert "gather" in compiled
    assert ("dynamic-update-slice" in compiled) == (case in WITH_BORDERS)
