"""Energies of predictions, the gate, terms for embeddings, the search on the circle."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import equiadapt_jax as ea
from equiadapt_jax import energies
from equiadapt_jax.groups import Cyclic, Dihedral

LOGITS = np.random.default_rng(0).normal(0, 3, size=(5, 2, 4))
KEY = jax.random.key(0)


def noise(*shape, dtype=np.float32, seed=0):
    return np.random.default_rng(seed).uniform(size=shape).astype(dtype)


def by_hand(name, logits):
    p = np.exp(logits) / np.exp(logits).sum()
    return {
        "confidence": np.log(p.max() / (1 - p.max())),
        "entropy": sum(q * np.log(q) for q in p),
        "logit_energy": np.log(np.exp(logits).sum()),
    }[name]


@pytest.mark.parametrize("name", ["confidence", "entropy", "logit_energy"])
def test_energies_are_their_formulas(name, x64):
    expected = [[by_hand(name, row) for row in rows] for rows in LOGITS]
    np.testing.assert_allclose(energies.NAMED[name](jnp.asarray(LOGITS)), expected, rtol=1e-10)


def test_classes_that_are_ruled_out_count_for_nothing():
    logits = jnp.asarray([[0.0, 1.0, -jnp.inf], [2.0, -1.0, -jnp.inf]])
    for name in ("confidence", "entropy", "logit_energy"):
        expected = [by_hand(name, row) for row in np.asarray(logits)[:, :2]]
        np.testing.assert_allclose(energies.NAMED[name](logits), expected, rtol=1e-5)


def test_what_is_zero_has_a_finite_derivative():
    norm = lambda maps: energies.feature_norm(jnp.zeros((2, 4)), (maps,)).sum()  # noqa: E731
    np.testing.assert_array_equal(jax.grad(norm)(jnp.zeros((2, 3, 3, 5))), 0)
    slope = jax.jacobian(energies.unit)(jnp.zeros(3))
    np.testing.assert_array_equal(slope, np.eye(3))
    np.testing.assert_allclose(jnp.linalg.norm(energies.unit(jnp.full(3, 1e-8))), 1, rtol=1e-6)


def test_the_odds_tell_what_saturated_probabilities_do_not():
    logits = jnp.asarray([[60.0, 0.0, 0.0], [50.0, 0.0, 0.0], [50.0, 50.0, 0.0]])
    assert (jax.nn.softmax(logits)[:2, 0] == 1).all()
    np.testing.assert_allclose(
        energies.confidence(logits), [60 - np.log(2), 50 - np.log(2), 0], atol=1e-5
    )
    with pytest.raises(ValueError, match="two classes are needed"):
        energies.confidence(logits[:, :1])


def test_the_norm_is_of_averaged_features():
    maps = (noise(3, 4, 4, 2), noise(3, 2, 5, 6, seed=1))
    expected = [np.linalg.norm(m.mean((0, 1))) for m in maps[-1]]
    np.testing.assert_allclose(energies.feature_norm(noise(3, 4), maps), expected, rtol=1e-6)
    with pytest.raises(ValueError, match="tells none: choose confidence"):
        energies.feature_norm(noise(3, 4))


def test_the_gate_keeps_the_identity_unless_it_is_beaten_by_the_margin():
    scores = jnp.asarray([[0.0, 0.9, 0.0], [0.0, 1.1, 0.0], [0.5, 0.0, 1.6]])
    np.testing.assert_array_equal(energies.gate(scores, 1.0).argmax(-1), [0, 1, 2])
    np.testing.assert_array_equal(energies.gate(scores, 0.0), scores)


# ---- behind adapt ----

WEIGHT = noise(6, 6, 1, 3, seed=3) * 4


def answer(params, x):
    return jnp.einsum("nhwc,hwck->nk", x, WEIGHT, precision=jax.lax.Precision.HIGHEST)


def behind(energy, group=None, predictor=None, **options):
    group = group or Dihedral(4)
    model = ea.adapt(group, energy, predictor or ea.from_function(answer), **options)
    return (model, *model.init(KEY, noise(2, 6, 6, 1)))


def test_the_most_confident_pose_is_taken_without_parameters():
    model, params, state = behind(energies.Energy(energies.confidence))
    assert params == {"scorer": {}, "predictor": {}}
    x = noise(4, 6, 6, 1)
    (logits, canonical), _ = jax.jit(model.apply)(params, state, x)
    every = np.stack(  # D4: g⁻¹·x undoes the turn, then the mirror
        [
            answer({}, (np.rot90(x, -(g % 4), (1, 2)))[:, :, :: -1 if g // 4 else 1].copy())
            for g in range(8)
        ],
        1,
    )
    odds = np.asarray(energies.confidence(jnp.asarray(every)))
    np.testing.assert_allclose(canonical.scores, odds, rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(canonical.pose, odds.argmax(1))
    np.testing.assert_allclose(logits, every[np.arange(4), odds.argmax(1)], rtol=1e-5)


@pytest.mark.parametrize("poses", [1, 3, None])
def test_exact_turns_leave_every_bit_and_a_gate_gives_that_up(poses):
    group, x = Dihedral(4), jnp.asarray(noise(6, 6, 6, 1))
    model, params, state = behind(energies.Energy(energies.entropy), poses=poses)
    gated, *_ = behind(energies.Energy(energies.entropy, margin=5.0), poses=poses)
    (one, _), _ = jax.jit(model.apply)(params, state, x)
    left_alone = []
    for g in range(8):
        turned = ea.actions.images.act(group, g, x)
        np.testing.assert_array_equal(jax.jit(model.apply)(params, state, turned)[0][0], one)
        (y, canonical), _ = jax.jit(gated.apply)(params, state, turned)
        np.testing.assert_array_equal(canonical.pose, 0)  # no entropy of three classes is so large
        np.testing.assert_array_equal(canonical.inputs, turned)
        left_alone.append(np.asarray(y))
    apart = np.abs(np.stack(left_alone[1:]) - left_alone[0]).max((1, 2))
    assert apart.min() > 0.1  # everything is left alone, so nothing is invariant


def test_any_function_of_prediction_and_maps_is_an_energy():
    resnet = ea.predictors.ResNet(3, stage_sizes=(1,), block="basic", width=4, stem="cifar")
    brightest = energies.Energy(lambda y, maps: maps[0].max((1, 2, 3)) + y[:, 0])
    model, params, state = behind(brightest, Cyclic(4), ea.from_linen(resnet))
    (_, canonical), _ = model.apply(params, state, noise(2, 8, 8, 1))
    found = model.predictor.features(params["predictor"], state["predictor"], noise(2, 8, 8, 1))
    y, maps = found
    np.testing.assert_allclose(canonical.scores[:, 0], maps[0].max((1, 2, 3)) + y[:, 0], rtol=1e-4)


class Plain(nn.Module):
    """A module that sows nothing."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(x.reshape(x.shape[0], -1))


def test_a_module_that_sows_nothing_has_energies_of_its_output():
    x = noise(5, 6, 6, 1)
    plain = ea.from_linen(Plain())
    model, params, state = behind(energies.Energy(energies.confidence), Cyclic(4), plain)
    (y, canonical), _ = jax.jit(model.apply)(params, state, x)
    dense = params["predictor"]["Dense_0"]
    every = np.stack(
        [
            np.rot90(x, -g, (1, 2)).reshape(5, -1) @ dense["kernel"] + dense["bias"]
            for g in range(4)
        ],
        1,
    )
    odds = np.asarray(energies.confidence(jnp.asarray(every)))
    np.testing.assert_allclose(canonical.scores, odds, atol=1e-4)
    np.testing.assert_allclose(y, every[np.arange(5), odds.argmax(1)], atol=1e-5)
    _, maps = plain.features(params["predictor"], state["predictor"], x)
    assert maps == ()
    with pytest.raises(ValueError, match="tells none: choose confidence"):
        behind(energies.Energy(energies.feature_norm), Cyclic(4), plain)


def test_what_is_no_energy_is_refused_with_a_sentence():
    with pytest.raises(ValueError, match=r"shape \(2, 3\): one number for each"):
        behind(energies.Energy(lambda y, maps: y))
    with pytest.raises(ValueError, match="a margin of at least 0"):
        energies.Energy(energies.entropy, margin=-1.0)
    with pytest.raises(ValueError, match="leave `features` out"):
        behind(energies.Energy(energies.entropy), features=lambda maps, y: y)
    with pytest.raises(TypeError, match="The predictor is a function"):
        ea.adapt(Cyclic(4), energies.Energy(energies.entropy), answer)
    with pytest.raises(ValueError, match="choose confidence"):
        behind(energies.Energy(energies.feature_norm))


# ---- terms for embeddings ----


def test_the_contrastive_term_is_its_formula_and_cannot_be_shrunk(x64):
    e = np.random.default_rng(1).normal(size=(3, 4, 5))
    unit = e / np.linalg.norm(e, axis=-1, keepdims=True)
    expected = [
        0.5 * np.log(np.mean([np.exp((u[g] @ u[h] - 1) / 0.5) for g in range(4) for h in range(4)
                              if g != h]))
        for u in unit
    ]  # fmt: skip
    found = energies.contrastive(jnp.asarray(e))
    np.testing.assert_allclose(found, np.mean(expected), rtol=1e-10)
    np.testing.assert_allclose(energies.contrastive(jnp.asarray(1e-6 * e)), found, rtol=1e-10)
    gradient = jax.grad(lambda s: energies.contrastive(s * e))(1.0)
    np.testing.assert_allclose(gradient, 0, atol=1e-12)  # the length of vectors plays no part


def test_the_contrastive_term_parts_every_pair():
    together = jnp.ones((1, 4, 3))
    pairs = jnp.asarray([[[1.0, 0], [1, 0], [-1, 0], [-1, 0]]])  # a mean of cosines is best here
    square = jnp.asarray([[[1.0, 0], [0, 1], [-1, 0], [0, -1]]])
    values = [float(energies.contrastive(e)) for e in (square, pairs, together)]
    assert values == sorted(values)
    assert values[-1] == pytest.approx(0, abs=1e-6)
    assert float(energies.contrastive(together[:, :1])) == 0
    assert jnp.isfinite(jax.grad(lambda e: energies.contrastive(e))(jnp.zeros((1, 4, 3)))).all()


def test_the_artefact_term_is_one_less_the_cosine(x64):
    one, other = noise(3, 4, dtype=np.float64), noise(3, 4, dtype=np.float64, seed=1)
    cosine = (one * other).sum(-1) / np.linalg.norm(one, axis=-1) / np.linalg.norm(other, axis=-1)
    np.testing.assert_allclose(energies.artefact(one, other), (1 - cosine).mean(), rtol=1e-10)
    np.testing.assert_allclose(energies.artefact(one, 3 * one), 0, atol=1e-12)


def test_there_and_back_is_the_same_up_to_interpolation():
    x = jnp.asarray(noise(2, 16, 16, 1))
    quarter = energies.there_and_back(x, jnp.full(2, np.pi / 2))
    np.testing.assert_array_equal(quarter, x)
    between = energies.there_and_back(x, jnp.full(2, 0.6))
    inside = slice(5, 11)
    assert 0.01 < float(abs(between - x)[:, inside, inside].mean()) < 0.25


# ---- on the circle ----


def blobs(angles, size=33):
    """Images of two smooth blobs off the centre, turned by angles, in closed form."""
    y, x = np.mgrid[:size, :size] - (size - 1) / 2
    images = []
    for a in angles:
        image = 0
        for radius, phase, height in ((9.0, 0.0, 1.0), (6.0, 2.0, 0.6)):
            cx, cy = radius * np.cos(a + phase), -radius * np.sin(a + phase)
            image = image + height * np.exp(-((x - cx) ** 2 + (y - cy) ** 2) / (2 * 2.5**2))
        images.append(image)
    return jnp.asarray(np.stack(images)[..., None], jnp.float32)


@pytest.mark.parametrize("chunk", [None, 8])
def test_the_search_finds_the_angle_to_half_a_degree(chunk):
    template = blobs([0.0])
    energy = lambda x: -((x - template) ** 2).sum((1, 2, 3))  # noqa: E731
    angles = np.random.default_rng(0).uniform(0, 2 * np.pi, 12).astype(np.float32)
    find = jax.jit(lambda x: energies.search(energy, x, angles=24, chunk=chunk))
    found, value = find(blobs(angles))
    error = np.degrees(np.abs((np.asarray(found) - angles + np.pi) % (2 * np.pi) - np.pi))
    assert error.max() < 0.5
    assert ((found >= 0) & (found < 2 * np.pi)).all()
    canonical = ea.actions.images.rotate(blobs(angles), -found)
    np.testing.assert_allclose(value, energy(canonical), rtol=1e-3, atol=1e-4)


def test_the_search_narrows_to_the_top_of_a_closed_form():
    """The energy of an image with one number, its angle, is read from the image itself."""
    top = 2.1234
    image = blobs([0.0])

    def energy(x):  # the angle of the brightest blob, by its centre of mass
        y, c = jnp.mgrid[:33, :33] - 16.0
        mass = jnp.maximum(x[..., 0], 0)
        angle = jnp.arctan2(-(mass * y).sum((1, 2)), (mass * c).sum((1, 2)))
        return jnp.cos(angle - top)

    coarse, _ = energies.search(energy, image, angles=16, steps=0)
    fine, value = energies.search(energy, image, angles=16, steps=16)
    assert value[0] > 1 - 1e-5
    assert energies.search(energy, image, angles=16, steps=0)[1][0] <= value[0]
    assert abs(float(coarse[0] - fine[0])) <= 2 * np.pi / 16


def test_a_search_that_cannot_be_is_refused():
    energy = lambda x: x.sum((1, 2, 3))  # noqa: E731
    with pytest.raises(ValueError, match="chunk=5: give at least 3 angles"):
        energies.search(energy, blobs([0.0]), angles=32, chunk=5)
    with pytest.raises(ValueError, match=r"takes images \(B, S, S, C\)"):
        energies.search(energy, blobs([0.0])[0])
