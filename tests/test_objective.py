"""What training minimises, against oracles written here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage

import equiadapt_jax as ea
from equiadapt_jax.training import objective
from equiadapt_jax.training.config import Augmentation

IMAGES = np.random.default_rng(0).uniform(size=(6, 12, 12, 2)).astype(np.float32)
LABELS = np.arange(6, dtype=np.int32) % 3


def linear_scorer(group):
    """Scores by a random reading of every pose: equivariant, with parameters, quick."""

    def init(key, x):
        return {"w": jax.random.normal(key, x.shape[1:])}

    def apply(params, x):
        poses = jnp.stack(
            [ea.actions.images.act(group, group.inverse(g), x) for g in group.elements()], 1
        )
        return jnp.einsum("bghwc,hwc->bg", poses, params["w"]) / 10

    return ea.from_function(apply, init)


def linear_predictor():
    return ea.from_function(
        lambda params, x: x.reshape(x.shape[0], -1) @ params["w"],
        lambda key, x: {"w": jax.random.normal(key, (x[0].size, 3)) / 10},
    )


def refuses(params, x):
    raise RuntimeError("the predictor was run")


def setting(group, predictor=None, **options):
    model = ea.adapt(group, linear_scorer(group), predictor or linear_predictor(), **options)
    return model, *model.init(jax.random.key(1), jnp.asarray(IMAGES))


def test_the_loss_is_the_tasks_plus_the_weighted_priors():
    group = ea.groups.Cyclic(4)
    model, params, state = setting(group)
    loss = objective.adaptation(
        model,
        ea.priors.Identity(),
        prior_weight=7.0,
        augmentation=Augmentation(),
        turn_inputs=False,
    )
    batch = {"image": jnp.asarray(IMAGES), "label": jnp.asarray(LABELS)}
    value, (_, metrics) = loss(params, state, batch, jax.random.key(0))
    (logits, canonical), _ = model.apply(params, state, batch["image"])
    logits, scores = np.float64(logits), np.float64(canonical.scores)
    task = np.mean(np.log(np.exp(logits).sum(-1)) - logits[np.arange(6), LABELS])
    prior = np.mean(np.log(np.exp(scores).sum(-1)) - scores[:, 0])
    np.testing.assert_allclose(value, task + 7 * prior, rtol=1e-5)
    np.testing.assert_allclose(metrics["accuracy"], np.mean(logits.argmax(-1) == LABELS))
    np.testing.assert_allclose(metrics["pose_accuracy"], np.mean(scores.argmax(-1) == 0))


def test_without_labels_the_predictor_is_not_run():
    group = ea.groups.Cyclic(4)
    model = ea.adapt(group, linear_scorer(group), ea.from_function(refuses))
    params = {"scorer": {"w": jnp.ones(IMAGES.shape[1:])}, "predictor": {}}
    loss = objective.adaptation(
        model, ea.priors.Identity(), prior_weight=7.0, augmentation=Augmentation(),
        turn_inputs=False, labels=False,
    )  # fmt: skip
    batch = {"image": jnp.asarray(IMAGES)}
    value, _ = loss(params, {"scorer": {}, "predictor": {}}, batch, jax.random.key(0))
    assert np.isfinite(value)


@pytest.mark.parametrize("group", [ea.groups.Cyclic(8), ea.groups.Dihedral(3)], ids=str)
def test_turned_inputs_come_with_the_nearest_element(group):
    # The coordinates as two channels: the further apart two poses, the further their images.
    y, x = np.mgrid[:16, :16] - 7.5
    image = jnp.asarray(np.stack([x, y], -1), jnp.float32)
    images = jnp.broadcast_to(image, (300, *image.shape))
    turned, applied = objective.turn(group, jax.random.key(3), images, "edge", 0.0)
    assert set(np.unique(applied)) == set(range(group.order))
    every = np.asarray(ea.actions.images.orbit(group, image)).reshape(group.order, -1)
    distance = np.linalg.norm(np.asarray(turned).reshape(300, 1, -1) - every, axis=-1)
    # Halfway between two elements rounding and interpolation may tell either.
    assert np.mean(distance.argmin(-1) == applied) > 0.95


def test_turning_prevents_nothing_for_an_equivariant_scorer():
    """For an exact group the shifted prior of a turned image is the prior of the image."""
    group = ea.groups.Dihedral(4)
    model, params, state = setting(group)
    canonical, _ = model.canonicalize(params, state, jnp.asarray(IMAGES))
    g = jnp.arange(6, dtype=jnp.int32)
    turned = ea.actions.images.act(group, g, jnp.asarray(IMAGES))
    again, _ = model.canonicalize(params, state, turned)
    prior = ea.priors.Identity()
    np.testing.assert_allclose(
        prior.loss(group, canonical.scores),
        prior.loss(group, again.scores, applied=g),
        rtol=1e-5,
    )


def test_augmentation_moves_pixels_as_scipy_does():
    amount = Augmentation(angle=0.3, scale=0.2, shift=0.1)
    key = jax.random.key(5)
    found = objective.augment(jnp.asarray(IMAGES), key, amount)
    noise = np.float64(jax.random.uniform(key, (6, 4), minval=-1.0, maxval=1.0))
    size = IMAGES.shape[1]
    for image, result, (turn, zoom, across, down) in zip(IMAGES, found, noise, strict=True):
        theta, scale = 0.3 * turn, np.exp(-0.2 * zoom)
        # Output pixel to input pixel, (row, column): a counter-clockwise turn shows at (x, y) what
        # was at (cos x − sin y, sin x + cos y), y pointing down.
        matrix = scale * np.array([[np.cos(theta), np.sin(theta)], [-np.sin(theta), np.cos(theta)]])
        centre = np.full(2, (size - 1) / 2)
        offset = centre - matrix @ centre + 0.1 * size * np.array([down, across])
        for channel in range(2):
            expected = scipy.ndimage.affine_transform(
                np.float64(image[..., channel]), matrix, offset, order=1, mode="nearest"
            )
            np.testing.assert_allclose(result[..., channel], expected, atol=2e-5)


def test_no_augmentation_leaves_the_bits_alone():
    key = jax.random.key(0)
    images = jnp.asarray(IMAGES)
    assert objective.augment(images, key, Augmentation()) is images
    assert objective.augment(images, key, Augmentation(angle=0.3), angle=False) is images


def scores_of(model, params, state):
    return np.float64(model.canonicalize(params, state, jnp.asarray(IMAGES))[0].scores)


@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize("weight", [0.5, -2.0])
def test_the_confidence_penalty_takes_its_share_of_the_entropy_from_the_loss(labels, weight):
    model, params, state = setting(ea.groups.Cyclic(4))
    batch = {"image": jnp.asarray(IMAGES), "label": jnp.asarray(LABELS)}
    values = [
        objective.adaptation(
            model, ea.priors.Identity(), prior_weight=7.0, augmentation=Augmentation(),
            turn_inputs=False, labels=labels, confidence_penalty=w,
        )(params, state, batch, jax.random.key(0))
        for w in (weight, 0.0)
    ]  # fmt: skip
    p = np.exp(scores_of(model, params, state))
    p /= p.sum(-1, keepdims=True)
    entropy = -(p * np.log(p)).sum(-1).mean()
    np.testing.assert_allclose(values[0][0] - values[1][0], -weight * entropy, rtol=1e-4)
    np.testing.assert_allclose(values[0][1][1]["pose_entropy"], entropy, rtol=1e-5)
    assert values[0][0] == values[0][1][1]["loss"]


def test_impossible_poses_have_no_entropy_and_finite_derivatives():
    scores = jnp.array([[0.0, 1.0, -jnp.inf], [0.0, -3e4, -3e4]])
    value, gradient = jax.value_and_grad(objective._entropy)(scores)
    p = 1 / (1 + np.e)
    np.testing.assert_allclose(value, -(p * np.log(p) + (1 - p) * np.log(1 - p)) / 2, rtol=1e-6)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("decay", ["cosine", "exponential"])
def test_temperatures_go_from_the_first_to_the_last(decay):
    schedule = objective.temperatures(2.0, 0.5, decay, 11)
    for step in range(11):
        share = step / 10
        wanted = {
            "cosine": 0.5 + 1.5 * (1 + np.cos(np.pi * share)) / 2,
            "exponential": 2 * (0.5 / 2) ** share,
        }[decay]
        np.testing.assert_allclose(schedule(jnp.int32(step)), wanted, rtol=1e-6)
    assert objective.temperatures(2.0, 0.0, decay, 11) is None
    np.testing.assert_allclose(objective.temperatures(2.0, 0.5, decay, 1)(0), 2.0)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [((1.0, 0.5, "linear", 3), "temperature_decay is 'linear': choose one of cosine, exponential"),
     ((1.0, -0.5, "cosine", 3), r"is 1\.0 and temperature_end -0\.5: both must be"),
     ((0.0, 0.5, "cosine", 3), r"is 0\.0 and temperature_end 0\.5: both must be")],
)  # fmt: skip
def test_what_is_no_schedule_is_refused(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        objective.temperatures(*arguments)


def test_a_step_is_made_at_its_own_temperature():
    """Loss and gradient are those of a model that has always had it."""
    group = ea.groups.Cyclic(4)
    schedule = objective.temperatures(2.0, 0.25, "exponential", 4)
    batch = {"image": jnp.asarray(IMAGES), "label": jnp.asarray(LABELS)}

    def gradient(temperature, scheduled, step):
        model, params, state = setting(group, temperature=temperature, method="soft")
        loss = objective.adaptation(
            model, ea.priors.Identity(), prior_weight=1.0, augmentation=Augmentation(),
            turn_inputs=False, temperature=scheduled,
        )  # fmt: skip
        derivative = jax.jit(jax.grad(loss, has_aux=True))
        by, (_, figures) = derivative(params, state, batch, jax.random.key(0), step)
        assert figures.get("temperature") == (None if scheduled is None else scheduled(step))
        return by["scorer"]["w"]

    for step in (0, 3):
        fixed = gradient(float(schedule(step)), None, step)
        np.testing.assert_allclose(gradient(1.0, schedule, step), fixed, rtol=2e-5, atol=1e-7)
    assert np.abs(gradient(1.0, schedule, 3) - gradient(1.0, schedule, 0)).max() > 1e-3
