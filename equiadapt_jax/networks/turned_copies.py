"""Turned copies of images at the working size of a scorer, exact for turns that are exact."""

from collections.abc import Iterable

import jax

from equiadapt_jax.actions import images as image_actions
from equiadapt_jax.groups import Group


def turned_copies(
    group: Group, elements: Iterable[int], images: jax.Array, size: int | None
) -> list[jax.Array]:
    """q·x for each q of `group.lattice` in `elements`, resized to `(B, size, size, C)`.

    To turn x by an exact element only permutes the copies, to the bit. Images at least twice as
    large as `size` are halved first, and turned afterwards. What remains is resized copy by copy,
    in its own frame, since that of a turned image differs by rounding.

    Args:
      group: C_n or D_n.
      elements: Python integers of the group's lattice.
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
    top_left, top_right = images[:, ::2, ::2], images[:, ::2, 1::2]
    bottom_left, bottom_right = images[:, 1::2, ::2], images[:, 1::2, 1::2]
    return ((top_left + bottom_right) + (top_right + bottom_left)) / 4
