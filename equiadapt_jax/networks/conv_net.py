"""A small plain convolutional network: nothing equivariant about it, so it can tell poses apart."""

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax

from equiadapt_jax.networks.feature_scorer import pool


class ConvNet(nn.Module):
    """Images `(N, S, S, C)` to vectors `(N, outputs)`, float32 or wider.

    Convolutions, averages over the cells of a grid (where in the image something is seen tells the
    pose), and two dense layers. Every image is normalised by itself. Options mean what they do in
    `GroupConvNet`, with other defaults.

    Attributes:
      outputs: length of the vectors.
      features: channels of the convolutions.
      kernels: their kernel sizes.
      strides: their strides.
      size: working size in pixels, to which images are resized; None: the input's.
      grid: side of the grid to which feature maps are averaged.
      hidden: width of the first dense layer.
      dtype: compute dtype; None takes that of inputs and parameters.
    """

    outputs: int
    features: Sequence[int] = (16, 32, 32)
    kernels: Sequence[int] = (3, 3, 3)
    strides: Sequence[int] = (1, 2, 2)
    size: int | None = None
    grid: int = 4
    hidden: int = 64
    dtype: Any = None

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Vectors `(N, outputs)` for images `(N, S, S, C)`."""
        if images.ndim != 4:
            raise ValueError(f"ConvNet takes images (N, S, S, C), got {images.shape}.")
        if not len(self.features) == len(self.kernels) == len(self.strides) > 0:
            raise ValueError(
                f"ConvNet has features {self.features}, kernels {self.kernels} and strides "
                f"{self.strides}: give one of each for every layer."
            )
        x = images
        if self.size is not None and (self.size, self.size) != x.shape[1:3]:
            x = jax.image.resize(x, (x.shape[0], self.size, self.size, x.shape[3]), "linear")
        for i, (features, kernel, stride) in enumerate(
            zip(self.features, self.kernels, self.strides, strict=True)
        ):
            x = nn.Conv(
                features, (kernel, kernel), strides=stride, use_bias=False, dtype=self.dtype,
                name=f"conv{i}",
            )(x)  # fmt: skip
            x = nn.LayerNorm(
                reduction_axes=(-3, -2, -1), feature_axes=-1, dtype=self.dtype, name=f"norm{i}"
            )(x)
            x = nn.gelu(x)
        x = pool(x, self.grid)
        # Accelerators multiply float32 in less by default; scores decide between near-ties.
        dense = functools.partial(nn.Dense, dtype=x.dtype, precision=jax.lax.Precision.HIGHEST)
        x = nn.gelu(dense(self.hidden, name="hidden")(x))
        return dense(self.outputs, name="out")(x)
