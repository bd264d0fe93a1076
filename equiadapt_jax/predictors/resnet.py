"""Residual networks (He et al. 2016, arXiv 1512.03385), for ImageNet and for CIFAR."""

from typing import Any, Self

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from equiadapt_jax.predictors.batch_norm import BatchNorm
from equiadapt_jax.predictors.preprocess import at_least_float32, check_images

_CHOICES = {
    "block": ("basic", "bottleneck"),
    "stem": ("imagenet", "cifar"),
    "shortcut": ("projection", "subsample"),
}

_VARIANTS: dict[str, dict[str, Any]] = {
    "resnet18": {"stage_sizes": (2, 2, 2, 2), "block": "basic"},
    "resnet34": {"stage_sizes": (3, 4, 6, 3), "block": "basic"},
    "resnet50": {"stage_sizes": (3, 4, 6, 3)},
    "resnet101": {"stage_sizes": (3, 4, 23, 3)},
    "resnet152": {"stage_sizes": (3, 8, 36, 3)},
    "wide_resnet50_2": {"stage_sizes": (3, 4, 6, 3), "width_factor": 2},
    "wide_resnet101_2": {"stage_sizes": (3, 4, 23, 3), "width_factor": 2},
}
# Section 4.2 of the paper: three stages of n blocks of two layers, and two more layers.
_VARIANTS |= {
    f"resnet{depth}": {
        "stage_sizes": ((depth - 2) // 6,) * 3,
        "block": "basic",
        "width": 16,
        "stem": "cifar",
        "shortcut": "subsample",
    }
    for depth in (20, 32, 44, 56, 110)
}

# Variance 2 / fan_out keeps the scale of the gradients through rectifiers (arXiv 1502.01852).
_init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


class ResNet(nn.Module):
    """A residual network: images to logits, or to features.

    Input (B, H, W, C) floats, any size and number of channels; output (B, num_classes) logits, or
    the pooled features where `num_classes` is None or 0, in at least float32. Batch statistics are
    the collection "batch_stats": read with `train=False`, updated (name it in `mutable`) with
    `train=True`.

    `stage_sizes` counts the blocks of each stage; stage s has `width` · 2^s channels, times four
    after a block of kind "bottleneck" (whose stride is in its 3×3 convolution), and all but the
    first stage halve the image. `width_factor` widens the 3×3 convolutions of a bottleneck
    (torchvision's width_per_group / 64; Zagoruyko and Komodakis 2016, arXiv 1605.07146).
    `stem` is "imagenet", a 7×7 convolution and a 3×3 maximum, both of stride 2, or "cifar", one
    3×3 convolution. Where a block changes the shape, its shortcut is a 1×1 convolution
    ("projection") or every second pixel with zero channels on both sides ("subsample", the paper's
    option A, without parameters). Every layer pads by k // 2 on each side, as PyTorch does; "SAME"
    would pad by less on one side where the stride is 2.

    Parameters and statistics are float32. `dtype` is what the layers compute in; None follows the
    widest of images and parameters. `bn_momentum` is the share of the old statistics that stays
    (PyTorch counts the other share); the running variance is the unbiased one, as PyTorch's.

    `remat` keeps only what enters each block for the way back, which computes the rest anew.

    The output of each stage is sown into the collection "features", for scorers that read features.

    Raises ValueError for an unknown `block`, `stem` or `shortcut`, for images of the wrong rank,
    type or number of channels, and in training for a batch that leaves one value to a channel.
    """

    num_classes: int | None
    stage_sizes: tuple[int, ...]
    block: str = "bottleneck"
    width: int = 64
    width_factor: int = 1
    stem: str = "imagenet"
    shortcut: str = "projection"
    bn_momentum: float = 0.9
    bn_eps: float = 1e-5
    dtype: DTypeLike | None = None
    remat: bool = False

    @classmethod
    def variant(cls, name: str, num_classes: int | None, **overrides: Any) -> Self:
        """Return a published network by name.

        For ImageNet: resnet18, 34, 50, 101, 152, wide_resnet50_2 and wide_resnet101_2. For CIFAR:
        resnet20, 32, 44, 56 and 110, with three stages of 16, 32 and 64 channels. `overrides`
        replace any other field. Raises ValueError for another name.
        """
        if name not in _VARIANTS:
            raise ValueError(f"unknown ResNet {name!r}: choose one of {', '.join(_VARIANTS)}.")
        return cls(num_classes, **{**_VARIANTS[name], **overrides})

    def __post_init__(self):
        for field, choices in _CHOICES.items():
            value = getattr(self, field)
            if value not in choices:
                raise ValueError(f"unknown {field} {value!r}: choose one of {', '.join(choices)}.")
        self.stage_sizes = tuple(self.stage_sizes)  # a list would make the module unhashable
        super().__post_init__()

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Return logits (B, num_classes), or features, for images (B, H, W, C)."""
        x = check_images(x, self.get_variable("params", "conv1"))
        kernel, stride = (7, 2) if self.stem == "imagenet" else (3, 1)
        x = _conv(self.width, kernel, stride, self.dtype, "conv1")(x)
        x = nn.relu(self._norm("bn1")(x, train))
        if self.stem == "imagenet":
            x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        for stage, size in enumerate(self.stage_sizes):
            for i in range(size):
                x = self._block(stage, i)(x, train)
            if not self.is_initializing():
                self.sow("features", f"layer{stage + 1}", x)
        x = at_least_float32(x).mean(axis=(1, 2))
        if not self.num_classes:
            return x
        dtype = None if self.dtype is None else x.dtype
        return nn.Dense(self.num_classes, dtype=dtype, name="fc")(x)

    def _block(self, stage: int, i: int) -> "_Block":
        width = self.width * 2**stage
        stride = 2 if stage > 0 and i == 0 else 1
        inner = width * self.width_factor
        convs: tuple[tuple[int, int, int], ...] = ((width, 3, stride), (width, 3, 1))
        if self.block == "bottleneck":
            convs = ((inner, 1, 1), (inner, 3, stride), (4 * width, 1, 1))
        name = f"layer{stage + 1}_{i}"
        make = nn.remat(_Block, static_argnums=(2,)) if self.remat else _Block
        return make(convs, self.shortcut, self.bn_momentum, self.bn_eps, self.dtype, name=name)

    def _norm(self, name: str) -> BatchNorm:
        return BatchNorm(self.bn_momentum, self.bn_eps, self.dtype, name=name)


class _Block(nn.Module):
    """Convolutions, each (features, kernel, stride), with a shortcut around them."""

    convs: tuple[tuple[int, int, int], ...]
    shortcut: str
    bn_momentum: float
    bn_eps: float
    dtype: DTypeLike | None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        y = x
        for i, (features, kernel, stride) in enumerate(self.convs, start=1):
            y = _conv(features, kernel, stride, self.dtype, f"conv{i}")(y)
            y = self._norm(f"bn{i}")(y, train)
            if i < len(self.convs):
                y = nn.relu(y)
        return nn.relu(y + self._skip(x, train))

    def _skip(self, x: jax.Array, train: bool) -> jax.Array:
        features = self.convs[-1][0]
        stride = max(stride for _, _, stride in self.convs)
        if stride == 1 and features == x.shape[-1]:
            return x
        if self.shortcut == "subsample":
            return _subsample(x, features, stride)
        x = _conv(features, 1, stride, self.dtype, "downsample_conv")(x)
        return self._norm("downsample_bn")(x, train)

    def _norm(self, name: str) -> BatchNorm:
        return BatchNorm(self.bn_momentum, self.bn_eps, self.dtype, name=name)


def _conv(features: int, kernel: int, stride: int, dtype: DTypeLike | None, name: str) -> nn.Conv:
    return nn.Conv(
        features,
        (kernel, kernel),
        stride,
        padding=kernel // 2,
        use_bias=False,
        dtype=dtype,
        kernel_init=_init,
        conv_general_dilated=_pointwise if kernel == 1 else None,
        name=name,
    )


def _pointwise(x: jax.Array, kernel: jax.Array, strides: tuple[int, int], *_, **how) -> jax.Array:
    """Return a 1×1 convolution as a product of matrices, of which its gradient is one as well.

    That of a convolution takes XLA several times as long on a CPU.
    """
    pixels = x[:, :: strides[0], :: strides[1]]
    return jnp.matmul(pixels, kernel[0, 0], precision=how["precision"])


def _subsample(x: jax.Array, features: int, stride: int) -> jax.Array:
    """Return every `stride`-th pixel, with zero channels before and after up to `features`."""
    x = x[:, ::stride, ::stride]
    extra = features - x.shape[-1]
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (extra // 2, extra - extra // 2)))
