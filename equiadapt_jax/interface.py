"""A network as pure functions, whatever it was written in: Linen, NNX or plain functions."""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import flax
import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Network:
    """A network as two pure functions, and a third for scorers that read its features.

    Attributes:
      init: `init(key, x) -> (params, state)`, both nested dicts of arrays; state holds what `apply`
        updates while training, such as batch statistics, and is empty for most networks.
      apply: `apply(params, state, x, *, train=False, key=None) -> (y, state)`; `key` feeds dropout.
      features: `features(params, state, x) -> (y, maps)` in inference: what `apply` gives, and a
        tuple of feature maps `(B, H, W, C)` on the way there, which may be empty. None where that
        is not known.
    """

    init: Callable[..., tuple[Any, Any]]
    apply: Callable[..., tuple[Any, Any]]
    features: Callable[..., tuple[Any, tuple[jax.Array, ...]]] | None = None


def from_linen(module) -> Network:
    """A Flax Linen module as a `Network`.

    `train` is passed on as whichever of `train`, `training`, `deterministic` or
    `use_running_average` the module's `__call__` takes. Every collection but "params" is state.
    Features are what the module sows into the collection "features", in the order of their names;
    none where it sows nothing.
    """
    mode = _training_argument(type(module).__call__)

    def init(key, x):
        params_key, dropout_key = jax.random.split(key)
        variables = module.init({"params": params_key, "dropout": dropout_key}, x, **mode(False))
        variables = dict(flax.core.unfreeze(variables))
        variables.pop("features", None)
        return variables.pop("params", {}), variables

    def apply(params, state, x, *, train=False, key=None):
        rngs = {} if key is None else {"dropout": key}
        variables = {"params": params, **state}
        if not (train and state):
            return module.apply(variables, x, rngs=rngs, **mode(train)), state
        y, updated = module.apply(variables, x, rngs=rngs, mutable=list(state), **mode(train))
        updated = flax.core.unfreeze(updated)
        if jax.tree.structure(updated) != jax.tree.structure(flax.core.unfreeze(state)):
            raise ValueError(
                f"A training step of {type(module).__name__} changed the structure of its state "
                f"({', '.join(state)}), as sow does: leave such a collection out of the state."
            )
        return y, updated

    def features(params, state, x):
        variables = {"params": params, **state}
        y, sown = module.apply(variables, x, mutable=["features"], **mode(False))
        return y, tuple(jax.tree.leaves(sown.get("features", {})))

    return Network(init, apply, features)


def from_nnx(module) -> Network:
    """A Flax NNX module, or a function `rngs -> module`, as a `Network`.

    A module given as such keeps its parameters: `init` returns them. A function is called with
    `nnx.Rngs(key)` by `init`. Parameters are the `nnx.Param` variables, state the others but random
    state and what the module sows.
    """
    from flax import nnx

    fixed = isinstance(module, nnx.Module)

    kinds = (nnx.Param, nnx.RngState, nnx.Intermediate)  # the last: what is sown

    def init(key, x):
        _, params, *_, state = nnx.split(module if fixed else module(nnx.Rngs(key)), *kinds, ...)
        return nnx.to_pure_dict(params), nnx.to_pure_dict(state)

    def apply(params, state, x, *, train=False, key=None):
        abstract = module if fixed else nnx.eval_shape(lambda: module(nnx.Rngs(0)))
        definition, params_tree, rngs, sown, state_tree = nnx.split(abstract, *kinds, ...)
        if train and key is None and jax.tree.leaves(rngs):
            raise ValueError(
                f"{type(abstract).__name__} draws random numbers while training: "
                "pass key=jax.random.key(...)."
            )
        nnx.replace_by_pure_dict(params_tree, params)
        nnx.replace_by_pure_dict(state_tree, state)
        merged = nnx.merge(definition, params_tree, rngs, sown, state_tree, copy=True)
        merged.train() if train else merged.eval()
        if key is not None:
            nnx.reseed(merged, default=key, dropout=key)
        y = merged(x)
        return y, nnx.to_pure_dict(nnx.state(merged, nnx.Not(nnx.Any(*kinds))))

    return Network(init, apply)


def from_function(
    function: Callable, init: Callable | None = None, features: Callable | None = None
) -> Network:
    """A stateless function `function(params, x) -> y` as a `Network`.

    `init(key, x) -> params` makes its parameters; without it they are empty, and `function` may
    close over fixed ones. It is called alike in training and inference. `features(params, x) ->
    (y, maps)` gives feature maps with it, for a scorer that reads them.
    """

    def initialise(key, x):
        return ({} if init is None else init(key, x)), {}

    def apply(params, state, x, *, train=False, key=None):
        return function(params, x), state

    def with_features(params, state, x):
        return features(params, x)

    return Network(initialise, apply, None if features is None else with_features)


def pose_by_pose(network: Callable, turned: jax.Array) -> Any:
    """`network` of each `(B, …)` of `turned`, `(K, B, …)`, one after the other, stacked.

    In one batch of all of them a processor would round the last pixels in another order, so that
    the poses of a turned image would not be those of the image. Known arrays are passed as they
    are, to a network that JAX cannot trace too.
    """
    if isinstance(turned, jax.core.Tracer):
        return jax.lax.map(network, turned)
    return jax.tree.map(lambda *rows: jnp.stack(rows), *map(network, turned))


def _training_argument(call) -> Callable[[bool], dict[str, bool]]:
    """How a module's `__call__` is told that it trains."""
    parameters = inspect.signature(call).parameters
    told = {"train": True, "training": True, "deterministic": False, "use_running_average": False}
    name = next((name for name in told if name in parameters), None)
    return lambda train: {} if name is None else {name: train == told[name]}
