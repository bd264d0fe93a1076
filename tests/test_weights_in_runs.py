"""Runs that adapt a network from a weight file, and are rebuilt without it."""

import copy
import dataclasses
import hashlib
import json
import shutil
import tarfile

import jax.numpy as jnp
import numpy as np
import pytest

import equiadapt_jax as ea
from equiadapt_jax import runs
from equiadapt_jax.training import config as settings
from equiadapt_jax.training import run
from equiadapt_jax.training.weights import read_weights
from equiadapt_jax.training.workdir import read_config
from tests import weight_files
from tests.tiny_runs import ROOT, leaves, shipped

SHARED = ROOT.parent / "shared"
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def cifar_resnet(classes=2):
    return weight_files.resnet(
        stage_sizes=(1, 1, 1), stem="cifar", shortcut="subsample", num_classes=classes
    )


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A CIFAR ResNet of random parameters for two classes, in PyTorch's key names."""
    path = tmp_path_factory.mktemp("weights") / "resnet.safetensors"
    return weight_files.save(path, weight_files.as_cifar(weight_files.arrays(cifar_resnet())))


@pytest.fixture
def config(tiny, weights):
    """`config(head="fresh")`: a tiny run on the image folder, frozen, from the weights."""

    def make(mode="frozen", pretrain=0, **predictor):
        base = tiny("image_folder", mode=mode)
        chosen = {"weights": str(weights), "mean": MEAN, "std": STD, **predictor}
        return dataclasses.replace(
            base,
            predictor=dataclasses.replace(base.predictor, **chosen),
            pretrain=dataclasses.replace(base.pretrain, steps=pretrain),
        )

    return make


def test_a_run_starts_from_the_file_and_is_rebuilt_without_it(config, weights, tmp_path):
    moved = shutil.copy(weights, tmp_path / "moved.safetensors")
    run.train(config(weights=str(moved)), tmp_path / "run")
    moved.unlink()
    kept, _ = read_config(tmp_path / "run")
    assert kept.predictor.sha256 == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert kept.predictor.name == "resnet"
    assert kept.predictor.options["stage_sizes"] == (1, 1, 1)
    assert kept.predictor.options["shortcut"] == "subsample"
    x = weight_files.images(24).astype(np.float32)
    preprocess = ea.predictors.Preprocess(MEAN, STD)
    expected = weight_files.torch_output(cifar_resnet(), x, preprocess)
    for step in (0, None):  # a frozen predictor is the same before and after
        params, state, model = ea.load(tmp_path / "run", step=step)
        logits, _ = model.predict(params, state, jnp.asarray(x))
        np.testing.assert_allclose(logits, expected, atol=1e-5 * expected.std())
    metrics, _ = runs.evaluate(tmp_path / "run")
    assert metrics["adapted/changed_rate"] == 0


def test_a_run_goes_on_with_weights_from_another_place(config, weights, tmp_path):
    run.train(config(), tmp_path / "run")
    moved = str(shutil.copy(weights, tmp_path / "moved.safetensors"))
    run.train(config(weights=moved), tmp_path / "run", resume=True)
    again = dataclasses.replace(read_config(tmp_path / "run")[0])
    run.train(again, tmp_path / "run", resume=True)
    other = weight_files.as_cifar(weight_files.arrays(cifar_resnet()))
    other["linear.bias"] = other["linear.bias"] + 1
    changed = weight_files.save(tmp_path / "other.safetensors", other)
    with pytest.raises(ValueError, match=r"other settings \(predictor\.sha256: "):
        run.train(config(weights=str(changed)), tmp_path / "run", resume=True)


def test_fine_tuning_starts_from_the_file(config, weights, places, tmp_path):
    """With a learning rate of zero it ends there too, but for the batch statistics."""
    start = config(pretrain=2)
    still = dataclasses.replace(start.pretrain, learning_rate=0.0)
    run.train(dataclasses.replace(start, pretrain=still), tmp_path / "run")
    loaded = ea.predictors.load(weights, preprocess=ea.predictors.Preprocess(MEAN, STD))
    params, _, _ = ea.load(tmp_path / "run", step=0)
    for name, value in leaves(loaded.params).items():
        np.testing.assert_array_equal(leaves(params["predictor"])[name], value)
    # The other weights are another pretrained predictor.
    other = weight_files.as_cifar(weight_files.arrays(cifar_resnet()))
    other["linear.bias"] = other["linear.bias"] + 1
    changed = weight_files.save(tmp_path / "other.safetensors", other)
    run.train(
        dataclasses.replace(config(pretrain=2, weights=str(changed)), pretrain=still),
        tmp_path / "other",
    )
    params, _, _ = ea.load(tmp_path / "other", step=0)
    np.testing.assert_allclose(
        params["predictor"]["fc"]["bias"], loaded.params["fc"]["bias"] + 1, rtol=1e-6
    )


def test_a_fresh_classifier_is_trained(config, tmp_path, weights):
    path = weight_files.save(
        tmp_path / "five.safetensors", weight_files.as_cifar(weight_files.arrays(cifar_resnet(5)))
    )
    run.train(config("joint", weights=str(path), head="fresh"), tmp_path / "run")
    params, _, _ = ea.load(tmp_path / "run", step=0)
    assert params["predictor"]["fc"]["kernel"].shape == (32, 2)
    assert not np.any(params["predictor"]["fc"]["kernel"])
    params, _, _ = ea.load(tmp_path / "run", step=2)
    assert np.any(params["predictor"]["fc"]["kernel"])


def test_a_vit_is_brought_to_the_size_of_the_images(config, tmp_path):
    module = weight_files.vit(grid=4, num_classes=2)
    path = weight_files.save(
        tmp_path / "vit.safetensors", weight_files.as_timm(weight_files.arrays(module))
    )
    (tmp_path / "config.json").write_text('{"num_attention_heads": 2}')
    (tmp_path / "preprocessor_config.json").write_text(
        '{"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.5, 0.5]}'
    )
    run.train(config(weights=str(path), mean=(), std=()), tmp_path / "run")
    path.unlink()
    params, state, model = ea.load(tmp_path / "run")
    assert params["predictor"]["pos_embed"].shape == (1, 1 + 3 * 3, 32)  # 24 pixels, patches of 8
    kept = read_config(tmp_path / "run")[0].predictor
    assert (kept.name, kept.options["heads"]) == ("vit", 2)
    assert (kept.mean, kept.std) == ((0.1, 0.2, 0.3), (0.5, 0.5, 0.5))
    assert model.apply(params, state, jnp.zeros((1, 24, 24, 3)))[0][0].shape == (1, 2)


def test_a_network_takes_images_of_other_channels(config, weights):
    found, (params, _) = read_weights(config(), 2, (24, 24, 1))
    assert params["conv1"]["kernel"].shape == (3, 3, 1, 8)
    assert found.predictor.mean == (pytest.approx(0.5),)


def damaged(weights, tmp_path):
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(weights.read_bytes()[:-100])
    return str(path)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"weights": "nowhere.safetensors"}, r"nowhere\.safetensors does not exist"),
        ({"weights": damaged}, r"damaged\.safetensors cannot be read"),
        ({"sha256": "0" * 64}, r"resnet\.safetensors has SHA-256 \w{64}, not 0{64}"),
        ({"weights": "", "sha256": "0" * 64}, "sha256 is given without config.predictor.weights"),
        ({"head": "fresh"}, "A fresh classifier is all zeros, and nothing would train it"),
        ({"head": "new"}, "config.predictor.head is 'new': choose one of keep, fresh"),
        ({"mean": ()}, "Give config.predictor.mean and config.predictor.std, or none of both"),
        ({"mean": (), "std": ()}, "no preprocess, and neither"),
        ({"weights": "", "mean": (), "std": ()}, "are empty: that is only for weights"),
        ({"mean": (0.5, 0.5)}, "differ in length|channels of"),
    ],
)
def test_what_cannot_be_used_is_refused_before_anything_is_written(
    config, weights, tmp_path, change, sentence
):
    change = {n: v(weights, tmp_path) if callable(v) else v for n, v in change.items()}
    before = set(tmp_path.iterdir())
    with pytest.raises((ValueError, FileNotFoundError), match=sentence):
        run.train(config(**change), tmp_path / "run")
    assert set(tmp_path.iterdir()) == before


def test_a_classifier_for_other_classes_is_refused(config, tmp_path):
    path = weight_files.save(
        tmp_path / "five.safetensors", weight_files.as_cifar(weight_files.arrays(cifar_resnet(5)))
    )
    with pytest.raises(
        ValueError, match=r"is for 5 classes, and the data have 2: take --config\.p"
    ):
        run.train(config(weights=str(path)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_fingerprints_know_weights_by_their_digest():
    def predictor(**changes):
        return dataclasses.replace(settings.Config(), predictor=settings.Predictor(**changes))

    here, there = predictor(weights="a", sha256="1"), predictor(weights="b", sha256="1")
    assert settings.fingerprint(here) == settings.fingerprint(there)
    assert settings.fingerprint(here) != settings.fingerprint(predictor(weights="a", sha256="2"))
    assert settings.differences(here, there) == []


def test_published_weights_on_real_images(places, tmp_path):
    """The tiny variant of the configuration, on 60 of the test images."""
    if not (SHARED / "weights").is_dir():
        pytest.skip(f"no published weights and images in {SHARED}")
    root = tmp_path / "images"
    root.mkdir()
    with tarfile.open(SHARED / "data" / "cifar10_jpeg" / "test.tar") as images:
        members = [m for m in images.getmembers() if m.isfile()][::84]
        for split in ("train", "test"):
            with tarfile.open(root / f"{split}.tar", "w") as part:
                for member in members:
                    inside = copy.copy(member)
                    inside.name = member.name.removeprefix("test/")
                    part.addfile(inside, images.extractfile(member))
    config = shipped(ROOT / "configs" / "cifar10_resnet20.py", "tiny")
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(
            config.data, root=str(root), data_dir=str(places["data"]),
            train="train", validation="train[:50%]", test="test",
        ),
        predictor=dataclasses.replace(
            config.predictor, weights=str(SHARED / "weights" / "cifar10_resnet20.safetensors")
        ),
    )  # fmt: skip
    run.train(config, tmp_path / "run")
    metrics, _ = runs.evaluate(tmp_path / "run")
    assert metrics["vanilla/accuracy"] > 0.7  # 0.8 of all test images
    assert metrics["vanilla/accuracy"] - metrics["vanilla/group_accuracy"] > 0.2
    assert json.loads((tmp_path / "run" / "config.json").read_text())["settings"]["predictor"][
        "options"
    ]["stage_sizes"] == [3, 3, 3]
