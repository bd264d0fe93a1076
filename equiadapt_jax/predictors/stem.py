"""Pretrained networks for images with another number of channels."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from equiadapt_jax.predictors.preprocess import Preprocess, sources

_STEMS = ("patch_embed", "conv1")


def adapt_stem(
    params: Mapping[str, Any], channels: int, preprocess: Preprocess | None = None
) -> dict[str, Any]:
    """Return the parameters of a network that takes images with `channels` channels, 1 to 13.

    `params` is the parameter tree of a `ViT` or a `ResNet`; its first convolution, `patch_embed`
    or `conv1`, has a kernel (kh, kw, C, D). `preprocess` is what the network was pretrained with,
    where it treats channels differently; the new network goes with
    `preprocess.for_channels(channels)`. Filter j of the new kernel is, with m = min(C, channels),

        K'_j = Σ_i (s'_j / s_i) K_i / n_i    over all i < C with i ≡ j modulo m,

    where s and s' are the standard deviations before and after, and n_i is the number of new
    channels that K_i goes to. So one channel gets the sum of all filters, and more than C get the
    filters in turn, each divided by how often it is used. Where the convolution has a bias, it
    takes up what the means differ, b' = b - Σ_i (m_i - m'_j) / s_i Σ K_i (the inner sum over kh and
    kw).

    An image whose channels are all equal gives the same output as the same values in C channels
    gave before, in exact arithmetic, if `channels` ≥ C, or if the network is a `ViT`, or if the
    channels that are merged have equal means (as where mean and std are single numbers, or without
    `preprocess`, the inputs of both networks being normalized alike). What remains is a `ResNet`
    for fewer channels with different means: its first convolution has no bias, and away from the
    border its output is off by the constant Σ_i (m_i - m'_j) / s_i Σ K_i, which training with batch
    statistics takes away again. To avoid that, repeat the channel in the image instead.

    Arrays keep their type and kind, NumPy's or JAX's; those that do not change are passed on,
    and nothing is changed in place. Raises ValueError for `channels` out of range, a tree without
    such a convolution, a kernel of another rank, and a `preprocess` for another number of channels.
    """
    name = next((name for name in _STEMS if name in params), None)
    if name is None or "kernel" not in params[name]:
        raise ValueError(
            f"no kernel of a first convolution, {' or '.join(_STEMS)}, among the parameters "
            f"{', '.join(map(str, params)) or 'given, which are none'}: give the tree of a ViT "
            "or ResNet itself."
        )
    stem = dict(params[name])
    stem["kernel"], offset = _adapt_kernel(name, stem["kernel"], channels, preprocess)
    if "bias" in stem:
        stem["bias"] = (stem["bias"] - offset).astype(stem["bias"].dtype)
    return {**params, name: stem}


def _adapt_kernel(
    name: str, kernel: Any, channels: int, preprocess: Preprocess | None
) -> tuple[Any, Any]:
    """Return the new kernel, and how far its output (D,) lies above the old one."""
    if np.ndim(kernel) != 4:
        raise ValueError(
            f"the kernel of {name} must be (kh, kw, C, D), got shape {np.shape(kernel)}: convert "
            "it from a layout that keeps convolutions otherwise."
        )
    count = kernel.shape[2]
    before = preprocess or Preprocess(mean=0.0, std=1.0)
    after = before.for_channels(channels)
    (mean, std), (new_mean, new_std) = _numbers(before, count), _numbers(after, channels)
    # NumPy stays NumPy: weights are prepared on the host, in float64 without a switch.
    xp = np if isinstance(kernel, np.ndarray) else jnp
    wide = kernel.astype(jnp.promote_types(kernel.dtype, jnp.float32))
    groups = sources(count, channels)
    uses = [sum(i in group for group in groups) for i in range(count)]
    new, offset = [], 0.0
    for j, group in enumerate(groups):
        shares = [(i, wide[:, :, i] / uses[i]) for i in group]
        new.append(sum(new_std[j] / std[i] * share for i, share in shares))
        offset += sum((mean[i] - new_mean[j]) / std[i] * share.sum((0, 1)) for i, share in shares)
    return xp.stack(new, axis=2).astype(kernel.dtype), offset


def _numbers(preprocess: Preprocess, count: int) -> tuple[list[float], list[float]]:
    """Return mean and std, each as a list with one number for each of `count` channels."""
    both = preprocess.mean, preprocess.std
    for value in both:
        if isinstance(value, tuple) and len(value) != count:
            raise ValueError(
                f"preprocess has the {len(value)} channels of {value} where the kernel has "
                f"{count}: give the one that these weights were trained with."
            )
    mean, std = (np.broadcast_to(value, count).tolist() for value in both)
    return mean, std
