"""A steerable scorer: vectors that turn with the image, by any angle.

A field of order m is a complex number per pixel that a rotation by θ carries along and multiplies
by e^{imθ}: order 0 are invariants, 1 vectors, 2 axes without a head. Correlation with a circular
harmonic R(r) e^{ikα} makes order m + k of order m, and of its conjugate order k − m; these are all
the linear maps there are (Worrall et al. 2017, arXiv 1612.04642; Weiler and Cesa 2019, arXiv
1911.08251). Angles α are measured counter-clockwise from up, on the axis of the mirror. So where R
is real a left-right mirror conjugates every field, which is how O(2) acts on them.

On a grid that holds as far as nothing beyond its finest wave is made. The image is seen in a disk
that fades out, filters are rings blurred by a Gaussian in a smooth window, fields are gated by
smooth functions. Of small filters only those of |k| ≤ 2 hold what they promise: on square pixels
e^{ikα} is also e^{i(k−4)α}, and to long waves the one of lower order answers far more than that of
order 3 or 4, however little of it there is.

For quarter turns, and for O(2) mirrors, it holds to the bit: the turned copies of the images go
through the network in a loop, so that each is computed alike, where in one batch of all, or with
its own turn compiled into what follows, sums would be rounded in another order. Their vectors,
carried back, are added up in an order that these turns do not change.
"""

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from equiadapt_jax.groups import SO, MatrixGroup
from equiadapt_jax.networks.turned_copies import turned_copies

ORDERS = (0, 1, 2)
_EXACT = jax.lax.Precision.HIGHEST
_FAINT = 1e-3  # mean squares much below it are not brought to one, so that rounding stays small


class SteerableNet(nn.Module):
    """Vectors of images `(B, S, S, C)`: `(B, 1, 2)` for SO(2), `(B, 2, 2)` for O(2).

    Rows are (x to the right, y down), in float32 or wider; `canonicalization.frame` makes a pose of
    them. The network runs on four turned copies of every image, for O(2) on eight.

    Attributes:
      group: SO(2) or O(2).
      layers: (channels, kernel, stride) of each convolution; every channel is a field of each
        order. Layers pad by p = (k − 1) // 2, and s divides S + 2p − k, so that the centre stays
        where it is.
      size: working size in pixels, to which every copy of the image is resized; None: the input's.
      rings: of the filters of the last layer, which is as large as the image.
      hidden: channels of the last layer, and width of the one that weighs them.
      dtype: compute dtype of the convolutions; None takes that of images and parameters.
    """

    group: MatrixGroup
    layers: Sequence[tuple[int, int, int]] = ((4, 6, 2), (8, 7, 1))
    size: int | None = None
    rings: int = 4
    hidden: int = 16
    dtype: Any = None

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Vectors for images `(B, S, S, C)`."""
        if not isinstance(self.group, MatrixGroup):
            raise ValueError(
                f"SteerableNet gives vectors, poses of SO(2) or O(2), and the group is "
                f"{self.group}: take GroupConvNet for finite groups."
            )
        if images.ndim != 4 or images.shape[1] != images.shape[2]:
            raise ValueError(f"SteerableNet takes images (B, S, S, C), got {images.shape}.")
        if not self.layers:
            raise ValueError("SteerableNet has no layers: give (channels, kernel, stride) of some.")
        dtype = self.dtype or jnp.promote_types(images.dtype, jnp.float32)
        filters, biases, into = [], [], images.shape[-1]
        for i, (channels, kernel, _) in enumerate(self.layers):
            filters.append(self._filters(i, kernel, into, channels).astype(dtype))
            shape = (len(ORDERS), 1, channels)
            biases.append(self.param(f"bias{i}", nn.initializers.zeros, shape))
            into = channels
        pool = self._pooling(into)
        weigh = self._weighing()

        def vectors(copy):
            x = _seen(copy.astype(jnp.promote_types(copy.dtype, jnp.float32)))
            fields = x.astype(dtype)[..., None, None, :]  # one order, its real part
            for i in range(len(self.layers)):
                fields = self._layer(i, fields, filters[i], biases[i])
            return self._vectors(self._pool(fields, pool), weigh)

        lattice = self.group.subgroup(4)
        inverses = map(lattice.inverse, range(lattice.order))
        copies = jnp.stack(turned_copies(lattice, inverses, images, self.size))
        return _carried_back(self.group, jax.lax.map(vectors, copies))

    def _filters(self, i, kernel, into, channels):
        """Filters `(K, K, in, out)` of a layer, to fields and to the gates of all of them."""
        basis = _basis(kernel, isinstance(self.group, SO), image=not i)
        gates = basis[..., :1, :1]  # real parts of order 0
        gates = gates[abs(gates).max(tuple(range(1, gates.ndim))) > 0]

        def combined(name, basis, channels):
            shape = (len(basis), into, channels)
            init = nn.initializers.normal(1 / np.sqrt(shape[0] * into / len(ORDERS)))
            weight = self.param(name, init, shape)
            basis = basis.astype(weight.dtype)
            filters = jnp.einsum("eyxmqnp,eio->yxmqinpo", basis, weight, precision=_EXACT)
            return filters.reshape(kernel, kernel, np.prod(filters.shape[2:5]), -1)

        to_fields = combined(f"conv{i}", basis, channels)
        return jnp.concatenate([to_fields, combined(f"gate{i}", gates, len(ORDERS) * channels)], -1)

    def _layer(self, i, fields, filters, bias):
        """A convolution to fields `(B, H, W, orders, 2, channels)`, gated."""
        channels, kernel, stride = self.layers[i]
        batch, size = fields.shape[:2]
        padding = (kernel - 1) // 2
        if (size + 2 * padding - kernel) % stride:
            raise ValueError(
                f"Layer {i} of SteerableNet strides by {stride} over {size} pixels with kernel "
                f"{kernel}: the centre would move; choose a size for which {stride} divides "
                f"size - {kernel - 2 * padding}."
            )
        y = jax.lax.conv_general_dilated(
            fields.reshape(batch, size, size, -1),
            filters,
            (stride, stride),
            [(padding, padding)] * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        made = 2 * len(ORDERS) * channels
        shape = (*y.shape[:3], len(ORDERS), -1, channels)
        z, gates = (_scaled(part.reshape(shape)) for part in (y[..., :made], y[..., made:]))
        mask = _disk(y.shape[1]).astype(z.dtype)[:, :, None, None, None]
        # Half as steep: products of fields make waves shorter, and the grid has a shortest one.
        return mask * z * nn.sigmoid(gates / 2 + bias.astype(z.dtype))

    def _pooling(self, channels):
        """Weights `(orders, orders, 2 · 2 rings, C, 2 hidden)` of real and imaginary parts.

        In real numbers: what a product of complex matrices makes of a row depends on its place.
        """
        count = 2 if isinstance(self.group, SO) else 1  # complex weights, or real ones
        shape = (count, len(ORDERS), len(ORDERS), 2 * self.rings, channels, self.hidden)
        init = nn.initializers.normal(1 / np.sqrt(np.prod(shape[2:5])))
        weight = self.param("pool", init, shape)
        a, b = weight if count == 2 else (weight[0], jnp.zeros_like(weight[0]))
        return jnp.concatenate([jnp.concatenate([a, b], -1), jnp.concatenate([-b, a], -1)], -2)

    def _pool(self, fields, weight):
        """Fields of the whole image about its centre, complex `(B, orders, hidden)`."""
        fields = fields.astype(jnp.promote_types(fields.dtype, jnp.float32))
        seen = _rings(fields, self.rings)
        parts = jnp.concatenate([seen.real, seen.imag], -1)
        weight = weight.astype(fields.dtype)
        pooled = jnp.einsum("znmbc,nmbch->znh", parts, weight, precision=_EXACT)
        pooled = jax.lax.complex(pooled[..., : self.hidden], pooled[..., self.hidden :])
        square = _square(pooled).mean((1, 2), keepdims=True)
        return pooled * jax.lax.rsqrt(square + _FAINT)

    def _weighing(self):
        """The two layers that weigh vectors by what does not turn."""
        count, parts = (1, 2) if isinstance(self.group, SO) else (2, 1)
        hidden = self._dense("hidden", 4 * self.hidden, self.hidden)
        weigh = self._dense("weigh", self.hidden, count * 2 * self.hidden * parts)
        return lambda x: weigh(nn.gelu(hidden(x)))

    def _dense(self, name, into, out):
        """A layer as a plain function: a bound module may not be called within lax.map."""
        layer = nn.Dense(out, precision=_EXACT, name=name)
        layer(jnp.zeros((1, into)))  # makes its parameters
        return functools.partial(layer.clone(parent=None, name=None).apply, layer.variables)

    def _vectors(self, pooled, weigh):
        """Vectors `(B, k, 2)`: order 1 of pooled fields, weighed by what does not turn."""
        rotations = isinstance(self.group, SO)
        scalar, vector, axis = (pooled[:, n] for n in ORDERS)
        signed = [scalar.real, scalar.imag] if rotations else [scalar.real, scalar.imag**2]
        squares = [_square(z) for z in (vector, axis)]
        weights = weigh(jnp.concatenate(signed + squares, -1))
        count, parts = (1, 2) if rotations else (2, 1)
        weights = weights.reshape(-1, count, 2 * self.hidden, parts)
        found = jnp.concatenate([vector, axis * vector.conj()], -1)[:, None]
        weights = _complex(jnp.moveaxis(weights, -1, -2)) if rotations else weights[..., 0]
        v = (weights * found).sum(-1)
        return jnp.stack([-v.imag, -v.real], -1)  # from up, counter-clockwise


def _rings(fields, count):
    """Fields summed over blurred rings about the centre, `(B, orders, orders, 2 count, C)`.

    Complex. The axes are the order made, the order it is made of, the rings for the field and then
    for its conjugate, and the channel.
    """
    size, highest = fields.shape[1], 2 * ORDERS[-1]
    step = size / 2 / count
    radii, orders = step * (np.arange(count) + 0.5), range(-ORDERS[-1], highest + 1)
    rings = np.stack(
        [[circular_harmonics(size, radius, step / 1.5, k) for radius in radii] for k in orders]
    )
    rings /= np.sqrt((abs(rings) ** 2).sum((-2, -1), keepdims=True))

    seen = jax.lax.complex(
        *(
            jnp.einsum("zyxmqc,kjyx->kzmjqc", fields, part.astype(fields.dtype), precision=_EXACT)
            for part in (rings.real, rings.imag)
        )
    )
    real, turned = seen[..., 0, :], 1j * seen[..., 1, :]
    field, conjugate = (dict(zip(orders, x, strict=True)) for x in (real + turned, real - turned))
    made = [
        [jnp.concatenate([field[n - m][:, m], conjugate[n + m][:, m]], 1) for m in ORDERS]
        for n in ORDERS
    ]
    return jnp.stack([jnp.stack(row, 1) for row in made], 1)


def _carried_back(group, vectors):
    """The mean of q·v over exact q, `(B, k, 2)`, of vectors `(|lattice|, B, k, 2)`.

    Exact elements permute (a, b, c, d) in a circle or turn it round, and for O(2) exchange the four
    with and the four without a mirror: none of it changes (a + c) + (b + d).
    """
    lattice = group.subgroup(4)
    matrices = np.asarray(lattice._matrices, vectors.dtype)
    turned = [(m * v[..., None, :]).sum(-1) for m, v in zip(matrices, vectors, strict=True)]
    halves = [(a + c) + (b + d) for a, b, c, d in zip(*[iter(turned)] * 4, strict=True)]
    return sum(halves[1:], halves[0]) / lattice.order


def _seen(images):
    """Images without their mean, fading out towards the border of the disk."""
    mask = _disk(images.shape[1]).astype(images.dtype)[:, :, None]
    mean = (mask * images).sum((1, 2), keepdims=True) / mask.sum()
    return mask * (images - mean)


def _disk(size):
    """1 within 0.7 of the disk's radius, 0 outside, between them twice differentiable."""
    t = np.clip((_distance(size) / (size / 2) - 0.7) / 0.3, 0, 1)
    return 1 - t**3 * (10 - 15 * t + 6 * t**2)


def _distance(size):
    offset = np.arange(size) - (size - 1) / 2
    return np.hypot(offset[:, None], offset)


def circular_harmonics(size: int, radius: float, sigma: float, order: int) -> np.ndarray:
    """A ring of e^{ikα}, blurred: complex `(size, size)`, about the centre.

    The value at d is the mean over β of e^{ikβ} exp(−|d − ρ(β)|² / 2σ²), where ρ(β) is the place on
    the ring at an angle of β counter-clockwise from up: smooth everywhere, and without waves much
    shorter than 2σ. `radius` and `sigma` are in pixels, `order` is k.
    """
    offset = np.arange(size) - (size - 1) / 2
    count = 4 * int(np.ceil(max(8, 2 * radius / sigma + 2 * abs(order))))
    beta = 2 * np.pi * np.arange(count) / count
    x = offset[:, None] + radius * np.sin(beta)  # (x, y) of the ring are −(sin β, cos β)
    y = offset[:, None] + radius * np.cos(beta)
    across, down = (np.exp(-(t**2) / (2 * sigma**2)) for t in (x, y))
    return np.einsum("yn,xn,n->yx", down, across, np.exp(1j * order * beta)) / count


@functools.lru_cache(maxsize=32)
def _basis(size, phases, *, image=False):
    """Linear maps of fields, `(E, size, size, orders, 2, orders, 2)`, of filters of |k| ≤ 2.

    The axes are y and x, the order that is read with its real and imaginary part, and the order
    that is made with its. There are maps of the field and of its conjugate, of two rings each, with
    `phases` those times i too, which mirrors do not allow. Those of an image read its only, real
    order.
    """
    orders = len(ORDERS)
    found = []
    for out in ORDERS:
        for into in ORDERS[:1] if image else ORDERS:
            for order, conjugated in ((out - into, False), (out + into, True)):
                if abs(order) > ORDERS[-1] or (image and conjugated):
                    continue
                for w in _rings_of_pixels(size, order, phases):
                    one = np.zeros((size, size, orders, 2, orders, 2))
                    one[:, :, into, :, out, :] = _as_real(w, conjugated)
                    found.append(one)
    basis = np.stack(found)
    return basis[:, :, :, :1, :1] if image else basis


def _rings_of_pixels(size, order, phases):
    """Filters e^{ikα} of unit norm, complex `(size, size)`, in a window that ends smoothly."""
    window = np.clip(1 - (_distance(size) / ((size + 1) / 2)) ** 2, 0, None) ** 3
    rings = [circular_harmonics(size, size * r, size / 6, order) for r in (0.1, 0.2)]
    rings = [ring * window / np.linalg.norm(ring * window) for ring in rings]
    return [factor * ring for ring in rings for factor in ((1, 1j) if phases else (1,))]


def _as_real(w, conjugated):
    """Multiplication by complex numbers, after conjugation or not, as `(..., 2, 2)`: in, out."""
    sign = -1 if conjugated else 1
    real, imaginary = [w.real, w.imag], [-sign * w.imag, sign * w.real]
    return np.stack([np.stack(real, -1), np.stack(imaginary, -1)], -2)


def _complex(parts):
    """Complex numbers of `(..., 2, C)`."""
    return jax.lax.complex(parts[..., 0, :], parts[..., 1, :])


def _square(z):
    return z.real**2 + z.imag**2


def _scaled(fields):
    """Fields at unit mean square over the image and both parts."""
    wide = fields.astype(jnp.promote_types(fields.dtype, jnp.float32))
    square = (wide**2).mean((1, 2, 4), keepdims=True)
    return (wide * jax.lax.rsqrt(square + _FAINT)).astype(fields.dtype)
