"""The layouts of vision transformers."""

from collections.abc import Iterator

from equiadapt_jax.conversion.layouts import Layout, Rule, convolution, dense, norm, token


def _patches(key: str) -> Iterator[Rule]:
    yield from convolution("patch_embed", key)
    yield Rule("patch_embed/bias", (f"{key}.bias",), "o -> o")


_TWO_HEADS = (
    "its prediction is the mean of two classifiers, on the class token and on the distillation "
    "token, which ViT does not have: give head=None for the features of the class token, or a "
    "number of classes for a fresh classifier on them"
)
_SWIGLU = "its perceptrons are gated (SwiGLU), which ViT does not have: take a smaller DINOv2"

_TIMM = Layout(
    "timm ViT",
    "vit",
    (
        *_patches("patch_embed.proj"),
        token("cls_token", "cls_token"),
        token("dist_token", "dist_token"),
        token("reg_token", "reg_token"),
        token("reg_token", "register_tokens"),  # as DINOv2 itself calls them
        token("pos_embed", "pos_embed"),
        *norm("blocks_{i}/norm1", "blocks.{i}.norm1"),
        *dense("blocks_{i}/attn/qkv", "blocks.{i}.attn.qkv"),
        *dense("blocks_{i}/attn/proj", "blocks.{i}.attn.proj"),
        Rule("blocks_{i}/ls1/gamma", ("blocks.{i}.ls1.gamma",), "c -> c"),
        *norm("blocks_{i}/norm2", "blocks.{i}.norm2"),
        *dense("blocks_{i}/mlp/fc1", "blocks.{i}.mlp.fc1"),
        *dense("blocks_{i}/mlp/fc2", "blocks.{i}.mlp.fc2"),
        Rule("blocks_{i}/ls2/gamma", ("blocks.{i}.ls2.gamma",), "c -> c"),
        *norm("norm", "norm"),
        *norm("norm", "fc_norm"),  # instead of the other, after the mean
        *dense("head", "head"),
    ),
    ignorable=("mask_token",),
    classifier=(r"head\..*", r"head_dist\..*"),
    refused=((r"blocks\.\d+\.mlp\.(w12|w3)\..*", _SWIGLU),),
    refused_head=((r"head_dist\..*", _TWO_HEADS),),
)

_LAYER = "encoder.layers.encoder_layer_{i}"
_FUSED = f"{_LAYER}.self_attention.in_proj"
_TORCHVISION = Layout(
    "torchvision ViT",
    "vit",
    (
        *_patches("conv_proj"),
        token("cls_token", "class_token"),
        token("pos_embed", "encoder.pos_embedding"),
        *norm("blocks_{i}/norm1", f"{_LAYER}.ln_1"),
        Rule("blocks_{i}/attn/qkv/kernel", (f"{_FUSED}_weight",), "o i -> i o"),
        Rule("blocks_{i}/attn/qkv/bias", (f"{_FUSED}_bias",), "o -> o"),
        *dense("blocks_{i}/attn/proj", f"{_LAYER}.self_attention.out_proj"),
        *norm("blocks_{i}/norm2", f"{_LAYER}.ln_2"),
        *dense("blocks_{i}/mlp/fc1", f"{_LAYER}.mlp.0"),
        *dense("blocks_{i}/mlp/fc2", f"{_LAYER}.mlp.3"),
        *norm("norm", "encoder.ln"),
        *dense("head", "heads.head"),
    ),
    classifier=(r"heads\..*",),
)


def _google(name: str, attention: int, norm2: int, mlp: int, positions: str, **kwargs) -> Layout:
    """Flax's own numbering of modules, which differs between two generations of code."""
    layer = "{prefix}Transformer/encoderblock_{i}"
    attn = f"{layer}/MultiHeadDotProductAttention_{attention}"

    def flax_dense(path, key):
        yield Rule(f"{path}/kernel", (f"{key}/kernel",), "i o -> i o")
        yield Rule(f"{path}/bias", (f"{key}/bias",), "o -> o")

    def flax_norm(path, key):
        yield Rule(f"{path}/scale", (f"{key}/scale",), "c -> c")
        yield Rule(f"{path}/bias", (f"{key}/bias",), "c -> c")

    def qkv(leaf, axes):
        keys = tuple(f"{attn}/{part}/{leaf}" for part in ("query", "key", "value"))
        return Rule(f"blocks_{{i}}/attn/qkv/{leaf}", keys, axes)

    rules = (
        Rule("patch_embed/kernel", ("{prefix}embedding/kernel",), "h w i o -> h w i o"),
        Rule("patch_embed/bias", ("{prefix}embedding/bias",), "o -> o"),
        token("cls_token", "{prefix}cls"),
        token("pos_embed", f"{{prefix}}{positions}"),
        *flax_norm("blocks_{i}/norm1", f"{layer}/LayerNorm_0"),
        qkv("kernel", "w h d -> w (h d)"),
        qkv("bias", "h d -> (h d)"),
        Rule("blocks_{i}/attn/proj/kernel", (f"{attn}/out/kernel",), "h d w -> (h d) w"),
        Rule("blocks_{i}/attn/proj/bias", (f"{attn}/out/bias",), "o -> o"),
        *flax_norm("blocks_{i}/norm2", f"{layer}/LayerNorm_{norm2}"),
        *flax_dense("blocks_{i}/mlp/fc1", f"{layer}/MlpBlock_{mlp}/Dense_0"),
        *flax_dense("blocks_{i}/mlp/fc2", f"{layer}/MlpBlock_{mlp}/Dense_1"),
        *flax_norm("norm", "{prefix}Transformer/encoder_norm"),
        *flax_dense("head", "{prefix}head"),
    )
    return Layout(
        name, "vit", rules, classifier=("{prefix}head/.*", "{prefix}pre_logits/.*"), **kwargs
    )


_GOOGLE = _google(
    "Google ViT", 1, 2, 3, "Transformer/posembed_input/pos_embedding", prefixes=("", "opt/target/")
)
_BIG_VISION = _google("big_vision ViT", 0, 1, 0, "pos_embedding", prefixes=("params/", ""))

# What the parts of a block are called, in files and in the memory of transformers 5.
_FILE_ATTENTION = {
    "qkv": tuple(f"attention.attention.{part}" for part in ("query", "key", "value")),
    "proj": "attention.output.dense",
}
_MEMORY_ATTENTION = {
    "qkv": tuple(f"attention.{part}_proj" for part in "qkv"),
    "proj": "attention.o_proj",
}
_PERCEPTRON = {"fc1": "mlp.fc1", "fc2": "mlp.fc2"}
_AROUND = {"norm1": "layernorm_before", "norm2": "layernorm_after"}
_SCALED = {"norm1": "norm1", "norm2": "norm2", "ls1": "layer_scale1", "ls2": "layer_scale2"}


def _hugging_face(name: str, models: tuple[str, ...], blocks: str, names: dict, **kwargs) -> Layout:
    blocks = f"{{prefix}}{blocks}.{{i}}"

    def theirs(part):
        return f"{blocks}.{names[part]}"

    rules = [
        *_patches("{prefix}embeddings.patch_embeddings.projection"),
        token("cls_token", "{prefix}embeddings.cls_token"),
        token("dist_token", "{prefix}embeddings.distillation_token"),
        token("reg_token", "{prefix}embeddings.register_tokens"),
        token("pos_embed", "{prefix}embeddings.position_embeddings"),
        *norm("blocks_{i}/norm1", theirs("norm1")),
        *dense("blocks_{i}/attn/qkv", *(f"{blocks}.{part}" for part in names["qkv"])),
        *dense("blocks_{i}/attn/proj", theirs("proj")),
        *norm("blocks_{i}/norm2", theirs("norm2")),
        *dense("blocks_{i}/mlp/fc1", theirs("fc1")),
        *dense("blocks_{i}/mlp/fc2", theirs("fc2")),
        *norm("norm", "{prefix}layernorm"),
        *dense("head", "classifier"),
    ]
    if "ls1" in names:
        rules += [
            Rule(f"blocks_{{i}}/{part}/gamma", (f"{theirs(part)}.lambda1",), "c -> c")
            for part in ("ls1", "ls2")
        ]
    return Layout(
        name,
        "vit",
        tuple(rules),
        prefixes=("", *(f"{model}." for model in models)),
        ignorable=(r"{prefix}pooler\.dense\..*", r"{prefix}embeddings\.mask_token"),
        classifier=(r"(cls_|distillation_)?classifier\..*",),
        refused=((r".*\.mlp\.weights_(in|out)\..*", _SWIGLU),),
        refused_head=((r"(cls_|distillation_)classifier\..*", _TWO_HEADS),),
        antialias=False,
        **kwargs,
    )


_MEMORY = "as transformers 5 has it in memory"
_FILE_PERCEPTRON = {"fc1": "intermediate.dense", "fc2": "output.dense"}
_HUGGING_FACE = (
    _hugging_face("Hugging Face ViT or DeiT", ("vit", "deit"), "encoder.layer",
                  _AROUND | _FILE_ATTENTION | _FILE_PERCEPTRON, norm_eps=1e-12),
    _hugging_face(f"Hugging Face ViT or DeiT, {_MEMORY}", ("vit", "deit"), "layers",
                  _AROUND | _MEMORY_ATTENTION | _PERCEPTRON, norm_eps=1e-12),
    _hugging_face("Hugging Face DINOv2", ("dinov2", "dinov2_with_registers"), "encoder.layer",
                  _SCALED | _FILE_ATTENTION | _PERCEPTRON),
    _hugging_face(f"Hugging Face DINOv2, {_MEMORY}", ("dinov2", "dinov2_with_registers"),
                  "encoder.layer", _SCALED | _MEMORY_ATTENTION | _PERCEPTRON),
)  # fmt: skip

LAYOUTS = (_TIMM, _TORCHVISION, *_HUGGING_FACE, _GOOGLE, _BIG_VISION)
