"""Any network as an energy over the orbit: optimised canonicalization.

A network that is not equivariant sees the input in every pose, and what it makes of g⁻¹·x is the
score of g (Panigrahi & Mondal 2024, arXiv 2405.14089; Kaba et al. 2023, arXiv 2211.06489, section
3.2). Each pose is seen in its own frame: turning the image by an exact element permutes what the
network is given, and the scores are the same bits in other places, whatever the network is.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from equiadapt_jax import canonicalization
from equiadapt_jax.energies import unit
from equiadapt_jax.groups import Group
from equiadapt_jax.interface import Network, pose_by_pose

REFERENCES = ("learned", "fixed", "none")


@dataclasses.dataclass(frozen=True)
class OrbitScorer(Network):
    """A `Network` of images `(B, S, S, C)` to scores `(B, |G|)`; made by `orbit_scorer`.

    Its parameters are `{"network": …}`, with the reference vector where that is learned.

    Attributes:
      embed: `embed(params, state, images, *, train=False, key=None) -> (embeddings, state)`: what
        the network makes of each pose, `(B, |G|, D)`, the terms of `energies` are for; None where
        it gives the score itself.
    """

    embed: Callable[..., tuple[jax.Array, Any]] | None = None


def orbit_scorer(
    group: Group,
    network: Network,
    *,
    reference: str | jax.Array = "learned",
    scale: float = 10.0,
    pad: str = "edge",
    fill: float = 0.0,
    interpolation: str = "linear",
) -> OrbitScorer:
    """Score the poses of images by any network, one pass for each.

    Args:
      group: C_n or D_n.
      network: images `(N, S, S, C)` to embeddings `(N, D)`; for `reference="none"` to one number
        for each, `(N,)` or `(N, 1)`. Batch statistics, if it has any, are taken over all poses.
      reference: what an embedding is compared with: "learned", a vector among the parameters;
        "fixed", the diagonal; or a vector `(D,)` of your own. The score is scale · cosine. "none":
        the network gives the score.
      scale: of the cosine; the softmax of the scores can be no sharper than exp(2 · scale) to 1.
      pad: what lies outside the image where an element interpolates, see `actions.images`.
      fill: its value for `pad="constant"`.
      interpolation: "linear" or "cubic".

    Raises:
      ValueError: an unknown reference, or a scale that is not positive; later, a network that gives
        something else.
      TypeError: not a `Network`.
    """
    named = isinstance(reference, str)
    if named and reference not in REFERENCES:
        raise ValueError(
            f"Unknown reference {reference!r}: choose {', '.join(REFERENCES)}, or give a vector."
        )
    if not scale > 0:
        raise ValueError(f"The scale of the cosine is {scale}: it must be positive.")
    if not isinstance(network, Network):
        raise TypeError(
            f"The network is a {type(network).__name__}: wrap it with from_linen, from_nnx or "
            "from_function."
        )
    scalar, learned = named and reference == "none", named and reference == "learned"

    def check_reference(length):
        if not named and jnp.shape(reference) != (length,):
            raise ValueError(
                f"The reference has shape {jnp.shape(reference)} and the embeddings length "
                f"{length}: give a vector of that length."
            )

    def poses(images):
        how = {"pad": pad, "fill": fill, "interpolation": interpolation}
        turned = [
            canonicalization.canonicalize(group, g, images, **how) for g in range(group.order)
        ]
        return jnp.stack(turned)

    def init(key, images):
        network_key, reference_key = jax.random.split(key)
        params, state = network.init(network_key, images)
        found, _ = jax.eval_shape(network.apply, params, state, images)
        _check(found.shape, images.shape[0], scalar)
        check_reference(found.shape[-1])
        params = {"network": params}
        if learned:
            params["reference"] = jax.random.normal(reference_key, found.shape[1:])
        return params, state

    def embed(params, state, images, *, train=False, key=None):
        turned, count = poses(images), images.shape[0]
        if train:  # all at once, for a network that has statistics of its batch
            side_by_side = jnp.moveaxis(turned, 0, 1).reshape(-1, *images.shape[1:])
            y, state = network.apply(params["network"], state, side_by_side, train=True, key=key)
            _check(y.shape, count * group.order, scalar)
            y = y.reshape(count, group.order, -1)
        else:
            y = pose_by_pose(lambda x: network.apply(params["network"], state, x)[0], turned)
            _check(y.shape[1:], count, scalar)
            y = jnp.moveaxis(y.reshape(group.order, count, -1), 0, 1)
        return y.astype(jnp.promote_types(y.dtype, jnp.float32)), state

    def apply(params, state, images, *, train=False, key=None):
        y, state = embed(params, state, images, train=train, key=key)
        if scalar:
            return y[..., 0], state
        check_reference(y.shape[-1])
        vector = params["reference"] if learned else reference
        vector = jnp.ones(y.shape[-1]) if named and not learned else jnp.asarray(vector)
        return scale * jnp.sum(unit(y) * unit(vector), -1), state

    return OrbitScorer(init, apply, embed=None if scalar else embed)


def _check(shape, images, scalar):
    wanted = ((images,), (images, 1)) if scalar else ()
    if shape not in wanted and (scalar or len(shape) != 2 or shape[0] != images):
        kind = "one number for each is needed" if scalar else "embeddings (N, D) are needed"
        raise ValueError(f"The network gives {shape} for {images} images: {kind}.")
