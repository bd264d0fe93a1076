"""How the axes of an array in a file become those of a leaf: "w h d -> w (h d)"."""

import functools
import math
import re

import numpy as np

Shape = tuple[int, ...]


@functools.cache
def _parse(axes: str) -> tuple[list[str], list[list[str]]]:
    """Theirs, and ours as groups of those that are merged."""
    left, right = axes.split(" -> ")
    groups = re.findall(r"\(([^)]*)\)|(\S+)", right)
    return left.split(), [(merged or single).split() for merged, single in groups]


def convert(array: np.ndarray, axes: str) -> np.ndarray:
    """Return `array` with its axes as `axes` says; its rank must be right."""
    theirs, ours = _parse(axes)
    order = [theirs.index(name) for group in ours for name in group]
    return array.transpose(order).reshape(converted_shape(array.shape, axes))


def converted_shape(shape: Shape, axes: str) -> Shape | None:
    """Return the shape after `convert`, or None where the rank is wrong."""
    theirs, ours = _parse(axes)
    if len(shape) != len(theirs):
        return None
    size = dict(zip(theirs, shape, strict=True))
    return tuple(math.prod(size[name] for name in group) for group in ours)


def heads_of(shape: Shape, axes: str) -> int | None:
    """Return the size of axis `h` where it is one by itself, the attention heads."""
    theirs, ours = _parse(axes)
    apart = any("h" in group and len(group) > 1 for group in ours)
    return shape[theirs.index("h")] if apart and len(shape) == len(theirs) else None


def original_shape(shape: Shape, axes: str, heads: int) -> Shape:
    """Return the shape that `convert` makes `shape` of; `heads` is the size of a merged `h`."""
    theirs, ours = _parse(axes)
    size: dict[str, int] = {}
    for group, length in zip(ours, shape, strict=True):
        if len(group) == 1:
            size[group[0]] = length
        else:  # the heads and the features of each
            size |= {group[0]: heads, group[1]: length // heads}
    return tuple(size[name] for name in theirs)
