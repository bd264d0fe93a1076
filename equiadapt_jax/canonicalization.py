"""From scores to a pose, from a pose to the canonical input, and the way back.

A scorer gives `scores (..., |G|)`; the pose h(x) is the best of them, and the canonical input
h(x)⁻¹·x is the same for every x in an orbit (Kaba et al. 2023, arXiv 2211.06489, section 3; Mondal
et al. 2023, arXiv 2310.01647, section 3). Pure functions over arrays; no networks, no state.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from equiadapt_jax.actions import images as image_actions
from equiadapt_jax.groups import Group

METHODS = ("straight_through", "gumbel", "soft")


class Canonical(NamedTuple):
    """What canonicalization found: canonical inputs, poses, scores and weights over the group."""

    inputs: jax.Array
    pose: jax.Array
    scores: jax.Array
    weights: jax.Array


def select_pose(group: Group, scores: jax.Array) -> jax.Array:
    """The pose of the highest score, int32 `(...)`, of scores `(..., |G|)`; the first of equals."""
    _check(group, scores)
    return jnp.argmax(scores, -1).astype(jnp.int32)


def weights(
    scores: jax.Array,
    *,
    method: str = "straight_through",
    temperature: float = 1.0,
    key: jax.Array | None = None,
) -> jax.Array:
    """Weights over poses that sum to one, `(..., |G|)`, in at least float32.

    Args:
      scores: `(..., |G|)`.
      method: "straight_through", one-hot at the best score with the derivative of the softmax;
        "gumbel", the same after adding Gumbel noise (a sample of the softmax at temperature 1);
        "soft", the softmax itself.
      temperature: divides the scores in the softmax and its derivative; positive.
      key: for "gumbel", one key for the batch.

    Raises:
      ValueError: an unknown method, a temperature that is not positive, or "gumbel" without a key.
    """
    if method not in METHODS:
        raise ValueError(f"Unknown method {method!r} for weights: choose one of {METHODS}.")
    if not isinstance(temperature, jax.Array) and temperature <= 0:
        raise ValueError(f"The temperature of the weights is {temperature}: it must be positive.")
    scores = scores.astype(jnp.promote_types(scores.dtype, jnp.float32))
    if method == "gumbel":
        if key is None:
            raise ValueError("Gumbel weights draw noise: pass key=jax.random.key(...).")
        scores = scores + jax.random.gumbel(key, scores.shape, scores.dtype)
    soft = jax.nn.softmax(scores / temperature, -1)
    if method == "soft":
        return soft
    hard = jax.nn.one_hot(jnp.argmax(scores, -1), scores.shape[-1], dtype=scores.dtype)
    return hard + (soft - jax.lax.stop_gradient(soft))


def canonicalize(
    group: Group,
    pose: jax.Array,
    images: jax.Array,
    weights: jax.Array | None = None,
    *,
    pad: str = "edge",
    fill: float = 0.0,
    interpolation: str = "linear",
) -> jax.Array:
    """The canonical input pose⁻¹·x: `act(group, inverse(pose), x)`, to the bit.

    With weights, which leave the value as it is, the derivative with respect to them is that of the
    mixture Σ_g w_g g⁻¹·x: ⟨∂L/∂x₀, g⁻¹·x⟩ for each g, one transformation in memory at a time. The
    derivative with respect to the images is the transpose of the one transformation made. Only
    reverse mode is defined.

    Args:
      group: the group.
      pose: int32 `(...)`, for instance from `select_pose`.
      images: `(..., H, W, C)`.
      weights: `(..., |G|)`, for instance from `weights`; needed only for gradients to the scores.
      pad: "edge" or "constant", see `actions.images`.
      fill: the value outside the image for `pad="constant"`.
      interpolation: "linear" or "cubic", see `actions.images`.
    """
    if weights is None:
        return image_actions.act(
            group, group.inverse(pose), images, pad=pad, fill=fill, interpolation=interpolation
        )
    _check(group, weights, images)
    return _canonicalize(group, (pad, fill, interpolation), pose, weights, images)


def mixture(
    group: Group,
    weights: jax.Array,
    images: jax.Array,
    *,
    pad: str = "edge",
    fill: float = 0.0,
    interpolation: str = "linear",
) -> jax.Array:
    """Σ_g w_g g⁻¹·x over the whole group, for soft weights `(..., |G|)`; arguments as above."""
    _check(group, weights, images)
    dtype = np.promote_types(images.dtype, np.float32)

    @jax.checkpoint
    def add(total, g):
        turned = image_actions.act(
            group, group.inverse(g), images, pad=pad, fill=fill, interpolation=interpolation
        )
        weight = jnp.take(weights, g, -1)[..., None, None, None].astype(dtype)
        return total + weight * turned.astype(dtype), None

    zero = jnp.zeros(images.shape, dtype)
    return jax.lax.scan(add, zero, group.elements())[0].astype(images.dtype)


def invert(
    group: Group,
    pose: jax.Array,
    images: jax.Array,
    *,
    pad: str = "edge",
    fill: float = 0.0,
    interpolation: str = "linear",
) -> jax.Array:
    """pose·y: an image-shaped output for the canonical input, carried back to the input's pose."""
    return image_actions.act(group, pose, images, pad=pad, fill=fill, interpolation=interpolation)


def from_scores(
    group: Group,
    scores: jax.Array,
    images: jax.Array,
    *,
    method: str = "straight_through",
    temperature: float = 1.0,
    key: jax.Array | None = None,
    pad: str = "edge",
    fill: float = 0.0,
    interpolation: str = "linear",
) -> Canonical:
    """Scores and images to `Canonical`: weights, the pose they choose, the canonical inputs.

    Hard weights give the same canonical inputs with and without gradients; soft ones the mixture.
    Arguments as in `weights` and `canonicalize`.
    """
    w = weights(scores, method=method, temperature=temperature, key=key)
    # Saturated soft weights can be equal where the scores are not.
    pose = select_pose(group, scores if method == "soft" else w)
    if method == "soft":
        inputs = mixture(group, w, images, pad=pad, fill=fill, interpolation=interpolation)
    else:
        inputs = canonicalize(
            group, pose, images, w, pad=pad, fill=fill, interpolation=interpolation
        )
    return Canonical(inputs, pose, scores, w)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _canonicalize(group, how, pose, weights, images):
    return _transform(group, how, pose, images)


def _transform(group, how, pose, images):
    pad, fill, interpolation = how
    g = group.inverse(pose)
    return image_actions.act(group, g, images, pad=pad, fill=fill, interpolation=interpolation)


def _canonicalize_forward(group, how, pose, weights, images):
    return _canonicalize(group, how, pose, weights, images), (pose, weights, images)


def _canonicalize_backward(group, how, residuals, cotangent):
    pose, weights, images = residuals
    dtype = np.promote_types(weights.dtype, images.dtype)

    def inner_product(g):
        turned = _transform(group, how, g, images).astype(dtype)
        return jnp.sum(cotangent.astype(dtype) * turned, (-3, -2, -1))

    products = jnp.moveaxis(jax.lax.map(inner_product, group.elements()), 0, -1)
    _, transpose = jax.vjp(lambda x: _transform(group, how, pose, x), images)
    return None, products.astype(weights.dtype), transpose(cotangent)[0]


_canonicalize.defvjp(_canonicalize_forward, _canonicalize_backward)


def _check(group, scores, images=None):
    if scores.ndim < 1 or scores.shape[-1] != group.order:
        raise ValueError(
            f"Scores or weights of shape {scores.shape} do not fit {group}: the last axis holds "
            f"one for each of its {group.order} elements."
        )
    if images is not None and scores.shape[:-1] != images.shape[:-3]:
        raise ValueError(
            f"Weights of shape {scores.shape} do not fit images of shape {images.shape}: give one "
            "row of weights for each image."
        )
