"""Weight files with damage: python benchmarks/damaged_weights.py [--count=1000] [--seed=0].

Damages small weight files of five layouts in eight ways and loads each. Every one must give a
ValueError or FileNotFoundError of one readable message, which names the keys that were damaged;
exits with 1 where one loads, gives another error, or does not name them. What cannot be seen in a
file is not among the ways: arrays of equal shape exchanged, square ones transposed, other values.
"""

import argparse
import itertools
import json
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
from safetensors.numpy import save

import equiadapt_jax as ea

WIDTH, HEADS, MLP, CLASSES, DEPTH = 32, 2, 48, 5, 2
PREPROCESS = ea.predictors.Preprocess(mean=0.5, std=0.5)
Shapes = dict[str, tuple[int, ...]]


def timm() -> Shapes:
    block = {
        "norm1.weight": (WIDTH,), "norm1.bias": (WIDTH,),
        "attn.qkv.weight": (3 * WIDTH, WIDTH), "attn.qkv.bias": (3 * WIDTH,),
        "attn.proj.weight": (WIDTH, WIDTH), "attn.proj.bias": (WIDTH,),
        "norm2.weight": (WIDTH,), "norm2.bias": (WIDTH,),
        "mlp.fc1.weight": (MLP, WIDTH), "mlp.fc1.bias": (MLP,),
        "mlp.fc2.weight": (WIDTH, MLP), "mlp.fc2.bias": (WIDTH,),
    }  # fmt: skip
    return {
        "cls_token": (1, 1, WIDTH), "pos_embed": (1, 17, WIDTH),
        "patch_embed.proj.weight": (WIDTH, 3, 8, 8), "patch_embed.proj.bias": (WIDTH,),
        **{f"blocks.{i}.{key}": shape for i in range(DEPTH) for key, shape in block.items()},
        "norm.weight": (WIDTH,), "norm.bias": (WIDTH,),
        "head.weight": (CLASSES, WIDTH), "head.bias": (CLASSES,),
    }  # fmt: skip


def hugging_face(model="vit", norms=("layernorm_before", "layernorm_after")) -> Shapes:
    block: Shapes = {"attention.output.dense.weight": (WIDTH, WIDTH)}
    block |= {"attention.output.dense.bias": (WIDTH,)}
    for part in ("query", "key", "value"):
        block |= {f"attention.attention.{part}.weight": (WIDTH, WIDTH)}
        block |= {f"attention.attention.{part}.bias": (WIDTH,)}
    for norm in norms:
        block |= {f"{norm}.weight": (WIDTH,), f"{norm}.bias": (WIDTH,)}
    one, two = ("intermediate.dense", "output.dense") if model == "vit" else ("mlp.fc1", "mlp.fc2")
    block |= {f"{one}.weight": (MLP, WIDTH), f"{one}.bias": (MLP,)}
    block |= {f"{two}.weight": (WIDTH, MLP), f"{two}.bias": (WIDTH,)}
    if model != "vit":
        block |= {"layer_scale1.lambda1": (WIDTH,), "layer_scale2.lambda1": (WIDTH,)}
    projection = f"{model}.embeddings.patch_embeddings.projection"
    blocks = {
        f"{model}.encoder.layer.{i}.{key}": shape
        for i in range(DEPTH)
        for key, shape in block.items()
    }
    return blocks | {
        f"{model}.embeddings.cls_token": (1, 1, WIDTH),
        f"{model}.embeddings.position_embeddings": (1, 17, WIDTH),
        f"{projection}.weight": (WIDTH, 3, 8, 8), f"{projection}.bias": (WIDTH,),
        f"{model}.layernorm.weight": (WIDTH,), f"{model}.layernorm.bias": (WIDTH,),
        "classifier.weight": (CLASSES, WIDTH if model == "vit" else 2 * WIDTH),
        "classifier.bias": (CLASSES,),
    }  # fmt: skip


def dinov2() -> Shapes:
    shapes = hugging_face("dinov2_with_registers", ("norm1", "norm2"))
    return shapes | {"dinov2_with_registers.embeddings.register_tokens": (1, 3, WIDTH)}


def google() -> Shapes:
    attention, mlp = "MultiHeadDotProductAttention_1", "MlpBlock_3"
    each = WIDTH // HEADS
    block: Shapes = {}
    for part in ("query", "key", "value"):
        block |= {f"{attention}/{part}/kernel": (WIDTH, HEADS, each)}
        block |= {f"{attention}/{part}/bias": (HEADS, each)}
    block |= {f"{attention}/out/kernel": (HEADS, each, WIDTH), f"{attention}/out/bias": (WIDTH,)}
    for norm in ("LayerNorm_0", "LayerNorm_2"):
        block |= {f"{norm}/scale": (WIDTH,), f"{norm}/bias": (WIDTH,)}
    block |= {f"{mlp}/Dense_0/kernel": (WIDTH, MLP), f"{mlp}/Dense_0/bias": (MLP,)}
    block |= {f"{mlp}/Dense_1/kernel": (MLP, WIDTH), f"{mlp}/Dense_1/bias": (WIDTH,)}
    blocks = {
        f"Transformer/encoderblock_{i}/{key}": shape
        for i in range(DEPTH)
        for key, shape in block.items()
    }
    return blocks | {
        "cls": (1, 1, WIDTH), "Transformer/posembed_input/pos_embedding": (1, 17, WIDTH),
        "embedding/kernel": (8, 8, 3, WIDTH), "embedding/bias": (WIDTH,),
        "Transformer/encoder_norm/scale": (WIDTH,), "Transformer/encoder_norm/bias": (WIDTH,),
        "head/kernel": (WIDTH, CLASSES), "head/bias": (CLASSES,),
    }  # fmt: skip


def resnet() -> Shapes:
    shapes: Shapes = {"conv1.weight": (8, 3, 7, 7)}
    norms = {"bn1": 8}
    channels = 8
    for stage, i in itertools.product(range(1, 4), range(2)):
        block, width = f"layer{stage}.{i}", 4 * 2**stage
        shapes |= {f"{block}.conv1.weight": (width, channels, 3, 3)}
        shapes |= {f"{block}.conv2.weight": (width, width, 3, 3)}
        norms |= {f"{block}.bn1": width, f"{block}.bn2": width}
        if width != channels:
            shapes |= {f"{block}.downsample.0.weight": (width, channels, 1, 1)}
            norms |= {f"{block}.downsample.1": width}
        channels = width
    for norm, width in norms.items():
        for leaf in ("weight", "bias", "running_mean", "running_var"):
            shapes |= {f"{norm}.{leaf}": (width,)}
    return shapes | {"fc.weight": (CLASSES, channels), "fc.bias": (CLASSES,)}


# What is in config.json beside the weights.
LAYOUTS = {
    "timm": (timm, {}),
    "Hugging Face": (hugging_face, {"num_attention_heads": HEADS}),
    "DINOv2": (dinov2, {"num_attention_heads": HEADS, "num_register_tokens": 3}),
    "Google": (google, {}),
    "ResNet": (resnet, {}),
}
KINDS = ("missing", "extra", "renamed", "transposed", "truncated", "header", "dtype", "not finite")


def weights(layout: str, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Random arrays in float32 with the keys of a layout."""
    shapes = LAYOUTS[layout][0]()
    return {key: rng.normal(size=shape).astype(np.float32) for key, shape in shapes.items()}


def damage_arrays(
    kind: str, arrays: dict[str, np.ndarray], rng: np.random.Generator
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Damaged arrays, and the keys that a message must name."""
    arrays = dict(arrays)
    keys = [str(k) for k in rng.choice(sorted(arrays), rng.integers(1, 4), replace=False)]
    if kind == "missing":
        for key in keys:
            del arrays[key]
    elif kind == "extra":
        keys = [rng.choice(["{}_copy", "ema.{}", "{}.weight_g"]).format(key) for key in keys]
        arrays |= {key: np.zeros(3, np.float32) for key in keys}
    elif kind == "renamed":
        names = [key[:-1] + rng.choice(["", "S", "_", "t0"]) for key in keys]
        arrays |= {name: arrays.pop(key) for key, name in zip(keys, names, strict=True)}
        keys += names
    elif kind == "transposed":
        keys = [str(rng.choice([key for key, a in arrays.items() if len(set(a.shape)) > 1]))]
        orders = itertools.permutations(range(arrays[keys[0]].ndim))
        moved = [arrays[keys[0]].transpose(order) for order in orders]
        moved = [array for array in moved if array.shape != arrays[keys[0]].shape]
        arrays[keys[0]] = moved[rng.integers(len(moved))]
    elif kind == "dtype":
        dtype = rng.choice(["int32", "uint8", "bool", "int64"])
        arrays |= {key: arrays[key].astype(dtype) for key in keys}
    elif kind == "not finite":
        for key in keys:
            arrays[key] = arrays[key].copy()
            arrays[key].flat[rng.integers(arrays[key].size)] = rng.choice([np.nan, np.inf, -np.inf])
    return arrays, keys


def damage_file(kind: str, path: Path, rng: np.random.Generator) -> None:
    """Cut a file somewhere, or change a byte of its header."""
    content = bytearray(path.read_bytes())
    if kind == "truncated":
        path.write_bytes(content[: rng.integers(len(content))])
        return
    if path.suffix == ".npz":  # the first array's: type, order and shape
        begin = (
            30 + int.from_bytes(content[26:28], "little") + int.from_bytes(content[28:30], "little")
        )
        end = begin + 80
    else:
        begin, end = 0, 8 + int.from_bytes(content[:8], "little")
        while content[end - 1] == ord(" "):  # padding means nothing
            end -= 1
    content[rng.integers(begin, end)] ^= 1 << rng.integers(8)
    path.write_bytes(content)


def outcome(layout: str, kind: str, seed: int) -> str:
    """What comes of one damaged file: "refused", or what is wrong with that."""
    rng = np.random.default_rng((seed, KINDS.index(kind)))
    arrays = weights(layout, rng)
    named: list[str] = []
    if kind not in ("truncated", "header"):
        arrays, named = damage_arrays(kind, arrays, rng)
    with tempfile.TemporaryDirectory() as directory:
        path = write(layout, arrays, Path(directory))
        if kind in ("truncated", "header"):
            damage_file(kind, path, rng)
        return attempt(path, named)


def write(layout: str, arrays: dict[str, np.ndarray], directory: Path) -> Path:
    """A weight file, with its config.json where the layout has one."""
    config = LAYOUTS[layout][1]
    if config:
        (directory / "config.json").write_text(json.dumps(config))
    if layout == "Google":
        path = directory / "weights.npz"
        np.savez(path, **arrays)
        return path
    path = directory / "model.safetensors"
    path.write_bytes(save({key: np.ascontiguousarray(array) for key, array in arrays.items()}))
    return path


def attempt(path: Path, named: list[str]) -> str:
    """Load a file; "refused" if that fails as it should, naming all of `named`."""
    heads = None if path.suffix == ".npz" or (path.parent / "config.json").exists() else HEADS
    try:
        ea.predictors.load(path, preprocess=PREPROCESS, heads=heads)
    except (ValueError, FileNotFoundError) as error:
        message = str(error)
        unnamed = [key for key in named if key not in message]
        if unnamed:
            return f"refused without naming {unnamed}: {message}"
        return "refused" if 20 < len(message) < 4000 else f"unreadable: {message}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "loaded"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    counts, wrong = Counter(), 0
    cases = itertools.cycle(itertools.product(LAYOUTS, KINDS))
    for n, (layout, kind) in enumerate(itertools.islice(cases, options.count)):
        result = outcome(layout, kind, options.seed + n)
        counts[kind, result == "refused"] += 1
        if result != "refused":
            wrong += 1
            print(f"{layout}, {kind}, seed {options.seed + n}: {result}")
    for kind in KINDS:
        print(f"{kind:12} {counts[kind, True]:4} refused, {counts[kind, False]} not as they should")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
