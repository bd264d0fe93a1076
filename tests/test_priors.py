"""The losses of the priors against their formulas, written in NumPy."""

import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis.extra import numpy as hnp
from jax.test_util import check_grads
from scipy.special import logsumexp

from equiadapt_jax import groups, priors
from equiadapt_jax.groups import Cyclic, Dihedral
from equiadapt_jax.priors import Categorical, Identity

GROUP = Dihedral(4)
SKEW = (0.3, 0.05, 0.0, 0.1, 0.25, 0.2, 0.1, 0.0)
PRIORS = [
    Identity(),
    Categorical(SKEW),
    Categorical(SKEW, kl_weight=0.7),
    Categorical(SKEW, per_sample=True),
    Categorical((0.5, 0, 0, 0, 0.5, 0, 0, 0), kl_weight=1.0, per_sample=True),
]


def scores_of(*shape, dtype=np.float64, seed=0):
    return np.random.default_rng(seed).normal(scale=2.0, size=shape).astype(dtype)


def expected(prior, scores):
    """−log p(e|x), −log Σ π p, or KL(π ‖ p), means over the batch; plus λ KL(π ‖ mean of p)."""
    log_p = scores - logsumexp(scores, axis=-1, keepdims=True)
    if isinstance(prior, Identity):
        return -log_p[..., 0].mean()
    pi = np.array(prior.probabilities)
    some = pi > 0
    if prior.per_sample:
        loss = (pi[some] * (np.log(pi[some]) - log_p[..., some])).sum(-1).mean()
    else:
        loss = -np.log((pi * np.exp(log_p)).sum(-1)).mean()
    mean = np.exp(log_p).reshape(-1, pi.size).mean(0)
    return loss + prior.kl_weight * (pi[some] * np.log(pi[some] / mean[some])).sum()


def permuted(group, g, scores):
    """The scores of g·x, given those of x: scores(g·x)[..., g∘i] = scores(x)[..., i]."""
    out = np.empty_like(scores)
    for index in np.ndindex(scores.shape[:-1]):
        for i in range(group.order):
            out[index][group.compose(int(g[index]), i)] = scores[index][i]
    return out


@functools.cache
def loss_of(prior):
    """Compiled once per prior, in either precision."""
    return jax.jit(lambda scores: prior.loss(GROUP, scores))


@pytest.mark.parametrize("prior", PRIORS, ids=repr)
@pytest.mark.parametrize("shape", [(8,), (5, 8), (2, 3, 8)])
def test_losses_are_their_formulas(prior, shape, x64):
    scores = scores_of(*shape)
    actual = loss_of(prior)(scores)
    assert actual.shape == ()
    np.testing.assert_allclose(actual, expected(prior, scores), rtol=1e-12)


@given(hnp.arrays(np.float32, (3, 8), elements=st.floats(-30, 30, width=32)))
def test_losses_hold_for_any_scores(scores):
    for prior in PRIORS[:4]:
        wanted = expected(prior, scores.astype(np.float64))
        np.testing.assert_allclose(loss_of(prior)(scores), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prior", PRIORS, ids=repr)
@pytest.mark.parametrize("group", [Dihedral(4), Cyclic(8)], ids=str)
def test_an_applied_element_shifts_the_prior(prior, group, x64):
    scores = scores_of(5, 8)
    applied = np.array([1, 3, 6, 0, 5], np.int32)
    turned = permuted(group, applied, scores)
    loss = jax.jit(lambda s, a: prior.loss(group, s, applied=a))
    np.testing.assert_allclose(loss(turned, applied), expected(prior, scores), rtol=1e-12)
    assert abs(float(prior.loss(group, turned)) - expected(prior, scores)) > 1e-3
    # One element for the whole batch, in both spellings.
    for one in (3, jnp.int32(3)):
        turned = permuted(group, np.full(5, 3), scores)
        np.testing.assert_allclose(
            prior.loss(group, turned, applied=one), expected(prior, scores), rtol=1e-12
        )


@pytest.mark.parametrize("per_sample", [False, True])
def test_a_point_mass_at_the_identity_is_the_identity_prior(per_sample, x64):
    scores = scores_of(6, 8)
    point = Categorical((1, 0, 0, 0, 0, 0, 0, 0), per_sample=per_sample)
    for applied in (None, np.arange(6)):
        np.testing.assert_allclose(
            point.loss(GROUP, scores, applied=applied),
            Identity().loss(GROUP, scores, applied=applied),
            rtol=1e-13,
        )


def test_kl_asks_the_batch_to_be_distributed_as_the_prior(x64):
    half = (0.5, 0, 0, 0, 0.5, 0, 0, 0)
    one_sided = np.full((4, 8), -30.0)
    one_sided[:, 0] = 0
    mixed = one_sided.copy()
    mixed[2:] = np.roll(mixed[2:], 4, axis=-1)
    with_kl, without = Categorical(half, kl_weight=1.0), Categorical(half)
    assert abs(without.loss(GROUP, one_sided) - without.loss(GROUP, mixed)) < 1e-9
    np.testing.assert_allclose(with_kl.loss(GROUP, mixed), without.loss(GROUP, mixed), atol=1e-9)
    assert with_kl.loss(GROUP, one_sided) > without.loss(GROUP, one_sided) + 5


@pytest.mark.parametrize("prior", PRIORS, ids=repr)
def test_gradients_agree_with_finite_differences(prior, x64):
    applied = np.array([2, 0, 7])
    check_grads(
        lambda s: prior.loss(GROUP, s, applied=applied),
        (scores_of(3, 8),), order=1, modes=["rev"], atol=1e-7, rtol=1e-7,
    )  # fmt: skip


@pytest.mark.parametrize("prior", PRIORS, ids=repr)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_extreme_scores_have_finite_losses_and_gradients(prior, dtype):
    # The likeliest pose has no mass under the prior, and the likely ones next to no probability.
    scores = jnp.zeros((2, 8), dtype).at[:, 2].set(3e4)
    loss, gradient = jax.jit(jax.value_and_grad(lambda s: prior.loss(GROUP, s)))(scores)
    assert loss.dtype == jnp.float32
    assert gradient.dtype == scores.dtype
    assert np.isfinite(loss)
    assert loss > 1e4
    assert np.isfinite(gradient.astype(jnp.float32)).all()
    assert np.abs(gradient.astype(jnp.float32)).max() > 0.05


@pytest.mark.parametrize("prior", PRIORS[:4], ids=repr)
def test_impossible_poses_without_mass_are_left_out(prior):
    """A score of −∞ where the prior has no mass costs nothing and spoils nothing."""
    scores = jnp.asarray(scores_of(3, 8, dtype=np.float32)).at[:, 7].set(-jnp.inf)
    loss, gradient = jax.value_and_grad(lambda s: prior.loss(GROUP, s))(scores)
    finite = loss_of(prior)(scores.at[:, 7].set(-1e4))
    np.testing.assert_allclose(loss, finite, rtol=1e-6)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("prior", PRIORS, ids=repr)
def test_low_precision_scores_are_reduced_in_float32(prior):
    scores = jnp.asarray(scores_of(64, 8, dtype=np.float32), jnp.bfloat16)
    wanted = expected(prior, np.asarray(scores, np.float64))
    np.testing.assert_allclose(loss_of(prior)(scores), wanted, rtol=1e-5)


def test_priors_are_static_arguments():
    loss = jax.jit(lambda prior, group, scores: prior.loss(group, scores))
    for prior in (Categorical(SKEW), Categorical(list(SKEW)), Categorical(np.array(SKEW))):
        loss(prior, Dihedral(4), scores_of(2, 8, dtype=np.float32))
    assert loss._cache_size() == 1
    assert jax.tree.leaves(Categorical(SKEW)) == []


def test_losses_of_a_vmapped_batch_average_to_that_of_the_batch(x64):
    scores, applied = scores_of(4, 8), jnp.arange(4)
    prior = Categorical(SKEW)
    single = jax.vmap(lambda s, a: prior.loss(GROUP, s, applied=a))(scores, applied)
    np.testing.assert_allclose(
        single.mean(), prior.loss(GROUP, scores, applied=applied), rtol=1e-12
    )


REFUSED = {
    "too little mass": (lambda: Categorical((0.5, 0.4)), r"sum to 0\.9.*summing to 1"),
    "negative mass": (lambda: Categorical((1.5, -0.5)), "at least 0 for each element"),
    "not a number": (lambda: Categorical((float("nan"), 1.0)), "at least 0 for each element"),
    "no elements": (lambda: Categorical(()), "summing to 1"),
    "a negative weight": (
        lambda: Categorical((1.0,), kl_weight=-1.0), r"kl_weight is -1\.0: it must be at least 0"),
    "a weight that is not a number": (
        lambda: Categorical((1.0,), kl_weight=float("nan")), "kl_weight is nan"),
    "mass for another group": (
        lambda: Categorical((0.5, 0.5)).loss(GROUP, jnp.zeros((1, 8))),
        "2 probabilities and dihedral4 8 elements"),
    "scores of another group": (
        lambda: Identity().loss(GROUP, jnp.zeros((3, 4))),
        r"shape \(3, 4\) do not fit dihedral4.*8 elements"),
    "scores of another group, of no prior": (
        lambda: priors.Uniform().loss(GROUP, jnp.zeros((3, 4))), "do not fit dihedral4"),
    "elements for other inputs": (
        lambda: Identity().loss(GROUP, jnp.zeros((3, 8)), applied=jnp.zeros(2, int)),
        r"elements of shape \(2,\) for scores of inputs of shape \(3,\): give one for all"),
    "elements for other inputs, of no prior": (
        lambda: priors.Uniform().loss(GROUP, jnp.zeros((3, 8)), applied=jnp.zeros((3, 1), int)),
        r"elements of shape \(3, 1\) for scores of inputs of shape \(3,\)"),
    "an element for no batch": (
        lambda: Identity().loss(GROUP, jnp.zeros(8), applied=jnp.zeros(1, int)),
        r"elements of shape \(1,\) for scores of inputs of shape \(\)"),
    "modes of another group": (
        lambda: Categorical((0.5, 0.5)).modes(GROUP), "2 probabilities and dihedral4 8 elements"),
    "no scores": (lambda: Identity().loss(groups.Cyclic(1), jnp.zeros(())), r"shape \(\)"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_a_prior_is_refused_with_a_sentence(case):
    call, sentence = REFUSED[case]
    with pytest.raises(ValueError, match=sentence):
        call()


@pytest.mark.parametrize("prior", [Identity(), Categorical(SKEW), priors.Uniform()], ids=repr)
def test_applied_elements_are_integers(prior):
    with pytest.raises(TypeError, match="applied has dtype float32, .* dihedral4 are integers"):
        prior.loss(GROUP, jnp.zeros((3, 8)), applied=jnp.zeros(3))


@pytest.mark.parametrize("prior", [Identity(), priors.Uniform(), priors.VonMises(2.0)], ids=repr)
def test_what_does_not_fit_a_matrix_group_is_refused_with_a_sentence(prior):
    vectors, turns = jnp.zeros((3, 1, 2)), jnp.stack([jnp.eye(2)] * 2)
    with pytest.raises(ValueError, match=r"shape \(3, 2, 2\) do not span a frame of so2"):
        prior.loss(groups.SO(2), jnp.zeros((3, 2, 2)), applied=jnp.eye(2))
    with pytest.raises(ValueError, match=r"applied has shape \(3,\), and elements of so2 are mat"):
        prior.loss(groups.SO(2), vectors, applied=jnp.zeros(3))
    with pytest.raises(ValueError, match=r"elements of shape \(2,\) for scores of .* \(3,\)"):
        prior.loss(groups.SO(2), vectors, applied=turns)


def test_modes_are_the_most_probable_elements():
    for prior in (Identity(), priors.Uniform()):
        assert prior.modes(GROUP) == (0,)
    assert Categorical(SKEW).modes(GROUP) == (0,)
    assert Categorical((0.5, 0, 0, 0, 0.5, 0, 0, 0)).modes(GROUP) == (0, 4)


def test_applied_is_keyword_only():
    for prior in (priors.Identity(), priors.Categorical((1.0,))):
        with pytest.raises(TypeError, match="positional"):
            prior.loss(Cyclic(1), jnp.zeros((2, 1)), 0)
