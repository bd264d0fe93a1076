"""The layouts of residual networks."""

from collections.abc import Iterator

from equiadapt_jax.conversion.layouts import Layout, Rule, batch_norm, convolution, dense

_STAGES = range(1, 5)
_COUNTER = r"(.*\.)?num_batches_tracked"


def _torch_block(stage: int) -> Iterator[Rule]:
    ours, theirs = f"layer{stage}_{{i}}", f"layer{stage}.{{i}}"
    for n in (1, 2, 3):
        yield from convolution(f"{ours}/conv{n}", f"{theirs}.conv{n}")
        yield from batch_norm(f"{ours}/bn{n}", f"{theirs}.bn{n}")
    yield from convolution(f"{ours}/downsample_conv", f"{theirs}.downsample.0")
    yield from batch_norm(f"{ours}/downsample_bn", f"{theirs}.downsample.1")


_TORCH = Layout(
    "timm, torchvision or CIFAR ResNet",
    "resnet",
    (
        *convolution("conv1", "conv1"),
        *batch_norm("bn1", "bn1"),
        *(rule for stage in _STAGES for rule in _torch_block(stage)),
        *dense("fc", "fc"),
        *dense("fc", "linear"),  # the CIFAR networks
    ),
    ignorable=(_COUNTER,),
    classifier=(r"(fc|linear)\..*",),
)


def _hugging_face_block(stage: int) -> Iterator[Rule]:
    ours, theirs = f"layer{stage}_{{i}}", f"{{prefix}}encoder.stages.{stage - 1}.layers.{{i}}"
    parts = [(f"conv{n}", f"bn{n}", f"layer.{n - 1}") for n in (1, 2, 3)]
    for conv, norm, part in (*parts, ("downsample_conv", "downsample_bn", "shortcut")):
        yield from convolution(f"{ours}/{conv}", f"{theirs}.{part}.convolution")
        yield from batch_norm(f"{ours}/{norm}", f"{theirs}.{part}.normalization")


_HUGGING_FACE = Layout(
    "Hugging Face ResNet",
    "resnet",
    (
        *convolution("conv1", "{prefix}embedder.embedder.convolution"),
        *batch_norm("bn1", "{prefix}embedder.embedder.normalization"),
        *(rule for stage in _STAGES for rule in _hugging_face_block(stage)),
        *dense("fc", "classifier.1"),
    ),
    prefixes=("resnet.", ""),
    ignorable=(_COUNTER,),
    classifier=(r"classifier\..*",),
)

LAYOUTS = (_TORCH, _HUGGING_FACE)
