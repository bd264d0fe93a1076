"""Batch normalization whose running statistics are those of published weights."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from equiadapt_jax.predictors.preprocess import at_least_float32


class BatchNorm(nn.Module):
    """Normalizes each channel over all other axes (Ioffe and Szegedy 2015, arXiv 1502.03167).

    Input and output (..., C). With `train=True` the statistics are those of the batch, normalized
    by the biased variance, and the collection "batch_stats" moves towards them: `momentum` is the
    share of the old value that stays (PyTorch counts the other share), and the running variance is
    the unbiased one, n / (n - 1) times the biased, where n counts the values of a channel over the
    whole batch. Under jit that is the global batch, however it is sharded. With `train=False` the
    running statistics are used and left as they are; so they are by `init`.

    Parameters `scale` and `bias` and statistics `mean` and `var` are made in float32 and keep the
    type they are given in. Everything is computed in at least float32; `dtype` is that of the
    output, None the widest of input and parameters.

    Raises ValueError in training where a channel has fewer than two values: it has no variance.
    """

    momentum: float = 0.9
    eps: float = 1e-5
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Return `x` (..., C) normalized."""
        shape = x.shape[-1:]
        scale = self.param("scale", nn.initializers.ones, shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, shape, jnp.float32)
        mean = self.variable("batch_stats", "mean", jnp.zeros, shape, jnp.float32)
        var = self.variable("batch_stats", "var", jnp.ones, shape, jnp.float32)
        dtype = jnp.result_type(x, scale, bias) if self.dtype is None else self.dtype

        x = at_least_float32(x)
        used = (mean.value, var.value)
        if train:
            used = _statistics(x)
        if train and not self.is_initializing():
            n = _count(x)
            mean.value = self._moved(mean.value, used[0])
            var.value = self._moved(var.value, used[1] * (n / (n - 1)))

        leading = (1,) * (x.ndim - 1)
        center, spread, scale, bias = (
            at_least_float32(v).reshape(*leading, -1) for v in (*used, scale, bias)
        )
        y = (x - center) * (jax.lax.rsqrt(spread + self.eps) * scale) + bias
        return y.astype(dtype)

    def _moved(self, old: jax.Array, new: jax.Array) -> jax.Array:
        # The stored type stays, or else a second step would be compiled again.
        moved = self.momentum * at_least_float32(old) + (1 - self.momentum) * new
        return moved.astype(old.dtype)


def _statistics(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and biased variance (C,) of each channel."""
    # E[x²] - E[x]² would be one pass, but loses its digits where the mean is large.
    axes = tuple(range(x.ndim - 1))
    mean = x.mean(axes, keepdims=True)
    return mean.reshape(-1), jnp.square(x - mean).mean(axes)


def _count(x: jax.Array) -> int:
    """How many values each channel has."""
    n = x.size // x.shape[-1]
    if n < 2:
        raise ValueError(
            "batch normalization in training needs two or more values for each channel, got "
            f"{n} from shape {x.shape}: give a larger batch or image, or freeze the predictor."
        )
    return n
