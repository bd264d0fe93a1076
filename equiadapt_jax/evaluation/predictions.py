"""What `make_evaluator` calls: models, pretrained networks and plain functions, all in one form."""

import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from equiadapt_jax.adaptation import Adapted
from equiadapt_jax.groups import MatrixGroup
from equiadapt_jax.interface import Network
from equiadapt_jax.predictors import Pretrained


def adapted_prediction(model: Adapted) -> Callable[..., tuple]:
    """`predict(params, state, images, first=0) -> (logits, pose, scores)` of the adapted model.

    Without the scores for SO(2) and O(2), whose poses have no probabilities. Where it samples
    poses, an image of the same number, which `first` is of the first one, always gets the same
    draws.
    """

    def predict(params, state, images, first=0):
        key = draws(first, images.shape[0])
        (logits, canonical), _ = model.apply(params, state, images, key=key)
        if isinstance(model.group, MatrixGroup):
            return logits, canonical.pose
        return logits, canonical.pose, canonical.scores

    return predict


def draws(first: int | jax.Array, images: int) -> jax.Array:
    """Keys `(images,)` for images of the numbers `first`, `first` + 1 and so on."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), first + jnp.arange(images))


def vanilla_prediction(model: Adapted) -> Callable[..., tuple]:
    """`predict(params, state, images) -> (logits, None)` of the predictor alone."""
    return lambda params, state, images: (model.predict(params, state, images)[0], None)


def pretrained_prediction(pretrained: Pretrained) -> Callable[..., Any]:
    """`call(params, state, images) -> logits` of a pretrained network, its preprocessing first.

    TypeError where the network is not a `Network`, or the preprocessing not callable.
    """
    network, preprocess = pretrained.network, pretrained.preprocess
    if not isinstance(network, Network):
        raise TypeError(
            f"The network of Pretrained is a {type(network).__name__}: wrap it with "
            "equiadapt_jax.from_linen, from_nnx or from_function."
        )
    if preprocess is not None and not callable(preprocess):
        raise TypeError(
            f"The preprocess of Pretrained is a {type(preprocess).__name__}: give a function of "
            "images, such as equiadapt_jax.predictors.Preprocess, or None."
        )

    def call(params, state, images):
        images = jnp.asarray(images)
        return network.apply(params, state, preprocess(images) if preprocess else images)[0]

    return call


def check_prediction(
    call: Callable[..., Any], params: Any, state: Any, name: str, shape: tuple[int, ...],
    classes: int,
) -> tuple[Callable[..., tuple], str]:  # fmt: skip
    """(`predict(params, state, images) -> (logits, None)`, why JAX cannot trace it or "").

    Args:
      call: `call(params, state, images) -> logits`: images float32 (B, S, S, C) in [0, 1] to logits
        (B, classes), arrays of JAX or of NumPy, or what becomes one by `np.asarray`.
      params: the first argument.
      state: the second.
      name: how the user calls it, for messages.
      shape: (B, S, S, C).
      classes: how many logits there must be.

    What JAX cannot trace is tried once with zeros, and later called with NumPy arrays.
    Raises ValueError where it raises itself, or returns anything but such logits.
    """
    try:
        found = jax.eval_shape(call, params, state, jax.ShapeDtypeStruct(shape, np.float32))
        reason = ""
    except Exception as error:  # whatever a function of NumPy arrays does with a tracer
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}".partition(". ")[0][:200]
        found = _call(call, params, state, name, np.zeros(shape, np.float32))
    _check_shape(found, name, shape[0], classes)
    if not reason:
        return lambda params, state, images: (call(params, state, images), None), ""

    def predict(params, state, images):
        logits = _call(call, params, state, name, images)
        _check_shape(logits, name, images.shape[0], classes)
        return logits, None

    return predict, reason


def as_sentence(what: str, error: Exception) -> str:
    """That `what`, the user's own code, raised an error, and where in it."""
    frames = traceback.extract_tb(error.__traceback__)
    foreign = ("site-packages", str(Path(__file__).parents[1]) + os.sep, "<frozen")
    own = [frame for frame in frames if not any(part in frame.filename for part in foreign)]
    last = (own or frames)[-1]
    return (
        f"{what} raised {type(error).__name__}: {error} ({last.filename}, line {last.lineno}; "
        "--traceback shows all)"
    )


def _call(call, params, state, name, images):
    try:
        return np.asarray(call(params, state, images))
    except Exception as error:
        what = f"{name}, given images {images.dtype} {images.shape},"
        raise ValueError(as_sentence(what, error)) from error


def _check_shape(logits, name, batch, classes):
    shape = getattr(logits, "shape", None)
    if shape is None or len(shape) != 2 or shape[0] != batch:
        what = f"a {type(logits).__name__}" if shape is None else f"shape {tuple(shape)}"
        raise ValueError(
            f"{name} returned {what} for {batch} images: logits (B, classes) are needed, here "
            f"({batch}, {classes})."
        )
    if shape[1] != classes:
        raise ValueError(
            f"{name} returned {shape[1]} logits per image, but the data have {classes} classes: "
            "one logit per class is needed, in the order of the classes."
        )
