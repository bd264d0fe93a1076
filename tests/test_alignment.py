"""Priors estimated from data, against NumPy loops, closed forms and data whose poses are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import equiadapt_jax as ea
from equiadapt_jax import alignment
from equiadapt_jax.groups import Cyclic, Dihedral

RNG = np.random.default_rng(0)
SKEW = np.array([0.5, 0.3, 0.15, 0.05])
GROUPS = [Cyclic(4), Dihedral(3)]


def rows(count, order, scale=2.0):
    p = np.exp(RNG.normal(scale=scale, size=(count, order)))
    return p / p.sum(-1, keepdims=True)


def test_the_posterior_is_bayes_rule(x64):
    p = rows(6, 4).reshape(2, 3, 4)
    found = alignment.posterior(SKEW, p)
    for index in np.ndindex(2, 3):
        joint = [SKEW[g] * p[index][g] for g in range(4)]
        np.testing.assert_allclose(found[index], np.array(joint) / sum(joint), rtol=1e-12)
    mean = np.mean(np.asarray(found).reshape(6, 4), axis=0)
    np.testing.assert_allclose(alignment.update(SKEW, p), mean, rtol=1e-12)


def test_impossible_rows_are_left_alone_with_finite_derivatives():
    prior, p = np.array([1.0, 0, 0, 0]), jnp.array([[0, 0.5, 0.5, 0], [0.5, 0.5, 0, 0]])
    np.testing.assert_array_equal(alignment.posterior(prior, p), [[0, 0.5, 0.5, 0], [1, 0, 0, 0]])
    gradient = jax.grad(lambda p: alignment.posterior(prior, p)[:, 0].sum())(p)
    assert np.isfinite(gradient).all()


def test_an_update_never_lowers_the_likelihood(x64):
    p, prior = rows(50, 4), np.array([0.1, 0.2, 0.3, 0.4])
    found = []
    for _ in range(20):
        found.append(np.log(p @ prior).mean())
        prior = np.asarray(alignment.update(prior, p))
    assert (np.diff(found) >= -1e-15).all()
    assert found[-1] > found[0] + 1e-3


def test_the_estimate_is_the_maximum_of_the_likelihood(x64):
    """The conditions of Karush, Kuhn and Tucker, which are enough: the likelihood is concave."""
    p = rows(200, 4, scale=1.0)
    found = np.asarray(jax.jit(alignment.estimate, static_argnames="steps")(p, steps=20000))
    np.testing.assert_allclose(found.sum(), 1, rtol=1e-12)
    slope = (p / (p @ found)[:, None]).mean(0)
    np.testing.assert_allclose(slope[found > 1e-6], 1, atol=1e-6)
    assert (slope <= 1 + 1e-6).all()


def test_sure_poses_are_counted():
    poses = RNG.integers(0, 4, 100)
    found = alignment.estimate(jnp.eye(4)[poses])
    np.testing.assert_allclose(found, np.bincount(poses, minlength=4) / 100, atol=1e-6)


def test_images_that_look_alike_in_two_poses_do_not_blur_the_estimate(x64):
    poses = RNG.choice(4, 4000, p=SKEW)
    p = np.eye(4)[poses]
    alike = np.arange(4000) % 2 == 0  # with their half turn
    p[alike] = (p[alike] + np.roll(p[alike], 2, -1)) / 2
    true = np.bincount(poses, minlength=4) / 4000
    assert abs(np.asarray(alignment.estimate(p)) - true).sum() / 2 < 0.02
    assert abs(p.mean(0) - true).sum() / 2 > 0.1  # what a histogram would say


@pytest.mark.parametrize("group", GROUPS, ids=str)
def test_a_shift_is_another_upright(group):
    prior = rows(1, group.order)[0].astype(np.float32)
    for s in range(group.order):
        wanted = np.zeros_like(prior)
        for h in range(group.order):
            wanted[group.compose(h, s)] += prior[h]
        shifted = alignment.shift(group, prior, s)
        np.testing.assert_array_equal(shifted, wanted)
        np.testing.assert_allclose(alignment.distance(group, shifted, prior), 0, atol=1e-7)
    centred, s = alignment.centre(group, prior)
    assert int(jnp.argmax(centred)) == 0
    np.testing.assert_array_equal(centred, alignment.shift(group, prior, s))


@pytest.mark.parametrize("group", GROUPS, ids=str)
def test_the_distance_is_that_of_the_best_shift(group):
    one, other = (rows(1, group.order)[0].astype(np.float32) for _ in range(2))
    wanted = min(
        sum(abs(one[h] - other[group.compose(h, s)]) for h in range(group.order)) / 2
        for s in range(group.order)
    )
    np.testing.assert_allclose(alignment.distance(group, one, other), wanted, rtol=1e-5)


def data(group, probabilities, noise, count=600):
    """Vectors over the group, one upright vector under an element each, with noise; the elements.

    (h·f)[h∘i] = f[i], which is how scores move.
    """
    upright = np.linspace(-1, 1, group.order) ** 3 * 3
    poses = RNG.choice(group.order, count, p=probabilities).astype(np.int32)
    found = np.empty((count, group.order))
    for n, h in enumerate(poses):
        found[n, group.compose(int(h), np.arange(group.order))] = upright
    return found + noise * RNG.normal(size=found.shape), poses


def templates(group, x, noise):
    """A scorer that compares with the mean of the aligned data: what to train, and to score by."""
    back = np.stack([x[:, group.compose(g, np.arange(group.order))] for g in range(group.order)], 1)

    def train(number, poses):
        return back[np.arange(len(x)), np.asarray(poses)].mean(0)

    def score(mean):
        return jax.nn.softmax(-((back - mean) ** 2).sum(-1) / (2 * noise**2), -1)

    return train, score


@pytest.mark.parametrize("group", GROUPS, ids=str)
def test_unknown_poses_are_found_up_to_a_common_shift(group):
    true = np.array([0.1, 0.5, 0.2, 0.2] if group.order == 4 else [0.1, 0.1, 0.1, 0.1, 0.5, 0.1])
    x, poses = data(group, true, 0.3)
    prior, found = alignment.bootstrap(group, len(x), *templates(group, x, 0.3))
    counted = np.bincount(poses, minlength=group.order) / len(poses)
    assert float(alignment.distance(group, prior, counted)) < 0.03
    assert int(jnp.argmax(prior)) == 0
    right = [np.mean(found == group.compose(poses, s)) for s in range(group.order)]
    assert max(right) > 0.95
    assert int(np.argmax(right)) == int(group.inverse(int(np.argmax(true))))


def test_data_without_a_preferred_pose_have_no_other_estimate():
    group = Cyclic(4)
    x, _ = data(group, np.full(4, 0.25), 0.3)
    x = np.concatenate([x[:, group.compose(g, np.arange(4))] for g in range(4)])  # to the last one
    prior, _ = alignment.bootstrap(group, len(x), *templates(group, x, 0.3))
    np.testing.assert_allclose(prior, 0.25, atol=1e-3)


def test_what_makes_no_estimate_is_refused():
    group = Cyclic(4)
    with pytest.raises(ValueError, match="rounds=1: a prior is estimated in at least 2"):
        alignment.bootstrap(group, 3, None, None, rounds=1)
    with pytest.raises(ValueError, match=r"shape \(2, 4\) are not one row for each of 3 images"):
        alignment.bootstrap(group, 3, lambda *_: None, lambda _: jnp.ones((2, 4)))


def test_it_is_public():
    assert ea.alignment is alignment
