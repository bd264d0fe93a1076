"""Arrays of a weight file → leaves of a parameter tree, each of them checked."""

from collections import defaultdict
from collections.abc import Mapping
from operator import itemgetter

import numpy as np
from numpy.typing import DTypeLike

from equiadapt_jax.conversion import axes
from equiadapt_jax.conversion.axes import Shape
from equiadapt_jax.conversion.layouts import Rule, pattern
from equiadapt_jax.conversion.recognition import Recognized, keys_of, matching

_FLOATS = ("float16", "bfloat16", "float32", "float64")
_SHOWN = 10

Problems = dict[str, list[str]]


def fill(
    found: Recognized,
    arrays: Mapping[str, np.ndarray],
    wanted: Mapping[str, Shape],
    dtype: DTypeLike = np.float32,
    with_head: bool = True,
) -> dict[str, np.ndarray]:
    """Return every leaf of `wanted`, path → shape, from the arrays of a file, as `dtype`.

    Each leaf is filled once, each key is used once or named as ignorable by the layout; without
    the classifier (`with_head=False`), so are its keys. Arrays are float16, bfloat16, float32 or
    float64. Raises one ValueError that lists all keys that are missing or unexpected and all
    arrays of a wrong shape or type, or with values that are not finite.
    """
    problems: Problems = defaultdict(list)
    leaves: dict[str, np.ndarray] = {}
    used: set[str] = set()
    for path, shape in wanted.items():
        rule, keys = _rule_for(found, path, arrays)
        used |= set(keys)
        share = (*shape[:-1], shape[-1] // len(keys))
        expected = axes.original_shape(share, rule.axes, found.heads)
        whole = [_check(key, arrays.get(key), expected, dtype, problems) for key in keys]
        if all(whole):
            parts = [axes.convert(arrays[key].astype(dtype), rule.axes) for key in keys]
            leaves[path] = np.concatenate(parts, axis=-1) if len(parts) > 1 else parts[0]
    ignored = found.layout.ignorable + (() if with_head else found.layout.classifier)
    unexpected = set(arrays) - used - set(matching(arrays, ignored, found.prefix))
    for key in sorted(unexpected):
        problems["unexpected"].append(f"{key} {_text(arrays[key].shape)}")
    problems["doubtful"] += found.doubts
    if any(problems.values()):
        raise ValueError(_message(found, problems))
    return leaves


def _rule_for(
    found: Recognized, path: str, arrays: Mapping[str, np.ndarray]
) -> tuple[Rule, tuple[str, ...]]:
    """The rule that fills a leaf, with its keys: of several, the first with keys in the file."""
    candidates = []
    for rule in found.layout.rules:
        if match := pattern(rule.path, "").fullmatch(path):
            keys = keys_of(rule, found.prefix, match[1] if match.groups() else "")
            candidates.append((rule, keys))
            if any(key in arrays for key in keys):
                return rule, keys
    if not candidates:
        raise ValueError(f"{found.layout.name} has no {path}: this architecture cannot be in it.")
    return candidates[0]


def _check(
    key: str, array: np.ndarray | None, expected: Shape, dtype: DTypeLike, problems: Problems
) -> bool:
    """Whether an array is what is expected; if not, the problem is noted."""
    if array is None:
        problems["missing"].append(f"{key} {_text(expected)}")
        return False
    name = f"{key} {_text(array.shape)}"
    if array.dtype.name not in _FLOATS:
        problems["wrong dtype"].append(f"{name}: {array.dtype}, not a float")
    if array.shape != expected:
        problems["wrong shape"].append(f"{name}: expected {_text(expected)}")
    if array.dtype.name not in _FLOATS or array.shape != expected:
        return False
    with np.errstate(over="ignore"):  # too large for `dtype` is an infinity
        bad = array.size - np.count_nonzero(np.isfinite(array.astype(dtype)))
    if bad:
        problems["not finite"].append(f"{name}: {bad} of its values")
    return not bad


def _text(shape: Shape) -> str:
    return f"({', '.join(map(str, shape))})"


def _message(found: Recognized, problems: Problems) -> str:
    lines = [f"these weights, recognized as {found.layout.name}, do not fit {found.fields}."]
    for kind, items in filter(itemgetter(1), problems.items()):
        rest = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
        lines.append(f"  {kind}: {'; '.join(items[:_SHOWN])}{rest}")
    return "\n".join(lines)
