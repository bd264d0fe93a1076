"""From scores or vectors to a pose, from a pose to the canonical input, and the way back.

For a finite group a scorer gives `scores (..., |G|)`; the pose h(x) is the best of them, and the
canonical input h(x)⁻¹·x is the same for every x in an orbit (Kaba et al. 2023, arXiv 2211.06489,
section 3; Mondal et al. 2023, arXiv 2310.01647, section 3). For SO(2) and O(2) it gives vectors
that turn with the image; the pose is the frame they span, a matrix, and gradients pass through it.
Pure functions over arrays; no networks, no state.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from equiadapt_jax.actions import images as image_actions
from equiadapt_jax.groups import SO, Cyclic, Dihedral, Group, MatrixGroup, O, finite

METHODS = ("straight_through", "gumbel", "soft")
_SHORT = 1e-6  # vectors without a longer entry span no frame
_CLEAR = 4.0  # log-odds by which a second vector of length one tells the side of the mirror


class Canonical(NamedTuple):
    """What canonicalization found: canonical inputs, poses, scores and weights over the group.

    For SO(2) and O(2) poses are matrices `(..., 2, 2)`, scores the vectors that span them or those
    over the finite group that is refined, and there are no weights.
    """

    inputs: jax.Array
    pose: jax.Array
    scores: jax.Array
    weights: jax.Array | None


def select_pose(group: Group, scores: jax.Array) -> jax.Array:
    """The pose of the highest score, int32 `(...)`, of scores `(..., |G|)`; the first of equals."""
    check_scores(group, scores)
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
    check_temperature(temperature)
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
    group: Group | MatrixGroup,
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
      pose: int32 `(...)`, for instance from `select_pose`; for SO(2) and O(2) matrices
        `(..., 2, 2)`, for instance from `frame`, which get gradients as they are.
      images: `(..., H, W, C)`.
      weights: `(..., |G|)`, for instance from `weights`; needed only for gradients to the scores of
        a finite group.
      pad: "edge" or "constant", see `actions.images`.
      fill: the value outside the image for `pad="constant"`.
      interpolation: "linear" or "cubic", see `actions.images`.
    """
    bring = _bring(group, pad, fill, interpolation)
    if weights is None:
        return bring(pose, images)
    group = _check(group, weights, images)
    return straight_through(group, pose, weights, images, bring)


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
    return weighted_sum(group, weights, images, _bring(group, pad, fill, interpolation))


def invert(
    group: Group | MatrixGroup,
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


def frame(group: MatrixGroup, vectors: jax.Array) -> jax.Array:
    """The pose that vectors span, by Gram-Schmidt: an element of SO(2) or O(2), `(..., 2, 2)`.

    Where the image's own up, (0, −1), has gone is what the first vector says; for O(2) the second
    says on which side of it right, (1, 0), is now. Up comes first because an image that is its own
    mirror image has one. So frame(g·v) = g∘frame(v) for all g, to the bit for quarter turns and
    mirrors, and the result is of the group to within rounding: its determinant is 1 for SO(2).

    Which of two mirrored poses is chosen has no derivative (a prior's loss has); the rotation's
    derivative is finite everywhere.

    Args:
      group: SO(2) or O(2).
      vectors: `(..., 1, 2)` for SO(2), `(..., 2, 2)` for O(2): rows of (x to the right, y down).
        Where no entry of the first is larger than 1e-6 the frame is the identity, and turns with
        nothing; where none of the second is, there is no mirror.

    Returns:
      Matrices in at least float32.

    Raises:
      ValueError: a finite group, or vectors of another shape.
    """
    up, right, _ = _up_and_right(group, vectors)
    return jnp.stack([right, -up], -1)


def mirror_log_odds(group: MatrixGroup, vectors: jax.Array) -> jax.Array:
    """Log-odds that the pose has no mirror, `(...)`: not negative where `frame` has none.

    Four times the length of the second vector along the right of the unmirrored frame. Of its
    length and not its angle, whose derivative would vanish where it points the other way. Arguments
    as for `frame`, of O(2) alone.
    """
    if not isinstance(group, O):
        raise ValueError(f"{group} has no mirrors of which there could be odds: take O(2).")
    return _CLEAR * _up_and_right(group, vectors)[2]


def _up_and_right(group, vectors):
    """Unit vectors `(..., 2)` that span the frame; how far it is not mirrored, for SO(2) None."""
    check_vectors(group, vectors)
    vectors = vectors.astype(jnp.promote_types(vectors.dtype, jnp.float32))
    up, known = _unit(vectors[..., 0, :], (0.0, -1.0))
    right = jnp.stack([-up[..., 1], up[..., 0]], -1)
    if not isinstance(group, O):
        return up, right, None
    side = vectors[..., 1, :]
    known &= ~(jnp.abs(side).max(-1) <= _SHORT)
    along = side[..., 0] * right[..., 0] + side[..., 1] * right[..., 1]
    along = jnp.where(known, along, 0)
    sign = jnp.where(along < 0, -1, 1).astype(up.dtype)
    return up, sign[..., None] * right, along


def _unit(vector, instead):
    """The vector at length one, or another where it is too short; and which it was."""
    # Greater and smaller entry: which is x and which y must not change the last bits.
    large = jnp.maximum(jnp.abs(vector[..., 0]), jnp.abs(vector[..., 1]))
    small = jnp.minimum(jnp.abs(vector[..., 0]), jnp.abs(vector[..., 1]))
    long_enough = ~(large <= _SHORT)  # what is not a number stays so, and is seen
    large = jnp.where(long_enough, large, 1)
    ratio = jnp.where(long_enough, small / large, 0)
    length = (large * jnp.sqrt(1 + ratio * ratio))[..., None]
    safe = jnp.where(long_enough[..., None], vector, jnp.asarray(instead, vector.dtype))
    return safe / jnp.where(long_enough[..., None], length, 1), long_enough


def from_vectors(
    group: MatrixGroup,
    vectors: jax.Array,
    images: jax.Array,
    *,
    pad: str = "edge",
    fill: float = 0.0,
    interpolation: str = "linear",
) -> Canonical:
    """Vectors and images to `Canonical`: the frame, and the canonical inputs.

    The derivative reaches the vectors through the matrix and the sampling. `scores` are the
    vectors; there are no weights. Arguments as in `frame` and `canonicalize`.
    """
    pose = frame(group, vectors)
    inputs = canonicalize(group, pose, images, pad=pad, fill=fill, interpolation=interpolation)
    return Canonical(inputs, pose, vectors, None)


def refine(group: Group, scores: jax.Array) -> jax.Array:
    """A pose between elements: the top of a parabola through the best score and its neighbours.

    For scores over C_n the result is of SO(2), for D_n of O(2). With s₋, s₀, s₊ the scores of
    r⁻¹∘g, g and r∘g, g the best, the pose is g turned by (s₋ − s₊) / 2(s₋ − 2s₀ + s₊) steps of
    2π/n, at most half of one: differentiable in these three. Scores of an exactly turned image, the
    same bits in other places, give the exactly turned pose.

    Args:
      group: C_n or D_n with n of at least 3.
      scores: `(..., |G|)`.

    Returns:
      Matrices `(..., 2, 2)` in at least float32.

    Raises:
      ValueError: scores that do not fit the group, or a group with too few rotations.
    """
    best = select_pose(group, scores)
    n, exact_turns = group.n, math.gcd(group.n, 4)
    if n < 3:
        raise ValueError(
            f"{group} has no neighbours to refine a pose between: take n of 3 or more."
        )
    scores = scores.astype(jnp.promote_types(scores.dtype, jnp.float32))
    steps, mirrored = group.steps(best), group.reflects(best)
    below, here, above = (
        jnp.take_along_axis(scores, ((steps + k) % n + n * mirrored)[..., None], -1)[..., 0]
        for k in (-1, 0, 1)
    )
    curvature = (below + above) - 2 * here
    # No parabola goes through scores that are equal, or −∞; of those almost equal the derivative,
    # which divides by the square of the curvature, would be none.
    flat = ~(jnp.isfinite(curvature) & (curvature <= -(jnp.finfo(scores.dtype).tiny ** 0.5)))
    slope = jnp.where(flat, 0, below - above)
    offset = slope / jnp.where(flat, -1, 2 * curvature)
    # The nearest exact turn, and what is left: the same for all exact turns, negated for mirrors.
    span = n // exact_turns
    first = steps % span
    beyond = 2 * (first + offset) > span
    rest = jnp.where(beyond, -((span - first) - offset), first + offset)
    quarter = (steps // span + beyond) * (4 // exact_turns)
    rotation, lattice = O(2).rotation(rest * (2 * np.pi / n)), Dihedral(4)
    exact = lattice.matrix(quarter % 4 + 4 * mirrored, rotation.dtype)
    return O(2).compose(rotation, exact)


def from_refined(
    group: Group,
    scores: jax.Array,
    images: jax.Array,
    *,
    pad: str = "edge",
    fill: float = 0.0,
    interpolation: str = "linear",
) -> Canonical:
    """As `from_scores`, with the pose of `refine`: of SO(2) or O(2), from scores of C_n or D_n.

    There are no weights: the derivative passes through the matrix to the best score and its
    neighbours. Train the scores as those of the finite group.
    """
    pose = refine(group, scores)
    rotations: MatrixGroup = SO(2) if isinstance(group, Cyclic) else O(2)
    inputs = canonicalize(rotations, pose, images, pad=pad, fill=fill, interpolation=interpolation)
    return Canonical(inputs, pose, scores, None)


def _bring(group, pad, fill, interpolation):
    """(g, images) ↦ g⁻¹·x."""

    def bring(g, images):
        g = group.inverse(g)
        return image_actions.act(group, g, images, pad=pad, fill=fill, interpolation=interpolation)

    return bring


# (elements, one for all or for each of the batch, and arrays) ↦ arrays of the same shape.
Transform = Callable[[jax.Array, jax.Array], jax.Array]


def weighted_sum(group: Group, weights: jax.Array, x: jax.Array, transform: Transform) -> jax.Array:
    """Σ_g w_g transform(g, x) over the whole group, one transform in memory at a time.

    Args:
      group: the group.
      weights: `(..., |G|)`.
      x: arrays `(..., *)`, with the leading shape of the weights.
      transform: `transform(g, x)` for an element and such arrays.

    Returns:
      The shape and dtype of x, added up in at least float32.
    """
    dtype = np.promote_types(x.dtype, np.float32)

    @jax.checkpoint
    def add(total, g):
        weight = jnp.expand_dims(jnp.take(weights, g, -1), _own(weights, x)).astype(dtype)
        return total + weight * transform(g, x).astype(dtype), None

    return jax.lax.scan(add, jnp.zeros(x.shape, dtype), group.elements())[0].astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 4))
def straight_through(
    group: Group, pose: jax.Array, weights: jax.Array, x: jax.Array, transform: Transform
) -> jax.Array:
    """`transform(pose, x)`, with the derivative of `weighted_sum` with respect to the weights.

    That is ⟨∂L/∂y, transform(g, x)⟩ for each g, one in memory at a time; the derivative with
    respect to x is the transpose of the one transform made. Only reverse mode is defined. `pose`
    is int32 `(...)`, the others are as in `weighted_sum`.
    """
    return transform(pose, x)


def _straight_through_forward(group, pose, weights, x, transform):
    return transform(pose, x), (pose, weights, x)


def _straight_through_backward(group, transform, residuals, cotangent):
    pose, weights, x = residuals
    dtype = np.promote_types(weights.dtype, x.dtype)

    def inner_product(g):
        return jnp.sum(cotangent.astype(dtype) * transform(g, x).astype(dtype), _own(weights, x))

    products = jnp.moveaxis(jax.lax.map(inner_product, group.elements()), 0, -1)
    _, transpose = jax.vjp(lambda x: transform(pose, x), x)
    return None, products.astype(weights.dtype), transpose(cotangent)[0]


straight_through.defvjp(_straight_through_forward, _straight_through_backward)


def _own(weights, x):
    """The axes of x behind the batch."""
    return tuple(range(weights.ndim - 1, x.ndim))


def check_scores(group: Group | MatrixGroup, scores: jax.Array) -> Group:
    """The group; ValueError for scores or weights that are not one for each of its elements."""
    group = finite(group, "A choice by scores or weights")
    if scores.ndim < 1 or scores.shape[-1] != group.order:
        raise ValueError(
            f"Scores or weights of shape {scores.shape} do not fit {group}: the last axis holds "
            f"one for each of its {group.order} elements."
        )
    return group


def check_temperature(temperature: float | jax.Array) -> None:
    """ValueError for a temperature that is not positive, if it is known: an array may be traced."""
    if not isinstance(temperature, jax.Array) and not temperature > 0:
        raise ValueError(f"The temperature of the weights is {temperature}: it must be positive.")


def check_vectors(group: Group | MatrixGroup, vectors: jax.Array) -> None:
    """ValueError for a finite group, or vectors that do not span a frame of SO(2) or O(2)."""
    if not isinstance(group, MatrixGroup):
        raise ValueError(
            f"A frame is a pose of SO(2) or O(2), and the group is {group}: use select_pose for "
            "finite groups."
        )
    rows = 2 if isinstance(group, O) else 1
    if vectors.shape[-2:] != (rows, 2):
        raise ValueError(
            f"Vectors of shape {vectors.shape} do not span a frame of {group}: give "
            f"(..., {rows}, 2)."
        )


def _check(group, weights, images):
    group = check_scores(group, weights)
    if weights.shape[:-1] != images.shape[:-3]:
        raise ValueError(
            f"Weights of shape {weights.shape} do not fit images of shape {images.shape}: give one "
            "row of weights for each image."
        )
    return group
