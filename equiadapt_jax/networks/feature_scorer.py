"""A scorer that reads what a pretrained predictor sees in every pose.

A predictor that was pretrained on upright images knows what upright looks like. Its features of
g⁻¹·x, for every g, are the orbit that this small head scores. Each pose is seen in its own frame,
so that turning the image by an exact element only permutes what the head gets: scores are the same
bits, in other places.
"""

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from equiadapt_jax.groups import Group, finite
from equiadapt_jax.networks.group_conv import row_by_row


class FeatureScorer(nn.Module):
    """Scores poses by the predictor's features of them: `(B, |G|, F)` to `(B, |G|)`.

    `features[:, g]` belongs to g⁻¹·x and is made by `read` from one pass of the predictor. A layer
    that all poses share follows, then a group convolution over all of G, which compares them, and
    the score, in float32 or wider.

    Attributes:
      group: C_n or D_n.
      grid: side of the grid to which `read` averages feature maps; where in the image something is
        seen tells the pose.
      hidden: width of both layers.
      dropout: share of features and of hidden values that training leaves out.
      dtype: compute dtype; None takes that of inputs and parameters.
    """

    group: Group
    grid: int = 4
    hidden: int = 192
    dropout: float = 0.3
    dtype: Any = None

    def read(self, maps: Sequence[jax.Array], output: jax.Array) -> jax.Array:
        """One vector of features for each image: what `adapt` takes as `features`.

        Args:
          maps: the predictor's features, `(N, H, W, C)` each, of any sizes and channels.
          output: its logits `(N, K)`, whose confidence is a feature too.

        Returns:
          `(N, grid² Σ C + K)`, in at least float32: averages over the cells of a grid, scaled to
          unit variance map by map, and log-probabilities.

        Raises:
          ValueError: maps or an output of another rank, or no map.
        """
        if not maps:
            raise ValueError(
                "FeatureScorer reads feature maps, and the predictor tells none: let its module "
                "sow them into 'features', or give Network(init, apply, features)."
            )
        if any(m.ndim != 4 for m in maps) or output.ndim != 2:
            raise ValueError(
                f"FeatureScorer reads maps (N, H, W, C) and logits (N, K), got "
                f"{[m.shape for m in maps]} and {output.shape}: give other features to the network."
            )
        pooled = [_standardize(pool(m, self.grid)) for m in maps]
        output = output.astype(jnp.promote_types(output.dtype, jnp.float32))
        return jnp.concatenate([*pooled, jax.nn.log_softmax(output)], -1)

    @nn.compact
    def __call__(self, features: jax.Array, *, train: bool = False) -> jax.Array:
        """Scores `(B, |G|)` for features `(B, |G|, F)`."""
        finite(self.group, "FeatureScorer")
        if features.ndim != 3 or features.shape[1] != self.group.order:
            raise ValueError(
                f"FeatureScorer takes features (B, {self.group.order}, F), one row for an element "
                f"of {self.group}: got {features.shape}."
            )
        if train and self.dropout and not self.has_rng("dropout"):
            raise ValueError(
                f"dropout={self.dropout} needs a key in training: pass key=jax.random.key(...)."
            )
        drop = functools.partial(nn.Dropout(self.dropout), deterministic=not train)
        x = self._layer("hidden", drop(features))
        order = np.arange(self.group.order)
        table = self.group.compose(order[:, None], order)
        x = self._layer("mix", drop(x)[:, table].reshape(*x.shape[:2], -1))
        x = drop(x).astype(jnp.promote_types(x.dtype, jnp.float32))
        score = nn.Dense(1, use_bias=False, dtype=x.dtype, dot_general=row_by_row, name="score")
        return score(x)[..., 0]

    def _layer(self, name, x):
        x = nn.Dense(self.hidden, dtype=self.dtype, name=name)(x)
        return nn.gelu(nn.LayerNorm(dtype=self.dtype, name=f"{name}_norm")(x))


def pool(x: jax.Array, grid: int) -> jax.Array:
    """Averages over grid × grid cells of equal area, `(N, grid² C)`, for maps of any size."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    count, height, width, channels = x.shape
    if height % grid == 0 and width % grid == 0:
        # Sums instead of products: a fifth of the predictor's own time is saved for a CIFAR ResNet.
        x = x.reshape(count, grid, height // grid, grid, width // grid, channels).mean((2, 4))
    else:
        rows, columns = (jnp.asarray(cells(size, grid), x.dtype) for size in (height, width))
        x = jnp.einsum("nhwc,ih,jw->nijc", x, rows, columns, precision=jax.lax.Precision.HIGHEST)
    return x.reshape(count, -1)


def cells(size: int, grid: int) -> np.ndarray:
    """The share of each of `size` pixels in each of `grid` cells, `(grid, size)`; rows sum to 1."""
    edge = np.arange(grid + 1)[:, None] * size / grid
    covered = np.clip(edge[1:], np.arange(size), np.arange(1, size + 1)) - np.clip(
        edge[:-1], np.arange(size), np.arange(1, size + 1)
    )
    return covered * grid / size


def _standardize(x):
    mean = x.mean(-1, keepdims=True)
    return (x - mean) * jax.lax.rsqrt(((x - mean) ** 2).mean(-1, keepdims=True) + 1e-6)
