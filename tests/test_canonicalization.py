"""From scores to canonical inputs: orbits, exactness, and derivatives against explicit mixtures."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from equiadapt_jax import canonicalization
from equiadapt_jax.actions import images
from equiadapt_jax.canonicalization import canonicalize, from_scores, invert, mixture, select_pose
from equiadapt_jax.groups import Cyclic, Dihedral

act = jax.jit(images.act, static_argnames="pad")
EXACT = [Cyclic(4), Dihedral(4), Dihedral(2)]
GROUPS = [Cyclic(4), Dihedral(4), Cyclic(8)]


def noise(*shape, dtype=np.float32, seed=0):
    return np.random.default_rng(seed).uniform(size=shape).astype(dtype)


def same_bits(a, b):
    a, b = np.asarray(a), np.asarray(b)
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def template_scores(group, x):
    """⟨t, g⁻¹·x⟩ for a fixed t: scores(g·x)[..., g∘i] = scores(x)[..., i] for exact g."""
    template = noise(*x.shape[-3:], dtype=x.dtype, seed=9)
    return jnp.stack(
        [
            (images.act(group, group.inverse(g), x) * template).sum((-3, -2, -1))
            for g in range(group.order)
        ],
        -1,
    )


@functools.partial(jax.jit, static_argnames="method")
def canonical(group, x, method="straight_through"):
    return from_scores(group, template_scores(group, x), x, method=method)


def orbit_batch(group, x):
    """All exact q·x for every image of a batch: elements `(|Q|,)` and images `(|Q|, B, …)`."""
    turned = [act(group, np.full(len(x), q, np.int32), x) for q in group.lattice]
    return np.asarray(group.lattice), np.stack(turned)


# ---- the forward pass ----


@pytest.mark.parametrize("group", [*EXACT, Cyclic(8), Dihedral(8)], ids=str)
def test_canonical_input_is_the_same_on_an_orbit_and_the_pose_moves_along(group):
    x = noise(3, 6, 6, 2)
    elements, orbit = orbit_batch(group, x)
    results = [canonical(group, turned) for turned in orbit]
    scores = np.sort(results[0].scores, -1)
    assert (scores[:, -1] - scores[:, -2] > 1e-6 * np.abs(scores).max()).all()  # no ties
    assert len(np.unique(np.concatenate([r.pose for r in results]))) > 1
    for q, result in zip(elements, results, strict=True):
        assert same_bits(result.inputs, results[0].inputs)
        np.testing.assert_array_equal(result.pose, group.compose(int(q), results[0].pose))
        assert result.pose.dtype == jnp.int32
        assert same_bits(jnp.argmax(result.weights, -1).astype(jnp.int32), result.pose)


@pytest.mark.parametrize("group", EXACT, ids=str)
def test_exact_poses_are_undone_to_the_bit(group):
    poses = group.elements()
    x = noise(group.order, 5, 5, 3)
    canonical_inputs = canonicalize(group, poses, x)
    for g in range(group.order):
        # h(x)⁻¹·x with the inverse written out: mirrors undo themselves, turns turn back.
        turns = 4 // group.n * (g % group.n)
        expected = np.rot90(x[g], -turns)
        assert same_bits(canonical_inputs[g], expected[:, ::-1] if g >= group.n else expected)
    assert same_bits(invert(group, poses, canonical_inputs), x)


def test_interpolated_poses_act_as_the_inverse_element():
    group, x = Dihedral(8), noise(16, 6, 6, 1)
    inverse = np.where(np.arange(16) < 8, -np.arange(16) % 8, np.arange(16)).astype(np.int32)
    for pad in ("edge", "constant"):
        options = {"pad": pad, "fill": 0.2}
        there = jax.jit(functools.partial(canonicalize, **options))(group, group.elements(), x)
        back = jax.jit(functools.partial(invert, **options))(group, group.elements(), x)
        assert same_bits(there, act(group, inverse, x, **options))
        assert same_bits(back, act(group, group.elements(), x, **options))


@pytest.mark.parametrize("group", [Dihedral(4), Cyclic(8)], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_and_inference_see_the_same_bits(group, dtype):
    x = jnp.asarray(noise(group.order, 7, 7, 2), dtype)
    pose, weights = group.elements(), jax.nn.one_hot(group.elements(), group.order)
    plain = jax.jit(lambda p, x: canonicalize(group, p, x))(pose, x)

    @functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    def loss(weights, x):
        x0 = canonicalize(group, pose, x, weights)
        return (x0.astype(jnp.float32) ** 2).sum(), x0

    (_, x0), (to_weights, to_images) = jax.jit(loss)(weights, x)
    assert same_bits(jax.jit(lambda w: canonicalize(group, pose, x, w))(weights), plain)
    assert same_bits(x0, plain)
    assert to_weights.dtype == jnp.float32
    assert to_images.dtype == x.dtype


def test_select_pose_takes_the_first_of_the_best():
    scores = np.array([[0.0, 3, 3, 1], [-1, -2, -3, -4]])
    np.testing.assert_array_equal(select_pose(Cyclic(4), jnp.asarray(scores)), [1, 0])
    assert select_pose(Cyclic(4), jnp.asarray(scores[0])).shape == ()


@pytest.mark.parametrize("method", canonicalization.METHODS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_weights_sum_to_one_in_at_least_float32(method, dtype):
    scores = jnp.asarray(noise(5, 6, seed=2), dtype)
    w = canonicalization.weights(scores, method=method, key=jax.random.key(0))
    assert w.dtype == jnp.float32
    np.testing.assert_allclose(w.sum(-1), 1, rtol=1e-6)
    if method == "soft":
        p = np.exp(np.asarray(scores, np.float64))
        np.testing.assert_allclose(w, p / p.sum(-1, keepdims=True), rtol=1e-6)
    else:
        assert set(np.ravel(w)) == {0.0, 1.0}


# ---- derivatives ----


def explicit_mixture(group, weights, x, **options):
    """Σ_g w_g act(g⁻¹, x), term by term."""
    total = jnp.zeros_like(x)
    for g in range(group.order):
        inverse = np.int32(g if g >= group.n else -g % group.n)
        turned = act(group, inverse, x, **options)
        total = total + weights[..., g][..., None, None, None] * turned
    return total


def energy(x0):
    """A loss that no symmetry leaves unchanged."""
    target = np.random.default_rng(5).normal(size=x0.shape[-3:])
    return ((x0 * target).sum((-3, -2, -1)) + (x0**3).sum((-3, -2, -1))).mean()


@pytest.mark.parametrize("pad", ["edge", "constant"])
@pytest.mark.parametrize("group", GROUPS, ids=str)
def test_hard_weights_have_the_derivative_of_the_mixture(group, pad, x64):
    x = jnp.asarray(noise(3, 5, 5, 2, dtype=np.float64))
    pose = jnp.asarray([1, 3, group.order - 1], jnp.int32)
    one_hot = jnp.eye(group.order)[pose]
    options = {"pad": pad, "fill": 0.4}

    def ours(w, x):
        return energy(canonicalize(group, pose, x, w, **options))

    def oracle(w, x):
        return energy(explicit_mixture(group, w, x, **options))

    value, gradients = jax.jit(jax.value_and_grad(ours, (0, 1)))(one_hot, x)
    expected_value, expected = jax.value_and_grad(oracle, (0, 1))(one_hot, x)
    np.testing.assert_allclose(value, expected_value, rtol=1e-13)
    for actual, wanted in zip(gradients, expected, strict=True):
        assert np.abs(wanted).max() > 1e-3
        np.testing.assert_allclose(actual, wanted, atol=1e-12)
    # The weights' derivative again, by central differences of the mixture.
    turned = np.stack([explicit_mixture(group, e, x, **options) for e in np.eye(group.order)])

    def loss(w):
        return energy(np.einsum("bg,gbhwc->bhwc", w, turned))

    step, numeric = 1e-5, np.zeros(one_hot.shape)
    for index in itertools.product(*map(range, numeric.shape)):
        shift = np.zeros(numeric.shape)
        shift[index] = step
        numeric[index] = (loss(one_hot + shift) - loss(one_hot - shift)) / (2 * step)
    np.testing.assert_allclose(gradients[0], numeric, atol=1e-8)


@pytest.mark.parametrize("temperature", [1.0, 0.25])
def test_scores_have_the_derivative_of_the_softmax(temperature, x64):
    group = Dihedral(4)
    x, scores = (
        jnp.asarray(noise(2, 5, 5, 1, dtype=np.float64)),
        np.log(noise(2, 8, dtype=np.float64) + 0.1),
    )

    def loss(scores):
        return energy(from_scores(group, scores, x, temperature=temperature).inputs)

    pose = select_pose(group, scores)
    to_weights = jax.grad(lambda w: energy(explicit_mixture(group, w, x)))(jnp.eye(8)[pose])
    p = np.exp(scores / temperature)
    p /= p.sum(-1, keepdims=True)
    expected = p * (to_weights - (p * to_weights).sum(-1, keepdims=True)) / temperature
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(scores), expected, atol=1e-13)


@pytest.mark.parametrize("group", GROUPS, ids=str)
def test_soft_weights_mix_the_orbit(group, x64):
    x, w = (
        noise(2, 5, 5, 2, dtype=np.float64),
        np.random.default_rng(1).dirichlet(np.ones(group.order), 2),
    )
    np.testing.assert_allclose(
        jax.jit(mixture)(group, w, x), explicit_mixture(group, jnp.asarray(w), x), atol=1e-13
    )
    ours = jax.jit(jax.grad(lambda w, x: energy(mixture(group, w, x)), (0, 1)))(w, x)
    oracle = jax.grad(lambda w, x: energy(explicit_mixture(group, w, x)), (0, 1))(
        jnp.asarray(w), jnp.asarray(x)
    )
    for actual, wanted in zip(ours, oracle, strict=True):
        np.testing.assert_allclose(actual, wanted, atol=1e-12)

    scores = np.log(w)
    soft = jax.jit(functools.partial(from_scores, method="soft"))(group, jnp.asarray(scores), x)
    np.testing.assert_allclose(soft.weights, w, rtol=1e-12)
    np.testing.assert_allclose(soft.inputs, explicit_mixture(group, jnp.asarray(w), x), atol=1e-13)
    np.testing.assert_array_equal(soft.pose, w.argmax(-1))


def test_soft_canonicalization_agrees_with_finite_differences(x64):
    x, scores = noise(2, 4, 4, 1, dtype=np.float64), noise(2, 8, dtype=np.float64)
    check_grads(
        jax.jit(lambda s, x: from_scores(
            Dihedral(4), s, x, method="soft", temperature=0.5).inputs),
        (scores, x), order=1, modes=["rev"], atol=1e-7, rtol=1e-7,
    )  # fmt: skip


def test_mixtures_keep_the_dtype_of_the_images(strict):
    x = jnp.asarray(noise(2, 5, 5, 1), jnp.bfloat16)
    w = jnp.full((2, 8), 0.125)
    mixed = jax.jit(mixture)(Cyclic(8), w, x)
    assert mixed.dtype == jnp.bfloat16
    # Rounded once, not after each of the eight terms; the terms are bfloat16 themselves.
    exact = explicit_mixture(Cyclic(8), w, x.astype(jnp.float32))
    np.testing.assert_allclose(mixed.astype(jnp.float32), exact, atol=4e-3)


def backward_memory(function, group):
    x, w = jnp.zeros((4, 32, 32, 3)), jnp.full((4, group.order), 1 / group.order)
    loss = lambda w, x: (function(group, w, x) ** 2).sum()  # noqa: E731
    compiled = jax.jit(jax.grad(loss, (0, 1))).lower(w, x).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_memory_of_the_backward_pass_does_not_grow_with_the_group():
    def hard(group, w, x):
        return canonicalize(group, jnp.zeros(4, jnp.int32), x, w)

    def naive(group, w, x):
        return jnp.einsum("bg,bghwc->bhwc", w, images.orbit(group, x))

    images_of_a_batch = 4 * 32 * 32 * 3 * 4
    assert backward_memory(naive, Cyclic(64)) > 64 * images_of_a_batch  # this measure sees it
    for function in (hard, mixture):
        small, large = (backward_memory(function, Cyclic(n)) for n in (8, 64))
        assert large < small + images_of_a_batch


# ---- gumbel ----


def test_gumbel_poses_are_samples_of_the_softmax():
    scores = jnp.broadcast_to(jnp.log(jnp.array([0.1, 0.2, 0.3, 0.4])), (20_000, 4))
    sample = jax.jit(
        lambda key, t: canonicalization.weights(scores, method="gumbel", key=key, temperature=t)
    )
    drawn = sample(jax.random.key(0), 1.0)
    # A share p has a standard deviation of at most 0.0036 over 20,000 draws.
    np.testing.assert_allclose(drawn.mean(0), [0.1, 0.2, 0.3, 0.4], atol=0.015)
    assert same_bits(drawn, sample(jax.random.key(0), 1.0))
    assert same_bits(drawn, sample(jax.random.key(0), 0.1))  # only the derivative is sharper
    assert (drawn != sample(jax.random.key(1), 1.0)).any()


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_gumbel_derivative_is_that_of_the_softmax_of_the_noisy_scores(temperature, x64):
    scores, direction = noise(3, 4, dtype=np.float64), noise(3, 4, dtype=np.float64, seed=1)
    key = jax.random.key(3)
    noisy = (scores + jax.random.gumbel(key, scores.shape, jnp.float64)) / temperature
    expected = jax.grad(lambda s: (jax.nn.softmax(s, -1) * direction).sum())(noisy) / temperature

    def loss(scores):
        w = canonicalization.weights(scores, method="gumbel", key=key, temperature=temperature)
        return (w * direction).sum()

    np.testing.assert_allclose(jax.grad(loss)(scores), expected, atol=1e-14)


def test_gumbel_canonical_inputs_follow_the_sampled_pose():
    group, x, scores = Dihedral(4), noise(64, 5, 5, 1), jnp.zeros((64, 8))
    result = from_scores(group, scores, x, method="gumbel", key=jax.random.key(0))
    assert len(np.unique(result.pose)) == 8
    assert same_bits(result.inputs, canonicalize(group, result.pose, x))
    np.testing.assert_array_equal(result.weights, np.eye(8)[result.pose])


# ---- transformations and refusals ----


def test_the_whole_step_under_vmap_and_without_compiling_again():
    @jax.jit
    def step(group, scores, x):
        return jax.grad(lambda s: energy(from_scores(group, s, x).inputs))(scores)

    x, scores = noise(3, 5, 5, 1), jnp.asarray(noise(3, 4, seed=1))
    batched = step(Cyclic(4), scores, x)
    step(Cyclic(2 + 2), scores + 1, x + 1)
    assert step._cache_size() == 1

    single = jax.vmap(lambda s, x: step(Cyclic(4), s, x))(scores, x)
    np.testing.assert_allclose(single / 3, batched, rtol=1e-5, atol=1e-7)
    forward = jax.jit(jax.vmap(lambda s, x: from_scores(Cyclic(4), s, x)))(scores, x)
    assert same_bits(forward.inputs, from_scores(Cyclic(4), scores, x).inputs)
    assert forward.pose.shape == (3,)


def test_canonicalizing_in_a_scan_that_carries_the_group():
    x, poses = noise(5, 5, 1), jnp.asarray([1, 5, 2, 7], jnp.int32)

    def step(carry, pose):
        group, x = carry
        return (group, canonicalize(group, pose, x)), None

    (group, last), _ = jax.lax.scan(step, (Dihedral(4), jnp.asarray(x)), poses)
    expected = functools.reduce(lambda x, pose: canonicalize(group, pose, x), poses, x)
    assert same_bits(last, expected)


SCORES, IMAGES = jnp.zeros((2, 4)), jnp.zeros((2, 4, 4, 1))
REFUSED = {
    "scores of another group": (
        lambda: select_pose(Cyclic(8), SCORES), r"shape \(2, 4\) do not fit cyclic8.*8 elements"),
    "weights of another group": (
        lambda: canonicalize(Dihedral(4), 0, IMAGES, SCORES), "do not fit dihedral4"),
    "mixing with weights of another group": (
        lambda: mixture(Dihedral(4), SCORES, IMAGES), "do not fit dihedral4"),
    "a method that does not exist": (
        lambda: canonicalization.weights(SCORES, method="hard"), "Unknown method 'hard'.*gumbel"),
    "no temperature": (
        lambda: canonicalization.weights(SCORES, temperature=0.0), "temperature.*is 0.0.*positive"),
    "a negative temperature": (
        lambda: from_scores(Cyclic(4), SCORES, IMAGES, temperature=-1.0), "must be positive"),
    "noise without a key": (
        lambda: from_scores(Cyclic(4), SCORES, IMAGES, method="gumbel"), "pass key="),
    "images that would change shape": (
        lambda: canonicalize(Cyclic(4), 1, IMAGES[:, :3]), "square first"),
    "poses of another shape": (
        lambda: canonicalize(Cyclic(4), np.zeros(3, int), IMAGES), r"shape \(3,\)"),
    "an unknown pad": (
        lambda: canonicalize(Cyclic(4), 1, IMAGES, pad="wrap"), "Unknown pad 'wrap'"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_done_is_refused_with_a_sentence(case):
    call, sentence = REFUSED[case]
    with pytest.raises(ValueError, match=sentence):
        call()


def test_strict_promotion_holds(strict):
    for dtype in (jnp.float32, jnp.bfloat16):
        x = jnp.asarray(noise(2, 5, 5, 1), dtype)
        w = jnp.full((2, 8), 0.125)
        step = jax.jit(
            jax.grad(
                lambda w, x: (
                    canonicalize(Cyclic(8), jnp.ones(2, jnp.int32), x, w).astype(jnp.float32).sum()
                ),
                (0, 1),
            )
        )
        to_weights, to_images = step(w, x)
        assert (to_weights.dtype, to_images.dtype) == (jnp.float32, dtype)
