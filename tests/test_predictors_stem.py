"""Stems for other numbers of channels: what a gray image gives stays what it was."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import equiadapt_jax as ea
from equiadapt_jax.predictors import Preprocess, ResNet, ViT, adapt_stem

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IMAGENET = Preprocess(MEAN, STD)
NETWORKS = {
    "vit": ViT(5, 4, 12, 1, 3),
    "resnet": ResNet(5, (1,), "basic", width=4),
    "cifar": ResNet(5, (1,), "basic", width=4, stem="cifar"),
}


def random_variables(model, channels=3, seed=1):
    rng = np.random.default_rng(seed)

    def leaf(path, shape):
        if path[-1].key in ("scale", "var"):
            return rng.uniform(0.5, 1.5, shape.shape)
        return rng.normal(size=shape.shape) / 5

    x = jax.ShapeDtypeStruct((1, 8, 8, channels), jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)
    return jax.tree_util.tree_map_with_path(leaf, shapes)


def logits(model, variables, preprocess, channels):
    """For a gray image in so many channels."""
    gray = np.random.default_rng(2).uniform(size=(2, 8, 8, 1))
    x = preprocess(np.repeat(gray, channels, axis=-1))
    # Compiling takes the time here, not computing.
    options = {"xla_backend_optimization_level": 0}
    return np.asarray(jax.jit(model.apply, compiler_options=options)(variables, x))


@functools.cache
def reference(name, preprocess, channels=3):
    model = NETWORKS[name]
    return logits(model, random_variables(model, channels), preprocess, channels)


def assert_gray_stays(name, preprocess, channels, old=3):
    model, variables = NETWORKS[name], random_variables(NETWORKS[name], old)
    params = adapt_stem(variables["params"], channels, preprocess)
    expected = reference(name, preprocess, old)
    actual = logits(
        model, {**variables, "params": params}, preprocess.for_channels(channels), channels
    )
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-10 * np.abs(expected).max())


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 8, 13])
def test_gray_images_give_the_same_logits_vit(x64, channels):
    assert_gray_stays("vit", IMAGENET, channels)


@pytest.mark.parametrize("name", ["resnet", "cifar"])
@pytest.mark.parametrize("channels", [3, 5, 13])
def test_gray_images_give_the_same_logits_resnet(x64, name, channels):
    assert_gray_stays(name, IMAGENET, channels)


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("std", [0.25, STD], ids=["one std", "three"])
def test_gray_images_give_the_same_logits_resnet_equal_means(x64, channels, std):
    assert_gray_stays("resnet", Preprocess(0.45, std), channels)


def test_gray_images_give_the_same_logits_many_channels_to_fewer(x64):
    rng = np.random.default_rng(3)
    bands = Preprocess(rng.uniform(0, 1, 13), rng.uniform(0.1, 1, 13))
    assert_gray_stays("vit", bands, 3, old=13)


def test_a_resnet_with_other_means_is_off_by_a_constant(x64):
    """Inside, where the kernel sees no padding, by the amount that the docstring states."""
    kernel = np.random.default_rng(0).normal(size=(7, 7, 3, 4))
    gray = np.random.default_rng(2).uniform(size=(1, 9, 9, 1))

    def response(kernel, x):
        return sum(
            np.asarray(x)[:, i : i + 3, j : j + 3] @ kernel[i, j]
            for i in range(7)
            for j in range(7)
        )

    new = adapt_stem({"conv1": {"kernel": kernel}}, 1, IMAGENET)["conv1"]["kernel"]
    one = response(new, IMAGENET.for_channels(1)(gray))
    three = response(kernel, IMAGENET(np.repeat(gray, 3, axis=-1)))
    offsets = (np.array(MEAN) - np.mean(MEAN)) / STD
    expected = np.einsum("i,hwid->d", offsets, kernel)
    assert np.abs(expected).max() > 1e-2
    np.testing.assert_allclose(one - three, np.broadcast_to(expected, one.shape), atol=1e-10)


def adapted_kernel(kernel, channels, preprocess=None, name="conv1"):
    return adapt_stem({name: {"kernel": kernel}}, channels, preprocess)[name]["kernel"]


FILTERS = {  # old channels, new ones, and the share of each old filter in each new one
    (3, 1): [[1, 1, 1]],
    (3, 2): [[1, 0, 1], [0, 1, 0]],
    (3, 4): [[1 / 2, 0, 0], [0, 1, 0], [0, 0, 1], [1 / 2, 0, 0]],
    (3, 6): [[1 / 2, 0, 0], [0, 1 / 2, 0], [0, 0, 1 / 2]] * 2,
    (1, 3): [[1 / 3]] * 3,
    (4, 3): [[1, 0, 0, 1], [0, 1, 0, 0], [0, 0, 1, 0]],
}


@pytest.mark.parametrize(("old", "new"), FILTERS)
def test_filters_are_merged_and_repeated_as_stated(old, new):
    kernel = np.random.default_rng(0).normal(size=(2, 3, old, 4))
    actual = adapted_kernel(kernel, new)
    assert actual.shape == (2, 3, new, 4)
    for j, shares in enumerate(FILTERS[old, new]):
        expected = sum(share * kernel[:, :, i] for i, share in enumerate(shares))
        np.testing.assert_allclose(actual[:, :, j], expected, rtol=0, atol=1e-15)
    np.testing.assert_allclose(actual.sum(2), kernel.sum(2), rtol=0, atol=1e-14)


@pytest.mark.parametrize("preprocess", [None, IMAGENET])
def test_as_many_channels_as_before_change_nothing(preprocess):
    kernel = np.random.default_rng(0).normal(size=(4, 4, 3, 5))
    stem = {"kernel": kernel, "bias": np.arange(5.0)}
    new = adapt_stem({"patch_embed": stem}, 3, preprocess)["patch_embed"]
    jax.tree.map(np.testing.assert_array_equal, new, stem)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("kind", [np, jnp], ids=["numpy", "jax"])
def test_arrays_keep_type_and_kind_and_are_not_changed(x64, dtype, kind):
    kernel = np.random.default_rng(0).normal(size=(4, 4, 3, 5)).astype(jnp.dtype(dtype))
    bias, head = np.arange(5.0).astype(kernel.dtype), np.ones(3, np.float32)
    stem = {name: kind.asarray(leaf.copy()) for name, leaf in (("kernel", kernel), ("bias", bias))}
    params = {"patch_embed": stem, "head": {"bias": kind.asarray(head)}}
    new = adapt_stem(params, 1, IMAGENET)
    assert new["head"] is params["head"]
    for name, old in (("kernel", kernel), ("bias", bias)):
        leaf = new["patch_embed"][name]
        assert leaf.dtype == dtype
        assert isinstance(leaf, np.ndarray if kind is np else jax.Array)
        assert (np.asarray(leaf) != old[:, :, :1] if old.ndim == 4 else leaf != old).any()
        np.testing.assert_array_equal(params["patch_embed"][name], old)
    exact = adapted_kernel(kernel.astype(np.float64), 1, IMAGENET)
    error = np.abs(np.asarray(new["patch_embed"]["kernel"], np.float64) - exact).max()
    assert error <= jnp.finfo(dtype).eps * np.abs(exact).max()


def test_float64_weights_of_numpy_stay_so_without_a_switch():
    assert adapted_kernel(np.ones((1, 1, 3, 2)), 1).dtype == np.float64


def test_it_works_under_jit():
    kernel = jnp.asarray(np.random.default_rng(0).normal(size=(4, 4, 3, 5)), jnp.float32)
    new = jax.jit(lambda params: adapt_stem(params, 7, IMAGENET))({"conv1": {"kernel": kernel}})
    expected = adapted_kernel(kernel, 7, IMAGENET)
    np.testing.assert_allclose(new["conv1"]["kernel"], expected, rtol=1e-6)


def test_preprocess_for_channels():
    new = IMAGENET.for_channels(5)
    assert new == Preprocess((*MEAN, *MEAN[:2]), (*STD, *STD[:2]))
    assert IMAGENET.for_channels(3) == IMAGENET
    one = IMAGENET.for_channels(1)
    np.testing.assert_allclose((one.mean, one.std), ([np.mean(MEAN)], [np.mean(STD)]), rtol=1e-15)
    two = IMAGENET.for_channels(2)
    np.testing.assert_allclose(two.mean, [(0.485 + 0.406) / 2, 0.456], rtol=1e-15)
    assert Preprocess(0.5, 0.25).for_channels(7) == Preprocess(0.5, 0.25)
    mixed = Preprocess(0.5, STD).for_channels(4)
    assert (mixed.mean, mixed.std) == (0.5, (*STD, STD[0]))


KERNEL = np.ones((2, 2, 3, 4))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (({"conv1": {"kernel": KERNEL}}, 0), "channels must be a whole number from 1 to 13, got 0"),
        (({"conv1": {"kernel": KERNEL}}, 14), "from 1 to 13, got 14: select or merge some"),
        (({"conv1": {"kernel": KERNEL}}, 2.5), r"from 1 to 13, got 2\.5"),
        (({"stem": {}, "head": {}}, 1), "patch_embed or conv1, among the parameters stem, head:"),
        (({}, 1), "among the parameters given, which are none: give the tree of a ViT"),
        (({"conv1": {"bias": KERNEL}}, 1), "no kernel of a first convolution"),
        (
            ({"patch_embed": {"kernel": np.ones((12, 4))}}, 1),
            r"the kernel of patch_embed must be \(kh, kw, C, D\), got shape \(12, 4\)",
        ),
        (
            ({"conv1": {"kernel": KERNEL}}, 1, Preprocess((0.5, 0.4), 1.0)),
            r"preprocess has the 2 channels of \(0\.5, 0\.4\) where the kernel has 3: give the one",
        ),
    ],
)
def test_what_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        adapt_stem(*arguments)


@pytest.mark.parametrize("channels", [0, 14])
@pytest.mark.parametrize("preprocess", [IMAGENET, Preprocess(0.5, 0.5)])
def test_preprocess_refuses_other_numbers_of_channels(channels, preprocess):
    with pytest.raises(ValueError, match=f"from 1 to 13, got {channels}"):
        preprocess.for_channels(channels)


def test_it_is_public():
    assert ea.predictors.adapt_stem is adapt_stem
