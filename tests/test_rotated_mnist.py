"""Rotated MNIST from files in the format of its authors, and a run on them."""

import dataclasses
import subprocess
import sys

import numpy as np
import pytest

import equiadapt_jax as ea
from equiadapt_jax import data, runs
from equiadapt_jax.data.rotated_mnist import TEST, TRAIN
from equiadapt_jax.training import run
from tests.tiny_runs import ROOT, shipped

RNG = np.random.default_rng(0)


def write(path, images, labels):
    """Lines as in the published files: numbers with six digits, three spaces before each."""
    with path.open("w") as file:
        for image, label in zip(images, labels, strict=True):
            file.write(
                "".join(f"   {value:.6e}" for value in [*image.ravel(), float(label)]) + "\n"
            )


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """(folder, images, labels): 36 and 20 images."""
    folder = tmp_path_factory.mktemp("mnist_rotation_new")
    images = {TRAIN: RNG.random((36, 28, 28)), TEST: RNG.random((20, 28, 28))}
    labels = {name: RNG.permutation(np.arange(len(x)) % 10) for name, x in images.items()}
    for name in images:
        write(folder / name, images[name], labels[name])
    return folder, images, labels


def test_what_was_written_is_read(published, tmp_path):
    folder, images, labels = published
    dataset = data.open_dataset("rotated_mnist", root=folder, data_dir=tmp_path)
    assert dataset.sizes == {"train": 30, "validation": 6, "test": 20}
    assert dataset.classes == tuple(map(str, range(10)))
    assert dataset.channels == 1
    expected = {
        "train": (images[TRAIN][:30], labels[TRAIN][:30]),
        "validation": (images[TRAIN][30:], labels[TRAIN][30:]),
        "test": (images[TEST], labels[TEST]),
    }
    for split, (pixels, label) in expected.items():
        examples = list(dataset.source(split))
        order = [
            int(np.abs(pixels - example["image"][..., 0]).max((1, 2)).argmin())
            for example in examples
        ]
        assert sorted(order) == list(range(len(pixels)))  # shuffled by TFDS, each once
        for example, i in zip(examples, order, strict=True):
            assert example["image"].dtype == np.float32
            np.testing.assert_allclose(example["image"][..., 0], pixels[i], atol=1e-6)
            assert example["label"] == label[i]


def test_the_first_row_of_an_image_comes_first(tmp_path):
    """A line that runs along the top is at the top."""
    image = np.zeros((28, 28))
    image[2, 3:25] = 1
    write(tmp_path / TRAIN, [image] * 6, range(6))
    write(tmp_path / TEST, [image], [0])
    dataset = data.open_dataset("rotated_mnist", root=tmp_path, data_dir=tmp_path / "d")
    np.testing.assert_array_equal(dataset.source("test")[0]["image"][..., 0], image)


def test_changed_files_are_prepared_anew(published, tmp_path):
    _, images, labels = published
    for name in images:
        write(tmp_path / name, images[name], labels[name])
    before = data.open_dataset("rotated_mnist", root=tmp_path, data_dir=tmp_path / "d")
    write(tmp_path / TEST, images[TEST][:10], labels[TEST][:10])
    after = data.open_dataset("rotated_mnist", root=tmp_path, data_dir=tmp_path / "d")
    assert after.version != before.version
    assert after.sizes["test"] == 10


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        (["0 " * 784 + "3", "0 " * 783 + "3"], "from line 1: .*columns changed from 785 to 784"),
        (["0 " * 100 + "3"] * 2, "holds 101 numbers in line 1: 784 pixels and a label"),
        (["0 " * 784 + "3", "0 " * 784 + "10"], "line 2, is not 784 pixels in .* label from 0 to"),
        (["0 " * 783 + "255 3"], "line 1, is not 784 pixels in"),
        (["0 " * 783 + "nan 3"], "line 1, is not 784 pixels in"),
        (["0 " * 783 + "x 3"], "from line 1: could not convert string 'x'"),
    ],
)
def test_other_files_are_refused_by_line(published, tmp_path, lines, sentence):
    _, images, labels = published
    write(tmp_path / TRAIN, images[TRAIN], labels[TRAIN])
    (tmp_path / TEST).write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match=sentence):
        data.open_dataset("rotated_mnist", root=tmp_path, data_dir=tmp_path / "d")
    assert not list((tmp_path / "d").glob("**/dataset_info.json"))


def test_missing_files_are_named(published, tmp_path):
    with pytest.raises(FileNotFoundError, match=f"There is no .*{TRAIN}; rotated_mnist expects"):
        data.open_dataset("rotated_mnist", root=tmp_path, data_dir=tmp_path / "d")
    with pytest.raises(ValueError, match="rotated_mnist needs root="):
        data.open_dataset("rotated_mnist", data_dir=tmp_path / "d")
    with pytest.raises(ValueError, match="is only for image_folder and rotated_mnist, not for dig"):
        data.open_dataset("digits", root=tmp_path, data_dir=tmp_path / "d")


def test_the_prepare_command(published, tmp_path):
    command = [sys.executable, "-m", "equiadapt_jax.data.prepare", "rotated_mnist"]
    done = subprocess.run(
        [*command, f"--root={published[0]}", f"--data_dir={tmp_path}"],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "train 30, validation 6, test 20" in done.stdout


def test_the_tiny_configuration_runs_on_such_files(published, tmp_path):
    config = shipped(ROOT / "configs" / "rotated_mnist.py", "tiny")
    data = dataclasses.replace(
        config.data, root=str(published[0]), data_dir=str(tmp_path / "d"), validation="validation",
        test="test",
    )  # fmt: skip
    run.train(dataclasses.replace(config, data=data), tmp_path / "run")
    metrics, _ = runs.evaluate(tmp_path / "run", group="cyclic4")
    assert metrics["adapted/changed_rate"] == 0
    _, _, model = ea.load(tmp_path / "run")
    assert model.group == ea.groups.Cyclic(8)
