"""Predictions for several poses of an input instead of one, weighted by the scores.

A single pose loses all where the scorer errs, and jumps where two poses tie: no continuous choice
of one pose exists for common groups (Dym et al. 2024, arXiv 2402.16077). Averaging the predictions
for the k best poses, weighted by the softmax of their scores, costs k passes of the predictor and
softens the first; the second is gone where k is the order of the group. There are four weightings:

    scores    softmax of the scores over the k best: a weighted frame where k is all of the group
    faded     the same less what the next pose would have: a pose fades before another replaces it,
              so the average is continuous with k below |G| too, where not all k + 1 best tie
    equal     1/k each: group averaging where k is all of the group (Puny et al. 2022, arXiv
              2110.03336; `mean`)
    sampled   1/k each, for k poses drawn from the softmax, with replacement: their mean over keys
              is the weighted frame (Kim et al. 2023, arXiv 2306.02866)

Poses are added up from the best to the worst, so an input that is turned by an exact element, whose
scores are the same numbers in other places, gives the same bits, unless scores tie; also where
poses are drawn, which are ranks among the scores, and the key is the same. Outputs that the group
acts on are each brought back to the pose of the input before they are added (`act`), the same
bits for groups that do not interpolate. Pure functions; no networks, no state.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from equiadapt_jax.actions import images as image_actions
from equiadapt_jax.canonicalization import check_scores, check_temperature
from equiadapt_jax.groups import Group, finite

WEIGHTINGS = ("scores", "faded", "equal", "sampled")


def best(
    group: Group,
    scores: jax.Array,
    *,
    poses: int | None = None,
    temperature: float = 1.0,
    weighting: str = "scores",
    key: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """(poses, weights) of the best poses, `(..., k)`, the best first; or of poses drawn by a key.

    Args:
      group: the group.
      scores: `(..., |G|)`.
      poses: k, how many; None for as many as the group has.
      temperature: divides the scores in every softmax; positive.
      weighting: one of WEIGHTINGS, see the module.
      key: for "sampled", one key for the batch, or one for each input `(...)`.

    Returns:
      int32 elements, and weights that sum to one, in at least float32.

    Raises:
      ValueError: scores that do not fit the group, k out of range, a temperature that is not
        positive, an unknown weighting, "sampled" without a key.
    """
    check_scores(group, scores)
    poses = group.order if poses is None else poses
    if not 1 <= poses <= group.order:
        raise ValueError(
            f"poses={poses}: average over 1 to {group.order} of the elements of {group}."
        )
    check_temperature(temperature)
    if weighting not in WEIGHTINGS:
        raise ValueError(f"Unknown weighting {weighting!r}: choose one of {', '.join(WEIGHTINGS)}.")
    scores = scores.astype(jnp.promote_types(scores.dtype, jnp.float32))
    if weighting == "sampled":
        elements = _draw(scores, poses, temperature, key)
        return elements, jnp.full(elements.shape, 1 / poses, scores.dtype)
    fading = weighting == "faded" and poses < group.order
    chosen, elements = jax.lax.top_k(scores, poses + fading)
    elements = elements[..., :poses].astype(jnp.int32)
    if weighting == "equal":
        return elements, jnp.full(elements.shape, 1 / poses, scores.dtype)
    chosen /= temperature
    return elements, _faded(chosen) if fading else jax.nn.softmax(chosen, -1)


def _draw(scores, poses, temperature, key):
    """Elements `(..., k)` drawn from softmax(scores / temperature), as ranks among the scores."""
    if key is None:
        raise ValueError("Sampled poses are drawn: pass key=jax.random.key(...).")
    ranked, elements = jax.lax.top_k(scores, scores.shape[-1])
    batch = scores.shape[:-1]
    if is_batch(key):  # the draws of an input are then the same in any batch
        draw = lambda key, s: jax.random.categorical(key, s, shape=(poses,))  # noqa: E731
        ranks = jnp.vectorize(draw, signature="(),(n)->(k)")(key, ranked / temperature)
    else:
        ranks = jax.random.categorical(key, ranked / temperature, shape=(poses, *batch))
        ranks = jnp.moveaxis(ranks, 0, -1)
    return jnp.take_along_axis(elements, ranks, -1).astype(jnp.int32)


def is_batch(key: jax.Array) -> bool:
    """Whether these are several keys of `jax.random.key`, and not one."""
    return key.ndim > 0 and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)


def _faded(scores):
    """Weights `(..., k)` ∝ exp(s_j) − exp(s_{k+1}) of the k + 1 best scores; equal if all tie."""
    weights = jnp.exp(scores[..., :-1] - scores[..., :1])
    weights -= jnp.exp(scores[..., -1:] - scores[..., :1])
    total = weights.sum(-1, keepdims=True)
    tied = total <= 0
    return jnp.where(tied, 1 / weights.shape[-1], weights / jnp.where(tied, 1, total))


Act = Callable[[jax.Array, jax.Array], jax.Array]


def combine(
    poses: jax.Array, weights: jax.Array, outputs: jax.Array, *, act: Act | None = None
) -> jax.Array:
    """Σ_j w_j ρ(g_j) y(g_j) of outputs that are known for every element of the group.

    Args:
      poses: g, int32 `(B, k)`, and
      weights: w, `(B, k)`, both from `best`.
      outputs: y, `(B, |G|, ...)`, where `outputs[:, g]` is the prediction for g⁻¹·x.
      act: ρ, `act(g, y)` for elements `(B,)` and outputs `(B, ...)`; None where the group does
        not act on them.

    Returns:
      `(B, ...)`, in the dtype of the outputs, added up in at least float32. A pose of weight zero
      adds nothing, whatever its output.
    """
    dtype = jnp.promote_types(outputs.dtype, jnp.float32)
    chosen = jax.vmap(lambda y, g: y[g])(outputs, poses).astype(dtype)
    total = jnp.zeros_like(chosen[:, 0])
    for j in range(poses.shape[1]):
        y = chosen[:, j] if act is None else act(poses[:, j], chosen[:, j])
        total += _weigh(weights[:, j], y)
    return total.astype(outputs.dtype)


def weighted(
    group: Group,
    scores: jax.Array,
    images: jax.Array,
    predict: Callable[[jax.Array], jax.Array],
    *,
    poses: int | None = None,
    temperature: float = 1.0,
    weighting: str = "scores",
    key: jax.Array | None = None,
    chunk: int | None = None,
    act: Act | None = None,
    pad: str = "edge",
    fill: float = 0.0,
    interpolation: str = "linear",
) -> jax.Array:
    """Σ_j w_j ρ(g_j) p(g_j⁻¹·x) over k poses g_j of `best`: k passes of the predictor p per image.

    With a `chunk` below k only the running sum and so many poses of the batch are in memory at a
    time, however large the group; reverse-mode derivatives then make each pass again.

    Args:
      group: the group.
      scores: `(B, |G|)`.
      images: `(B, H, W, C)`.
      predict: images `(N, H, W, C)` to outputs `(N, ...)`: logits, or probabilities to average
        those.
      poses: k; None for all of the group.
      temperature: of the weights, see `best`.
      weighting: how the poses are chosen and weighted, see `best`.
      key: for "sampled", see `best`.
      chunk: poses that share a pass, which sees chunk · B images; it divides k. None for all, the
        fastest where there is room (on CPUs, XLA runs a loop of smaller passes on one core).
      act: ρ, see `combine`.
      pad: what lies outside the image, see `actions.images`.
      fill: its value for `pad="constant"`.
      interpolation: "linear" or "cubic".

    Raises:
      ValueError: shapes that do not fit, k or the temperature out of range, a chunk that does not
        divide k.
    """
    elements, weights = best(
        group, scores, poses=poses, temperature=temperature, weighting=weighting, key=key
    )
    k = elements.shape[-1]
    if scores.ndim != 2 or images.ndim != 4 or scores.shape[0] != images.shape[0]:
        raise ValueError(
            f"Scores of shape {scores.shape} and images of shape {images.shape} do not fit: give "
            "(B, |G|) and (B, H, W, C), or use jax.vmap."
        )
    chunk = k if chunk is None else chunk
    if chunk < 1 or k % chunk:
        raise ValueError(f"chunk={chunk} does not divide the {k} poses: choose a divisor.")

    def canonicalize(g):
        g = group.inverse(g)
        return image_actions.act(group, g, images, pad=pad, fill=fill, interpolation=interpolation)

    def add(total, part):
        g, w = part  # (B, chunk); the batch stays in front, where devices share it
        canonical = jax.vmap(canonicalize, in_axes=1, out_axes=1)(g)
        outputs = predict(canonical.reshape(-1, *images.shape[1:]))
        outputs = outputs.reshape(-1, chunk, *outputs.shape[1:]).astype(total.dtype)
        for j in range(chunk):
            y = outputs[:, j] if act is None else act(g[:, j], outputs[:, j])
            total += _weigh(w[:, j], y)
        return total, None

    output = jax.eval_shape(predict, images)
    total = jnp.zeros(output.shape, jnp.promote_types(output.dtype, jnp.float32))
    if chunk == k:
        return add(total, (elements, weights))[0].astype(output.dtype)
    parts = [jnp.moveaxis(x.reshape(x.shape[0], -1, chunk), 1, 0) for x in (elements, weights)]
    return jax.lax.scan(jax.checkpoint(add), total, tuple(parts))[0].astype(output.dtype)


def mean(
    group: Group,
    images: jax.Array,
    predict: Callable[[jax.Array], jax.Array],
    *,
    chunk: int | None = None,
    act: Act | None = None,
    pad: str = "edge",
    fill: float = 0.0,
    interpolation: str = "linear",
) -> jax.Array:
    """Group averaging, 1/|G| Σ_g ρ(g) p(g⁻¹·x), which needs no scores; arguments as for `weighted`.

    |G| passes for each image. An exactly turned image gives the same up to rounding, because the
    poses are added up in the order of the elements.
    """
    scores = jnp.zeros((images.shape[0], finite(group, "Group averaging").order))
    return weighted(
        group, scores, images, predict, weighting="equal", chunk=chunk, act=act, pad=pad,
        fill=fill, interpolation=interpolation,
    )  # fmt: skip


def _weigh(weight, output):
    """Weight × output for each row; where the weight is zero, 0 · ∞ is left out."""
    weight = weight.reshape(-1, *[1] * (output.ndim - 1)).astype(output.dtype)
    # The product's own derivative stays: a pose of weight zero still tells its score.
    return weight * jnp.where(weight == 0, jnp.nan_to_num(output), output)
