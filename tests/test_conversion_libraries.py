"""Weights saved by transformers, timm and torchvision: logits equal to their own.

Skipped, each part, where the library is not installed. Small networks with random weights.
"""

import functools
import importlib
import json
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import equiadapt_jax as ea

torch = pytest.importorskip("torch")

from tests import weight_files as wf  # noqa: E402
from tests.test_predictors_torch import randomize  # noqa: E402

load = ea.predictors.load
VIT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32}
HUGGING_FACE = {
    "ViT": {**VIT, "intermediate_size": 48, "patch_size": 8},
    "DeiT": {**VIT, "intermediate_size": 48, "patch_size": 8},
    "Dinov2": {**VIT, "patch_size": 8, "layerscale_value": 0.5},
    "Dinov2WithRegisters": {**VIT, "patch_size": 8, "num_register_tokens": 3},
    "ResNet": {"embedding_size": 8, "hidden_sizes": [32, 64, 128], "depths": [2, 1, 1]},
    "ResNet, basic": {
        "embedding_size": 8, "hidden_sizes": [8, 16, 32, 64], "depths": [1, 1, 1, 1],
        "layer_type": "basic",
    },
}  # fmt: skip
TIMM = {
    "vit_tiny_patch16_224": {"img_size": 32, "patch_size": 8, "depth": 2, "num_classes": 5},
    "vit_base_patch16_224": {
        "img_size": 32, "patch_size": 8, "depth": 1, "num_classes": 5, "embed_dim": 64,
        "num_heads": 1, "global_pool": "avg",
    },
    "deit3_small_patch16_224": {"img_size": 32, "depth": 1, "num_classes": 5},
    "vit_small_patch14_dinov2": {"img_size": 28, "depth": 2, "num_classes": 5},
    "vit_small_patch14_reg4_dinov2": {"img_size": 28, "depth": 1},
    "resnet18": {"num_classes": 5},
    "resnet50": {"num_classes": 5, "layers": (1, 1, 1, 1)},
    "wide_resnet50_2": {"num_classes": 5, "layers": (1, 1, 1, 1)},
}  # fmt: skip


def library(name):
    """The library, its warnings aside, or a skip."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        declare_operators()  # transformers and timm import torchvision
        return pytest.importorskip(name, reason=f"{name} is not installed")


@functools.cache
def declare_operators():
    """What torchvision wants of its binary part, which may be made for another PyTorch."""
    try:
        importlib.import_module("torchvision")
    except ImportError:
        return None
    except RuntimeError:
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        definitions = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            definitions.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return definitions


def saved_by_transformers(name, directory, dtype=torch.float64, **changes):
    """A model with random weights, and the directory that it was saved in."""
    transformers = library("transformers")
    kind = name.split(",")[0]
    config = getattr(transformers, f"{kind}Config")(**HUGGING_FACE[name], num_labels=5, **changes)
    model = randomize(getattr(transformers, f"{kind}ForImageClassification")(config), 0).eval()
    model.to(dtype).save_pretrained(directory)
    (directory / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "rescale_factor": 1 / 255})
    )
    return model


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_directories_of_transformers(name, tmp_path, x64):
    model = saved_by_transformers(name, tmp_path)
    x = wf.images()
    expected = wf.torch_output(model, x)
    assert wf.error(tmp_path, expected, x, preprocess=None, dtype=jnp.float64) < 1e-10


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_directories_of_transformers_in_float32(name, tmp_path):
    model = saved_by_transformers(name, tmp_path, torch.float32)
    x = wf.images()
    assert wf.error(tmp_path, wf.torch_output(model, x), x, preprocess=None) < 1e-5


@pytest.mark.parametrize("name", ["ViT", "DeiT", "Dinov2"])
def test_state_dicts_of_transformers(name, tmp_path, x64):
    """Their keys are others than those in its files."""
    model = saved_by_transformers(name, tmp_path / "saved")
    path = wf.save(tmp_path / "weights.safetensors", wf.arrays(model))
    options = {"heads": 2, "dtype": jnp.float64}
    x = wf.images()
    assert wf.error(path, wf.torch_output(model, x), x, **options) < 1e-10


@pytest.mark.parametrize("name", ["ViT", "Dinov2WithRegisters", "DeiT"])
def test_backbones_of_transformers(name, tmp_path, x64):
    """Without classifier, with a pooler for ViT and DeiT, which is left away."""
    transformers = library("transformers")
    model = getattr(transformers, f"{name}Model")(
        getattr(transformers, f"{name}Config")(**HUGGING_FACE[name])
    )
    randomize(model, 0).eval().save_pretrained(tmp_path)
    x = wf.images()
    with torch.no_grad():
        pixels = torch.from_numpy(np.moveaxis((x - 0.5) / 0.5, -1, 1).copy())
        expected = model(pixels).last_hidden_state[:, 0].numpy()
    assert wf.error(tmp_path, expected, x, head=None, dtype=jnp.float64) < 1e-10


def test_sharded_directories_of_transformers(tmp_path):
    model = saved_by_transformers("ViT", tmp_path / "whole", torch.float32)
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    whole, parts = (
        load(tmp_path / name, preprocess=wf.HALF).params for name in ("whole", "shards")
    )
    jax.tree.map(np.testing.assert_array_equal, whole, parts)


@pytest.mark.parametrize("size", [16, 48])
@pytest.mark.parametrize("name", ["ViT", "Dinov2", "Dinov2WithRegisters"])
def test_positions_are_resampled_as_transformers_does(name, size, tmp_path):
    """Which resamples in float32, so that float64 agrees no better."""
    model = saved_by_transformers(name, tmp_path, torch.float32)
    x = wf.images(size)
    if name == "ViT":
        forward = functools.partial(model, interpolate_pos_encoding=True)
        forward.parameters = model.parameters
    else:
        forward = model
    expected = wf.torch_output(forward, x)
    assert wf.error(tmp_path, expected, x, preprocess=None, image_size=size) < 1e-5


def test_two_classifiers_are_refused_in_words(tmp_path):
    transformers = library("transformers")
    config = transformers.DeiTConfig(**HUGGING_FACE["DeiT"], num_labels=5)
    model = transformers.DeiTForImageClassificationWithTeacher(config)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="mean of two classifiers.*head=None"):
        load(tmp_path, preprocess=wf.HALF)
    fresh = load(tmp_path, preprocess=wf.HALF, head=3)
    assert wf.flax_output(fresh, wf.images()).shape == (2, 3)


@pytest.mark.parametrize("name", TIMM)
def test_networks_of_timm(name, tmp_path, x64):
    model = randomize(library("timm").create_model(name, **TIMM[name]), 0).eval()
    path = wf.save(tmp_path / "model.safetensors", wf.arrays(model))
    head = "keep" if "num_classes" in TIMM[name] else None
    options = {"head": head, "dtype": jnp.float64}
    x = wf.images(TIMM[name].get("img_size", 64))
    assert wf.error(path, wf.torch_output(model, x), x, **options) < 1e-10


def test_distilled_networks_of_timm_are_refused_in_words(tmp_path):
    model = library("timm").create_model("deit_tiny_distilled_patch16_224", depth=1)
    path = wf.save(tmp_path / "model.safetensors", wf.arrays(model))
    with pytest.raises(ValueError, match="mean of two classifiers"):
        load(path, preprocess=wf.HALF)
    assert load(path, preprocess=wf.HALF, head=None).params["reg_token"].shape == (1, 1, 192)


def test_the_configuration_of_timm_gives_pool_and_preprocess(tmp_path, x64):
    options = TIMM["vit_tiny_patch16_224"]
    model = library("timm").create_model(
        "vit_tiny_patch16_224", **options, global_pool="avg", fc_norm=False
    )
    randomize(model, 0).eval()
    wf.save(tmp_path / "model.safetensors", wf.arrays(model))
    (tmp_path / "config.json").write_text(
        json.dumps({"global_pool": "avg", "pretrained_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}})
    )
    x = wf.images()
    expected = wf.torch_output(model, x)
    assert wf.error(tmp_path, expected, x, preprocess=None, dtype=jnp.float64) < 1e-10


@pytest.mark.parametrize("new", [7, 10, 16, 21])
def test_positions_are_resampled_as_timm_does(new):
    from equiadapt_jax.conversion import positions

    library("timm")
    from timm.layers import resample_abs_pos_embed

    # timm's arithmetic is in float32, where points of the grid are off by a part in 10⁶.
    held = np.random.default_rng(0).normal(size=(1, 196, 6)).astype(np.float32)
    expected = resample_abs_pos_embed(
        torch.from_numpy(held), [new, new], [14, 14], num_prefix_tokens=0
    ).numpy()
    ours = positions.resample(held, 14, new, antialias=True)
    assert np.abs(ours - expected).max() < 1e-5 * expected.std()


def test_vit_of_torchvision(tmp_path, x64):
    models = library("torchvision").models
    model = randomize(models.VisionTransformer(32, 8, 2, 2, 32, 48, num_classes=5), 0).eval()
    path = wf.save(tmp_path / "model.safetensors", wf.arrays(model))
    x = wf.images()
    options = {"heads": 2, "dtype": jnp.float64}
    assert wf.error(path, wf.torch_output(model, x), x, **options) < 1e-10


@pytest.mark.parametrize("block", ["BasicBlock", "Bottleneck"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_resnet_of_torchvision(block, suffix, tmp_path, x64):
    resnet = library("torchvision").models.resnet
    model = resnet.ResNet(getattr(resnet, block), [1, 2, 1, 1], num_classes=5)
    randomize(model, 0).eval()
    path = tmp_path / f"model{suffix}"
    if suffix == ".pth":
        torch.save(model.state_dict(), path)
    else:
        wf.save(path, wf.arrays(model))
    x = wf.images(64)
    assert wf.error(path, wf.torch_output(model, x), x, dtype=jnp.float64) < 1e-10
