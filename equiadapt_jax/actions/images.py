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
padded image is ever made. All functions are pure, and work under jit, vmap and grad; forward mode
is not defined where elements are arrays.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from equiadapt_jax.groups import Group, MatrixGroup, finite, quarter_turns

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
        the angle is exact.
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
        return _moved(images, jnp.asarray(quarter), jnp.asarray(mirror, jnp.int32))
    images = _where(mirror, images[..., ::-1, :], images)
    if quarter % 2:
        images = jnp.swapaxes(images, -3, -2)
    if (quarter % 4 + 1) // 2 % 2:
        images = images[..., ::-1, :, :]
    return images[..., ::-1, :] if quarter % 4 // 2 else images


@jax.custom_vjp
def _moved(images, quarter, mirror):
    """`_turn` by elements that are not known when it is traced: every pixel reads one place.

    To choose among turned images instead would double what XLA computes for a pixel with every
    choice, and with turns of turns its time to compile without end.
    """
    height, width = images.shape[-3:-1]
    i, j = jnp.arange(height)[:, None], jnp.arange(width)[None, :]

    def move(image, quarter, mirror):
        place = _source(i, j, height, width, quarter, mirror)
        return image.reshape(height * width, -1).at[place].get(mode="promise_in_bounds")

    flat = images.reshape(-1, *images.shape[-3:])
    axes = [0 if x.ndim else None for x in (quarter, mirror)]
    quarter, mirror = (x.reshape(-1) if x.ndim else x for x in (quarter, mirror))
    return jax.vmap(move, in_axes=(0, *axes))(flat, quarter, mirror).reshape(images.shape)


def _moved_forward(images, quarter, mirror):
    return _moved(images, quarter, mirror), (quarter, mirror)


def _moved_backward(element, cotangent):
    quarter, mirror = element  # a mirror before a turn is undone by itself
    return _moved(cotangent, jnp.where(mirror == 1, quarter, -quarter), mirror), None, None


_moved.defvjp(_moved_forward, _moved_backward)


def _source(i, j, height, width, quarter, mirror):
    """Where the flat image has pixel (i, j) of the one that is mirrored and turned."""
    i = jnp.where((quarter + 1) // 2 % 2 == 1, height - 1 - i, i)
    j = jnp.where(quarter // 2 % 2 == 1, width - 1 - j, j)
    if height == width:
        i, j = jnp.where(quarter % 2 == 1, j, i), jnp.where(quarter % 2 == 1, i, j)
    return i * width + jnp.where(mirror == 1, width - 1 - j, j)


def _where(condition, true: jax.Array, false: jax.Array) -> jax.Array:
    """Choose per image, and at trace time where the condition is already known."""
    if not isinstance(condition, jax.Array) and np.ndim(condition) == 0:
        return true if condition else false
    return jnp.where(jnp.asarray(condition, bool)[..., None, None, None], true, false)


def _sample(images, quarter, mirror, cos, sin, pad, fill, interpolation) -> jax.Array:
    """Mirror, quarter turns, then one rotation by atan2(sin, cos); all of it in a single gather."""
    flat = images.reshape(-1, *images.shape[-3:])
    parameters = [jnp.asarray(p) for p in (quarter, mirror, cos, sin)]
    axes = [0 if p.ndim else None for p in parameters]
    parameters = [p.reshape(-1) if p.ndim else p for p in parameters]
    sample = functools.partial(_sample_one, pad=pad, fill=fill, interpolation=interpolation)
    return jax.vmap(sample, in_axes=(0, *axes))(flat, *parameters).reshape(images.shape)


def _sample_one(image, quarter, mirror, cos, sin, *, pad, fill, interpolation):
    height, width, _ = image.shape
    y = jnp.arange(height, dtype=cos.dtype)[:, None] - (height - 1) / 2
    x = jnp.arange(width, dtype=cos.dtype)[None, :] - (width - 1) / 2
    column, row = cos * x - sin * y + (width - 1) / 2, sin * x + cos * y + (height - 1) / 2
    if pad == "edge":
        column, row = jnp.clip(column, 0, width - 1), jnp.clip(row, 0, height - 1)
    left, top = jnp.floor(column), jnp.floor(row)
    offsets, weights = _KERNELS[interpolation]
    across, down = weights((column - left)[..., None]), weights((row - top)[..., None])
    i = jnp.stack([top + k for k in offsets for _ in offsets]).astype(jnp.int32)
    j = jnp.stack([left + k for _ in offsets for k in offsets]).astype(jnp.int32)
    pixels = _gather(image, jnp.clip(i, 0, height - 1), jnp.clip(j, 0, width - 1), quarter, mirror)
    pixels = pixels.astype(cos.dtype)
    if pad == "constant":
        inside = (i >= 0) & (i < height) & (j >= 0) & (j < width)
        pixels = jnp.where(inside[..., None], pixels, jnp.asarray(fill, cos.dtype))
    pixels = pixels.reshape(len(offsets), len(offsets), *image.shape)
    rows = [sum(p * w for p, w in zip(line, across, strict=True)) for line in pixels]
    return sum(r * w for r, w in zip(rows, down, strict=True)).astype(image.dtype)


def _linear(t):
    return 1 - t, t


def _cubic(t, a=-0.75):
    """Keys' weights of the pixels at −1, 0, 1 and 2 for a place t in [0, 1) between 0 and 1."""
    u = 1 - t
    near, far = ((a + 2) * t - (a + 3)) * t * t + 1, ((a + 2) * u - (a + 3)) * u * u + 1
    return a * t * u * u, near, far, a * u * t * t


_KERNELS = {"linear": ((0, 1), _linear), "cubic": ((-1, 0, 1, 2), _cubic)}


def _gather(image, i, j, quarter, mirror):
    """Pixels (i, j) of the image that `_turn` would make, read from the original."""
    height, width, channels = image.shape
    flat = image.reshape(height * width, channels)
    place = _source(i, j, height, width, quarter, mirror)
    return flat.at[place].get(mode="promise_in_bounds")
