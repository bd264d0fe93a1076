"""A group-convolution scorer for images, exact under the transformations that are exact.

A feature map over G is one plane per element. Here every plane is stored turned back into its own
frame, F_g = g⁻¹·f_g, so that acting with h only permutes planes: (h·F)_g = F_{h⁻¹g}. The group
convolution f'_g = Σ_j ψ_{g,j} ⋆ f_{gj} (Cohen & Welling 2016, arXiv 1602.07576) then reads

    F'_g = Σ_j ψ_j ⋆ (j·F_{gj}) = Σ_j j·((j⁻¹·ψ_j) ⋆ F_{gj}),

one ordinary convolution of every plane with the same turned filters, and a sum of turned results in
the same order, so that an exactly turned image gives the same numbers in other places: scores are
the same bits, permuted.
"""

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen.dtypes import promote_dtype

from equiadapt_jax.actions import images as image_actions
from equiadapt_jax.groups import Group, finite
from equiadapt_jax.networks.convolution import convolve
from equiadapt_jax.networks.turned_copies import turned_copies


class GroupConvNet(nn.Module):
    """Scores the poses of images: `(B, H, W, C)` to `(B, |G|)`, float32 or wider.

    A lifting convolution reads the image from every pose; group convolutions follow, each mixing a
    plane with those that exact transformations relate to it; planes are pooled to a coarse grid,
    each in its own frame, and a last group convolution over all of G scores them.

    Attributes:
      group: C_n or D_n.
      features: channels of the convolutions, the lifting layer first.
      kernels: their kernel sizes.
      strides: their strides. Layers pad by p = (k − 1) // 2; quarter turns commute with a stride s
        over S pixels only where it divides S + 2p − k, which is refused otherwise.
      size: working size in pixels, to which every pose of the image is resized, squares or not;
        None: the input's, a square.
      grid: side of the grid to which planes are pooled.
      hidden: width of the scoring layer.
      dtype: compute dtype; None takes that of inputs and parameters. Scores are at least float32.
      pad: what lies outside the image where an element interpolates, see `actions.images`.
      fill: its value for `pad="constant"`.
    """

    group: Group
    features: Sequence[int] = (16, 32, 32)
    kernels: Sequence[int] = (3, 3, 3)
    strides: Sequence[int] = (1, 1, 1)
    size: int | None = None
    grid: int = 1
    hidden: int = 64
    dtype: Any = None
    pad: str = "edge"
    fill: float = 0.0

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Scores `(B, |G|)` for images `(B, H, W, C)`."""
        finite(self.group, "GroupConvNet")
        if images.ndim != 4:
            raise ValueError(f"GroupConvNet takes images (B, H, W, C), got {images.shape}.")
        if not len(self.features) == len(self.kernels) == len(self.strides) > 0:
            raise ValueError(
                f"GroupConvNet has features {self.features}, kernels {self.kernels} and strides "
                f"{self.strides}: give one of each for every layer."
            )
        planes = _poses(self.group, images, self.size, self.pad, self.fill)
        if planes.shape[2] != planes.shape[3]:
            raise ValueError(
                f"GroupConvNet sees squares, and the images have shape {images.shape}: give the "
                "working size to which they are resized."
            )
        layers = zip(self.features, self.kernels, self.strides, strict=True)
        for i, (features, kernel, stride) in enumerate(layers):
            planes = self._convolution(i, planes, features, kernel, stride)
        return self._scores(_pool(planes, self.grid))

    def _convolution(self, i, planes, features, kernel, stride):
        """Planes `(|G|, B, S', S', features)` of planes `(|G|, B, S, S, C)`.

        The first layer reads each pose of the image alone.
        """
        size, channels = planes.shape[3:]
        padding = (kernel - 1) // 2
        if (size + 2 * padding - kernel) % stride:
            raise ValueError(
                f"Layer {i} of GroupConvNet strides by {stride} over {size} pixels with kernel "
                f"{kernel}: quarter turns would see other pixels; choose a working size for which "
                f"{stride} divides size - {kernel - 2 * padding}."
            )
        lattice = self.group.lattice if i else self.group.lattice[:1]
        shape = (kernel, kernel, len(lattice) * channels, features)
        filters = _turned_back(self.group, lattice, _Filters(shape, name=f"conv{i}")())
        planes, filters = promote_dtype(planes, filters, dtype=self.dtype)
        # Pose by pose: in one batch of all, a CPU rounds the last pixels in another order.
        convolved = [convolve(plane, filters, stride, padding) for plane in planes]
        table = _compose_table(self.group, lattice)
        planes = jnp.stack([_turned_sum(self.group, lattice, convolved, row) for row in table])
        # Each plane is normalised as a whole: a mean over all of them would depend on their order.
        normalise = nn.LayerNorm(
            reduction_axes=(-3, -2, -1), feature_axes=-1, dtype=self.dtype, name=f"norm{i}"
        )
        return nn.gelu(normalise(planes))

    def _scores(self, pooled):
        pooled = pooled.astype(jnp.promote_types(pooled.dtype, jnp.float32))
        # Accelerators multiply float32 in less by default; scores decide between near-ties.
        dense = functools.partial(nn.Dense, dtype=pooled.dtype, precision=jax.lax.Precision.HIGHEST)
        hidden = nn.gelu(dense(self.hidden, name="hidden")(pooled))
        table = _compose_table(self.group, np.arange(self.group.order))
        mixed = hidden[:, table].reshape(*hidden.shape[:2], -1)
        mixed = nn.gelu(dense(self.hidden, name="mix")(mixed))
        return dense(1, use_bias=False, dot_general=row_by_row, name="score")(mixed)[..., 0]


class _Filters(nn.Module):
    """The parameter `kernel` of a convolution."""

    shape: Sequence[int]

    @nn.compact
    def __call__(self):
        return self.param("kernel", nn.initializers.lecun_normal(), self.shape, jnp.float32)


def row_by_row(x, kernel, *_, **__):
    """The product x·kernel with a matrix `(K, 1)`, as sums: a CPU's depends on a row's place."""
    return (x * kernel[:, 0]).sum(-1, keepdims=True)


def _poses(group, images, size, pad, fill):
    """g⁻¹·x for all g, `(|G|, B, S, S, C)`, at the working size.

    The exact part acts first, then the rest is interpolated.
    """
    remainder, exact = group.split(group.inverse(np.arange(group.order)))
    copies = turned_copies(group, group.lattice, images, size)
    turned = dict(zip(map(int, group.lattice), copies, strict=True))
    return jnp.stack(
        [
            image_actions.act(group, int(r), turned[int(q)], pad=pad, fill=fill)
            for r, q in zip(remainder, exact, strict=True)
        ]
    )


def _turned_back(group, lattice, filters):
    """j⁻¹·ψ_j for the exact j, side by side: `(K, K, |lattice| C, F)` to `(K, K, C, |lattice| F)`.

    A filter is an image of K×K pixels with C·F channels.
    """
    each = jnp.split(filters, len(lattice), 2)
    flat = [f.reshape(*f.shape[:2], -1) for f in each]
    back = [
        image_actions.act(group, int(group.inverse(j)), f)
        for j, f in zip(lattice, flat, strict=True)
    ]
    return jnp.concatenate([f.reshape(each[0].shape) for f in back], -1)


def _turned_sum(group, lattice, convolved, row):
    """Σ_j j·(part j of plane row[j]), for planes `(B, S, S, |lattice| F)`."""
    dtype, features = convolved[0].dtype, convolved[0].shape[-1] // len(lattice)
    parts = [
        image_actions.act(group, int(j), convolved[h][..., k * features : (k + 1) * features])
        for k, (j, h) in enumerate(zip(lattice, row, strict=True))
    ]
    return sum(part.astype(jnp.promote_types(dtype, jnp.float32)) for part in parts).astype(dtype)


def _compose_table(group, right):
    """Gj for all g and the given j, `(|G|, len(right))`."""
    return group.compose(np.arange(group.order)[:, None], right)


def _pool(planes, grid):
    """Averages over grid × grid cells of every plane, `(B, |G|, grid² C)`."""
    order, batch, size, _, channels = planes.shape
    if size % grid:
        raise ValueError(
            f"GroupConvNet pools {size} pixels to a grid of {grid}: choose a grid that divides "
            f"{size}."
        )
    cells = planes.reshape(order, batch, grid, size // grid, grid, size // grid, channels)
    return jnp.swapaxes(cells.mean((3, 5)).reshape(order, batch, -1), 0, 1)
