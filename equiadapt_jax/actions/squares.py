"""Images of any shape as squares, which every rotation maps onto themselves; and their disk."""

import jax
import jax.numpy as jnp
import numpy as np

from equiadapt_jax.actions.images import PADS


def from_images(images: jax.Array, *, pad: str = "edge", fill: float = 0.0) -> jax.Array:
    """Images `(..., H, W, C)` in the centre of squares `(..., S, S, C)`, S the longer side.

    Beyond the image its edge continues (`pad="edge"`) or is `fill` (`pad="constant"`). Where H − W
    is odd the pixel too many is below or on the right, so a quarter turn then moves the image by
    one pixel.
    """
    if images.ndim < 3:
        raise ValueError(f"Images have shape (..., H, W, C), got {images.shape}.")
    if pad not in PADS:
        raise ValueError(f"Unknown pad {pad!r}: choose one of {', '.join(PADS)}.")
    if images.shape[-3] == images.shape[-2]:
        return images
    widths = [(0, 0)] * (images.ndim - 3) + [*_margins(*images.shape[-3:-1]), (0, 0)]
    values = {"constant_values": fill} if pad == "constant" else {}
    return jnp.pad(images, widths, mode=pad, **values)


def validity(height: int, width: int) -> np.ndarray:
    """Where a square of `from_images` shows the image: float32 `(S, S, 1)`, 1 there, 0 beyond."""
    ones = np.ones((height, width, 1), np.float32)
    return np.pad(ones, [*_margins(height, width), (0, 0)])


def to_images(squares: jax.Array, height: int, width: int, *, axis: int = -3) -> jax.Array:
    """The way back: the part of squares that shows an image of this height and width.

    Args:
      squares: rows on `axis`, columns on the next: `(..., S, S, C)`. Maps of another resolution,
        `(..., T, T, C)`, give the same part of it.
      height: of the image, and
      width: in pixels.
      axis: of the rows.

    Raises:
      ValueError: maps that are not square, or coarse ones where the part begins or ends within a
        pixel.
    """
    size, side = max(height, width), squares.shape[axis]
    across = axis + 1
    if squares.shape[across] != side:
        raise ValueError(f"Maps of shape {squares.shape} are not square on axes {axis}, {across}.")
    for place, length, (before, _) in zip(
        (axis, across), (height, width), _margins(height, width), strict=True
    ):
        start, stop = before * side, (before + length) * side
        if start % size or stop % size:
            raise ValueError(
                f"Maps of {side}×{side} pixels for squares of {size}×{size} cannot be cut to an "
                f"image of {height}×{width}, whose edge lies within a pixel: predict at full "
                "resolution."
            )
        squares = jax.lax.slice_in_dim(
            squares, start // size, stop // size, axis=place % squares.ndim
        )
    return squares


def disk(images: jax.Array, *, fill: float = 0.0) -> jax.Array:
    """Square images that are `fill` outside the inscribed disk, with a soft edge of one pixel.

    Of images `(..., S, S, C)` of floats, the pixel whose centre lies r pixels from the centre keeps
    the share S/2 − r, at least 0 and at most 1. Exact elements commute with this to the bit.
    """
    if images.ndim < 3 or images.shape[-3] != images.shape[-2]:
        raise ValueError(f"A disk is inscribed in squares (..., S, S, C), not in {images.shape}.")
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise TypeError(f"Images of dtype {images.dtype} have no soft edge: give floats.")
    size = images.shape[-2]
    centred = np.square(np.arange(size) - (size - 1) / 2)
    distance = np.sqrt(centred[:, None] + centred)
    share = jnp.asarray(np.clip(size / 2 - distance, 0, 1)[..., None], images.dtype)
    return share * images + (1 - share) * jnp.asarray(fill, images.dtype)


def _margins(height, width):
    """((above, below), (left, right)) pixels between an image and the square around it."""
    missing = [max(height, width) - length for length in (height, width)]
    return [(m // 2, m - m // 2) for m in missing]
