"""Reading weight files, what lies beside them, and files with damage."""

import hashlib
import importlib.util
import json
import pickle
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

import equiadapt_jax as ea
from equiadapt_jax.conversion import files, positions

load = ea.predictors.load
HALF = ea.predictors.Preprocess(mean=0.5, std=0.5)
SCRIPT = Path(__file__).parents[1] / "benchmarks" / "damaged_weights.py"


def script():
    spec = importlib.util.spec_from_file_location("damaged_weights", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


damaged = script()


def written(layout, directory, seed=0):
    arrays = damaged.weights(layout, np.random.default_rng(seed))
    return damaged.write(layout, arrays, directory), arrays


def assert_same(first, second):
    jax.tree.map(np.testing.assert_array_equal, first.params, second.params)
    jax.tree.map(np.testing.assert_array_equal, first.state, second.state)


# ---- damage ----


@pytest.mark.parametrize("layout", damaged.LAYOUTS)
def test_files_without_damage_load(layout, tmp_path):
    path, _ = written(layout, tmp_path)
    assert damaged.attempt(path, []) == "loaded"


@pytest.mark.parametrize("kind", damaged.KINDS)
@settings(max_examples=12)
@given(layout=st.sampled_from(sorted(damaged.LAYOUTS)), seed=st.integers(0, 2**32 - 1))
def test_damage_is_refused_in_words(kind, layout, seed):
    assert damaged.outcome(layout, kind, seed) == "refused"


def test_everything_that_is_wrong_is_told_at_once(tmp_path):
    _, arrays = written("timm", tmp_path)
    del arrays["norm.bias"], arrays["cls_token"]
    arrays["extra"] = np.zeros(2, np.float32)
    arrays["head.bias"] = arrays["head.bias"].astype(np.int32)
    arrays["pos_embed"][0, 3, 5] = np.nan
    arrays["blocks.1.mlp.fc1.weight"] = arrays["blocks.1.mlp.fc1.weight"].T.copy()
    with pytest.raises(ValueError, match="timm ViT") as error:
        load(damaged.write("timm", arrays, tmp_path), preprocess=HALF, heads=2)
    for line in (
        "missing: cls_token (1, 1, 32); norm.bias (32)",
        "unexpected: extra (2)",
        "wrong shape: blocks.1.mlp.fc1.weight (32, 48): expected (48, 32)",
        "wrong dtype: head.bias (5): int32, not a float",
        "not finite: pos_embed (1, 17, 32): 1 of its values",
    ):
        assert line in str(error.value)


def test_a_long_list_is_cut(tmp_path):
    _, arrays = written("timm", tmp_path)
    arrays |= {f"extra_{i:02}": np.zeros(1, np.float32) for i in range(22)}
    with pytest.raises(ValueError, match="extra_09 .1. and 12 more$"):
        load(damaged.write("timm", arrays, tmp_path), preprocess=HALF, heads=2)


def test_what_overflows_the_wanted_type_is_refused(tmp_path):
    _, arrays = written("timm", tmp_path)
    arrays["norm.bias"] = np.full(32, 1e300)
    with pytest.raises(ValueError, match="not finite: norm.bias .32.: 32 of its values"):
        load(damaged.write("timm", arrays, tmp_path), preprocess=HALF, heads=2)


def test_two_names_for_one_leaf_are_refused(tmp_path):
    _, arrays = written("ResNet", tmp_path)
    arrays |= {"linear.bias": arrays["fc.bias"]}
    with pytest.raises(ValueError, match="unexpected: linear.bias"):
        load(damaged.write("ResNet", arrays, tmp_path), preprocess=HALF)


@pytest.mark.parametrize("head", ["keep", None, 7])
def test_counters_and_unwanted_heads_are_ignored_by_name(head, tmp_path):
    _, arrays = written("ResNet", tmp_path)
    arrays["bn1.num_batches_tracked"] = np.array(7)
    path = damaged.write("ResNet", arrays, tmp_path)
    assert ("fc" in load(path, preprocess=HALF, head=head).params) == (head is not None)
    arrays["bn1.num_batches"] = np.array(7)
    with pytest.raises(ValueError, match="unexpected: bn1.num_batches "):
        load(damaged.write("ResNet", arrays, tmp_path), preprocess=HALF, head=head)


# ---- digests ----


def test_a_digest_is_compared_before_anything_is_read(tmp_path):
    path, _ = written("ResNet", tmp_path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    load(path, preprocess=HALF, sha256=digest.upper())
    content = bytearray(path.read_bytes())
    content[-5] ^= 1  # the last bit of a value, which nothing else shows
    path.write_bytes(content)
    load(path, preprocess=HALF)
    with pytest.raises(ValueError, match=f"has SHA-256 .*not {digest}"):
        load(path, preprocess=HALF, sha256=digest)
    path.write_bytes(b"no weights at all")
    with pytest.raises(ValueError, match="has SHA-256"):
        load(path, preprocess=HALF, sha256=digest)


# ---- kinds of files ----


def test_shards_are_one_file_in_parts(tmp_path):
    whole, arrays = written("ResNet", tmp_path)
    parts = tmp_path / "parts"
    parts.mkdir()
    places = {key: f"model-{i % 2}.safetensors" for i, key in enumerate(arrays)}
    for name in set(places.values()):
        save_file({key: arrays[key] for key in arrays if places[key] == name}, parts / name)
    index = parts / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    assert_same(load(parts, preprocess=HALF), load(whole, preprocess=HALF))
    assert_same(load(index, preprocess=HALF), load(whole, preprocess=HALF))

    with pytest.raises(ValueError, match="sha256 can be that of one file only"):
        load(parts, preprocess=HALF, sha256="0" * 64)
    index.write_text(json.dumps({"weight_map": places | {"gone": "model-1.safetensors"}}))
    with pytest.raises(ValueError, match="differ in 1 keys: gone"):
        load(parts, preprocess=HALF)
    index.write_text(json.dumps({"weight_map": places | {"gone": "../model.safetensors"}}))
    with pytest.raises(ValueError, match="no .safetensors beside it"):
        load(parts, preprocess=HALF)
    index.write_text(json.dumps({"weight_map": ["model-1.safetensors"]}))
    with pytest.raises(ValueError, match="no weight_map"):
        load(parts, preprocess=HALF)
    index.write_text(json.dumps({"weight_map": places}))
    (parts / "model-1.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model-1.safetensors, not there"):
        load(parts, preprocess=HALF)


@pytest.mark.parametrize("under", [None, "state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_state_dicts_of_pytorch(under, prefix, tmp_path):
    torch = pytest.importorskip("torch")
    whole, arrays = written("ResNet", tmp_path)
    tensors = {prefix + key: torch.from_numpy(array) for key, array in arrays.items()}
    path = tmp_path / "weights.pth"
    torch.save(tensors if under is None else {under: tensors, "epoch": 3}, path)
    assert_same(load(path, preprocess=HALF), load(whole, preprocess=HALF))


def test_bfloat16_of_pytorch(tmp_path):
    torch = pytest.importorskip("torch")
    path = tmp_path / "weights.pt"
    torch.save({"a": torch.tensor([1.5, -2.0], dtype=torch.bfloat16)}, path)
    array = files.read(path)["a"]
    assert array.dtype.name == "bfloat16"
    assert array.tolist() == [1.5, -2.0]


class Harmful:
    def __reduce__(self):
        return exec, ("raise SystemExit('code of a pickle was run')",)


@pytest.mark.parametrize("name", ["weights.pth", "weights.bin", "weights.npz", "w.safetensors"])
def test_no_pickle_is_run(name, tmp_path):
    pytest.importorskip("torch")
    path = tmp_path / name
    path.write_bytes(pickle.dumps({"state_dict": Harmful()}, protocol=2))
    with pytest.raises(ValueError, match="cannot be read"):
        load(path, preprocess=HALF)
    objects = tmp_path / "objects.npz"
    np.savez(objects, a=np.array([Harmful()], dtype=object))
    with pytest.raises(ValueError, match="cannot be read"):
        load(objects, preprocess=HALF)


@pytest.mark.parametrize(
    ("content", "message"),
    [([1, 2], "holds a list"), ({"a": 3}, "holds more than arrays: a"), ({}, "holds no arrays")],
)
def test_what_is_no_state_dict_is_refused(content, message, tmp_path):
    torch = pytest.importorskip("torch")
    path = tmp_path / "weights.pth"
    torch.save(content, path)
    with pytest.raises(ValueError, match=message):
        load(path, preprocess=HALF)


def test_without_pytorch_its_files_are_refused_in_words(tmp_path, monkeypatch):
    (tmp_path / "weights.pth").write_bytes(b"anything")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError, match="install torch, or convert it to .safetensors"):
        load(tmp_path / "weights.pth", preprocess=HALF)


def test_types_that_numpy_lacks_are_named(tmp_path):
    header = json.dumps({"a": {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [0, 2]}}).encode()
    path = tmp_path / "w.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0\0")
    with pytest.raises(ValueError, match="wrong dtype: a is F8_E4M3"):
        load(path, preprocess=HALF)


def test_what_is_not_there_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.safetensors does not exist"):
        load(tmp_path / "nowhere.safetensors", preprocess=HALF)
    with pytest.raises(FileNotFoundError, match="none of model.safetensors"):
        load(tmp_path, preprocess=HALF)
    (tmp_path / "weights.h5").write_bytes(b"")
    with pytest.raises(ValueError, match="is not one of .safetensors"):
        load(tmp_path / "weights.h5", preprocess=HALF)


# ---- what lies beside the weights ----


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        (
            "preprocessor_config.json",
            {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "do_rescale": True},
            ea.predictors.Preprocess((0.1, 0.2, 0.3), (0.4, 0.5, 0.6)),
        ),
        (
            "preprocessor_config.json",
            {"do_normalize": False, "image_mean": [0.1, 0.2, 0.3]},
            ea.predictors.Preprocess(0.0, 1.0),
        ),
        (
            "config.json",
            {"pretrained_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2]}},
            ea.predictors.Preprocess((0.5, 0.5, 0.5), (0.2, 0.2, 0.2)),
        ),
    ],
)
def test_preprocessing_is_read_beside_the_weights(name, content, expected, tmp_path):
    path, _ = written("ResNet", tmp_path)
    (tmp_path / name).write_text(json.dumps(content))
    assert load(path).preprocess == expected
    assert load(tmp_path).preprocess == expected
    assert load(path, preprocess=HALF).preprocess == HALF


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "Keys cannot tell.*Preprocess.mean=0.5, std=0.5.*0.485, 0.456, 0.406"),
        ('{"image_mean": [1, 1, 1], "image_std": [1, 1, 1], "do_rescale": false}', "Keys cannot"),
        ('{"image_mean": [1], "image_std": [1], "rescale_factor": 1}', "Keys cannot tell"),
        ('{"image_mean": ["x"], "image_std": [1]}', "a mean or std that is none"),
        ('{"image_mean": [null], "image_std": [1]}', "a mean or std that is none"),
        ('{"image_mean": [0.5, 0.5, 0.5], "image_std": [0, 0, 0]}', "a mean or std that is none"),
        ("[]", "holds a list, not an object"),
        ("{", "is not JSON"),
    ],
)
def test_preprocessing_is_not_guessed(content, message, tmp_path):
    path, _ = written("ResNet", tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        load(path)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"hidden_size": 64}, "hidden_size is 64 in config.json and 32 in the weights"),
        ({"num_hidden_layers": 12}, "num_hidden_layers is 12 in config.json and 2"),
        ({"hidden_act": "gelu_new"}, "hidden_act is 'gelu_new'"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu' in config.json, where only 'gelu'"),
        ({"num_register_tokens": 4}, "missing: vit.embeddings.register_tokens"),
        ({"num_attention_heads": "two"}, "num_attention_heads='two', which cannot be"),
        ({"layer_norm_eps": -1}, "layer_norm_eps=-1, which cannot be"),
        ({"global_pool": "map"}, "global_pool='map'"),
        ({"global_pool": ["avg"]}, "global_pool=.'avg'."),
    ],
)
def test_a_configuration_that_contradicts_the_weights_is_refused(changed, message, tmp_path):
    path, _ = written("Hugging Face", tmp_path)
    config = {"num_attention_heads": 2, "hidden_size": 32, "num_hidden_layers": 2, **changed}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        load(path, preprocess=HALF)


# ---- the hub ----


def hub(monkeypatch, snapshot_download):
    module = types.SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)


def test_names_on_the_hub_are_downloaded(tmp_path, monkeypatch):
    path, _ = written("Hugging Face", tmp_path)
    asked = []

    def snapshot_download(name, *, revision, allow_patterns):
        asked.append((name, revision))
        assert "model*.safetensors" in allow_patterns
        return str(tmp_path)

    hub(monkeypatch, snapshot_download)
    assert_same(load("hf://owner/vit-b.16", preprocess=HALF), load(path, preprocess=HALF))
    load("hf://owner/name@refs/pr/1", preprocess=HALF)
    assert asked == [("owner/vit-b.16", None), ("owner/name", "refs/pr/1")]


def test_what_cannot_be_downloaded_is_told_with_where_to_get_it(monkeypatch):
    def snapshot_download(*args, **kwargs):
        raise ConnectionError("no network\nand a long trace")

    hub(monkeypatch, snapshot_download)
    where = r"no network\)\. Download config\.json.*https://huggingface\.co/owner/name/tree/v1"
    with pytest.raises(FileNotFoundError, match=where):
        load("hf://owner/name@v1", preprocess=HALF)


def test_names_of_another_form_and_an_absent_package_are_told(monkeypatch):
    with pytest.raises(ValueError, match="hf://owner/name@revision"):
        load("hf://name", preprocess=HALF)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"pip install 'equiadapt-jax\[hub\]'"):
        load("hf://owner/name", preprocess=HALF)


# ---- positions ----


@pytest.mark.parametrize("new", [5, 14, 20])
def test_resampling_with_a_filter_is_that_of_jax(new, x64):
    held = np.random.default_rng(0).normal(size=(1, 196, 6))
    expected = jax.image.resize(held.reshape(14, 14, 6), (new, new, 6), "cubic", antialias=True)
    ours = positions.resample(held, 14, new, antialias=True)
    np.testing.assert_allclose(ours, expected.reshape(1, new**2, 6), atol=1e-12)


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("new", [5, 14, 20])
def test_resampling_is_that_of_pytorch(new, antialias):
    torch = pytest.importorskip("torch")
    held = np.random.default_rng(0).normal(size=(1, 196, 6))
    grid = torch.from_numpy(held.reshape(1, 14, 14, 6)).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(
        grid, size=(new, new), mode="bicubic", antialias=antialias
    )
    expected = expected.permute(0, 2, 3, 1).reshape(1, new**2, 6).numpy()
    ours = positions.resample(held, 14, new, antialias=antialias)
    np.testing.assert_allclose(ours, expected, atol=1e-12)


def test_a_class_token_keeps_its_position(tmp_path):
    path, arrays = written("timm", tmp_path)
    for size, patches in ((16, 4), (32, 16), (64, 64)):
        network = load(path, preprocess=HALF, heads=2, image_size=size)
        held = network.params["pos_embed"]
        assert held.shape == (1, 1 + patches, 32)
        np.testing.assert_array_equal(held[:, 0], arrays["pos_embed"][:, 0])
        y, _ = network.network.apply(network.params, {}, np.zeros((1, size, size, 3), np.float32))
        assert y.shape == (1, 5)
