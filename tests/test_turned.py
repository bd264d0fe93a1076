"""Data that are turned on purpose, against NumPy's turns."""

import numpy as np
import pytest

from equiadapt_jax.data import evaluation_batches, training_batches
from equiadapt_jax.data.turned import RelabelledSource, TurnedSource, drawn
from equiadapt_jax.groups import Cyclic, Dihedral

RNG = np.random.default_rng(0)
SOURCE = [
    {"image": RNG.integers(0, 255, (8, 8, 1), dtype=np.uint8), "label": i, "name": f"n{i}"}
    for i in range(20)
]


def test_poses_follow_their_probabilities_and_the_images_number():
    p = (0.6, 0.3, 0.1, 0.0)
    found = drawn(p, 20000, seed=3, split="train")
    np.testing.assert_allclose(np.bincount(found, minlength=4) / 20000, p, atol=0.01)
    assert found.dtype == np.int32
    np.testing.assert_array_equal(drawn(p, 7, seed=3, split="train"), found[:7])
    for other in ({"seed": 4, "split": "train"}, {"seed": 3, "split": "validation"}):
        assert (drawn(p, 20000, **other) != found).any()
    np.testing.assert_array_equal(drawn((0, 0, 1, 0), 50, seed=0, split=""), 2)


@pytest.mark.parametrize("p", [(0.5, 0.4), (1.5, -0.5), (float("nan"), 1.0)])
def test_what_is_no_distribution_is_refused(p):
    with pytest.raises(ValueError, match="at least 0 for each element, summing to 1"):
        drawn(p, 3, seed=0, split="train")


def test_images_are_fitted_and_turned_once():
    elements = np.arange(20, dtype=np.int32) % 8
    turned = TurnedSource(SOURCE, Dihedral(4), elements, size=12, how="pad")
    upright = next(evaluation_batches(SOURCE, size=12, batch_size=20))["image"]
    batch = next(evaluation_batches(turned, size=None, how="none", batch_size=20))
    for image, found, g in zip(upright, batch["image"], elements, strict=True):
        np.testing.assert_array_equal(found, np.rot90(image[:, ::-1] if g > 3 else image, g % 4))
    assert batch["name"][3] == "n3"
    np.testing.assert_array_equal(batch["label"], np.arange(20))
    seen = next(training_batches(turned, size=None, how="none", batch_size=20, seed=0))
    order = seen["label"]
    np.testing.assert_array_equal(seen["image"], batch["image"][order])


def test_other_labels_leave_the_images_alone():
    source = RelabelledSource(SOURCE, np.arange(20, dtype=np.int32)[::-1])
    assert len(source) == 20
    assert source[4]["label"] == 15
    assert source[4]["image"] is SOURCE[4]["image"]


def test_as_many_elements_and_labels_as_images_are_needed():
    with pytest.raises(ValueError, match="3 elements for 20 images"):
        TurnedSource(SOURCE, Cyclic(4), np.zeros(3, np.int32), size=8, how="pad")
    with pytest.raises(ValueError, match="3 labels for 20 images"):
        RelabelledSource(SOURCE, np.zeros(3, np.int32))
