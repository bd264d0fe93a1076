"""Whether data have a preferred pose: on data of which it is known."""

import numpy as np
import pytest
import scipy.stats

from equiadapt_jax import runs
from equiadapt_jax.evaluation.upright import upright_evidence, wilson
from equiadapt_jax.evaluation.wording import about_evidence
from equiadapt_jax.groups import Cyclic, Dihedral
from equiadapt_jax.priors import Uniform

RNG = np.random.default_rng(0)


def photographs(count=120, size=18):
    """Noise that is brighter at the top, and a little at the left."""
    y, x = np.mgrid[:size, :size] / size
    noise = RNG.uniform(0, 0.5, (count, size, size, 2))
    return (noise + 0.4 * (1 - y)[..., None] + 0.1 * (1 - x)[..., None]).astype(np.float32)


def turned(images, probabilities, mirror=False):
    poses = RNG.choice(len(probabilities), len(images), p=probabilities)
    flipped = [x[:, ::-1] if mirror and RNG.random() < 0.5 else x for x in images]
    return np.stack([np.rot90(x, k) for x, k in zip(flipped, poses, strict=True)])


@pytest.mark.parametrize("group", [Cyclic(4), Cyclic(2), Cyclic(8), Dihedral(4)], ids=str)
def test_upright_data_are_told_from_turned_ones(group):
    found = upright_evidence(photographs(), group)
    assert found.images == 60
    assert found.chance == 1 / len(group.lattice)
    assert found.rate > 0.9
    assert found.low > 0.8
    np.testing.assert_allclose(found.picked.sum(), 1)
    assert "as the identity prior says" in about_evidence(found, "training")


@pytest.mark.parametrize("group", [Cyclic(4), Dihedral(4)], ids=str)
def test_without_a_preferred_pose_nothing_is_found(group):
    images = turned(photographs(300), [0.25] * 4, mirror=group == Dihedral(4))
    found = upright_evidence(images, group)
    assert found.low < found.chance < found.high
    assert "no better than chance" in about_evidence(found, "training")


def test_a_uniform_prior_says_nothing_that_could_be_checked():
    for group in (Cyclic(4), Dihedral(4), Dihedral(3)):
        exact, modes = runs._exact_poses(group, Uniform())
        assert upright_evidence(photographs(), exact, modes) is None
        np.testing.assert_allclose(runs._probabilities(Uniform(), group), 1 / group.order)


def test_in_between_no_more_is_said_than_is_known():
    found = upright_evidence(turned(photographs(400), [0.6, 0.4, 0, 0]), Cyclic(4))
    assert found.chance < found.low < found.rate < 0.75
    sentence = about_evidence(found, "training")
    assert "how clearly such a classifier cannot say" in sentence
    assert "of 200 training images" in sentence
    assert "as --config.prior.name=estimated would find" in sentence
    assert "would find" not in about_evidence(found, "training", "estimated")


def test_images_that_look_alike_in_all_poses_share_the_pick():
    found = upright_evidence(np.full((40, 8, 8, 1), 0.5, np.float32), Cyclic(4))
    np.testing.assert_allclose(found.picked, 0.25)


def test_half_of_symmetric_images_is_picked():
    images = photographs(80)
    images += np.abs(np.arange(18) - 8.5)[:, None, None].astype(np.float32) / 9
    found = upright_evidence(images + images[:, ::-1, ::-1], Cyclic(4))
    np.testing.assert_allclose(found.picked[[0, 2]], 0.5, atol=0.15)
    np.testing.assert_allclose(found.picked[0], found.picked[2])


def test_it_is_the_same_each_time_and_uses_the_first_images_only():
    images = photographs(410)
    one, other = (upright_evidence(x, Cyclic(2)) for x in (images, images[:400].copy()))
    np.testing.assert_array_equal(one.picked, other.picked)
    assert one.images == 200
    assert one.figures == other.figures
    assert one.figures["data/picked/r0"] == one.figures["data/upright_evidence"] == one.rate


def test_where_nothing_can_be_said_nothing_is():
    assert upright_evidence(photographs(), Cyclic(3)) is None  # every other element interpolates
    assert upright_evidence(photographs(10), Cyclic(4)) is None
    assert upright_evidence(photographs()[:, :10], Cyclic(4)) is None  # quarter turns reshape it
    assert upright_evidence(photographs()[:, :10], Cyclic(2)).rate > 0.9


@pytest.mark.parametrize(("right", "count"), [(0, 30), (7, 30), (30, 30), (250, 1000)])
def test_the_interval_is_wilsons(right, count):
    wanted = scipy.stats.binomtest(right, count).proportion_ci(method="wilson")
    np.testing.assert_allclose(wilson(right / count, count), wanted, atol=1e-4)


def test_a_prior_of_both_mirrors_is_justified_by_data_that_are_as_good_mirrored():
    images, group = turned(photographs(300), [1, 0, 0, 0], mirror=True), Dihedral(4)
    images = images + images[:, :, ::-1]  # their own mirror image, for whom the stored one is half
    alone = upright_evidence(images, group)
    both = upright_evidence(images, group, (0, 4))
    np.testing.assert_array_equal(alone.picked, both.picked)
    assert alone.rate < 0.55
    assert both.chance == 0.25
    assert both.rate == pytest.approx(both.picked[[0, 4]].sum())
    assert both.low > 0.8
    sentence = about_evidence(both, "training", "mirror")
    assert "stored in preferred poses, as the mirror prior says" in sentence
    assert "the stored one or that at 0° mirrored for" in sentence


def test_poses_that_are_as_likely_are_counted_as_seen_from_the_stored_one():
    """Stored turned by 90° or 270°, an image is as likely upside down."""
    found = upright_evidence(photographs(), Cyclic(4), (1, 3))
    assert found.alike == (0, 2)
    assert upright_evidence(photographs(), Cyclic(4), (1,)).alike == (0,)
    every = upright_evidence(photographs(), Cyclic(4), (0, 1, 2, 3))
    assert every.chance == 1
    assert "takes all 4 exact poses for as likely" in about_evidence(every, "training", "uniform")
