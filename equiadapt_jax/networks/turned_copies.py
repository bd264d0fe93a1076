"""Turned copies of images at the working size of a scorer, exact for turns that are exact."""

from collections.abc import Iterable

import jax
import jax.numpy as jnp

from equiadapt_jax.actions import images as image_actions
from equiadapt_jax.groups import Group


def turned_copies(
    group: Group, elements: Iterable[int], images: jax.Array, size: int | None
) -> list[jax.Array]:
    """q·x for each q of `group.lattice` in `elements`, resized to `(B, size, size, C)`.

    To turn x by an exact element only permutes the copies, to the bit. While both sides are even
    and at least twice `size`, images are halved first, and turned afterwards. What remains is
    resized copy by copy, in its own frame, since that of a turned image differs by rounding.

    Args:
      group: C_n or D_n.
      elements: known integers of the group's lattice.
      images: floats `(B, H, W, C)`, square unless n is at most 2.
      size: in pixels; None: the images'.
    """
    while size and all(n % 2 == 0 and n >= 2 * size for n in images.shape[1:3]):
        images = _halved(images)
    copies = [image_actions.act(group, int(q), images) for q in elements]
    if size is None or images.shape[1:3] == (size, size):
        return copies
    shape = (images.shape[0], size, size, images.shape[3])
    return [jax.image.resize(copy, shape, "linear") for copy in copies]


def _halved(images):
    """Means of 2×2 pixels, each diagonal's sum first: turns and mirrors exchange the two sums."""
    wide = images.astype(jnp.promote_types(images.dtype, jnp.float32))
    top_left, top_right = wide[:, ::2, ::2], wide[:, ::2, 1::2]
    bottom_left, bottom_right = wide[:, 1::2, ::2], wide[:, 1::2, 1::2]
    mean = ((top_left + bottom_right) + (top_right + bottom_left)) / 4
    return mean.astype(images.dtype) if jnp.issubdtype(images.dtype, jnp.floating) else mean
