"""Weight files in every layout against plain PyTorch statements of the networks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import equiadapt_jax as ea
from equiadapt_jax.conversion import recognition

torch = pytest.importorskip("torch")

from tests import weight_files as wf  # noqa: E402

load = ea.predictors.load
GOOGLE_NEW = {"prefix": "params/", "numbers": (0, 1, 0), "positions": "pos_embedding"}
DINO = {"layer_scale": 1.0}
WIDE = {"block": "bottleneck", "width_factor": 2}
CIFAR = {"stem": "cifar", "shortcut": "subsample"}

# name: the module, the file's names, and what load is told besides
CASES = {
    "timm": (wf.vit(), wf.as_timm),
    "timm, no class token, mean": (
        wf.vit(class_token=False, pool="mean"),
        lambda w: wf.renamed(wf.as_timm(w), ("^norm", "fc_norm")),
    ),
    "timm, layer scale": (wf.vit(layer_scale=1.0), wf.as_timm),
    "torchvision": (wf.vit(), wf.as_torchvision),
    "Hugging Face": (wf.vit(norm_eps=1e-12), wf.as_hugging_face),
    "Hugging Face, in memory": (
        wf.vit(norm_eps=1e-12),
        functools.partial(wf.as_hugging_face, memory=True, model="deit"),
    ),
    "Google": (wf.vit(), wf.as_google),
    "Google, optimizer": (wf.vit(), functools.partial(wf.as_google, prefix="opt/target/")),
    "big_vision": (
        wf.vit(class_token=False, pool="norm_mean"),
        functools.partial(wf.as_google, **GOOGLE_NEW),
    ),
    "DINOv2": (wf.vit(**DINO, pool="token_mean"), wf.as_dinov2),
    "DINOv2, in memory": (
        wf.vit(**DINO, pool="token_mean"),
        functools.partial(wf.as_dinov2, memory=True),
    ),
    "DINOv2, registers": (
        wf.vit(**DINO, registers=3, pool="token_mean"),
        functools.partial(wf.as_dinov2, model="dinov2_with_registers"),
    ),
    "ResNet, basic": (wf.resnet(), wf.as_torch_resnet),
    "ResNet, bottleneck": (wf.resnet(block="bottleneck"), wf.as_torch_resnet),
    "ResNet, wide": (wf.resnet(**WIDE), wf.as_torch_resnet),
    "ResNet, Hugging Face": (wf.resnet(), wf.as_hugging_face_resnet),
    "ResNet, bottleneck, Hugging Face": (
        wf.resnet(block="bottleneck"),
        wf.as_hugging_face_resnet,
    ),
    "CIFAR ResNet": (wf.resnet(**CIFAR), wf.as_cifar),
}


def suffix(name):
    return ".npz" if name.startswith(("Google", "big_vision")) else ".safetensors"


def options(name):
    """Heads are not to be seen, except in Google's layout."""
    return {} if suffix(name) == ".npz" or "ResNet" in name else {"heads": 2}


def write(tmp_path, name, dtype=None):
    module, names = CASES[name]
    return wf.save(tmp_path / f"weights{suffix(name)}", names(wf.arrays(module)), dtype)


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_pytorch_in_float64(name, tmp_path, x64):
    x = wf.images()
    expected = wf.torch_output(CASES[name][0], x)
    path = write(tmp_path, name)
    assert wf.error(path, expected, x, dtype=jnp.float64, **options(name)) < 1e-10


@pytest.mark.parametrize("name", ["timm", "Google", "DINOv2, registers", "ResNet, bottleneck"])
def test_logits_are_those_of_pytorch_in_float32(name, tmp_path):
    x = wf.images()
    expected = wf.torch_output(CASES[name][0], x).astype(np.float32)
    path = write(tmp_path, name, np.float32)
    assert wf.error(path, expected, x, **options(name)) < 1e-5


# ---- recognition ----


def shapes(module, names):
    return {key: array.shape for key, array in names(wf.arrays(module)).items()}


@pytest.mark.parametrize(
    ("width", "heads"), [(192, 3), (384, 6), (768, 12), (1024, 16), (1280, 16), (512, 8)]
)
def test_heads_follow_from_the_width(width, heads):
    module = wf.vit(grid=1, depth=1, width=width, heads=1, mlp_dim=8)
    found = recognition.recognize(shapes(module, wf.as_timm), {})
    assert found.fields["heads"] == heads


RESNETS = (18, 34, 50, 101, 152, 20, 32, 44, 56, 110)


@pytest.mark.parametrize("name", [*(f"resnet{depth}" for depth in RESNETS), "wide_resnet50_2"])
def test_every_variant_of_resnet_is_recognized(name):
    variant = ea.predictors.ResNet.variant(name, 7)
    with torch.device("meta"):
        module = wf.TorchResNet(variant, 3)
    names = wf.as_cifar if variant.stem == "cifar" else wf.as_torch_resnet
    weights = names({key: np.empty(v.shape, "V0") for key, v in module.state_dict().items()})
    found = recognition.recognize({key: array.shape for key, array in weights.items()}, {})
    assert ea.predictors.ResNet(7, **found.fields) == variant


@pytest.mark.parametrize("name", ["Ti/16", "S/14", "B/32", "L/16", "H/14"])
def test_every_variant_of_vit_is_recognized(name):
    variant = ea.predictors.ViT.variant(name, 7)
    with torch.device("meta"):
        module = wf.TorchViT(variant, 3, 49)
    names = {key: tuple(v.shape) for key, v in module.state_dict().items()}
    found = recognition.recognize(wf.as_timm(names), {})
    assert ea.predictors.ViT(7, **found.fields) == ea.predictors.ViT.variant(
        name, 7, mlp_dim=4 * variant.width
    )
    assert (found.grid, found.num_classes, found.channels) == (7, 7, 3)


def test_an_unknown_layout_is_told_with_what_was_looked_for(tmp_path):
    path = wf.save(tmp_path / "w.safetensors", {"encoder.weight": np.zeros(3), "b": np.zeros(2)})
    with pytest.raises(ValueError, match="unknown layout") as error:
        load(path, preprocess=wf.HALF)
    for part in ("encoder.weight", "timm ViT", "blocks.0.attn.qkv.weight", "Google", "ResNet"):
        assert part in str(error.value)


def test_heads_that_cannot_be_seen_are_asked_for(tmp_path):
    with pytest.raises(ValueError, match="32 features.*give heads="):
        load(write(tmp_path, "timm"), preprocess=wf.HALF)


def test_a_gated_perceptron_is_refused(tmp_path):
    weights = wf.as_dinov2(wf.arrays(CASES["DINOv2"][0]))
    weights = wf.renamed(weights, (r"mlp\.fc1", "mlp.weights_in"))
    with pytest.raises(ValueError, match="SwiGLU"):
        load(wf.save(tmp_path / "w.safetensors", weights), preprocess=wf.HALF, heads=2)


# ---- options ----


@pytest.fixture
def timm_file(tmp_path):
    return write(tmp_path, "timm")


def test_without_head_there_are_features(timm_file, x64):
    module = wf.vit(num_classes=None)
    x = wf.images()
    full = wf.arrays(CASES["timm"][0])
    module.load_state_dict({k: torch.from_numpy(full[k]) for k in module.state_dict()})
    expected = wf.torch_output(module, x)
    assert wf.error(timm_file, expected, x, head=None, heads=2, dtype=jnp.float64) < 1e-10


def test_a_fresh_head_is_zero_and_the_rest_is_kept(timm_file):
    kept = load(timm_file, preprocess=wf.HALF, heads=2)
    fresh = load(timm_file, preprocess=wf.HALF, heads=2, head=7)
    assert fresh.params["head"]["kernel"].shape == (32, 7)
    assert not wf.flax_output(fresh, wf.images()).any()
    for tree in (kept.params, fresh.params):
        tree.pop("head")
    jax.tree.map(np.testing.assert_array_equal, kept.params, fresh.params)


def test_a_head_is_not_made_up_where_there_is_none(tmp_path):
    weights = wf.as_dinov2(wf.arrays(wf.vit(**DINO, num_classes=None)))
    path = wf.save(tmp_path / "w.safetensors", weights)
    with pytest.raises(
        ValueError, match="no classifier to keep, such as classifier.weight.*give head=None"
    ):
        load(path, preprocess=wf.HALF, heads=2)
    backbone = load(path, preprocess=wf.HALF, heads=2, head=None)
    assert wf.flax_output(backbone, wf.images()).shape == (2, 32)


@pytest.mark.parametrize("channels", [1, 5])
def test_channels_go_through_adapt_stem(timm_file, channels):
    preprocess = ea.predictors.Preprocess((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
    plain = load(timm_file, preprocess=preprocess, heads=2)
    adapted = load(timm_file, preprocess=preprocess, heads=2, channels=channels)
    gray = wf.images(channels=1)
    expected = wf.flax_output(plain, np.repeat(gray, 3, axis=-1))
    y = wf.flax_output(adapted, np.repeat(gray, channels, axis=-1))
    assert np.abs(y - expected).max() < 1e-5 * expected.std()


@pytest.mark.parametrize("dtype", [np.float16, "bfloat16", np.float32, np.float64])
def test_every_type_of_float_becomes_float32(dtype, tmp_path):
    path = write(tmp_path, "ResNet, basic", jnp.dtype(dtype))
    network = load(path, preprocess=wf.HALF)
    assert {leaf.dtype for leaf in jax.tree.leaves((network.params, network.state))} == {
        jnp.dtype("float32")
    }
    expected = wf.arrays(CASES["ResNet, basic"][0])["conv1.weight"].astype(jnp.dtype(dtype))
    np.testing.assert_array_equal(
        network.params["conv1"]["kernel"], expected.transpose(2, 3, 1, 0).astype(np.float32)
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"dtype": jnp.int32}, "dtype must be"),
        ({"dtype": jnp.float64}, "jax_enable_x64"),
        ({"head": 0}, "head must be"),
        ({"head": "new"}, "head must be"),
        ({"image_size": 30}, "no multiple of the patches of 8"),
        ({"image_size": 0}, "image_size must be"),
        ({"channels": 14}, "1 to 13"),
        ({"heads": 3}, "not a multiple of 3 heads"),
        ({"heads": 0}, "heads must be"),
    ],
)
def test_wrong_options_are_refused(timm_file, given, message):
    with pytest.raises(ValueError, match=message):
        load(timm_file, **{"preprocess": wf.HALF, "heads": 2, **given})


def test_preprocess_of_another_class_is_refused(timm_file):
    with pytest.raises(TypeError, match="give a Preprocess"):
        load(timm_file, preprocess=lambda x: x)


def test_the_design_example_works(tmp_path):
    vit = load(write(tmp_path, "timm"), preprocess=wf.HALF, heads=2)
    group = ea.groups.Cyclic(4)
    scorer = ea.from_linen(ea.networks.GroupConvNet(group))
    model = ea.adapt(group, scorer, vit.network, preprocess=vit.preprocess, freeze_predictor=True)
    x = jnp.asarray(wf.images(), jnp.float32)
    params, state = model.init(jax.random.key(0), x, predictor=(vit.params, vit.state))
    (logits, canonical), _ = model.apply(params, state, x)
    assert logits.shape == (2, 5)
    np.testing.assert_allclose(
        logits, wf.flax_output(vit, canonical.inputs), atol=1e-5 * float(logits.std())
    )
