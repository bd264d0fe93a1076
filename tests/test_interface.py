"""Networks as two pure functions."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import equiadapt_jax as ea

KEY = jax.random.key(0, impl="rbg")


def noise(*shape, seed=0):
    return np.random.default_rng(seed).uniform(size=shape).astype(np.float32)


X = noise(4, 6, 6, 2)


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def norm(tree):
    return np.sqrt(sum(np.square(leaf).sum() for leaf in jax.tree.leaves(tree)))


# ---- linen ----


class Linen(nn.Module):
    """A dense layer, batch statistics and dropout, on flattened input."""

    @nn.compact
    def __call__(self, x, train: bool = False):
        x = nn.Dense(6, name="dense")(x.reshape(x.shape[0], -1))
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9, name="norm")(x)
        x = nn.Dropout(0.5, deterministic=not train)(x)
        return nn.Dense(3, name="head")(x)


class Told(nn.Module):
    """Returns what it was told about training, under the argument's name."""

    @nn.compact
    def __call__(self, x):
        return x


class Train(Told):
    def __call__(self, x, *, train):
        return jnp.float32(train)


class Training(Told):
    def __call__(self, x, training=None):
        return jnp.float32(training)


class Deterministic(Told):
    def __call__(self, x, deterministic):
        return jnp.float32(not deterministic)


class RunningAverage(Told):
    def __call__(self, x, use_running_average):
        return jnp.float32(not use_running_average)


@pytest.mark.parametrize("module", [Train, Training, Deterministic, RunningAverage])
def test_linen_modules_are_told_in_their_own_words(module):
    network = ea.from_linen(module())
    for train in (False, True):
        assert network.apply({}, {}, noise(1), train=train) == (float(train), {})
    assert network.apply({}, {}, noise(1))[0] == 0.0


@pytest.fixture(scope="module")
def linen():
    """(network, module, params, state, x, jitted apply)."""
    module, x = Linen(), noise(4, 5)
    network = ea.from_linen(module)
    params, state = jax.jit(network.init)(KEY, x)
    return network, module, params, state, x, jax.jit(network.apply, static_argnames="train")


def test_linen_variables_are_split_into_parameters_and_state(linen):
    _, module, params, state, x, _ = linen
    assert set(params) == {"dense", "norm", "head"}
    assert set(state) == {"batch_stats"}
    assert type(params) is type(params["dense"]) is type(state) is dict
    variables = jax.eval_shape(module.init, KEY, x)
    assert jax.tree.structure({"params": params, **state}) == jax.tree.structure(variables)


def test_linen_inference_is_the_module_and_leaves_the_state(linen):
    _, module, params, state, x, apply = linen
    y, after = apply(params, state, x)
    np.testing.assert_allclose(y, module.apply({"params": params, **state}, x), atol=1e-6)
    assert_same(after, state)
    for key in (None, jax.random.key(1), jax.random.key(2)):  # dropout is off
        again, after = apply(params, state, x, key=key)
        np.testing.assert_array_equal(again, y)
        assert_same(after, state)


def test_linen_training_updates_statistics_and_drops_out_by_key(linen):
    network, module, params, state, x, apply = linen
    y, after = apply(params, state, x, train=True, key=jax.random.key(1))
    expected, updated = module.apply(
        {"params": params, **state}, x, train=True,
        rngs={"dropout": jax.random.key(1)}, mutable=["batch_stats"],
    )  # fmt: skip
    np.testing.assert_allclose(y, expected, atol=1e-6)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), after, dict(updated))
    hidden = x @ params["dense"]["kernel"] + params["dense"]["bias"]
    np.testing.assert_allclose(
        after["batch_stats"]["norm"]["mean"], 0.1 * hidden.mean(0), atol=1e-6
    )
    assert (apply(params, state, x, train=True, key=jax.random.key(2))[0] != y).any()
    with pytest.raises(Exception, match="dropout"):
        network.apply(params, state, x, train=True)


def test_linen_modules_without_state_or_mode():
    network, x = ea.from_linen(nn.Dense(2)), noise(3, 4)
    params, state = network.init(KEY, x)
    assert state == {}
    for train in (False, True):
        y, after = network.apply(params, state, x, train=train, key=KEY)
        np.testing.assert_allclose(y, x @ params["kernel"] + params["bias"], atol=1e-6)
        assert after == {}


class Counting(nn.Module):
    """Counts its calls in a collection, whenever it may write to it."""

    @nn.compact
    def __call__(self, x):
        calls = self.variable("counters", "calls", lambda: jnp.zeros(()))
        if self.is_mutable_collection("counters"):
            calls.value += 1
        return x


def test_linen_state_of_any_collection_is_written_only_while_training():
    network = ea.from_linen(Counting())
    params, state = network.init(KEY, noise(1))
    assert params == {}
    calls = state["counters"]["calls"]
    assert network.apply(params, state, noise(1))[1]["counters"]["calls"] == calls
    assert network.apply(params, state, noise(1), train=True)[1]["counters"]["calls"] == calls + 1
    assert state["counters"]["calls"] == calls


# ---- nnx ----


class Nnx(nnx.Module):
    """A dense layer, batch statistics and dropout, on flattened input."""

    def __init__(self, rngs):
        self.dense = nnx.Linear(5, 6, rngs=rngs)
        self.norm = nnx.BatchNorm(6, momentum=0.9, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, x):
        x = self.norm(self.dense(x.reshape(x.shape[0], -1)))
        return self.head(self.drop(x))


MAKERS = {
    "instance": lambda: Nnx(nnx.Rngs(0)),
    "instance with streams": lambda: Nnx(nnx.Rngs(params=0, dropout=1)),
    "class": lambda: Nnx,
    "factory": lambda: lambda rngs: Nnx(rngs),
}


def snapshot(module):
    """Every array a module holds, keys and counters included."""
    leaves = jax.tree.leaves(nnx.to_pure_dict(nnx.state(module)))
    is_key = lambda a: jnp.issubdtype(a.dtype, jax.dtypes.prng_key)  # noqa: E731
    return [np.asarray(jax.random.key_data(a) if is_key(a) else a) for a in leaves]


@pytest.mark.parametrize("kind", MAKERS)
def test_nnx_modules_are_pure_functions(kind):
    module, x = MAKERS[kind](), noise(4, 5)
    network = ea.from_nnx(module)
    params, state = network.init(KEY, x)
    shapes = jax.tree.map(jnp.shape, (params, state))
    dense, head = {"kernel": (5, 6), "bias": (6,)}, {"kernel": (6, 3), "bias": (3,)}
    norms = {"scale": (6,), "bias": (6,)}
    assert shapes == (
        {"dense": dense, "norm": norms, "head": head}, {"norm": {"mean": (6,), "var": (6,)}}
    )  # fmt: skip
    assert type(params) is type(params["dense"]) is dict

    params = jax.tree.map(lambda a: a + 0.3, params)
    state = jax.tree.map(lambda a: a + 0.2, state)
    before = snapshot(module) if isinstance(module, nnx.Module) else []
    apply = jax.jit(network.apply, static_argnames="train")

    # Inference is the formula, leaves the statistics, and needs no key.
    y, after = apply(params, state, x)
    hidden = x @ params["dense"]["kernel"] + params["dense"]["bias"]
    spread = np.sqrt(state["norm"]["var"] + 1e-5)
    normal = (hidden - state["norm"]["mean"]) / spread * params["norm"]["scale"]
    expected = (normal + params["norm"]["bias"]) @ params["head"]["kernel"] + params["head"]["bias"]
    np.testing.assert_allclose(y, expected, atol=1e-5)
    assert_same(after, state)
    np.testing.assert_array_equal(apply(params, state, x, key=jax.random.key(5))[0], y)

    # Training moves the statistics and draws from the key alone.
    first, after = apply(params, state, x, train=True, key=jax.random.key(1))
    np.testing.assert_allclose(
        after["norm"]["mean"], 0.9 * state["norm"]["mean"] + 0.1 * hidden.mean(0), atol=1e-6
    )
    second, _ = apply(params, state, x, train=True, key=jax.random.key(1))
    np.testing.assert_array_equal(first, second)
    assert (apply(params, state, x, train=True, key=jax.random.key(2))[0] != first).any()
    with pytest.raises(ValueError, match="Nnx draws random numbers while training: pass key="):
        network.apply(params, state, x, train=True)

    def loss(params, key):
        return (network.apply(params, state, x, train=True, key=key)[0] ** 2).sum()

    gradient = jax.jit(jax.grad(loss))(params, jax.random.key(1))
    assert jax.tree.structure(gradient) == jax.tree.structure(params)
    assert all(norm(leaf) > 0 for leaf in (gradient["dense"]["kernel"], gradient["head"]))

    # Nothing of this is remembered by the module.
    network.apply(params, state, x, train=True, key=jax.random.key(1))
    after = snapshot(module) if isinstance(module, nnx.Module) else []
    assert_same(after, before)


@pytest.mark.filterwarnings("ignore:Using 'Module.sow:DeprecationWarning")
def test_what_an_nnx_module_sows_is_no_state():
    class Sows(nnx.Module):
        def __init__(self, rngs):
            self.linear, self.norm = nnx.Linear(5, 2, rngs=rngs), nnx.BatchNorm(2, rngs=rngs)

        def __call__(self, x):
            y = self.norm(self.linear(x))
            self.sow(nnx.Intermediate, "seen", y)
            return y

    used, x = Sows(nnx.Rngs(0)), noise(4, 5)
    used(x)
    for module in (Sows, used):
        network = ea.from_nnx(module)
        params, state = network.init(KEY, x)
        for train in (False, True):
            _, after = network.apply(params, state, x, train=train)
            _, again = network.apply(params, after, x, train=train)
            assert jax.tree.structure(state) == jax.tree.structure(after)
            assert jax.tree.structure(state) == jax.tree.structure(again)


def test_nnx_instances_keep_their_parameters_and_factories_draw_them():
    module, x = nnx.Linear(5, 2, rngs=nnx.Rngs(7)), noise(4, 5)
    params, state = ea.from_nnx(module).init(KEY, x)
    assert state == {}
    np.testing.assert_array_equal(params["kernel"], module.kernel[...])
    np.testing.assert_allclose(ea.from_nnx(module).apply(params, state, x)[0], module(x), atol=1e-6)
    drawn = ea.from_nnx(lambda rngs: nnx.Linear(5, 2, rngs=rngs))
    one, two, again = (drawn.init(jax.random.key(k), x)[0]["kernel"] for k in (0, 1, 0))
    assert (one != two).any()
    np.testing.assert_array_equal(one, again)
    shapes = jax.eval_shape(drawn.init, jax.random.key(0), x)
    assert shapes[0]["kernel"].shape == (5, 2)


# ---- functions ----


def test_functions_are_networks():
    fixed = ea.from_function(lambda params, x: 2 * x)
    assert fixed.init(KEY, noise(3)) == ({}, {})
    y, state = fixed.apply({}, {"kept": 1}, noise(3), train=True, key=KEY)
    np.testing.assert_array_equal(y, 2 * noise(3))
    assert state == {"kept": 1}

    linear = ea.from_function(
        lambda params, x: x @ params["w"],
        lambda key, x: {"w": jax.random.normal(key, (x.shape[-1], 2))},
    )
    params, state = linear.init(KEY, noise(4, 3))
    assert state == {}
    np.testing.assert_array_equal(params["w"], jax.random.normal(KEY, (3, 2)))
    np.testing.assert_allclose(
        linear.apply(params, state, noise(4, 3))[0], noise(4, 3) @ params["w"], atol=1e-6
    )
