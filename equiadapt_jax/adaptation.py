"""Scorer + predictor → one pure model that canonicalizes its input.

`adapt` puts a scorer before a predictor, both given as a `Network`: image → scores → pose →
canonical input → the predictor's own preprocessing → prediction.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax

from equiadapt_jax import canonicalization
from equiadapt_jax.canonicalization import Canonical
from equiadapt_jax.groups import Group
from equiadapt_jax.interface import Network, from_function, from_linen, from_nnx

__all__ = ["OUTPUTS", "Adapted", "Network", "adapt", "from_function", "from_linen", "from_nnx"]

OUTPUTS = ("trivial",)


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
                f"predictor is a {type(predictor).__name__}: give (params, state), where state "
                "may be empty."
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
