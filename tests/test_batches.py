"""Batches for training and evaluation, of one process and of several."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import grain
import numpy as np
import orbax.checkpoint as ocp
import pytest

from equiadapt_jax import data
from equiadapt_jax.data import batches as batching
from equiadapt_jax.data.batches import FittedSource
from tests.image_files import random_image, write, write_folder


def train(dataset, **options):
    defaults = {"size": 12, "batch_size": 32, "seed": 7}
    return data.training_batches(dataset.source("train"), **{**defaults, **options})


def assert_same(first, second):
    assert first.keys() == second.keys()
    for key in first:
        np.testing.assert_array_equal(first[key], second[key])


def test_training_batches(digits):
    batches = train(digits)
    batch = next(batches)
    assert batch["image"].shape == (32, 12, 12, 1)
    assert (batch["image"].dtype, batch["label"].dtype) == (np.float32, np.int32)
    same, other = train(digits, threads=0), train(digits, seed=8)  # four threads and none
    assert_same(batch, next(same))
    assert not np.array_equal(batch["image"], next(other)["image"])
    for _ in range(45):  # into the second epoch
        assert_same(next(batches), next(same))


def test_every_epoch_holds_every_example_in_another_order(digits):
    source = digits.source("train[:64]")
    batches = data.training_batches(source, size=0, batch_size=64, seed=0, epochs=2)
    first, second = [b["image"].reshape(64, -1) for b in batches]
    assert not np.array_equal(first, second)
    np.testing.assert_array_equal(*(x[np.lexsort(x.T)] for x in (first, second)))


def test_training_resumes_exactly(digits, tmp_path):
    batches = train(digits)
    for _ in range(5):
        next(batches)
    with ocp.CheckpointManager(tmp_path / "checkpoints") as manager:
        manager.save(5, args=ocp.args.Composite(data=grain.checkpoint.CheckpointSave(batches)))
        manager.wait_until_finished()
        resumed = train(digits)
        manager.restore(
            5, args=ocp.args.Composite(data=grain.checkpoint.CheckpointRestore(resumed))
        )
    for _ in range(40):
        assert_same(next(resumed), next(batches))


def test_too_few_examples_for_a_batch(digits):
    with pytest.raises(ValueError, match="has 10 examples, fewer than batch_size=32"):
        data.training_batches(digits.source("train[:10]"), size=8, batch_size=32, seed=0)


def test_evaluation_batches(digits):
    source = digits.source("test")
    batches = list(data.evaluation_batches(source, size=8, batch_size=100))
    assert [b["image"].shape for b in batches] == [(100, 8, 8, 1)] * 4
    assert [int(b["mask"].sum()) for b in batches] == [100, 100, 100, 60]
    keys = ("image", "label", "name", "mask")
    images, labels, names, mask = (np.concatenate([b[k] for b in batches]) for k in keys)
    assert list(names[mask]) == [str(i) for i in range(360)]
    expected = np.stack([data.to_unit(source[i]["image"]) for i in range(360)])
    np.testing.assert_array_equal(images[mask], expected)
    np.testing.assert_array_equal(labels[mask], [source[i]["label"] for i in range(360)])
    np.testing.assert_array_equal(images[~mask], np.broadcast_to(expected[-1], (40, 8, 8, 1)))
    assert (mask.dtype, labels.dtype) == (np.bool_, np.int32)


def test_a_class_that_train_lacks_is_refused(tmp_path):
    write_folder(tmp_path / "images")
    write(tmp_path / "images/test/wolf/1.png", random_image((6, 6, 3)))
    with pytest.raises(ValueError, match=r"class 'wolf' in .* has images but none in train"):
        data.open_dataset("image_folder", root=tmp_path / "images", data_dir=tmp_path / "d")


def test_mixed_sizes_need_fitting(tmp_path):
    write_folder(tmp_path / "images")
    write(tmp_path / "images/train/dog/wide.png", random_image((6, 9, 3)))
    dataset = data.open_dataset("image_folder", root=tmp_path / "images", data_dir=tmp_path / "d")
    source = dataset.source("train")
    (batch,) = data.evaluation_batches(source, size=8, batch_size=4)
    assert batch["image"].shape == (4, 8, 8, 3)
    message = r"Image train/.* is 6×\d pixels, the first one is 6×\d; .* fit='pad'"
    with pytest.raises(ValueError, match=message):
        list(data.evaluation_batches(source, size=None, how="none", batch_size=4))
    with pytest.raises(ValueError, match=message):
        next(data.training_batches(source, size=None, how="none", batch_size=3, seed=0))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("size", [6, 9])
def test_images_that_are_kept_are_those_that_were_read(dtype, size):
    """Of two sizes: those that are not resized are kept as integers, the others are not."""
    images = [random_image((s, s, 3), dtype) for s in (6, 6, 9)]
    source = [{"image": image, "label": i} for i, image in enumerate(images)]
    reads = []

    class Counted(list):
        def __getitem__(self, index):
            reads.append(index)
            return super().__getitem__(index)

    kept = FittedSource(Counted(source), size=size, how="pad", keep=True)
    reads.clear()
    for _ in range(3):
        for i, image in enumerate(images):
            np.testing.assert_array_equal(
                kept[i]["image"], data.fit(data.to_unit(image), size, "pad")
            )
            assert kept[i]["image"].dtype == np.float32
            assert kept[i]["label"] == i
        together = kept.batch(range(3))
        expected = [data.fit(data.to_unit(image), size, "pad") for image in images]
        np.testing.assert_array_equal(together["image"], expected)
        np.testing.assert_array_equal(together["label"], range(3))
        assert together["image"].dtype == np.float32
        both = kept.batch([1, 0])  # where all are kept, at once
        np.testing.assert_array_equal(both["image"], expected[1::-1])
        np.testing.assert_array_equal(both["label"], [1, 0])
    again = {i for i in range(3) if reads.count(i) > 1}
    assert again == ({2} if size == 6 and dtype != np.float32 else set())


def test_more_images_than_memory_allows_are_read_anew(monkeypatch):
    source = [{"image": random_image((4, 4, 3)), "label": i} for i in range(3)]
    monkeypatch.setattr(batching, "MEMORY_LIMIT", 3 * 4 * 4 * 3 + 1)
    assert FittedSource(source, size=4, how="pad", keep=True)._keeps
    monkeypatch.setattr(batching, "MEMORY_LIMIT", 3 * 4 * 4 * 3)
    large = FittedSource(source, size=4, how="pad", keep=True)
    assert not large._keeps
    np.testing.assert_array_equal(large[1]["image"], data.to_unit(source[1]["image"]))


# Processes

WORKER = """
import sys, jax
jax.distributed.initialize(f"localhost:{sys.argv[1]}", 2, int(sys.argv[2]))
from equiadapt_jax import data
source = data.open_dataset("digits", data_dir=sys.argv[3]).source("train")
batches = data.training_batches(source, size=8, batch_size=6, seed=3)
print(*[int(label) for _ in range(3) for label in next(batches)["label"]])
"""


def test_two_processes_share_each_batch(digits):
    with socket.socket() as server:
        server.bind(("localhost", 0))
        port = server.getsockname()[1]
    directory = Path(digits.builder.data_dir).parents[1]
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(port), str(index), str(directory)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
        )
        for index in range(2)
    ]
    shares = [list(map(int, worker.communicate(timeout=60)[0].split())) for worker in workers]
    batches = train(digits, size=8, batch_size=6, seed=3)
    whole = np.concatenate([next(batches)["label"] for _ in range(3)])
    np.testing.assert_array_equal(np.stack(shares, axis=1).ravel(), whole)
