"""Pixels read at turned places, with derivatives that only read as well: below `actions.images`.

`move` moves pixels by mirrors and quarter turns. `turn` does so and then turns the image by at most
45°, which interpolates once. Both are linear in the image, so its tangents go the same way; what
goes back to it, the transpose, is written out here. JAX's own would add into places, a scatter,
which is slow where many add at once.

**The transpose.** An output pixel o reads the image about a place p(o). So a pixel u of the image
was read by the o whose p(o) is closer to u than the kernel reaches, 1 or 2 pixels in each
direction. As p turns the lattice and keeps distances, these o lie in a window of 3×3 (linear) or
6×6 (cubic) about the place that p takes to u, and u reads them there. With `pad="edge"` the pixels
of the border have also been read by all the o whose p(o) lies beyond them: they are in the corners
of the output, and each pixel of the border adds up those of its own line.

**The derivative with respect to the angle** is that of the interpolation. Linear interpolation has
a kink where p(o) lies on a line of pixels, and continued edges have one on the border. There the
derivative is the symmetric one, the mean of those of the two sides: for an exact pose, where every
p(o) is a pixel, central differences. It is the limit of (f(θ + ε) − f(θ − ε)) / 2ε.

Forward and reverse mode, vmap, jit and scan are defined. What goes back to the image cannot be
differentiated again with respect to the rotation.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero


@jax.custom_jvp
def move(images: jax.Array, quarter: jax.Array, mirror: jax.Array) -> jax.Array:
    """Images mirrored left to right where `mirror`, then turned by `quarter` quarter turns.

    Args:
      images: `(..., H, W, C)` of any dtype, square unless quarter is even.
      quarter: int32 `(...)` or a scalar, counter-clockwise.
      mirror: int32 `(...)` or a scalar, 0 or 1.

    Every pixel reads one place. To choose among turned images instead would double what XLA
    computes for a pixel with every choice, and with turns of turns its time to compile without end.
    """
    return _for_each(_move, images, quarter, mirror)


@move.defjvp
def _move_jvp(primals, tangents):
    _, quarter, mirror = primals
    back = jnp.where(mirror == 1, quarter, -quarter)  # a mirror before a turn is undone by itself
    tangent = _linear(
        lambda x: _for_each(_move, x, quarter, mirror),
        lambda x: _for_each(_move, x, back, mirror),
        tangents[0],
    )
    return move(*primals), tangent


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def turn(
    pad: str,
    interpolation: str,
    images: jax.Array,
    quarter: jax.Array,
    mirror: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    fill: jax.Array,
) -> jax.Array:
    """Images moved as by `move`, then turned counter-clockwise by atan2(sin, cos), |·| ≤ 45°.

    Args:
      pad: "edge" or "constant".
      interpolation: "linear" or "cubic".
      images: square, `(..., S, S, C)`, any float dtype, which is also that of the result.
      quarter: int32 `(...)` or a scalar.
      mirror: int32 `(...)` or a scalar, 0 or 1.
      cos: `(...)` or a scalar, in at least float32; all coordinates are computed in its dtype.
      sin: the same, with cos² + sin² = 1 to within rounding.
      fill: the value outside the image for `pad="constant"`, a scalar of the dtype of cos.
    """
    taps = _TAPS[interpolation]
    return _turn(pad, taps, images, quarter, mirror, cos, sin, fill)


def _turn_jvp(pad, interpolation, primals, tangents):
    """By the image, a linear map with its transpose; by the rotation; by what lies outside."""
    images, quarter, mirror, cos, sin, fill = primals
    by_image, _, _, by_cos, by_sin, by_fill = tangents
    result = jnp.zeros(images.shape, cos.dtype)
    if not isinstance(by_image, SymbolicZero):
        place = quarter, mirror, _differentiated_once(cos), _differentiated_once(sin)
        forward = functools.partial(_turn, pad, _TAPS[interpolation])
        result += _linear(
            lambda x: forward(x, *place, jnp.zeros_like(fill)),
            lambda x: _for_each(functools.partial(_transpose, pad, interpolation), x, *place),
            by_image,
        ).astype(cos.dtype)
    if not (isinstance(by_cos, SymbolicZero) and isinstance(by_sin, SymbolicZero)):
        by_cos, by_sin = (
            jnp.zeros_like(cos) if isinstance(t, SymbolicZero) else t for t in (by_cos, by_sin)
        )
        slope = functools.partial(_slope, pad, _SYMMETRIC_TAPS[interpolation])
        result += _for_each(slope, images, quarter, mirror, cos, sin, fill, by_cos, by_sin)
    if not isinstance(by_fill, SymbolicZero):
        nothing = jnp.zeros(images.shape, cos.dtype)
        outside = _turn(pad, _TAPS[interpolation], nothing, *primals[1:5], jnp.ones_like(fill))
        result += outside * by_fill
    return turn(pad, interpolation, *primals), result.astype(images.dtype)


turn.defjvp(_turn_jvp, symbolic_zeros=True)


def _linear(function, transpose, x):
    """function(x), linear in x and of its shape, where JAX is told the transpose.

    The solution of linear equations is JAX's one linear function that takes its own transpose and
    maps over batches. What it would solve is never asked for.
    """
    return jax.lax.custom_linear_solve(
        lambda x: x, x, lambda _, x: function(x), lambda _, x: transpose(x)
    )


@jax.custom_jvp
def _differentiated_once(x):
    """The number itself, in the constants of `_linear`, which JAX takes to have no derivative."""
    return x


@_differentiated_once.defjvp
def _refuse(primals, tangents):
    raise NotImplementedError(
        "The derivative of a turned image with respect to the image is not differentiated with "
        "respect to the rotation: stop one of the two gradients by jax.lax.stop_gradient."
    )


def _for_each(function, images, *parameters):
    """The function of one image and its parameters, which have the images' leading shape or ()."""
    flat = images.reshape(-1, *images.shape[-3:])
    axes = [0 if p.ndim else None for p in parameters]
    parameters = [p.reshape(-1) if p.ndim else p for p in parameters]
    return jax.vmap(function, in_axes=(0, *axes))(flat, *parameters).reshape(images.shape)


def _turn(pad, taps, images, *parameters):
    return _for_each(functools.partial(_sample, pad, taps), images, *parameters)


# ---- one image ----


def _strides(height, width, quarter, mirror):
    """(start, down, right): pixel (i, j) of the moved image is at start + down·i + right·j."""
    from_below, from_right = (quarter + 1) // 2 % 2, quarter // 2 % 2
    column = 1 - 2 * mirror
    down = jnp.where(quarter % 2 == 1, column, width)
    right = jnp.where(quarter % 2 == 1, width, column)
    start = from_below * (height - 1) * down + from_right * (width - 1) * right
    return (
        start + mirror * (width - 1),
        (1 - 2 * from_below) * down,
        (1 - 2 * from_right) * right,
    )


def _move(image, quarter, mirror):
    height, width = image.shape[:2]
    i, j = (jnp.arange(length, dtype=jnp.int32) for length in (height, width))
    start, down, right = _strides(height, width, quarter, mirror)
    flat = image.reshape(height * width, -1)
    places = start + down * i[:, None] + right * j[None, :]
    return flat.at[places].get(mode="promise_in_bounds", wrap_negative_indices=False)


def _axes(size, dtype):
    """Places of the pixels from the centre: y `(S, 1)` and x `(1, S)`."""
    axis = jnp.arange(size, dtype=dtype) - (size - 1) / 2
    return axis[:, None], axis[None, :]


def _places(y, x, cos, sin):
    """Row and column at which the output pixel (y, x) reads, all from the centre."""
    return _product(sin, x) + _product(cos, y), _product(cos, x) - _product(sin, y)


def _clip(x, low, high):
    """jnp.clip by comparisons, which take XLA fewer instructions on a CPU than its maximum.

    NaN stays. At a bound the derivative is that of within, where jnp.clip has the mean of both.
    """
    return jnp.where(x < low, low, jnp.where(x > high, high, x))


def _product(a, b):
    """a·b, always rounded by itself, to one bit less than there are.

    XLA rounds a product and a sum at once here and apart there, and computes a place for the reads
    and once more for the weights: one that is nearly a whole number would be to either side of it.
    """
    info = jnp.finfo(a.dtype)
    return jax.lax.reduce_precision(a * b, info.nexp, info.nmant - 1)


def _sample(pad, taps, image, quarter, mirror, cos, sin, fill):
    """The moved image at the turned places, a gather for each tap."""
    places = _places(*_axes(image.shape[0], cos.dtype), cos, sin)
    image = _continued(pad, taps, image)
    (i, down), (j, across) = (_along(pad, taps, place, len(image)) for place in places)
    tap = _tap(pad, taps, image, quarter, mirror, i, j, fill)
    # Line by line: of equal pixels, as outside, that makes their value to the bit.
    lines = [sum(w * tap(m, n) for w, n in zip(across, taps[1], strict=True)) for m in taps[1]]
    return sum(w * line for w, line in zip(down, lines, strict=True)).astype(image.dtype)


def _continued(pad, taps, image):
    """The image, with its edge around it where it is smaller than a window within it."""
    if _within(pad, taps) and len(image) < len(taps[1]):
        return jnp.pad(image, ((1, 1), (1, 1), (0, 0)), mode="edge")
    return image


def _within(pad, taps):
    """Whether windows are moved to within the image: linear weights follow them there."""
    return pad == "edge" and taps[2] is not _cubic_weights


def _along(pad, taps, place, size):
    """(near, weights): the pixel `(S, S)` that a window is about, and what it takes of each.

    Places `(S, S)` are counted from the centre of an image of `size` pixels, pixels from its
    border, along one axis, as whole floats.
    """
    near_to, offsets, weights = taps
    place = place + (size - 1) / 2
    if pad == "edge":
        place = jnp.clip(place, 0, size - 1)  # differentiated at its bounds, for second derivatives
    near = near_to(place)
    if _within(pad, taps):
        near = _clip(near, -offsets[0], size - 1 - offsets[-1])
    return near, list(weights((place - near)[..., None]))


def _tap(pad, taps, image, quarter, mirror, i, j, fill):
    """tap(m, n): pixels of the moved image at (i + m, j + n), in the dtype of i and j."""
    size = len(image)
    read = _reader(image, quarter, mirror, i, j)

    def tap(m, n):
        if _within(pad, taps):
            return read(m, n)
        row, column = i + m, j + n
        inside = (row >= 0) & (row < size) & (column >= 0) & (column < size)
        pixels = read(_clip(row, 0, size - 1) - i, _clip(column, 0, size - 1) - j)
        return jnp.where(inside[..., None], pixels, fill) if pad == "constant" else pixels

    return tap


def _reader(image, quarter, mirror, i, j):
    """read(m, n): pixels of the moved image at (i + m, j + n), in the dtype of i.

    Steps m and n are whole numbers, for all pixels or for each. What lies outside the image is read
    from anywhere in it.
    """
    size = len(image)
    start, down, right = _strides(size, size, quarter, mirror)
    flat = image.reshape(size * size, -1)
    first = start + down * i.astype(jnp.int32) + right * j.astype(jnp.int32)

    def read(m, n):
        m, n = (jnp.asarray(step, jnp.int32) for step in (m, n))
        there = flat.at[first + (m * down + n * right)]
        return there.get(mode="clip", wrap_negative_indices=False).astype(i.dtype)

    return read


def _slope(pad, taps, image, quarter, mirror, cos, sin, fill, by_cos, by_sin):
    """The derivative of `_sample` in the direction of `by_cos` and `by_sin`.

    With ∂r and ∂c those along rows and columns, at the output pixel (y, x), it is
    (∂r y + ∂c x) by_cos + (∂r x − ∂c y) by_sin: the real part of a product of complex numbers, of
    which XLA reads the pixels once, where two sums would read them twice.
    """
    y, x = _axes(image.shape[0], cos.dtype)
    places = _places(y, x, cos, sin)
    image = _continued(pad, taps, image)
    (i, down), (j, across) = (_along(pad, taps, place, len(image)) for place in places)
    steeper, wider = (_slopes(pad, taps, place, len(image)) for place in places)
    tap = _tap(pad, taps, image, quarter, mirror, i, j, fill)
    by_row = by_column = 0.0
    for m, weight, slope in zip(taps[1], down, steeper, strict=True):
        pixels = [tap(m, n) for n in taps[1]]
        by_row += slope * sum(w * pixel for w, pixel in zip(across, pixels, strict=True))
        by_column += weight * sum(w * pixel for w, pixel in zip(wider, pixels, strict=True))
    place = jax.lax.complex(*jnp.broadcast_arrays(y, -x)) * jax.lax.complex(by_cos, by_sin)
    return jnp.real(jax.lax.complex(by_row, by_column) * place[..., None])


def _slopes(pad, taps, place, size):
    """The derivatives of the weights of `_along`."""
    half = (size - 1) / 2
    # Beyond a continued edge nothing changes, on it half as much as within.
    change = (jnp.sign(half - jnp.abs(place)) + 1) / 2 if pad == "edge" else jnp.ones_like(place)
    place = _clip(place, -half, half) if pad == "edge" else place
    t = place + half - _along(pad, taps, place, size)[0]
    return jax.jvp(lambda t: list(taps[2](t)), (t[..., None],), (change[..., None],))[1]


def _transpose(pad, interpolation, image, quarter, mirror, cos, sin):
    """The transpose of `_sample` without a fill: each pixel adds up its window, see the module."""
    near_to, offsets, kernel = _WINDOWS[interpolation]
    size = image.shape[0]
    # To move and then turn is to turn, the other way if there is a mirror, and then to move.
    quarter, sin = jnp.where(mirror == 1, quarter, -quarter), jnp.where(mirror == 1, -sin, sin)
    y, x = _axes(size, cos.dtype)
    half = (size - 1) / 2
    row, column = _places(y, x, cos, -sin)
    top, left = near_to(row + half), near_to(column + half)
    # From the pixel to what its window is about; the others of the window follow by steps.
    row, column = top - half - row, left - half - column
    row, column = sin * column + cos * row, cos * column - sin * row
    read = _reader(image, quarter, mirror, top, left)

    def add_row(k, total):
        step = jnp.asarray(k, cos.dtype)
        there = row + _outside(top + step, size)
        for n in offsets:
            down = there + (step * cos + n * sin)
            across = column + _outside(left + n, size) + (n * cos - step * sin)
            weight = _weight(pad, kernel, down, y, half) * _weight(pad, kernel, across, x, half)
            total += weight[..., None] * read(k, n)
        return total

    total = jnp.zeros(image.shape, cos.dtype)
    short = len(offsets) == 3  # all 36 of the cubic window written out take minutes to compile
    total = jax.lax.fori_loop(offsets[0], offsets[-1] + 1, add_row, total, unroll=short)
    if pad == "edge":
        beyond = functools.partial(_beyond, interpolation, image, mirror=mirror, cos=cos, sin=sin)
        turns = quarter + jnp.arange(4, dtype=jnp.int32)
        total = _on_borders(total, jax.vmap(lambda quarter: beyond(quarter=quarter))(turns))
    return total.astype(image.dtype)


def _outside(place, size):
    """What to add to a distance so that no kernel reaches a pixel that the image does not have.

    Windows reach 6 pixels far, kernels 2, and edges are continued from up to `size` away.
    """
    return jnp.where((place >= 0) & (place < size), 0, size + 8).astype(place.dtype)


def _weight(pad, kernel, distance, pixel, half):
    """What a sample takes of a pixel at a distance, along one axis from −half to half.

    A sample less than one beyond the border goes to the window in part, and to `_beyond` with the
    rest: a place that is computed in both, and rounded in two ways, is nowhere lost or doubled. The
    linear kernel is that part.
    """
    if pad == "constant" or kernel is _hat:
        return kernel(distance)
    place = pixel + distance
    share = 1 - _clip(jnp.abs(place) - half, 0, 1)
    place = _clip(place, -half, half)
    # The kernel reads the border once more, in place of the first pixel beyond it.
    again = jnp.where(jnp.abs(pixel) == half, kernel(jnp.abs(place - pixel) + 1), 0)
    return share * (kernel(place - pixel) + again)


def _beyond(interpolation, image, quarter, mirror, cos, sin):
    """What the left border adds up `(S, C)`: all outputs that read to the left of it.

    In the line of pixel r they are those near y = (r − sin·x) / cos, in the columns x of the corner
    that a turn by 45° takes out of the image, (1 − √½)·S of them: a few at a time, in a loop, so
    that what is the same for all channels is computed once.
    """
    near_to, offsets, kernel = _WINDOWS[interpolation]
    size = image.shape[0]
    half = (size - 1) / 2
    line = jnp.arange(size, dtype=cos.dtype) - half
    together = 12 // len(offsets)

    def add_columns(k, total):
        for j in [(together * k + n).astype(cos.dtype) for n in range(together)]:
            place = (line - _product(sin, j - half)) / cos + half
            near = near_to(place)
            # From the line, and beyond the border, of the first; the others follow by steps.
            down, beyond = cos * (near - place), sin * (near - half) - cos * (j - half) - half
            down += _outside(j, size)
            read = _reader(image, quarter, mirror, near, j)
            for n in offsets:
                distance = down + _outside(near + n, size) + n * cos
                weight = _weight("edge", kernel, distance, line, half)
                weight *= _clip(beyond + n * sin, 0, 1)
                total += weight[:, None] * read(n, 0)
        return total

    columns = math.ceil(0.293 * size) + 1
    total = jnp.zeros((size, image.shape[-1]), cos.dtype)
    return jax.lax.fori_loop(0, -(-columns // together), add_columns, total)


def _on_borders(image, sides):
    """The image and what its borders add up; that of side k is the left one of k quarter turns."""
    left, top, right, bottom = sides[0], sides[1, ::-1], sides[2, ::-1], sides[3]
    for place, down, along in ((0, left, top), (len(image) - 1, right, bottom)):
        image = image.at[:, place].add(down).at[place].add(along)  # one place: XLA adds a slice
    return image


# ---- kernels ----


def _linear_weights(t):
    """Of the pixels at 0 and 1, for a place t between them."""
    return 1 - t, t


def _cubic_weights(t, a=-0.75):
    """Keys' weights of the pixels at −1, 0, 1 and 2, for a place t between 0 and 1."""
    u = 1 - t
    near, far = ((a + 2) * t - (a + 3)) * t * t + 1, ((a + 2) * u - (a + 3)) * u * u + 1
    return a * t * u * u, near, far, a * u * t * t


def _hat(distance):
    """The linear kernel."""
    near = 1 - jnp.abs(distance)
    return jnp.where(near < 0, 0, near)


def _keys(distance, a=-0.75):
    """The cubic kernel, whose derivative is continuous."""
    d = jnp.abs(distance)
    d = jnp.where(d > 2, 2, d)
    near, far = ((a + 2) * d - (a + 3)) * d * d + 1, a * (d - 1) * (d - 2) ** 2
    return jnp.where(d < 1, near, far)


def _three_weights(t):
    """The linear weights of the pixels at −1, 0 and 1, for a place t between −1 and 1."""
    after = (t + t * jnp.sign(t)) / 2  # the derivative of this, at 0, is that of both sides
    before = after - t
    return before, 1 - (before + after), after


def _nearest(place):
    """The pixel next to a place; XLA takes rounding for so dear that it would store the result."""
    return jnp.floor(place + 0.5)


# The pixel next to a place, others from it, and the weights of all for a place from it. Linear
# interpolation reads one more where its derivative is asked for.
_TAPS = {
    "linear": (jnp.floor, (0, 1), _linear_weights),
    "cubic": (jnp.floor, (-1, 0, 1, 2), _cubic_weights),
}
_SYMMETRIC_TAPS = _TAPS | {"linear": (_nearest, (-1, 0, 1), _three_weights)}
# The same for the outputs about a place, which are at most √2 times the kernel's reach away in each
# direction, and the kernel.
_WINDOWS = {
    "linear": (_nearest, (-1, 0, 1), _hat),
    "cubic": (jnp.floor, (-2, -1, 0, 1, 2, 3), _keys),
}
