"""What an element does to annotations of images: masks, boxes, keypoints, polygons.

Coordinates are (x to the right, y down) in pixels. Keypoints lie on pixel centres: (0, 0) is the
centre of the first pixel, and they turn about ((W−1)/2, (H−1)/2). Boxes and polygons lie on pixel
edges: (0, 0) is the outer corner of the first pixel, and they turn about (W/2, H/2). So an
annotation stays on what it marks in `actions.images.act` of the same element. The way back is the
inverse element.

Elements have the leading shape of the annotations, one for each image, or are scalars. `size` is
(H, W) of the image before it is turned, one for all or one for each; a quarter turn of an image
that is not square swaps them (`turned_size`), and groups that turn by other angles refuse such
images.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from equiadapt_jax.groups import Group, MatrixGroup
from equiadapt_jax.representations import batch_shape


def act_on_keypoints(group: Group | MatrixGroup, g, points: jax.Array, size) -> jax.Array:
    """Keypoints `(..., 2)` on pixel centres, turned with their image.

    Args:
      group: the group.
      g: elements, whose shape is a leading part of that of the points, or a scalar.
      points: `(..., 2)`, floats.
      size: (H, W), or one for each image, integers `(..., 2)` whose shape before the last axis is
        that of the elements or, with one element for all, a leading part of that of the points.

    Raises:
      ValueError: shapes that do not fit, an image whose shape the group would change.
      TypeError: points that are not floats.

    Exact elements round only where size − x does: never for multiples of 1/2 in images.
    """
    return _turn(group, g, points, size, edges=False)


def act_on_polygons(group: Group | MatrixGroup, g, points: jax.Array, size) -> jax.Array:
    """Polygons `(..., 2)` on pixel edges, corner by corner; arguments as for keypoints."""
    return _turn(group, g, points, size, edges=True)


def act_on_boxes(group: Group | MatrixGroup, g, boxes: jax.Array, size) -> jax.Array:
    """The tightest upright boxes around turned ones, `(..., 4)`: x0, y0, x1, y1 on pixel edges.

    Of all four corners. There and back is exact for exact elements; at other angles boxes grow.
    Arguments as for keypoints.
    """
    if boxes.ndim < 1 or boxes.shape[-1] != 4:
        raise ValueError(f"Boxes have shape (..., 4), x0, y0, x1, y1; got {boxes.shape}.")
    _batch(group, g, boxes, 1)
    sizes = np.shape(size)[:-1]
    if boxes.shape[:-1][: len(sizes)] != sizes:
        raise ValueError(
            f"Sizes of shape {np.shape(size)} do not fit boxes of shape {boxes.shape}: give "
            "(H, W), or one for each image of the leading axes."
        )
    x0, y0, x1, y1 = jnp.moveaxis(boxes, -1, 0)
    corners = jnp.stack([x0, y0, x1, y0, x0, y1, x1, y1], -1).reshape(*boxes.shape[:-1], 4, 2)
    corners = _turn(group, g, corners, size, edges=True)
    return jnp.concatenate([corners.min(-2), corners.max(-2)], -1)


def act_on_masks(group: Group | MatrixGroup, g, masks: jax.Array, *, fill=0) -> jax.Array:
    """Masks of bools or labels `(..., H, W)`, turned with their image, by the nearest pixel.

    Nearest pixels lose some of an edge each time. What a network predicts keeps it: carry its
    logits, floats, with `actions.images.act` and threshold once.

    Args:
      group: the group.
      g: elements, whose shape is a leading part of that of the masks, or a scalar.
      masks: bools or integers, square unless n is at most 2.
      fill: what lies outside the image.

    Raises:
      ValueError: shapes that do not fit.
      TypeError: masks of floats.
    """
    if jnp.issubdtype(masks.dtype, jnp.inexact):
        raise TypeError(
            f"Masks of dtype {masks.dtype} are logits or probabilities: carry them with "
            "actions.images.act, and threshold once."
        )
    batch = _batch(group, g, masks, 2)
    height, width = masks.shape[-2:]
    if height != width and _steps(group) not in (1, 2):
        raise ValueError(
            f"{group} would change the shape of masks of {height}×{width} pixels: pad or crop "
            "them to a square first."
        )
    # A pixel shows what lay at the place that the element brings there.
    centres = jnp.stack(jnp.meshgrid(jnp.arange(width), jnp.arange(height)), -1)
    back = group.inverse(jnp.asarray(g))
    sources = jax.vmap(lambda h: act_on_keypoints(group, h, centres * 1.0, (height, width)))
    places = jnp.round(sources(back.reshape(-1, *back.shape[len(batch) :]))).astype(jnp.int32)

    def sample(places, masks):
        j, i = places[..., 0], places[..., 1]
        inside = (i >= 0) & (i < height) & (j >= 0) & (j < width)
        nearest = masks[..., jnp.clip(i, 0, height - 1), jnp.clip(j, 0, width - 1)]
        return jnp.where(inside, nearest, jnp.asarray(fill, masks.dtype))

    each = masks.reshape(len(places), math.prod(masks.shape[len(batch) : -2]), height, width)
    return jax.vmap(sample)(places, each).reshape(masks.shape)


def turned_size(group: Group | MatrixGroup, g, size) -> jax.Array:
    """(H, W) of images after elements g: int32 `(..., 2)`; quarter turns swap the two.

    One size for all or one for each element, or one element for all sizes.
    """
    size = _size(group, g, size)
    return jnp.where(_is_quarter(group, g)[..., None], size[..., ::-1], size)


def _turn(group, g, points, size, *, edges):
    """Points p as c' + ρ(g)(p − c), where c and c' are the centres of the image and its turn."""
    if points.ndim < 1 or points.shape[-1] != 2:
        raise ValueError(f"Points have shape (..., 2), x and y; got {points.shape}.")
    if not jnp.issubdtype(points.dtype, jnp.floating):
        raise TypeError(f"Coordinates of dtype {points.dtype} cannot be turned: give floats.")
    _batch(group, g, points, 1)
    before, after = _size(group, g, size), turned_size(group, g, size)
    if points.shape[:-1][: before.ndim - 1] != before.shape[:-1]:
        raise ValueError(
            f"Sizes of shape {before.shape} do not fit annotations of shape {points.shape}: give "
            "(H, W), or one for each image of the leading axes."
        )
    dtype = jnp.promote_types(points.dtype, jnp.float32)

    def aligned(x, own):  # with the batch in front, and axes of points behind it
        batch = x.shape[: x.ndim - own]
        return x.reshape(*batch, *[1] * (points.ndim - 1 - len(batch)), *x.shape[x.ndim - own :])

    def centre(size):  # (x, y)
        return aligned((size[..., ::-1].astype(dtype) - (0 if edges else 1)) / 2, 1)

    rho, offset = aligned(group.matrix(g, dtype), 2), points.astype(dtype) - centre(before)
    turned = rho[..., 0] * offset[..., :1] + rho[..., 1] * offset[..., 1:]
    return (centre(after) + turned).astype(points.dtype)


def _size(group, g, size):
    """The sizes as int32 `(2,)` or `(..., 2)`; traced ones are taken as they are."""
    elements = batch_shape(group, g)
    size = size if isinstance(size, jax.core.Tracer) else np.asarray(size, np.int32)
    if size.shape[-1:] != (2,) or (elements and size.shape not in ((2,), (*elements, 2))):
        raise ValueError(
            f"size has shape {size.shape}: give (H, W), or one for each element of shape "
            f"{elements}."
        )
    if isinstance(size, np.ndarray) and _steps(group) not in (1, 2, 4):
        for height, width in size.reshape(-1, 2):
            if height != width:
                raise ValueError(
                    f"{group} would change the shape of images of {height}×{width} pixels: pad or "
                    "crop them to a square first."
                )
    return jnp.asarray(size, jnp.int32)


def _steps(group):
    """The steps of a full turn; None where there are none."""
    return group.n if isinstance(group, Group) else None


def _is_quarter(group, g):
    """Whether elements are odd quarter turns, mirrored or not, and not of SO(2) or O(2)."""
    if isinstance(group, MatrixGroup):
        return jnp.zeros(batch_shape(group, g), bool)  # images are square
    return jnp.asarray(group.steps(g)) * 4 % (2 * group.n) == group.n


def _batch(group, g, annotations, own):
    """The shape of the elements, if it fits annotations with so many axes of their own."""
    batch = batch_shape(group, g)
    if annotations.shape[: annotations.ndim - own][: len(batch)] != batch:
        raise ValueError(
            f"Elements of shape {batch} do not fit annotations of shape {annotations.shape}: give "
            "one for all, or one for each image of the leading axes."
        )
    return batch
