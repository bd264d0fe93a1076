"""Batch statistics: precision, stored types, several devices, and when they stay as they are."""

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import equiadapt_jax as ea
from equiadapt_jax.predictors import ResNet
from equiadapt_jax.predictors.batch_norm import BatchNorm

KEY = jax.random.key(0, impl="rbg")  # compiles several times faster than the default


def images(*shape, seed=0):
    return np.random.default_rng(seed).normal(3.0, 2.0, shape)


def variables(dtype=np.float32, channels=3):
    rng = np.random.default_rng(7)
    draw = functools.partial(rng.uniform, 0.5, 1.5, channels)
    return {
        "params": {name: jnp.asarray(draw(), dtype) for name in ("scale", "bias")},
        "batch_stats": {name: jnp.asarray(draw(), dtype) for name in ("mean", "var")},
    }


def train(held, x, **fields):
    return BatchNorm(**fields).apply(held, jnp.asarray(x), True, mutable=["batch_stats"])


def expected_training(held, x, momentum=0.9, eps=1e-5):
    """Output and statistics after it, in NumPy's float64."""
    held = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), held)
    params, old = held["params"], held["batch_stats"]
    flat = np.asarray(x, np.float64).reshape(-1, x.shape[-1])
    y = (flat - flat.mean(0)) / np.sqrt(flat.var(0) + eps) * params["scale"] + params["bias"]
    stats = {
        "mean": momentum * old["mean"] + (1 - momentum) * flat.mean(0),
        "var": momentum * old["var"] + (1 - momentum) * flat.var(0, ddof=1),
    }
    return y.reshape(x.shape), stats


@pytest.mark.parametrize("shape", [(2, 1, 1, 3), (1, 1, 2, 3), (4, 5, 6, 3), (7, 3)])
def test_training_normalizes_and_moves_the_statistics(x64, shape):
    held, x = variables(np.float64), images(*shape)
    y, updated = train(held, x, momentum=0.7, eps=1e-3)
    expected, stats = expected_training(held, x, 0.7, 1e-3)
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-12)
    for name in stats:
        np.testing.assert_allclose(updated["batch_stats"][name], stats[name], rtol=1e-13)


def test_inference_uses_the_statistics_and_leaves_them(x64):
    held, x = variables(np.float64), images(2, 3, 3, 3)
    y, updated = BatchNorm().apply(held, x, False, mutable=["batch_stats"])
    params, stats = held["params"], held["batch_stats"]
    scale = params["scale"] / np.sqrt(stats["var"] + 1e-5)
    np.testing.assert_allclose(y, (x - stats["mean"]) * scale + params["bias"], atol=1e-12)
    for name in stats:
        np.testing.assert_array_equal(updated["batch_stats"][name], stats[name])


def test_statistics_are_computed_in_float32_of_narrow_images():
    # A standard deviation of 2 around 100, where one unit of bfloat16 is a half.
    x = jnp.asarray(100 + images(8, 9, 9, 3), jnp.bfloat16)
    held = variables()
    y, updated = train(held, x, dtype=jnp.bfloat16)
    expected, stats = expected_training(held, x)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(y, np.float64), expected, atol=0.02)
    for name in stats:
        np.testing.assert_allclose(updated["batch_stats"][name], stats[name], rtol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_statistics_keep_the_type_they_are_stored_in(x64, dtype):
    traces, held = [], variables(dtype)

    @jax.jit
    def step(held, x):
        traces.append(x.shape)
        return train(held, x)

    for seed in (1, 2):
        y, updated = step(held, images(4, 2, 2, 3, seed=seed))
        assert y.dtype == jnp.float64
        assert {leaf.dtype for leaf in jax.tree.leaves(updated)} == {np.dtype(dtype)}
        held = {**held, **updated}
    assert len(traces) == 1


@pytest.mark.parametrize(
    ("x", "params", "dtype", "result"),
    [
        ("bfloat16", "bfloat16", None, "bfloat16"),
        ("bfloat16", "float32", None, "float32"),
        ("bfloat16", "float32", "bfloat16", "bfloat16"),
        ("float32", "float64", None, "float64"),
        ("float32", "float32", "float64", "float64"),
    ],
)
@pytest.mark.parametrize("mode", [True, False])
def test_the_output_has_the_widest_type_or_the_one_asked_for(x64, x, params, dtype, result, mode):
    model = BatchNorm(dtype=None if dtype is None else jnp.dtype(dtype))
    apply = functools.partial(model.apply, train=mode, mutable=["batch_stats"])
    y, _ = jax.eval_shape(apply, variables(params), jnp.ones((2, 2, 2, 3), x))
    assert y.dtype == result


@pytest.mark.parametrize("shape", [(1, 1, 1, 3), (0, 4, 4, 3)])
def test_one_value_has_no_variance(shape):
    held, x = variables(), jnp.ones(shape)
    with pytest.raises(
        ValueError, match=rf"two or more values .* got {shape[0]} from .* larger batch"
    ):
        train(held, x)
    assert BatchNorm().apply(held, x, False).shape == shape
    made = jax.eval_shape(lambda: BatchNorm().init(KEY, x, True))
    assert made["batch_stats"]["mean"].shape == (3,)


def test_a_resnet_refuses_to_train_on_one_value_and_infers_from_it():
    model, x = ResNet(5, (1, 1), "basic", width=4), jnp.ones((1, 4, 4, 3))
    held = jax.eval_shape(model.init, KEY, x)  # 1×1 pixel after the stem
    training = functools.partial(model.apply, train=True, mutable=["batch_stats"])
    with pytest.raises(ValueError, match=r"got 1 from shape \(1, 1, 1, 4\)"):
        jax.eval_shape(training, held, x)
    assert jax.eval_shape(model.apply, held, x).shape == (1, 5)


def test_initialising_moves_no_statistics():
    stats = BatchNorm().init(KEY, jnp.asarray(images(4, 2, 2, 3)), True)["batch_stats"]
    np.testing.assert_array_equal(stats["mean"], np.zeros(3))
    np.testing.assert_array_equal(stats["var"], np.ones(3))


# ---- frozen ----


@functools.cache
def adapted(freeze):
    """A model with a small ResNet behind a canonicalizer, and one training step of it."""
    group, x = ea.groups.Cyclic(4), jnp.asarray(images(2, 8, 8, 1), jnp.float32)
    corner = ea.from_function(lambda params, x: x[:, (0, 0, -1, -1), (0, -1, -1, 0), 0])
    resnet = ResNet(3, (1,), "basic", width=4, stem="cifar")
    model = ea.adapt(group, corner, ea.from_linen(resnet), freeze_predictor=freeze)
    params, state = model.init(KEY, x)

    def loss(params, x):
        (logits, _), after = model.apply(params, state, x, train=True)
        return jnp.square(logits).sum(), after

    gradients, after = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(params, x)
    return state, after, *gradients


def test_a_frozen_resnet_keeps_parameters_and_statistics():
    state, after, by_params, by_x = adapted(freeze=True)
    jax.tree.map(np.testing.assert_array_equal, after, state)
    assert not any(leaf.any() for leaf in jax.tree.leaves(by_params))
    assert jnp.abs(by_x).max() > 1e-3


def test_a_free_resnet_changes_every_one_of_them():
    state, after, by_params, _ = adapted(freeze=False)
    changed = jax.tree.map(lambda a, b: bool((a != b).all()), after, state)
    assert all(jax.tree.leaves(changed))
    assert all(leaf.any() for leaf in jax.tree.leaves(by_params))


# ---- several devices ----

SHARDED = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from equiadapt_jax.predictors.batch_norm import BatchNorm

mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
rng = np.random.default_rng(0)
# Every device has another mean, so that statistics of its own share would be far off.
x = (rng.normal(size=(8, 2, 3, 5)) + 10 * np.arange(8).reshape(8, 1, 1, 1)).astype(np.float32)
held = BatchNorm().init(jax.random.key(0), jnp.asarray(x), False)
step = jax.jit(lambda held, x: BatchNorm().apply(held, x, True, mutable=["batch_stats"]))
shared = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
assert len(shared.addressable_shards) == 4 and shared.addressable_shards[0].data.shape[0] == 2
y, updated = step(held, shared)
wide = x.astype(np.float64)
axes = (0, 1, 2)
expected = (wide - wide.mean(axes)) / np.sqrt(wide.var(axes) + 1e-5)
np.testing.assert_allclose(y, expected, atol=1e-5)
stats = updated["batch_stats"]
np.testing.assert_allclose(stats["mean"], 0.1 * wide.mean(axes), rtol=1e-5)
np.testing.assert_allclose(stats["var"], 0.9 + 0.1 * wide.var(axes, ddof=1), rtol=1e-5)
"""


def test_statistics_are_those_of_the_batch_over_all_devices():
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    result = subprocess.run(
        [sys.executable, "-c", SHARDED],
        env={**os.environ, **flags},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
