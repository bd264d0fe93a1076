"""Small random networks in PyTorch, and their weights as each library would name them.

The names are written down here a second time, from the libraries' own state dicts, so that the
tables of the package are compared with something else than themselves.
"""

import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import torch
from safetensors.numpy import save_file

import equiadapt_jax as ea
from tests.test_predictors_torch import TorchResNet, TorchViT, randomize

HALF = ea.predictors.Preprocess(mean=0.5, std=0.5)
_VIT = {
    "width": 32, "depth": 2, "heads": 2, "mlp_dim": 48, "num_classes": 5, "patch": 8,
    "pool": "token", "class_token": True, "registers": 0, "layer_scale": None, "norm_eps": 1e-6,
}  # fmt: skip
_RESNET = {
    "stage_sizes": (2, 1, 1), "block": "basic", "width": 8, "width_factor": 1, "stem": "imagenet",
    "shortcut": "projection", "num_classes": 5,
}  # fmt: skip


def vit(grid=4, channels=3, seed=0, **changes):
    """A ViT in PyTorch, float64, with random weights."""
    model = types.SimpleNamespace(**{**_VIT, **changes})
    return randomize(TorchViT(model, channels, grid**2), seed).eval()


def resnet(channels=3, seed=0, **changes):
    model = types.SimpleNamespace(**{**_RESNET, **changes})
    return randomize(TorchResNet(model, channels), seed).eval()


def arrays(module):
    return {key: value.detach().numpy().copy() for key, value in module.state_dict().items()}


def renamed(weights, *pairs):
    """Every key after the substitutions, regular expression and replacement, one after another."""
    result = {}
    for key, array in weights.items():
        for old, new in pairs:
            key = re.sub(old, new, key)
        result[key] = array
    return result


def as_timm(weights):
    return renamed(weights, (r"^patch_embed", "patch_embed.proj"), (r"(ls\d)$", r"\1.gamma"))


def as_torchvision(weights):
    return renamed(
        weights,
        (r"^patch_embed", "conv_proj"),
        (r"^cls_token", "class_token"),
        (r"^pos_embed", "encoder.pos_embedding"),
        (r"^blocks\.", "encoder.layers.encoder_layer_"),
        (r"norm(\d)", r"ln_\1"),
        (r"attn\.qkv\.", "self_attention.in_proj_"),
        (r"attn\.proj", "self_attention.out_proj"),
        (r"mlp\.fc1", "mlp.0"),
        (r"mlp\.fc2", "mlp.3"),
        (r"^norm", "encoder.ln"),
        (r"^head", "heads.head"),
    )


def split(weights):
    """Queries, keys and values apart."""
    result = {}
    for key, array in weights.items():
        if ".qkv." in key:
            for name, part in zip("qkv", np.split(array, 3), strict=True):
                result[key.replace(".qkv.", f".{name}.")] = part
        else:
            result[key] = array
    return result


_EMBEDDINGS = (
    (r"^patch_embed", "embeddings.patch_embeddings.projection"),
    (r"^cls_token", "embeddings.cls_token"),
    (r"^reg_token", "embeddings.register_tokens"),
    (r"^pos_embed", "embeddings.position_embeddings"),
    (r"^norm", "layernorm"),
)
_IN_FILES = (
    (r"attn\.q", "attention.attention.query"),
    (r"attn\.k", "attention.attention.key"),
    (r"attn\.v", "attention.attention.value"),
    (r"attn\.proj", "attention.output.dense"),
)
_IN_MEMORY = ((r"attn\.proj", "attention.o_proj"), (r"attn\.([qkv])", r"attention.\1_proj"))
_AROUND = ((r"norm1", "layernorm_before"), (r"norm2", "layernorm_after"))


def as_hugging_face(weights, model="vit", memory=False):
    pairs = (
        *_EMBEDDINGS,
        (r"^blocks", "layers" if memory else "encoder.layer"),
        *(_IN_MEMORY if memory else _IN_FILES),
        *_AROUND,
        *(() if memory else (("mlp.fc1", "intermediate.dense"), ("mlp.fc2", "output.dense"))),
        (r"^", f"{model}."),
        (rf"^{model}\.head", "classifier"),
    )
    return renamed(split(weights), *pairs)


def as_dinov2(weights, model="dinov2", memory=False):
    pairs = (
        *_EMBEDDINGS,
        (r"^blocks", "encoder.layer"),
        *(_IN_MEMORY if memory else _IN_FILES),
        (r"ls(\d)$", r"layer_scale\1.lambda1"),
        (r"^", f"{model}."),
        (rf"^{model}\.head", "classifier"),
    )
    named = renamed(split(weights), *pairs)
    width = named[f"{model}.layernorm.weight"].shape[0]
    return named | {f"{model}.embeddings.mask_token": np.zeros((1, width))}


def as_google(weights, heads=2, prefix="", numbers=(1, 2, 3), positions=None):
    """As Flax lays arrays out: (in, out), images (h, w, in, out), heads apart."""
    attention, norm2, mlp = numbers
    named = renamed(
        split(weights),
        (r"^patch_embed", "embedding"),
        (r"^cls_token", "cls"),
        (r"^pos_embed", positions or "Transformer/posembed_input/pos_embedding"),
        (r"^blocks\.(\d+)\.", r"Transformer/encoderblock_\1/"),
        (r"attn\.q", f"MultiHeadDotProductAttention_{attention}.query"),
        (r"attn\.k", f"MultiHeadDotProductAttention_{attention}.key"),
        (r"attn\.v", f"MultiHeadDotProductAttention_{attention}.value"),
        (r"attn\.proj", f"MultiHeadDotProductAttention_{attention}.out"),
        (r"/norm1", "/LayerNorm_0"),
        (r"/norm2", f"/LayerNorm_{norm2}"),
        (r"mlp\.fc1", f"MlpBlock_{mlp}.Dense_0"),
        (r"mlp\.fc2", f"MlpBlock_{mlp}.Dense_1"),
        (r"^norm", "Transformer/encoder_norm"),
        (r"(norm|Norm_\d)\.weight", r"\1/scale"),
        (r"\.weight", "/kernel"),
        (r"\.", "/"),
        (r"^", prefix),
    )
    result = {}
    for key, array in named.items():
        if key.endswith("kernel"):
            array = array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T
        if re.search("query|key|value", key):
            array = array.reshape(*array.shape[:-1], heads, -1)
        elif "/out/kernel" in key:
            array = array.reshape(heads, -1, array.shape[-1])
        result[key] = array
    return result


def as_torch_resnet(weights):
    return renamed(
        weights,
        (r"^layer(\d)_", r"layer\1."),
        ("downsample_conv", "downsample.0"),
        ("downsample_bn", "downsample.1"),
    )


def as_cifar(weights):
    weights = {key: array for key, array in weights.items() if "num_batches" not in key}
    return renamed(as_torch_resnet(weights), (r"^fc", "linear"))


def as_hugging_face_resnet(weights):
    named = renamed(weights, (r"^(conv|bn)1", r"resnet.embedder.embedder.\1"))
    for n in (1, 2, 3):
        named = renamed(named, (rf"\.(conv|bn){n}\.", rf".layer.{n - 1}.\1."))
    return renamed(
        named,
        (r"^layer1_", "resnet.encoder.stages.0.layers."),
        (r"^layer2_", "resnet.encoder.stages.1.layers."),
        (r"^layer3_", "resnet.encoder.stages.2.layers."),
        (r"downsample_", "shortcut."),
        (r"\.conv\.", ".convolution."),
        (r"\.bn\.", ".normalization."),
        (r"^fc", "classifier.1"),
    )


def save(path, weights, dtype=None):
    """Write `.safetensors` or `.npz`; floats become `dtype`."""

    def cast(array):
        return array.astype(dtype) if dtype is not None and array.dtype.kind == "f" else array

    weights = {key: np.ascontiguousarray(cast(array)) for key, array in weights.items()}
    if str(path).endswith(".npz"):
        np.savez(path, **weights)
    else:
        save_file(weights, path)
    return path


def images(size=32, channels=3, count=2, seed=1):
    """Images (B, H, W, C) in [0, 1], float64."""
    return np.random.default_rng(seed).uniform(size=(count, size, size, channels))


def torch_output(module, x, preprocess=HALF):
    """What a module in PyTorch makes of images (B, H, W, C) in [0, 1], as NumPy."""
    dtype = next(module.parameters()).dtype
    x = (x - np.asarray(preprocess.mean)) / np.asarray(preprocess.std)
    with torch.no_grad():
        y = module(torch.from_numpy(np.moveaxis(x, -1, 1).copy()).to(dtype))
    return getattr(y, "logits", y).numpy()


def flax_output(pretrained, x):
    x = jnp.asarray(x, jax.tree.leaves(pretrained.params)[0].dtype)
    apply = jax.jit(pretrained.network.apply)
    return np.asarray(apply(pretrained.params, pretrained.state, pretrained.preprocess(x))[0])


def error(path, expected, x, **options):
    """Greatest difference from what PyTorch computes, in standard deviations of that."""
    y = flax_output(ea.predictors.load(path, **{"preprocess": HALF, **options}), x)
    assert y.shape == expected.shape
    assert y.dtype == expected.dtype
    return np.abs(y - expected).max() / expected.std()
