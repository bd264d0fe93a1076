"""The group-convolution scorer: exact on exact transformations, and what its formula says."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from equiadapt_jax.groups import Cyclic, Dihedral
from equiadapt_jax.networks import GroupConvNet

KEY = jax.random.key(0, impl="rbg")  # compiles several times faster than the default
Net = functools.partial(GroupConvNet, features=(3, 4), kernels=(3, 3), strides=(1, 1), hidden=5)


def noise(*shape, dtype=np.float32, seed=0):
    return np.random.default_rng(seed).uniform(size=shape).astype(dtype)


def parameters(net, x, dtype=np.float32):
    """Random parameters of the network's shapes, every one of them away from zero."""
    rng = np.random.default_rng(1)

    def leaf(shape):
        scale = 1 / np.sqrt(math.prod(shape.shape[:-1]) or 1)
        return (rng.normal(scale=scale, size=shape.shape) + (len(shape.shape) == 1)).astype(dtype)

    return jax.tree.map(leaf, jax.eval_shape(net.init, KEY, x)["params"])


def turn_and_mirror(x, quarters, mirror):
    """A left-right mirror, then quarter turns, of images `(B, S, S, C)`."""
    return np.rot90(x[:, :, ::-1] if mirror else x, quarters, axes=(1, 2)).copy()


def exact_elements(group):
    """(element, quarter turns, mirror) of all exact elements."""
    turns = [k for k in range(group.n) if 4 * k % group.n == 0]
    return [
        (k + group.n * m, 4 * k // group.n, m) for m in range(group.order // group.n) for k in turns
    ]


CASES = {
    "C4, even": (Net(Cyclic(4)), 8, 2),
    "C4, odd": (Net(Cyclic(4)), 9, 2),
    "C4, one image": (Net(Cyclic(4)), 8, 1),
    "C4, seven images": (Net(Cyclic(4)), 8, 7),
    "C4, three layers in cells": (
        Net(Cyclic(4), features=(3, 4, 4), kernels=(3,) * 3, strides=(1,) * 3, grid=2), 8, 2),
    "C4, strides at an even size": (Net(Cyclic(4), kernels=(4, 3), strides=(2, 1)), 8, 2),
    "C4, strides at an odd size": (Net(Cyclic(4), strides=(2, 2)), 9, 2),
    "C4, made smaller": (Net(Cyclic(4), size=8), 13, 2),
    "C4, made larger": (Net(Cyclic(4), size=9), 6, 2),
    "C4, constant": (Net(Cyclic(4), pad="constant"), 8, 2),
    "D4, even": (Net(Dihedral(4)), 8, 2),
    "D4, odd and made smaller": (Net(Dihedral(4), size=7), 11, 3),
    "C8, even": (Net(Cyclic(8)), 8, 2),
    "C8, odd and made smaller": (Net(Cyclic(8), size=6), 9, 2),
    "D8": (Net(Dihedral(8)), 7, 2),
    "C6": (Net(Cyclic(6)), 7, 2),
    # Of which a batch of all poses fills neither the vectors nor the threads of a CPU evenly.
    "C4, four images": (
        Net(Cyclic(4), features=(4, 16), kernels=(3, 3), strides=(1, 1)), 32, 4),
    "C4, five digits": (
        Net(Cyclic(4), features=(16, 32), kernels=(4, 2), strides=(2, 2)), 28, 5),
    "C2, one image": (
        Net(Cyclic(2), features=(8, 16), kernels=(3, 3), strides=(1, 1), grid=4), 32, 1),
    "C6, six images": (
        Net(Cyclic(6), features=(8, 16, 16), kernels=(4, 3, 3), strides=(2, 1, 1), grid=4), 64, 6),
    "C4, bfloat16": (Net(Cyclic(4), dtype=jnp.bfloat16), 8, 2),
    "C4, halved": (Net(Cyclic(4), size=8), 16, 2),
    "D4, halved and made smaller": (Net(Dihedral(4), size=6), 26, 3),
    "C8, halved twice": (Net(Cyclic(8), size=8), 32, 5),
    "D4, bfloat16 and halved": (Net(Dihedral(4), size=8, dtype=jnp.bfloat16), 16, 2),
    "D4, bfloat16 and made smaller": (Net(Dihedral(4), size=6, dtype=jnp.bfloat16), 9, 2),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_scores_of_an_exactly_turned_image_are_the_same_bits_permuted(case):
    net, size, batch = CASES[case]
    group = net.group
    x = noise(batch, size, size, 2)
    params = parameters(net, x)
    apply = jax.jit(lambda x: net.apply({"params": params}, x))
    scores = np.asarray(apply(x))
    assert scores.shape == (batch, group.order)
    assert scores.dtype == np.float32
    assert (np.ptp(scores, axis=-1) > 1e-3).all()
    for q, quarters, mirror in exact_elements(group):
        turned = np.asarray(apply(turn_and_mirror(x, quarters, mirror)))
        permuted = turned[:, [group.compose(q, i) for i in range(group.order)]]
        assert permuted.tobytes() == scores.tobytes()


@pytest.mark.parametrize("net", [Net(Dihedral(4), size=7), Net(Cyclic(8))], ids=["D4", "C8"])
def test_scores_are_equivariant_in_float64(net, x64):
    x = noise(2, 9, 9, 1, dtype=np.float64)
    params = parameters(net, x, np.float64)
    apply = jax.jit(lambda x: net.apply({"params": params}, x))
    scores = apply(x)
    assert scores.dtype == jnp.float64
    for q, quarters, mirror in exact_elements(net.group):
        turned = apply(turn_and_mirror(x, quarters, mirror))
        permuted = turned[:, net.group.compose(q, np.arange(net.group.order))]
        np.testing.assert_allclose(permuted, scores, atol=1e-10)


# ---- the unfolded group convolution, with turned filters, in NumPy ----


def turn(array, g):
    """g = r^(g mod 4) s^(g div 4) acting on the first two axes."""
    return np.rot90(array[:, ::-1] if g >= 4 else array, g % 4)


def compose(g, h):
    sign = -1 if g >= 4 else 1
    return (g % 4 + sign * (h % 4)) % 4 + 4 * ((g // 4 + h // 4) % 2)


def inverse(g):
    return g if g >= 4 else -g % 4


def correlate(plane, kernel, padding, stride):
    plane = np.pad(plane, ((padding, padding), (padding, padding), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(plane, kernel.shape[:2], axis=(0, 1))
    return np.einsum("xycij,ijco->xyo", windows[::stride, ::stride], kernel)


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def normalise(plane, p):
    return (plane - plane.mean()) / np.sqrt(plane.var() + 1e-6) * p["scale"] + p["bias"]


def unfolded(net, order, params, image):
    """Planes f_g in the image's own frame: f'_g = Σ_j (g·ψ_j) ⋆ f_gj, from f_g = (g·ψ) ⋆ x."""
    planes = None
    for i, (kernel, stride) in enumerate(zip(net.kernels, net.strides, strict=True)):
        psi, padding = params[f"conv{i}"]["kernel"], (kernel - 1) // 2
        if planes is None:
            layer = [correlate(image, turn(psi, g), padding, stride) for g in range(order)]
        else:
            per_neighbour = np.split(psi, order, axis=2)
            layer = [
                sum(
                    correlate(planes[compose(g, j)], turn(per_neighbour[j], g), padding, stride)
                    for j in range(order)
                )
                for g in range(order)
            ]
        planes = [gelu(normalise(plane, params[f"norm{i}"])) for plane in layer]
    hidden = []
    for g, plane in enumerate(planes):
        own = turn(plane, inverse(g))
        cell = own.shape[0] // net.grid
        cells = own.reshape(net.grid, cell, net.grid, cell, -1).mean((1, 3)).ravel()
        hidden.append(gelu(cells @ params["hidden"]["kernel"] + params["hidden"]["bias"]))
    scores = []
    for g in range(order):
        mixed = np.concatenate([hidden[compose(g, j)] for j in range(order)])
        mixed = gelu(mixed @ params["mix"]["kernel"] + params["mix"]["bias"])
        scores.append((mixed @ params["score"]["kernel"])[0])
    return np.array(scores)


@pytest.mark.parametrize(
    ("net", "size"),
    [
        (Net(Cyclic(4), grid=2), 6),
        (Net(Dihedral(4)), 5),
        (Net(Dihedral(4), kernels=(4, 3), strides=(2, 1), grid=2), 8),
    ],
    ids=["C4", "D4", "D4 with strides"],
)
def test_scores_are_those_of_convolutions_with_turned_filters(net, size, x64):
    x = noise(2, size, size, 2, dtype=np.float64)
    params = parameters(net, x, np.float64)
    scores = jax.jit(net.apply)({"params": params}, x)
    expected = [unfolded(net, net.group.order, params, image) for image in x]
    np.testing.assert_allclose(scores, expected, atol=1e-10)


def test_each_working_frame_is_resized_like_the_image():
    """With a working size, upright scores are those of the resized image."""
    net = Net(Cyclic(1), size=6)
    x = noise(2, 9, 9, 1)
    params = parameters(net, x)
    resized = jax.image.resize(x, (2, 6, 6, 1), "linear")
    apply = jax.jit(lambda x: net.apply({"params": params}, x))
    np.testing.assert_allclose(apply(x), apply(resized), atol=1e-5)


@pytest.mark.parametrize(("shape", "halvings"), [((28, 28), 2), ((26, 26), 1), ((30, 12), 1)])
def test_large_images_are_means_of_pixels_before_they_are_resized(shape, halvings):
    net = Net(Cyclic(1), size=6)
    x = noise(2, *shape, 2)
    params = parameters(net, x)
    smaller = x
    for _ in range(halvings):
        height, width = smaller.shape[1:3]
        smaller = smaller.reshape(2, height // 2, 2, width // 2, 2, 2).mean((2, 4))
    smaller = jax.image.resize(smaller, (2, 6, 6, 2), "linear")
    apply = jax.jit(lambda x: net.apply({"params": params}, x))
    np.testing.assert_allclose(apply(x), apply(smaller), atol=1e-5)


@pytest.mark.parametrize("dtype", [np.uint8, jnp.bfloat16])
def test_narrow_images_are_halved_without_loss(dtype):
    net = Net(Cyclic(1), size=6)
    x = np.round(255 * noise(2, 12, 12, 2))
    params = parameters(net, x.astype(np.float32))
    means = x.reshape(2, 6, 2, 6, 2, 2).mean((2, 4)).astype(np.float32)
    if dtype == jnp.bfloat16:
        means = means.astype(dtype)
    apply = jax.jit(lambda x: net.apply({"params": params}, x))
    np.testing.assert_allclose(apply(jnp.asarray(x, dtype)), apply(means), atol=1e-5)


# ---- parameters, precision, refusals ----


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_gradients_flow_to_all_parameters(dtype):
    net = Net(Dihedral(4), dtype=dtype)
    x, direction = noise(2, 7, 7, 2), noise(2, 8, seed=1)
    params = parameters(net, x)
    loss = lambda p, x: (net.apply({"params": p}, x) * direction).sum()  # noqa: E731
    gradients, to_images = jax.jit(jax.grad(loss, (0, 1)))(params, x)
    for leaf in jax.tree.leaves((gradients, to_images)):
        assert leaf.dtype == jnp.float32
        assert np.isfinite(leaf).all()
        assert (leaf != 0).mean() > 0.9


@pytest.mark.parametrize("wide", [False, True])
def test_parameters_are_float32_and_plain_dicts(wide):
    with jax.enable_x64(wide):
        x = noise(1, 6, 6, 1, dtype=np.float64 if wide else np.float32)
        net = Net(Cyclic(4), dtype=jnp.bfloat16)
        variables = jax.jit(net.init)(KEY, x)
        assert set(variables) == {"params"}
        assert type(variables["params"]) is dict
        assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
        shapes = jax.tree.map(jnp.shape, variables["params"])
        assert shapes["conv0"] == {"kernel": (3, 3, 1, 3)}
        assert shapes["conv1"] == {"kernel": (3, 3, 4 * 3, 4)}  # every plane sees all four
        assert shapes["mix"]["kernel"] == (4 * 5, 5)
        scores = jax.eval_shape(net.apply, variables, x)
        assert jnp.finfo(scores.dtype).bits >= 32


def test_low_precision_scores_are_close_to_those_in_float32():
    x = noise(2, 8, 8, 2)
    params = parameters(Net(Cyclic(4)), x)
    single = jax.jit(Net(Cyclic(4)).apply)({"params": params}, x)
    half = jax.jit(Net(Cyclic(4), dtype=jnp.bfloat16).apply)({"params": params}, x)
    assert (single != half).any()
    np.testing.assert_allclose(half, single, atol=0.05 * np.abs(single).max())


@pytest.mark.parametrize(
    ("net", "shape", "sentence"),
    [
        (Net(Cyclic(4), strides=(2, 1)), (1, 8, 8, 1), "Layer 0 .* strides by 2 over 8 pixels"),
        (Net(Cyclic(4), strides=(1, 2)), (1, 8, 8, 1), "Layer 1 .* choose a working size"),
        (Net(Cyclic(4), strides=(2, 1), size=8), (1, 9, 9, 1), "over 8 pixels with kernel 3"),
        (Net(Cyclic(4), grid=3), (1, 8, 8, 1), "pools 8 pixels to a grid of 3"),
        (Net(Cyclic(4)), (8, 8, 1), r"takes images \(B, H, W, C\), got \(8, 8, 1\)"),
        (Net(Cyclic(4)), (1, 8, 6, 1), "pad or crop them to a square"),
        (Net(Cyclic(2)), (1, 8, 6, 1), r"shape \(1, 8, 6, 1\): give the working size"),
    ],
)
def test_what_would_not_be_exact_is_refused_with_a_sentence(net, shape, sentence):
    with pytest.raises(ValueError, match=sentence):
        jax.eval_shape(net.init, KEY, jnp.zeros(shape))


@pytest.mark.parametrize("shape", [(16, 24), (24, 16), (16, 16)])
@pytest.mark.parametrize("group", [Cyclic(2), Dihedral(1)], ids=str)
def test_oblong_images_are_scored_at_a_working_size(group, shape):
    net, x = Net(group, size=16), noise(2, *shape, 3)
    params = net.init(KEY, x)
    scores = np.asarray(net.apply(params, x))
    turned = x[:, ::-1, ::-1] if group == Cyclic(2) else x[:, :, ::-1]
    np.testing.assert_array_equal(net.apply(params, turned.copy()), scores[:, ::-1])


def test_scorers_are_linen_modules():
    assert issubclass(GroupConvNet, nn.Module)
