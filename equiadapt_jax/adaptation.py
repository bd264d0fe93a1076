"""Scorer + predictor → one pure model that canonicalizes its input.

A `Network` is two pure functions, whatever it was written in. `adapt` puts a scorer before a
predictor: image → scores → pose → canonical input → the predictor's own preprocessing → prediction.
"""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import flax
import jax

from equiadapt_jax import canonicalization
from equiadapt_jax.canonicalization import Canonical
from equiadapt_jax.groups import Group

OUTPUTS = ("trivial",)


@dataclasses.dataclass(frozen=True)
class Network:
    """A network as two pure functions.

    Attributes:
      init: `init(key, x) -> (params, state)`, both nested dicts of arrays; state holds what `apply`
        updates while training, such as batch statistics, and is empty for most networks.
      apply: `apply(params, state, x, *, train=False, key=None) -> (y, state)`; `key` feeds dropout.
    """

    init: Callable[..., tuple[Any, Any]]
    apply: Callable[..., tuple[Any, Any]]


def from_linen(module) -> Network:
    """A Flax Linen module as a `Network`.

    `train` is passed on as whichever of `train`, `training`, `deterministic` or
    `use_running_average` the module's `__call__` takes. Every collection but "params" is state.
    """
    mode = _training_argument(type(module).__call__)

    def init(key, x):
        params_key, dropout_key = jax.random.split(key)
        variables = module.init({"params": params_key, "dropout": dropout_key}, x, **mode(False))
        variables = dict(flax.core.unfreeze(variables))
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

    return Network(init, apply)


def from_nnx(module) -> Network:
    """A Flax NNX module, or a function `rngs -> module`, as a `Network`.

    A module given as such keeps its parameters: `init` returns them. A function is called with
    `nnx.Rngs(key)` by `init`. Parameters are the `nnx.Param` variables, state the others.
    """
    from flax import nnx

    fixed = isinstance(module, nnx.Module)

    def split(module):
        definition, params, rngs, state = nnx.split(module, nnx.Param, nnx.RngState, ...)
        return definition, params, rngs, state

    def init(key, x):
        _, params, _, state = split(module if fixed else module(nnx.Rngs(key)))
        return nnx.to_pure_dict(params), nnx.to_pure_dict(state)

    def apply(params, state, x, *, train=False, key=None):
        abstract = module if fixed else nnx.eval_shape(lambda: module(nnx.Rngs(0)))
        definition, params_tree, rngs, state_tree = split(abstract)
        if train and key is None and jax.tree.leaves(rngs):
            raise ValueError(
                f"{type(abstract).__name__} draws random numbers while training: "
                "pass key=jax.random.key(...)."
            )
        nnx.replace_by_pure_dict(params_tree, params)
        nnx.replace_by_pure_dict(state_tree, state)
        merged = nnx.merge(definition, params_tree, rngs, state_tree, copy=True)
        merged.train() if train else merged.eval()
        if key is not None:
            nnx.reseed(merged, default=key, dropout=key)
        y = merged(x)
        return y, nnx.to_pure_dict(nnx.state(merged, nnx.Not(nnx.Any(nnx.Param, nnx.RngState))))

    return Network(init, apply)


def from_function(function: Callable, init: Callable | None = None) -> Network:
    """A stateless function `function(params, x) -> y` as a `Network`.

    `init(key, x) -> params` makes its parameters; without it they are empty, and `function` may
    close over fixed ones. It is called alike in training and inference.
    """

    def initialise(key, x):
        return ({} if init is None else init(key, x)), {}

    def apply(params, state, x, *, train=False, key=None):
        return function(params, x), state

    return Network(initialise, apply)


@dataclasses.dataclass(frozen=True)
class Adapted:
    """A predictor behind a canonicalizer, as pure functions; made by `adapt`.

    `params` and `state` are `{"scorer": …, "predictor": …}`.
    """

    group: Group
    scorer: Network
    predictor: Network
    preprocess: Callable[[jax.Array], jax.Array] | None
    output: str
    freeze_predictor: bool
    method: str
    temperature: float
    pad: str
    fill: float

    def init(
        self,
        key: jax.Array,
        images: jax.Array,
        predictor: tuple[Any, Any] | None = None,
    ) -> tuple[dict, dict]:
        """(params, state) for images `(B, S, S, C)`; the predictor's are those given, if any."""
        if predictor is not None and not (isinstance(predictor, tuple) and len(predictor) == 2):
            raise TypeError(
                f"predictor is a {type(predictor).__name__}: give (params, state), state being "
                "{} where there is none."
            )
        scorer_key, predictor_key = jax.random.split(key)
        scorer = self.scorer.init(scorer_key, images)
        predictor = predictor or self.predictor.init(predictor_key, self.prepare(images))
        params, state = zip(scorer, predictor, strict=True)
        names = ("scorer", "predictor")
        return dict(zip(names, params, strict=True)), dict(zip(names, state, strict=True))

    def canonicalize(
        self,
        params: Mapping,
        state: Mapping,
        images: jax.Array,
        *,
        train: bool = False,
        key: jax.Array | None = None,
    ) -> tuple[Canonical, dict]:
        """Canonical inputs and the updated state, without a predictor pass; see `apply`."""
        dropout, noise = (None, None) if key is None else jax.random.split(key)
        scores, scorer_state = self.scorer.apply(
            params["scorer"], state["scorer"], images, train=train, key=dropout if train else None
        )
        canonical = canonicalization.from_scores(
            self.group,
            scores,
            images,
            method=self.method if train else "straight_through",
            temperature=self.temperature,
            key=noise,
            pad=self.pad,
            fill=self.fill,
        )
        return canonical, {**state, "scorer": scorer_state}

    def predict(
        self,
        params: Mapping,
        state: Mapping,
        images: jax.Array,
        *,
        train: bool = False,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, dict]:
        """The predictor alone, with its preprocessing: no canonicalization.

        A frozen predictor runs as in inference; its parameters get no gradient, its input does.
        """
        train = train and not self.freeze_predictor
        predictor_params = params["predictor"]
        if self.freeze_predictor:
            predictor_params = jax.lax.stop_gradient(predictor_params)
        y, predictor_state = self.predictor.apply(
            predictor_params,
            state["predictor"],
            self.prepare(images),
            train=train,
            key=key if train else None,
        )
        return y, {**state, "predictor": predictor_state}

    def apply(
        self,
        params: Mapping,
        state: Mapping,
        images: jax.Array,
        *,
        train: bool = False,
        key: jax.Array | None = None,
    ) -> tuple[tuple[jax.Array, Canonical], dict]:
        """((prediction, canonical), state) for images `(B, S, S, C)` in [0, 1].

        Outside training the pose is the best one and nothing is random. One key serves the batch:
        dropout and Gumbel noise are drawn from it.
        """
        scorer_key, predictor_key = (None, None) if key is None else jax.random.split(key)
        canonical, state = self.canonicalize(params, state, images, train=train, key=scorer_key)
        y, state = self.predict(params, state, canonical.inputs, train=train, key=predictor_key)
        return (y, canonical), state

    def prepare(self, images: jax.Array) -> jax.Array:
        """What the predictor sees of images in [0, 1]."""
        return images if self.preprocess is None else self.preprocess(images)


def adapt(
    group: Group,
    scorer: Network,
    predictor: Network,
    *,
    preprocess: Callable[[jax.Array], jax.Array] | None = None,
    output: str = "trivial",
    freeze_predictor: bool = False,
    method: str = "straight_through",
    temperature: float = 1.0,
    pad: str = "edge",
    fill: float = 0.0,
) -> Adapted:
    """Put a canonicalizer before a predictor.

    Args:
      group: whose elements the prediction shall not depend on.
      scorer: images `(B, S, S, C)` in [0, 1] to scores `(B, |G|)`.
      predictor: preprocessed canonical images to predictions.
      preprocess: the predictor's own preprocessing, applied after canonicalization.
      output: how the group acts on predictions; "trivial", not at all, gives an invariant model.
      freeze_predictor: keep the predictor's parameters and statistics as they are.
      method: weights while training, see `canonicalization.weights`.
      temperature: of these weights.
      pad: what lies outside the image, see `actions.images`.
      fill: its value for `pad="constant"`.

    Raises:
      ValueError: an output or a method that does not exist.
      TypeError: a scorer or predictor that is not a `Network`.
    """
    if output not in OUTPUTS:
        raise ValueError(
            f"output={output!r} is not available: only {', '.join(OUTPUTS)} outputs, the same for "
            "every pose, are; carry others back yourself with canonicalization.invert."
        )
    if method not in canonicalization.METHODS:
        raise ValueError(f"Unknown method {method!r}: choose one of {canonicalization.METHODS}.")
    for name, network in (("scorer", scorer), ("predictor", predictor)):
        if not isinstance(network, Network):
            raise TypeError(
                f"The {name} is a {type(network).__name__}: wrap it with from_linen, from_nnx or "
                "from_function."
            )
    return Adapted(
        group,
        scorer,
        predictor,
        preprocess,
        output,
        freeze_predictor,
        method,
        temperature,
        pad,
        fill,
    )


def _training_argument(call) -> Callable[[bool], dict[str, bool]]:
    """How a module's `__call__` is told that it trains."""
    parameters = inspect.signature(call).parameters
    told = {"train": True, "training": True, "deterministic": False, "use_running_average": False}
    name = next((name for name in told if name in parameters), None)
    return lambda train: {} if name is None else {name: train == told[name]}
