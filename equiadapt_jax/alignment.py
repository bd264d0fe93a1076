"""A prior estimated from data that are not upright, by alternating alignment.

Data x = h·x₀ come in poses h drawn from a distribution π that nobody knows. A scorer that learns
the poses in which images are stored learns π, seen from every image: its best pose then brings all
of them to the mode of π. Trained anew on images aligned so, it tells the poses themselves, and π is
how they are distributed (bootstrapped re-alignment, arXiv 2510.08178). An image that looks alike in
several poses has no single one; the mixture Σ_g π(g) p(g|x) counts it for all of them, where a
histogram of best poses would count noise.

What upright means no data can tell: with x₀ = s·x₀' the poses are h∘s. Here the most probable pose
is the identity. Pure functions over arrays; p(g|x) = softmax(scores), π `(|G|,)`, both sum to one.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from equiadapt_jax.groups import Group


def posterior(prior: jax.Array, probabilities: jax.Array) -> jax.Array:
    """The poses' probabilities under a prior, π(g) p(g|x) / Σ_k π(k) p(k|x), `(..., |G|)`.

    Where the two have no pose in common, p(g|x) is returned.
    """
    probabilities = jnp.asarray(probabilities)
    dtype = jnp.promote_types(probabilities.dtype, jnp.float32)
    joint = probabilities.astype(dtype) * jnp.asarray(prior, dtype)
    total = jnp.sum(joint, -1, keepdims=True)
    possible = total > 0
    return jnp.where(possible, joint / jnp.where(possible, total, 1), probabilities)


def update(prior: jax.Array, probabilities: jax.Array) -> jax.Array:
    """One step of expectation maximisation: the mean posterior over all images `(..., |G|)`.

    It never lowers the likelihood, the mean of log Σ_g π(g) p(g|x).
    """
    return jnp.mean(posterior(prior, probabilities).reshape(-1, probabilities.shape[-1]), 0)


def estimate(probabilities: jax.Array, *, steps: int = 500) -> jax.Array:
    """The most likely π `(|G|,)` for probabilities `(..., |G|)` that a scorer gives.

    `steps` updates from the uniform distribution; the likelihood has no other maximum.
    """
    order = probabilities.shape[-1]
    start = jnp.full(order, 1 / order, jnp.promote_types(probabilities.dtype, jnp.float32))
    return jax.lax.fori_loop(0, steps, lambda _, prior: update(prior, probabilities), start)


def shift(group: Group, prior: jax.Array, s) -> jax.Array:
    """The distribution of h∘s for h distributed as the prior: poses seen from another upright."""
    return jnp.asarray(prior)[group.compose(group.elements(), group.inverse(s))]


def centre(group: Group, prior: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The prior with its mode, the first of equals, shifted to the identity; and that shift."""
    s = group.inverse(jnp.argmax(prior).astype(jnp.int32))
    return shift(group, prior, s), s


def distance(group: Group, prior: jax.Array, other: jax.Array) -> jax.Array:
    """Total variation ½ Σ_g |π(g) − ρ(g)| after the best common shift, in [0, 1]."""
    shifted = jax.vmap(lambda s: shift(group, prior, s))(group.elements())
    return jnp.min(jnp.sum(jnp.abs(shifted - jnp.asarray(other)), -1)) / 2


def bootstrap(
    group: Group,
    images: int,
    train: Callable[[int, jax.Array], Any],
    score: Callable[[Any], jax.Array],
    *,
    rounds: int = 4,
) -> tuple[jax.Array, jax.Array]:
    """(π, poses) of images that are stored in unknown poses; neither labels nor a start are needed.

    In each round a scorer is trained for the poses found so far, then π and the poses are found
    anew with what it says.

    Args:
      group: whose elements the poses are.
      images: how many.
      train: `train(round, poses)` trains a scorer for which image i has the pose `poses[i]`, int32
        `(N,)`: `priors.Identity().loss(group, scores, applied=poses)`. It should begin anew, since
        a scorer that has learned a wrong pose by heart keeps it.
      score: what it returned to the probabilities p(g|x) of all images, `(N, |G|)`.
      rounds: how often, at least 2: the first scorer has learned π with every pose, so nothing but
        its best poses can be used.

    Raises:
      ValueError: fewer than two rounds, or probabilities of another shape.
    """
    if rounds < 2:
        raise ValueError(f"rounds={rounds}: a prior is estimated in at least 2 rounds.")
    poses = jnp.zeros(images, jnp.int32)
    prior = jnp.full(group.order, 1 / group.order)
    for number in range(rounds):
        probabilities = score(train(number, poses))
        if probabilities.shape != (images, group.order):
            raise ValueError(
                f"Probabilities of shape {probabilities.shape} are not one row for each of "
                f"{images} images, with one for each element of {group}."
            )
        if number:
            prior = estimate(probabilities)
        poses = jnp.argmax(posterior(prior, probabilities), -1).astype(jnp.int32)
    prior, s = centre(group, prior)
    return prior, group.compose(poses, s)
