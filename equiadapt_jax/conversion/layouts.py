"""What a table says of the layout of weight files, and the rules that several share.

A table says, for every leaf of the parameter tree of `predictors.ViT` or `predictors.ResNet`, which
keys of a file it is made of and how their axes lie. It knows nothing of the networks themselves.
"""

import dataclasses
import functools
import re
from collections.abc import Iterator
from typing import NamedTuple


class Rule(NamedTuple):
    """What one leaf, or one in every block, is made of.

    Attributes:
      path: the leaf; `{i}` stands for the number of a block.
      keys: the keys of the file; several are joined along the last axis.
      axes: from theirs to ours, as in "w h d -> w (h d)"; `h` is the number of attention heads.
    """

    path: str
    keys: tuple[str, ...]
    axes: str


@dataclasses.dataclass(frozen=True)
class Layout:
    """How one library lays out one family of networks.

    Attributes:
      name: for messages.
      family: "vit" or "resnet".
      rules: the table; where two rules fill the same leaf, a file has the keys of one.
      prefixes: what `{prefix}` in the keys may stand for.
      ignorable: patterns of keys that may be there and are of no use here.
      classifier: patterns of keys that are ignored with the classifier, where it is not wanted.
      refused: patterns of keys, each with the reason why a file that has one is refused.
      refused_head: likewise where the classifier is wanted.
      norm_eps: of LayerNorm, where no config.json says it.
      antialias: how this library resamples position embeddings, see `positions.resample`; with
        registers all of them do so with a filter.
    """

    name: str
    family: str
    rules: tuple[Rule, ...]
    prefixes: tuple[str, ...] = ("",)
    ignorable: tuple[str, ...] = ()
    classifier: tuple[str, ...] = ()
    refused: tuple[tuple[str, str], ...] = ()
    refused_head: tuple[tuple[str, str], ...] = ()
    norm_eps: float = 1e-6
    antialias: bool = True


@functools.cache
def pattern(template: str, prefix: str) -> re.Pattern:
    """What a path or key with `{i}` and `{prefix}` matches, as a regular expression."""
    escaped = re.escape(template).replace(r"\{prefix\}", re.escape(prefix))
    return re.compile(escaped.replace(r"\{i\}", r"(0|[1-9]\d*)"))


def dense(path: str, *keys: str) -> Iterator[Rule]:
    """The rules of a linear layer of PyTorch; several keys are fused into one."""
    yield Rule(f"{path}/kernel", tuple(f"{key}.weight" for key in keys), "o i -> i o")
    yield Rule(f"{path}/bias", tuple(f"{key}.bias" for key in keys), "o -> o")


def convolution(path: str, key: str) -> Iterator[Rule]:
    """The rule of a convolution of PyTorch without bias."""
    yield Rule(f"{path}/kernel", (f"{key}.weight",), "o i h w -> h w i o")


def norm(path: str, key: str) -> Iterator[Rule]:
    """The rules of a normalization of PyTorch without statistics."""
    yield Rule(f"{path}/scale", (f"{key}.weight",), "c -> c")
    yield Rule(f"{path}/bias", (f"{key}.bias",), "c -> c")


def batch_norm(path: str, key: str) -> Iterator[Rule]:
    """The rules of a batch normalization of PyTorch."""
    yield from norm(path, key)
    yield Rule(f"{path}/mean", (f"{key}.running_mean",), "c -> c")
    yield Rule(f"{path}/var", (f"{key}.running_var",), "c -> c")


def token(path: str, key: str) -> Rule:
    """The rule of learned tokens or positions, (1, N, width) everywhere."""
    return Rule(path, (key,), "b n w -> b n w")
