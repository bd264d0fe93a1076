"""What happens to an image between the canonicalizer and a pretrained network."""

import dataclasses
import math
import statistics
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Preprocess:
    """Normalizes images to the mean and standard deviation that a network was pretrained with.

    `mean` and `std` are on the scale of [0, 1]: one number for each channel (any sequence; kept as
    a tuple), or a single number for any number of channels. Calling the object takes images
    (..., H, W, C), floats in [0, 1], to (x - mean) / std of the same shape, in at least float32.
    A static, hashable description: it has no leaves as a pytree.

    Raises ValueError for numbers that are not finite, a `std` that is not positive, `mean` and
    `std` of different lengths, images that are not floats, and a wrong number of channels.
    """

    mean: float | tuple[float, ...]
    std: float | tuple[float, ...]

    def __post_init__(self):
        for name in ("mean", "std"):
            object.__setattr__(self, name, _as_numbers(name, getattr(self, name)))
        if min(_as_tuple(self.std)) <= 0:
            raise ValueError(f"std must be above zero, got {self.std}: use 1.0 to leave the scale.")
        lengths = {len(value) for value in (self.mean, self.std) if isinstance(value, tuple)}
        if len(lengths) > 1:
            raise ValueError(
                f"mean {self.mean} and std {self.std} differ in length: give one number for each "
                "channel in both, or a single number."
            )

    def __call__(self, x: ArrayLike) -> jax.Array:
        """Return (x - mean) / std for images (..., H, W, C) in [0, 1]."""
        x = jnp.asarray(x)
        _check_floats(x)
        for name, value in (("mean", self.mean), ("std", self.std)):
            if isinstance(value, tuple) and (x.ndim < 3 or x.shape[-1] != len(value)):
                raise ValueError(
                    f"images of shape {x.shape} do not end in the {len(value)} channels of {name} "
                    f"{value}: bring them to (..., H, W, {len(value)}) or give one number."
                )
        x = at_least_float32(x)
        return (x - self._like(self.mean, x)) / self._like(self.std, x)

    def for_channels(self, channels: int) -> "Preprocess":
        """Return what goes with `adapt_stem`: the normalization of `channels` channels, 1 to 13.

        More channels take the numbers of the C present ones in turn; fewer take the means of those
        that are merged, i with j and i ≡ j modulo `channels`. A single number stays one. Raises
        ValueError for `channels` out of range.
        """
        check_channels(channels)

        def taken(value):
            if not isinstance(value, tuple):
                return value
            groups = sources(len(value), channels)
            return tuple(statistics.fmean(value[i] for i in group) for group in groups)

        return Preprocess(taken(self.mean), taken(self.std))

    @staticmethod
    def _like(value: float | tuple[float, ...], x: jax.Array) -> jax.Array:
        # Axes are added by hand, for sessions in which an implicit rank promotion is an error.
        return jnp.asarray(np.reshape(value, (1,) * (x.ndim - 1) + (-1,)), x.dtype)


def check_channels(channels: int) -> None:
    """Raise ValueError unless a stem can be adapted to so many channels, 1 to 13."""
    # Thirteen are the bands of Sentinel-2.
    if not (type(channels) is int and 1 <= channels <= 13):
        raise ValueError(
            f"channels must be a whole number from 1 to 13, got {channels!r}: select or merge some."
        )


def sources(old: int, new: int) -> list[tuple[int, ...]]:
    """Return, for each of `new` channels, the `old` ones it is made from.

    They are those congruent modulo the smaller number: each of more channels copies one, each of
    fewer merges several, and every old channel is used.
    """
    check_channels(new)
    smaller = min(old, new)
    return [tuple(i for i in range(old) if (i - j) % smaller == 0) for j in range(new)]


def at_least_float32(x: jax.Array) -> jax.Array:
    """Return `x` in float32, or in its own type where that is wider."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def check_images(x: ArrayLike, stem: Mapping[str, Any] | None = None) -> jax.Array:
    """Return a batch of images as an array after checking what an image network expects of it.

    `x` is (B, H, W, C), of floats; `stem` holds the parameters of the network's first convolution,
    `kernel` (kh, kw, C, D), once there are any. Raises ValueError where the rank, the type or the
    number of channels is wrong.
    """
    x = jnp.asarray(x)
    if x.ndim != 4:
        raise ValueError(f"images must be (B, H, W, C), got shape {x.shape}: add or merge axes.")
    _check_floats(x)
    if stem is not None and stem["kernel"].shape[2] != x.shape[-1]:
        raise ValueError(
            f"images of shape {x.shape} have {x.shape[-1]} channels where the first convolution "
            f"takes {stem['kernel'].shape[2]}: convert the images or initialise for them."
        )
    return x


def _check_floats(x: jax.Array) -> None:
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
            f"images must be floats, got {x.dtype}: convert them, bytes as x / 255.0 in [0, 1]."
        )


def _as_tuple(value: float | tuple[float, ...]) -> tuple[float, ...]:
    return value if isinstance(value, tuple) else (value,)


def _as_numbers(name: str, value: Any) -> float | tuple[float, ...]:
    """Return a float, or a tuple of floats, all of them finite."""
    numbers = float(value) if np.ndim(value) == 0 else tuple(float(v) for v in value)
    if numbers == () or not all(map(math.isfinite, _as_tuple(numbers))):
        raise ValueError(f"{name} must be one finite number, or one for each channel, got {value}.")
    return numbers
