"""Rotations and reflections of images.

Images are `(..., H, W, C)` floats. A positive angle turns the displayed image counter-clockwise
about ((H-1)/2, (W-1)/2); by π/2 it equals `jnp.rot90`. A reflection mirrors left to right. An
element acts as its exact part first (quarter turns and mirrors, which move pixels and change none)
and then as one interpolation of the remaining rotation: exact elements lose nothing, the others are
resampled once. Sampling coordinates are never computed in less than float32.

`interpolation="linear"` reads 2×2 pixels. "cubic" reads 4×4 by Keys' kernel with a = −0.75 (Keys
1981, DOI 10.1109/TASSP.1981.1163711; the value of PyTorch and OpenCV): it blurs less, which shows
where an image is resampled twice, and costs four times the reads. It is not clipped: beside an edge
it leaves the range of the image by up to a seventh of the step there.

What lies outside the image continues the edge (`pad="edge"`) or is `fill` (`pad="constant"`); no
padded image is made, but of those of one or two pixels. All functions are pure, and work under jit,
vmap and in both modes of differentiation; see `actions.sampling` for the derivatives.
"""

import jax
import jax.numpy as jnp
import numpy as np

from equiadapt_jax.actions import sampling
from equiadapt_jax.groups import SO, Group, MatrixGroup, finite, quarter_turns

PADS = ("edge", "constant")
INTERPOLATIONS = ("linear", "cubic")


def rotate(
    images: jax.Array,
    angle,
    *,
    pad: str = "edge",
    fill: float = 0.0,
    interpolation: str = "linear",
) -> jax.Array:
    """Square images turned counter-clockwise by `angle`, differentiable in both.

    Args:
      images: `(..., S, S, C)`, any float dtype, which is also that of the result.
      angle: radians, of shape `images.shape[:-3]` or a scalar. A quarter turn to within rounding of
        the angle, in float32 or the images' wider dtype, is exact.
      pad: "edge" or "constant".
      fill: the value outside the image for `pad="constant"`, in the range of the images.
      interpolation: "linear" or "cubic", see the module.

    Raises:
      ValueError: shapes that do not fit, images that are not square, an unknown pad or
        interpolation.
      TypeError: images that are not floats.
    """
    _check(images, jnp.shape(angle), pad, interpolation, square=True, floating=True)
    angle = jnp.asarray(angle, np.promote_types(images.dtype, np.float32))
    quarter, rest = quarter_turns(angle)
    how = (pad, fill, interpolation)
    return _sample(images, quarter, quarter * 0, jnp.cos(rest), jnp.sin(rest), *how)


def reflect(images: jax.Array, where=True) -> jax.Array:
    """Images mirrored left to right where `where` (bool, `images.shape[:-3]` or scalar) is true."""
    _check(images, jnp.shape(where), square=False, floating=False)
    return _turn(images, 0, where)


def act(
    group: Group | MatrixGroup,
    g,
    images: jax.Array,
    *,
    pad: str = "edge",
    fill: float = 0.0,
    interpolation: str = "linear",
) -> jax.Array:
    """g·x: images transformed by elements of C_n, D_n, SO(2) or O(2).

    Args:
      group: the group.
      g: elements: int32, of shape `images.shape[:-3]` or a scalar; of SO(2) and O(2) matrices, with
        (2, 2) behind that shape, in which the result is differentiable.
      images: `(..., H, W, C)`; floats, or any dtype where nothing is interpolated (n divides 4, or
        g is a Python integer of the lattice). Square unless n is at most 2.
      pad: "edge" or "constant", see the module.
      fill: the value outside the image for `pad="constant"`.
      interpolation: "linear" or "cubic", see the module.

    Returns:
      The transformed images, same shape and dtype. `act(compose(g, q), x)` is
      `act(g, act(q, x))` to the bit for every q in `group.lattice`; for SO(2) and O(2) for every
      quarter turn and mirror q, which only move pixels.

    Raises:
      ValueError: shapes that do not fit, an unknown pad or interpolation, images the group would
        reshape.
      TypeError: images that would be interpolated and are not floats.
    """
    if isinstance(group, MatrixGroup):
        return _act_by_matrix(group, g, images, pad, fill, interpolation)
    rest, lattice = group.split(g)
    known = not isinstance(rest, jax.Array) and np.ndim(rest) == 0
    exact = group.n in (1, 2, 4) or (known and rest == 0)
    square = group.n > 2
    _check(images, jnp.shape(g), pad, interpolation, square=square, floating=not exact, group=group)
    quarter, mirror = group.steps(lattice) * 4 // group.n, group.reflects(lattice)
    if exact:
        return _turn(images, quarter, mirror)
    matrix = group.matrix(rest, np.promote_types(images.dtype, np.float32))
    if group.n % 4:  # leaves more than 45°
        matrix, more = SO(2).split(matrix)
        quarter = (quarter + more) % 4
    how = (pad, fill, interpolation)
    return _sample(images, quarter, mirror, matrix[..., 0, 0], matrix[..., 0, 1], *how)


def orbit(
    group: Group,
    images: jax.Array,
    *,
    pad: str = "edge",
    fill: float = 0.0,
    interpolation: str = "linear",
) -> jax.Array:
    """All g·x, `(..., |G|, H, W, C)`, in the order of `group.elements()`; see `act`."""
    finite(group, "An orbit")

    def transform(g):
        return act(group, g, images, pad=pad, fill=fill, interpolation=interpolation)

    return jax.vmap(transform, out_axes=images.ndim - 3)(group.elements())


def _act_by_matrix(group, g, images, pad, fill, interpolation):
    """The same for matrices; the remainder is a rotation by at most 45°, as in `group.split`."""
    if jnp.shape(g)[-2:] != (2, 2):
        raise ValueError(
            f"Elements of {group} are matrices (..., 2, 2), got {jnp.shape(g)}: make them with "
            f"{type(group).__name__}(2).rotation(angle)."
        )
    _check(images, jnp.shape(g)[:-2], pad, interpolation, square=True, floating=True, group=group)
    rest, exact = group.split(jnp.asarray(g, np.promote_types(images.dtype, np.float32)))
    cos, sin = rest[..., 0, 0], rest[..., 0, 1]
    return _sample(images, exact % 4, exact // 4, cos, sin, pad, fill, interpolation)


def _check(
    images, batch_shape, pad="edge", interpolation="linear", *, square, floating, group=None
):
    """Raise one sentence for what cannot be transformed."""
    if images.ndim < 3:
        raise ValueError(f"Images have shape (..., H, W, C), got {images.shape}.")
    if batch_shape not in ((), images.shape[:-3]):
        raise ValueError(
            f"The elements or angles have shape {batch_shape}, the images {images.shape}: give one "
            f"for all, or one for each, of shape {images.shape[:-3]}."
        )
    if square and images.shape[-3] != images.shape[-2]:
        raise ValueError(
            f"{group or 'A rotation'} would change the shape of images of {images.shape[-3]}×"
            f"{images.shape[-2]} pixels: pad or crop them to a square first."
        )
    if floating and not jnp.issubdtype(images.dtype, jnp.floating):
        raise TypeError(
            f"Images of dtype {images.dtype} cannot be interpolated: convert them to floats."
        )
    for name, value, known in (
        ("pad", pad, PADS),
        ("interpolation", interpolation, INTERPOLATIONS),
    ):
        if value not in known:
            raise ValueError(f"Unknown {name} {value!r}: choose one of {', '.join(known)}.")


def _turn(images: jax.Array, quarter, mirror) -> jax.Array:
    """A left-right mirror where `mirror`, then `quarter` quarter turns; pixels only move."""
    if isinstance(quarter, jax.Array) or np.ndim(quarter):
        return sampling.move(images, *(jnp.asarray(p, jnp.int32) for p in (quarter, mirror)))
    images = _where(mirror, images[..., ::-1, :], images)
    if quarter % 2:
        images = jnp.swapaxes(images, -3, -2)
    if (quarter % 4 + 1) // 2 % 2:
        images = images[..., ::-1, :, :]
    return images[..., ::-1, :] if quarter % 4 // 2 else images


def _where(condition, true: jax.Array, false: jax.Array) -> jax.Array:
    """Choose per image, and at trace time where the condition is already known."""
    if not isinstance(condition, jax.Array) and np.ndim(condition) == 0:
        return true if condition else false
    return jnp.where(jnp.asarray(condition, bool)[..., None, None, None], true, false)


def _sample(images, quarter, mirror, cos, sin, pad, fill, interpolation) -> jax.Array:
    """Mirror, quarter turns, then one rotation by atan2(sin, cos); all of it in a single read."""
    quarter, mirror = (jnp.asarray(p, jnp.int32) for p in (quarter, mirror))
    cos, sin = jnp.asarray(cos), jnp.asarray(sin)
    fill = jnp.asarray(fill, cos.dtype)
    return sampling.turn(pad, interpolation, images, quarter, mirror, cos, sin, fill)
