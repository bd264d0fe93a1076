"""Which layout a weight file has and which architecture, from its keys and shapes alone."""

import dataclasses
import math
import re
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from equiadapt_jax.conversion import axes, resnet_layouts, vit_layouts
from equiadapt_jax.conversion.axes import Shape
from equiadapt_jax.conversion.layouts import Layout, Rule, pattern

LAYOUTS = (*vit_layouts.LAYOUTS, *resnet_layouts.LAYOUTS)

# 64 features to a head otherwise; the last is ViT-H.
_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}


@dataclasses.dataclass(frozen=True)
class Recognized:
    """What a file holds.

    Attributes:
      layout: the table that its keys fit.
      prefix: what `{prefix}` stands for in them.
      fields: of the network, `ViT` or `ResNet` without the number of classes.
      num_classes: of the classifier, None where there is none.
      channels: of the images.
      heads: of the attention, 1 for a ResNet.
      grid: patches along a side of the image, 0 for a ResNet.
      positions: position embeddings in the file, for patches and other tokens.
      distilled: whether there is a distillation token.
      antialias: how position embeddings are resampled, see `positions.resample`.
      doubts: what does not fit together, for the one message in which `filling.fill` tells all.
    """

    layout: Layout
    prefix: str
    fields: dict[str, Any]
    num_classes: int | None
    channels: int
    heads: int = 1
    grid: int = 0
    positions: int = 0
    distilled: bool = False
    antialias: bool = True
    doubts: tuple[str, ...] = ()


def recognize(
    shapes: Mapping[str, Shape],
    config: Mapping[str, Any],
    heads: int | None = None,
    with_head: bool = True,
) -> Recognized:
    """Return what a file with these keys and shapes holds.

    `config` is the content of the config.json beside it, `{}` for none: it gives what shapes do
    not say (heads, epsilon, pooling) and must not contradict them; `with_head` says whether the
    classifier is wanted. Where a key is missing that a size is read from, that size is made up:
    filling the tree names the key, with all other doubts. Raises ValueError for an unknown
    layout, heads that cannot be known, and what the networks do not have.
    """
    if heads is not None and (not isinstance(heads, int) or heads < 1):
        raise ValueError(f"heads must be a positive number, got {heads!r}.")
    layout, prefix = _find_layout(shapes)
    for template, reason in layout.refused + (layout.refused_head if with_head else ()):
        for key in matching(shapes, (template,), prefix):
            raise ValueError(f"{layout.name} with {key}: {reason}.")
    sizes = _sizes(layout, prefix, shapes)
    make = _vit if layout.family == "vit" else _resnet
    heads = heads or _heads(layout, prefix, shapes, config)
    found = make(layout, prefix, sizes, config, heads, shapes)
    doubts = [*found.doubts, *_contradictions(found, config)]
    if with_head and found.num_classes is None:
        doubts.append(
            f"no classifier to keep, such as {', '.join(_head_keys(found))}: give head=None for "
            "features, or a number of classes for a fresh one"
        )
    return dataclasses.replace(found, doubts=tuple(doubts))


def matching(keys: Iterable[str], templates: Iterable[str], prefix: str) -> list[str]:
    """Return those of `keys` that match a regular expression, in which `{prefix}` is replaced."""
    patterns = [re.compile(t.replace("{prefix}", re.escape(prefix))) for t in templates]
    return [key for key in keys if any(p.fullmatch(key) for p in patterns)]


def _head_keys(found: Recognized) -> list[str]:
    """The keys that the classifier may have."""
    rules = [rule for rule in found.layout.rules if rule.path.split("/")[0] in ("head", "fc")]
    return [key for rule in rules for key in keys_of(rule, found.prefix, "")]


def _find_layout(keys: Iterable[str]) -> tuple[Layout, str]:
    """The table and prefix that most keys fit."""
    keys = list(keys)
    counts = {
        (layout.name, prefix): (_count(layout, prefix, keys), layout)
        for layout in LAYOUTS
        for prefix in layout.prefixes
    }
    ranked = sorted(counts.items(), key=lambda item: item[1][0], reverse=True)
    ((_, prefix), (best, layout)), (_, (second, _)) = ranked[:2]
    if best > second and 2 * best >= len(keys):
        return layout, prefix
    looked_for = "; ".join(f"{layout.name} ({_example(layout)})" for layout in LAYOUTS)
    sample = ", ".join(sorted(keys)[:6]) or "none"
    raise ValueError(
        f"unknown layout of {len(keys)} keys, such as {sample}. Looked for: {looked_for}. Save the "
        "weights in one of these, or fill the parameters yourself."
    )


def _count(layout: Layout, prefix: str, keys: list[str]) -> int:
    patterns = [pattern(key, prefix) for rule in layout.rules for key in rule.keys]
    return sum(any(p.fullmatch(key) for p in patterns) for key in keys)


def _example(layout: Layout) -> str:
    """A key that shows the layout."""
    paths = ("blocks_{i}/attn/qkv/kernel", "layer1_{i}/conv1/kernel")
    rule = next(rule for rule in layout.rules if rule.path in paths)
    return rule.keys[0].replace("{prefix}", layout.prefixes[0]).replace("{i}", "0")


def _sizes(layout: Layout, prefix: str, shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    """The shapes that leaves would have, where all their keys are there and of the right rank."""
    sizes = {}
    for rule, path, keys in expand(layout, prefix, shapes):
        parts = [axes.converted_shape(shapes[key], rule.axes) for key in keys if key in shapes]
        whole = [part for part in parts if part is not None]
        if len(whole) == len(keys):
            sizes[path] = (*whole[0][:-1], sum(part[-1] for part in whole))
    return sizes


def expand(
    layout: Layout, prefix: str, keys: Iterable[str]
) -> Iterable[tuple[Rule, str, tuple[str, ...]]]:
    """Yield rule, leaf and keys for each leaf that some of `keys` belong to."""
    seen = set()
    for rule in layout.rules:
        patterns = [pattern(template, prefix) for template in rule.keys]
        for key in keys:
            for p in patterns:
                if match := p.fullmatch(key):
                    i = match[1] if match.groups() else ""
                    path = rule.path.replace("{i}", i)
                    if (rule, path) not in seen:
                        seen.add((rule, path))
                        yield rule, path, keys_of(rule, prefix, i)


def keys_of(rule: Rule, prefix: str, i: str) -> tuple[str, ...]:
    """Return the keys of a rule in block `i`."""
    return tuple(k.replace("{prefix}", prefix).replace("{i}", i) for k in rule.keys)


def _vote(sizes: Mapping[str, Shape], regex: str, axis: int, default: int) -> int:
    """The most common size, so that one damaged array does not put all others in the wrong."""
    found = [shape[axis] for path, shape in sizes.items() if re.fullmatch(regex, path)]
    return statistics.mode(found) if found and min(found) > 0 else default


def _length(paths: Iterable[str], name: str) -> int:
    """How many blocks `name`0, `name`1, … there are without a gap."""
    found = {int(m[1]) for path in paths if (m := re.match(rf"{name}(\d+)/", path))}
    return next(i for i in range(len(found) + 1) if i not in found)


def _vit(layout, prefix, sizes, config, heads, keys) -> Recognized:
    width = _vote(sizes, r"blocks_\d+/norm1/scale", 0, 64)
    distilled = "dist_token" in sizes
    rows = sizes.get("pos_embed", (1, 1, width))[1]
    # Where the positions are one too many for a grid, the token is there but for its key.
    class_token = "cls_token" in sizes or (not _side(rows) and _side(rows - 1) > 0)
    patches = sizes.get("patch_embed/kernel", (16, 16, 3, width))
    registers = int(_number(config, "num_register_tokens", sizes.get("reg_token", (1, 0))[1], 0))
    grid, doubts = _grid(layout, prefix, rows, class_token + distilled)
    fields = {
        "patch": max(patches[0], 1),
        "width": width,
        "depth": _length(sizes, "blocks_"),
        "heads": heads or _usual_heads(width),
        "mlp_dim": _vote(sizes, r"blocks_\d+/mlp/fc1/bias", 0, 4 * width),
        "pool": _pool(sizes, keys, width, class_token, config),
        "class_token": class_token,
        "registers": registers + distilled,
        "layer_scale": 1.0 if any("/ls1/" in path for path in sizes) else None,
        "norm_eps": _number(config, "layer_norm_eps", layout.norm_eps),
    }
    return Recognized(
        layout, prefix, fields, _classes(sizes, "head"), patches[2], fields["heads"], grid,
        rows, distilled, layout.antialias or registers > 0, doubts,
    )  # fmt: skip


def _resnet(layout, prefix, sizes, config, heads, keys) -> Recognized:
    blocks = Counter(path.split("/")[1] for path in sizes if re.fullmatch(r".*/conv\d/.*", path))
    bottleneck = 2 * blocks["conv3"] > blocks["conv1"]
    last = _vote(sizes, rf"layer1_\d+/bn{3 if bottleneck else 2}/scale", 0, 64)
    width = last // 4 if bottleneck else last
    kernel = sizes.get("conv1/kernel", (7, 7, 3, width))
    projects = any("downsample_conv" in path for path in sizes)
    lengths = [_length(sizes, f"layer{stage}_") for stage in (1, 2, 3, 4)]
    fields: dict[str, Any] = {
        "stage_sizes": tuple(lengths[: next((i for i, n in enumerate(lengths) if not n), 4)]),
        "block": "bottleneck" if bottleneck else "basic",
        "width": max(width, 1),
        "stem": "cifar" if kernel[0] == 3 else "imagenet",
        "shortcut": "projection" if projects else "subsample",
    }
    if bottleneck:
        inner = _vote(sizes, r"layer1_\d+/bn1/scale", 0, width)
        fields["width_factor"] = max(inner // max(width, 1), 1)
    return Recognized(layout, prefix, fields, _classes(sizes, "fc"), kernel[2])


def _classes(sizes: Mapping[str, Shape], head: str) -> int | None:
    kernel, bias = sizes.get(f"{head}/kernel"), sizes.get(f"{head}/bias")
    return bias[0] if bias else kernel[1] if kernel else None


def _side(rows: int) -> int:
    """Side of a square of so many patches, 0 where it is none."""
    side = math.isqrt(max(rows, 0))
    return side if side**2 == rows else 0


def _grid(layout, prefix, rows: int, tokens: int) -> tuple[int, tuple[str, ...]]:
    """Patches along a side, and what is to be doubted of it."""
    # DeiT III and DINOv2 with registers, in timm, have no position for the class token.
    side = _side(rows - tokens) or (tokens < 2 and _side(rows))
    if side:
        return side, ()
    rule = next(rule for rule in layout.rules if rule.path == "pos_embed")
    return 1, (
        f"{keys_of(rule, prefix, '')[0]} holds {rows} positions, which are not those of a square "
        f"grid of patches and of {tokens} tokens before it",
    )


def _pool(sizes, keys, width: int, class_token: bool, config: Mapping[str, Any]) -> str:
    if sizes.get("head/kernel", (0,))[0] == 2 * width:
        return "token_mean"
    if any(key.startswith("fc_norm.") for key in keys):
        return "mean"
    pools = {"token": "token", "avg": "norm_mean"}
    default = "token" if class_token else "avg"
    said = config.get("global_pool") or default
    if not isinstance(said, str) or said not in pools:
        raise ValueError(
            f"config.json says global_pool={said!r}, which ViT does not have: only "
            f"{' and '.join(pools)} are."
        )
    return pools[said]


def _heads(layout, prefix, shapes, config) -> int | None:
    if "num_attention_heads" in config:
        return int(_number(config, "num_attention_heads", 1))
    found = [
        axes.heads_of(shapes[key], rule.axes)
        for rule, _, keys in expand(layout, prefix, shapes)
        for key in keys
        if key in shapes
    ]
    known = [n for n in found if n]
    return statistics.mode(known) if known else None


def _usual_heads(width: int) -> int:
    if width not in _HEADS and width % 64:
        raise ValueError(
            f"the number of attention heads is not to be seen in the weights, and {width} features "
            "are no multiple of the usual 64 for each: give heads=."
        )
    return _HEADS.get(width, width // 64)


def _number(config: Mapping[str, Any], word: str, default: float, least: float = 1e-30) -> float:
    value = config.get(word, default)
    if not isinstance(value, int | float) or not least <= value < 1e6:
        raise ValueError(f"config.json says {word}={value!r}, which cannot be.")
    return value


# Words of Hugging Face's config.json, and what they are called here.
_WORDS = {
    "hidden_size": "width",
    "num_hidden_layers": "depth",
    "patch_size": "patch",
    "intermediate_size": "mlp_dim",
    "depths": "stage_sizes",
    "layer_type": "block",
}
_ONLY: dict[str, dict[str, Any]] = {
    "vit": {"hidden_act": "gelu", "use_swiglu_ffn": False},
    "resnet": {
        "hidden_act": "relu",
        "downsample_in_bottleneck": False,
        "downsample_in_first_stage": False,
    },
}


def _contradictions(found: Recognized, config: Mapping[str, Any]) -> Iterable[str]:
    for word, field in _WORDS.items():
        said, seen = config.get(word), found.fields.get(field)
        said = tuple(said) if isinstance(said, list) else said
        if None not in (said, seen) and said != seen:
            yield f"{word} is {said} in config.json and {seen} in the weights"
    for word, value in _ONLY[found.layout.family].items():
        if config.get(word, value) != value:
            yield f"{word} is {config[word]!r} in config.json, where only {value!r} can be had here"
