"""Where arrays lie when a program sees several devices: rows are shared, networks are copied."""

from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

_T = TypeVar("_T")


def shared() -> NamedSharding:
    """Each device holds an equal part along the first axis."""
    return NamedSharding(_mesh(), PartitionSpec("data"))


def copied() -> NamedSharding:
    """Each device holds all of it."""
    return NamedSharding(_mesh(), PartitionSpec())


def spread(batch: Any) -> jax.Array:
    """An array `(B, …)` shared by all devices, or where B is no multiple of them, on each."""
    return jax.device_put(batch, copied() if len(batch) % jax.device_count() else shared())


def copy(tree: Any) -> Any:
    """A tree of arrays on every device."""
    return jax.device_put(tree, copied())


def fetched(begun: Iterable[tuple[_T, Any]]) -> Iterator[tuple[_T, Any]]:
    """Pairs of anything and results on devices, these as NumPy arrays.

    Each is waited for when the next has begun, so that no device idles while the host is at work.
    """
    waiting: tuple[_T, Any] | None = None
    for pair in begun:
        if waiting is not None:
            yield waiting[0], jax.device_get(waiting[1])
        waiting = pair
    if waiting is not None:
        yield waiting[0], jax.device_get(waiting[1])


def _mesh():
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
