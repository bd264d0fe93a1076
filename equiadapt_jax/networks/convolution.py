"""Convolutions with a stride, as products of matrices where that is faster."""

import functools

import jax
import jax.numpy as jnp


def convolve(x: jax.Array, filters: jax.Array, stride: int, padding: int) -> jax.Array:
    """Correlation of squares `(B, S, S, C)` with filters `(K, K, C, F)`: `(B, S', S', F)`.

    On a CPU, strides that divide K and the padded side make it one product of matrices, of which
    the gradients are products too: they take half of the time that XLA needs for those of a
    convolution.
    """
    plain = functools.partial(_convolution, stride=stride, padding=padding)
    if stride == 1 or filters.shape[0] % stride or (x.shape[1] + 2 * padding) % stride:
        return plain(x, filters)
    product = functools.partial(_product, stride=stride, padding=padding)
    return jax.lax.platform_dependent(x, filters, cpu=product, default=plain)


def _convolution(x, filters, *, stride, padding):
    return jax.lax.conv_general_dilated(
        x,
        filters,
        (stride, stride),
        [(padding, padding)] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def _product(x, filters, *, stride, padding):
    """The pixels of a stride as channels; of these the few that each filter spans side by side."""
    x = jnp.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    kernel, _, channels, features = filters.shape
    side, span = x.shape[1] // stride, kernel // stride
    cells = x.reshape(-1, side, stride, side, stride, channels).swapaxes(2, 3)
    cells = cells.reshape(-1, side, side, stride * stride * channels)
    w = filters.reshape(span, stride, span, stride, channels, features).swapaxes(1, 2)
    size = side - span + 1
    seen = [cells[:, i : i + size, j : j + size] for i in range(span) for j in range(span)]
    return jnp.concatenate(seen, -1) @ w.reshape(-1, features)
