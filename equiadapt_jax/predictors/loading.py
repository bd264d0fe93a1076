"""Pretrained networks from the weight files that people have."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.typing import DTypeLike

from equiadapt_jax.conversion import files, filling, hub, positions, recognition
from equiadapt_jax.interface import Network, from_linen
from equiadapt_jax.predictors.preprocess import Preprocess
from equiadapt_jax.predictors.pretrained import Pretrained
from equiadapt_jax.predictors.resnet import ResNet
from equiadapt_jax.predictors.stem import adapt_stem
from equiadapt_jax.predictors.vit import ViT

Head = Literal["keep"] | int | None
Shapes = dict[str, tuple[int, ...]]


def load(
    path: str | Path,
    *,
    preprocess: Preprocess | None = None,
    sha256: str | None = None,
    image_size: int | None = None,
    head: Head = "keep",
    channels: int | None = None,
    heads: int | None = None,
    dtype: DTypeLike = jnp.float32,
) -> Pretrained:
    """Return the `ViT` or `ResNet` of a weight file, with its parameters and preprocessing.

    `path` is a file (`.safetensors`, also several by their `.index.json`; `.npz`; and, where
    PyTorch is installed, `.pth`, `.pt` or `.bin`, of which only tensors are read), a Hugging Face
    directory, or "hf://owner/name" or "hf://owner/name@revision" on the Hugging Face hub (needs
    huggingface_hub). Layout and architecture are recognized from keys and shapes: ViT and DeiT of
    timm, torchvision, Hugging Face and Google; DINOv2 of Hugging Face, timm and its authors; ResNet
    of timm, torchvision and Hugging Face, and the CIFAR ResNets in PyTorch's key names.

    Args:
      path: of the weights. A `config.json` and `preprocessor_config.json` beside them are read.
      preprocess: what the network was trained with. None takes it from the files beside the
        weights: `image_mean` and `image_std`, or timm's `pretrained_cfg`.
      sha256: the hexadecimal digest that the weight file must have; compared before it is read.
      image_size: side of the images in pixels; a ViT whose grid of patches differs gets its
        position embeddings resampled (bicubic; with a filter against aliasing as timm does, but
        none for Hugging Face's ViTs without registers, as there). A ResNet takes any size.
      head: "keep" keeps the classifier, None leaves it away (features), and a number gives a fresh
        one for so many classes, of zeros: all logits are zero until it is trained.
      channels: of the images, 1 to 13, by `adapt_stem`; `preprocess` follows.
      heads: of the attention. None takes it from `config.json`, or from the width (3, 6, 12, 16 and
        16 for 192, 384, 768, 1024 and 1280 features, else 64 features each).
      dtype: of parameters and statistics, whatever the file has; float64 needs `jax_enable_x64`.

    A distillation token (DeiT) is kept as a register; the mean of its two classifiers is refused.
    What neither keys nor shapes nor a `config.json` say is taken as is usual: exact GELU, strides
    in the 3×3 convolutions, LayerNorm's epsilon of the library, and that a backbone of fewer blocks
    or without registers is meant to be so. Arrays of equal shape that were exchanged, square ones
    that were transposed, and flipped bits of values cannot be seen: give `sha256` against these.

    Raises:
      ValueError: an unknown or ambiguous layout; a digest that differs; a damaged file; keys that
        are missing or unexpected, arrays of a wrong shape or type (integers) or with values that
        are not finite, all listed in one message; a `config.json` that contradicts the weights;
        no `preprocess` and none beside the weights; a classifier to keep where there is none.
      FileNotFoundError: no such file, or a repository that could not be downloaded.
      ImportError: PyTorch or huggingface_hub needed but absent.
      TypeError: a `preprocess` of another class.
    """
    module, params, state, preprocess = read(
        path, preprocess=preprocess, sha256=sha256, image_size=image_size, head=head,
        channels=channels, heads=heads, dtype=dtype,
    )  # fmt: skip
    return Pretrained(from_linen(module), params, state, preprocess)


def read(
    path: str | Path,
    *,
    preprocess: Preprocess | None = None,
    sha256: str | None = None,
    image_size: int | None = None,
    head: Head = "keep",
    channels: int | None = None,
    heads: int | None = None,
    dtype: DTypeLike = jnp.float32,
) -> tuple[ViT | ResNet, Any, Any, Preprocess]:
    """Module, parameters, state and preprocessing of a weight file, of which `load` makes one."""
    _check_arguments(preprocess, image_size, head, dtype)
    file = find(path)
    if sha256 is not None:
        files.check_digest(file, sha256)
    config = files.read_json(file.parent / "config.json")
    preprocess = preprocess or _preprocess_beside(file, config)
    try:
        module, params, state = _convert(
            files.read(file), config, head, heads, image_size, np.dtype(dtype)
        )
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    if channels is not None:
        params = adapt_stem(params, channels, preprocess)
        preprocess = preprocess.for_channels(channels)
    params, state = jax.tree.map(jnp.asarray, (params, state))
    return module, params, state, preprocess


def find(path: str | Path) -> Path:
    """Return the weight file that `path` stands for, downloaded if it is on the hub."""
    return files.find(hub.download(path) if hub.is_remote(path) else path)


def _check_arguments(preprocess: Any, image_size: Any, head: Any, dtype: DTypeLike) -> None:
    if preprocess is not None and not isinstance(preprocess, Preprocess):
        raise TypeError(f"preprocess is a {type(preprocess).__name__}: give a Preprocess.")
    if image_size is not None and not (isinstance(image_size, int) and image_size > 0):
        raise ValueError(f"image_size must be one positive number of pixels, got {image_size!r}.")
    if head not in ("keep", None) and not (isinstance(head, int) and head > 0):
        raise ValueError(f"head must be 'keep', None or a number of classes, got {head!r}.")
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"dtype must be one of floats, got {dtype!r}.")
    if jnp.zeros((), jax.dtypes.canonicalize_dtype(dtype)).dtype != np.dtype(dtype):
        raise ValueError(
            f"dtype {np.dtype(dtype)} needs jax.config.update('jax_enable_x64', True)."
        )


def _preprocess_beside(file: Path, config: Mapping[str, Any]) -> Preprocess:
    """What the files beside the weights say; ValueError where they do not."""
    said = files.read_json(file.parent / "preprocessor_config.json")
    mean, std = said.get("image_mean"), said.get("image_std")
    if said.get("do_normalize") is False:
        mean, std = 0.0, 1.0
    if not math.isclose(255 * said.get("rescale_factor", 1 / 255), 1) or (
        said.get("do_rescale") is False
    ):
        mean = std = None  # of images on another scale than [0, 1]
    elif mean is None and isinstance(config.get("pretrained_cfg"), dict):
        mean, std = (config["pretrained_cfg"].get(name) for name in ("mean", "std"))
    if mean is None or std is None:
        raise ValueError(
            f"no preprocess, and neither preprocessor_config.json nor timm's config.json beside "
            f"{file} says it for images in [0, 1]. Keys cannot tell, so give what the network was "
            "trained with: Preprocess(mean=0.5, std=0.5) is usual for ViTs of Google and timm, "
            "Preprocess(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)) for ResNets, "
            "torchvision, DeiT and DINOv2."
        )
    try:
        return Preprocess(mean, std)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"the files beside {file} give a mean or std that is none: {error}"
        ) from None


def _convert(
    arrays: Mapping[str, np.ndarray],
    config: Mapping[str, Any],
    head: Head,
    heads: int | None,
    image_size: int | None,
    dtype: np.dtype,
) -> tuple[ViT | ResNet, dict, dict]:
    """The module of a file, its parameters and its state; a fresh classifier is zero."""
    keep = head == "keep"
    shapes = {key: array.shape for key, array in arrays.items()}
    found = recognition.recognize(shapes, config, heads, keep)
    family = {"vit": ViT, "resnet": ResNet}[found.layout.family]
    module = family(found.num_classes if keep else head, **found.fields)
    params, statistics = _shapes(from_linen(module), found)
    leaves = filling.fill(found, arrays, _wanted(found, params | statistics, keep), dtype, keep)
    if found.layout.family == "vit":
        leaves = positions.arrange(
            leaves,
            class_token=found.fields["class_token"],
            grid=found.grid,
            new_grid=_grid(found, image_size),
            antialias=found.antialias,
        )

    def tree(shapes):
        made = {path: leaves.get(path, np.zeros(shape, dtype)) for path, shape in shapes.items()}
        return traverse_util.unflatten_dict(made, sep="/")

    return module, tree(params), {"batch_stats": tree(statistics)} if statistics else {}


def _wanted(found: recognition.Recognized, shapes: Shapes, keep_head: bool) -> Shapes:
    """The shapes that the file shall fill: without a fresh classifier, positions as they are."""
    heads = () if keep_head else ("head/", "fc/")
    wanted = {path: shape for path, shape in shapes.items() if not path.startswith(heads)}
    if found.layout.family == "vit":
        wanted["pos_embed"] = (1, found.positions, found.fields["width"])
    if found.distilled:
        wanted["dist_token"] = wanted.pop("reg_token")
    return wanted


def _shapes(network: Network, found: recognition.Recognized) -> tuple[Shapes, Shapes]:
    """Shapes of the parameters and of the statistics, by path."""
    side = found.grid * found.fields["patch"] if found.grid else 64
    images = jax.ShapeDtypeStruct((1, side, side, found.channels), jnp.float32)
    params, state = jax.eval_shape(network.init, jax.random.key(0), images)
    flat = (traverse_util.flatten_dict(t, sep="/") for t in (params, state.get("batch_stats", {})))
    first, second = ({path: leaf.shape for path, leaf in leaves.items()} for leaves in flat)
    return first, second


def _grid(found: recognition.Recognized, image_size: int | None) -> int:
    """Patches along a side of the images that the network shall take."""
    patch = found.fields["patch"]
    if image_size is not None and image_size % patch:
        raise ValueError(f"image_size {image_size} is no multiple of the patches of {patch}.")
    return found.grid if image_size is None else image_size // patch
