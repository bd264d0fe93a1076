"""What training minimises: the task's loss and the prior's (Mondal et al., arXiv 2310.01647)."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from equiadapt_jax import canonicalization, energies
from equiadapt_jax.actions import images as image_actions
from equiadapt_jax.adaptation import Adapted
from equiadapt_jax.evaluation.orbits import away
from equiadapt_jax.groups import Group, MatrixGroup
from equiadapt_jax.training.config import Augmentation

# objective(params, state, batch, key, step) -> (loss, (state, metrics))
Objective = Callable[..., tuple[jax.Array, tuple[Any, dict[str, jax.Array]]]]

DECAYS = ("cosine", "exponential")


def pretraining(
    model: Adapted,
    augmentation: Augmentation,
    turned_by: Group | MatrixGroup | None = None,
    *,
    any_angle: bool = False,
) -> Objective:
    """The task's loss of the predictor alone, on upright images.

    With `turned_by` on images turned by random elements of that group, or with `any_angle` by
    angles drawn from the whole circle (and mirrored or not, for D_n).
    """

    def turned(group, key, images):
        if any_angle:
            return turn(group, key, images, model.pad, model.fill)[0]
        g = group.random(key, images.shape[:1])
        return image_actions.act(group, g, images, pad=model.pad, fill=model.fill)

    def objective(params, state, batch, key, step=0):
        augment_key, dropout_key = jax.random.split(key)
        if turned_by is None:
            images = augment(batch["image"], augment_key, augmentation)
        else:
            augment_key, turn_key = jax.random.split(augment_key)
            images = augment(batch["image"], augment_key, augmentation, angle=not any_angle)
            images = turned(turned_by, turn_key, images)
        logits, state = model.predict(params, state, images, train=True, key=dropout_key)
        loss = _cross_entropy(logits, batch["label"])
        return loss, (state, {"loss": loss, "accuracy": _accuracy(logits, batch["label"])})

    return objective


def adaptation(
    model: Adapted,
    prior,
    *,
    prior_weight: float,
    augmentation: Augmentation,
    turn_inputs: bool,
    labels: bool = True,
    contrastive_weight: float = 0.0,
    artefact_weight: float = 0.0,
    confidence_penalty: float = 0.0,
    temperature: Callable[[Any], Any] | None = None,
) -> Objective:
    """Task + prior_weight × prior − confidence_penalty × entropy; without labels no task.

    Then the predictor is not called, unless the scorer reads its features. Of a scorer that embeds
    the poses (`orbit_scorer`) the contrastive and the artefact term of `energies` are added with
    their weights, which cost further passes of the scorer: one over the poses, and for the
    artefact term one more over those of the images turned there and back. The entropy is the mean
    of that of p(g|x), in nats: a penalty above 0 keeps scores from being too sure of a pose
    (Pereyra et al. 2017, arXiv 1701.06548), one below 0 makes them surer. `temperature` is that of
    the weights at a step, the model's own without it.

    With `turn_inputs` every image is first turned by an angle drawn from the whole circle (and
    mirrored or not, for D_n), and the prior shifted by the nearest element: otherwise a scorer
    would learn that what was interpolated is not upright. For SO(2) and O(2) by the very element.
    """
    weights = (contrastive_weight, artefact_weight)

    def objective(params, state, batch, key, step=0):
        augment_key, turn_key, model_key, terms_key = jax.random.split(key, 4)
        images = augment(batch["image"], augment_key, augmentation, angle=not turn_inputs)
        applied = None
        if turn_inputs:
            images, applied = turn(model.group, turn_key, images, model.pad, model.fill)
        terms, found = _embedding_terms(model, params, state, images, terms_key, weights)
        now = _at(model, temperature, step)
        if labels:
            (logits, canonical), state = now.apply(params, state, images, train=True, key=model_key)
        else:
            canonical, state = now.canonicalize(params, state, images, train=True, key=model_key)
        loss = prior_loss = prior.loss(model.group, canonical.scores, applied=applied)
        if labels:
            task = _cross_entropy(logits, batch["label"])
            loss = task + prior_weight * prior_loss
            found |= {"task_loss": task, "accuracy": _accuracy(logits, batch["label"])}
        if not _spans_frames(model):
            found["pose_entropy"] = entropy = _entropy(canonical.scores)
            loss = _penalised(loss, confidence_penalty, entropy)
        if temperature is not None:
            found["temperature"] = now.temperature
        loss += terms
        metrics = _pose_metrics(model.group, prior, prior_loss, canonical.pose, applied)
        return loss, (state, {"loss": loss, **found, **metrics})

    return objective


def adaptation_from_features(
    model: Adapted,
    prior,
    *,
    prior_weight: float,
    labels: bool = True,
    confidence_penalty: float = 0.0,
    temperature: Callable[[Any], Any] | None = None,
) -> Objective:
    """The same from what `cache.make` has kept, with no predictor pass.

    A batch holds features, predictions and applied elements for the orbits of its images. The
    task's loss is that of the predictions, summed with the weights of the scores.
    """
    method = "soft" if model.method == "predictions" else model.method

    def objective(params, state, batch, key, step=0):
        dropout_key, noise_key = jax.random.split(key)
        features = batch["features"].astype(jnp.float32)
        scores, state = model.score(params, state, features, train=True, key=dropout_key)
        loss = prior_loss = prior.loss(model.group, scores, applied=batch["applied"])
        now = _at(model, temperature, step).temperature
        found = {} if temperature is None else {"temperature": now}
        weights = canonicalization.weights(scores, method=method, key=noise_key, temperature=now)
        if labels:
            logits = model.combine(scores, batch["predictions"], weights)
            task = _cross_entropy(logits, batch["label"])
            loss = task + prior_weight * prior_loss
            found |= {"task_loss": task, "accuracy": _accuracy(logits, batch["label"])}
        entropy = _entropy(scores)
        loss = _penalised(loss, confidence_penalty, entropy)
        pose = jnp.argmax(scores if method == "soft" else weights, -1)
        found |= _pose_metrics(model.group, prior, prior_loss, pose, batch["applied"])
        return loss, (state, {"loss": loss, **found, "pose_entropy": entropy})

    return objective


def _embedding_terms(model, params, state, images, key, weights):
    """(contrastive and artefact term, weighted; their values by name) of a scorer's embeddings."""
    contrastive_weight, artefact_weight = weights
    total, found = jnp.zeros(()), {}
    if not any(weights):
        return total, found
    dropout_key, angle_key = jax.random.split(key)

    def embed(images):  # with one dropout for both, so that they differ by interpolation alone
        scorer = params["scorer"], state["scorer"]
        return model.scorer.embed(*scorer, images, train=True, key=dropout_key)[0]

    embeddings = embed(images)
    if contrastive_weight:
        found["contrastive_loss"] = energies.contrastive(embeddings)
        total += contrastive_weight * found["contrastive_loss"]
    if artefact_weight:
        angle = jax.random.uniform(angle_key, images.shape[:1], maxval=2 * jnp.pi)
        resampled = energies.there_and_back(images, angle, pad=model.pad, fill=model.fill)
        # Of all poses, so that the one chosen is among them, whichever it will be.
        found["artefact_loss"] = energies.artefact(embeddings, embed(resampled))
        total += artefact_weight * found["artefact_loss"]
    return total, found


def turn(
    group: Group | MatrixGroup, key: jax.Array, images: jax.Array, pad: str, fill: float
) -> tuple[jax.Array, jax.Array]:
    """Images turned by random angles, for D_n and O(2) after a random mirror; and the elements.

    Of finite groups those that are nearest.
    """
    if isinstance(group, MatrixGroup):
        g = group.random(key, images.shape[:-3])
        return image_actions.act(group, g, images, pad=pad, fill=fill), g
    angle_key, mirror_key = jax.random.split(key)
    batch = images.shape[:-3]
    angle = jax.random.uniform(angle_key, batch, maxval=2 * jnp.pi)
    mirrored = jax.random.randint(mirror_key, batch, 0, group.order // group.n)
    images = image_actions.reflect(images, mirrored)
    images = image_actions.rotate(images, angle, pad=pad, fill=fill)
    steps = jnp.round(angle * group.n / (2 * jnp.pi)).astype(jnp.int32) % group.n
    return images, steps + group.n * mirrored


def augment(
    images: jax.Array, key: jax.Array, amount: Augmentation, *, angle: bool = True
) -> jax.Array:
    """A mirror for half of `(B, S, S, C)`, and small random rotations, magnifications and shifts.

    One interpolation, or none.
    """
    if amount.mirror:
        key, mirror_key = jax.random.split(key)
        mirrored = jax.random.bernoulli(mirror_key, shape=images.shape[:1])
        images = image_actions.reflect(images, mirrored)
    turning = amount.angle if angle else 0.0
    if not (turning or amount.scale or amount.shift):
        return images
    batch, size = images.shape[0], images.shape[1]
    noise = jax.random.uniform(key, (batch, 4), minval=-1.0, maxval=1.0)
    theta, zoom = turning * noise[:, 0], jnp.exp(-amount.scale * noise[:, 1])
    cos, sin = zoom * jnp.cos(theta), zoom * jnp.sin(theta)

    def warp(image, cos, sin, shift):
        centred = jnp.arange(size) - (size - 1) / 2
        x, y = centred[None, :], centred[:, None]
        column = cos * x - sin * y + (size - 1) / 2 + shift[0]
        row = sin * x + cos * y + (size - 1) / 2 + shift[1]
        sample = jax.vmap(
            lambda channel: jax.scipy.ndimage.map_coordinates(channel, (row, column), 1, "nearest"),
            in_axes=-1,
            out_axes=-1,
        )
        return sample(image)

    return jax.vmap(warp)(images, cos, sin, size * amount.shift * noise[:, 2:])


def temperatures(start: float, end: float, decay: str, steps: int) -> Callable[[Any], Any] | None:
    """The temperature at each step, from `start` at step 0 to `end` at the last of `steps`.

    `decay` is "cosine", slow at both ends, or "exponential", by the same factor at each step. None
    where `end` is 0: the temperature stays as it is. ValueError for what is not a schedule.
    """
    if decay not in DECAYS:
        raise ValueError(
            f"config.adaptation.temperature_decay is {decay!r}: choose one of {', '.join(DECAYS)}."
        )
    if end < 0 or start <= 0:
        raise ValueError(
            f"config.adaptation.temperature is {start} and temperature_end {end}: both must be "
            "positive, or temperature_end 0 for one that stays."
        )
    if end == 0:
        return None
    if decay == "cosine":
        return optax.cosine_decay_schedule(start, max(steps - 1, 1), end / start)
    return optax.exponential_decay(start, max(steps - 1, 1), end / start)


def _at(model, temperature, step):
    """The model with the temperature of a step."""
    if temperature is None:
        return model
    return dataclasses.replace(model, temperature=temperature(step))


def _entropy(scores):
    log_p = jax.nn.log_softmax(scores.astype(jnp.promote_types(scores.dtype, jnp.float32)), -1)
    log_p = jnp.maximum(log_p, -80)  # −∞ would leave no number: 0 · ∞
    return -jnp.mean(jnp.sum(jnp.exp(log_p) * log_p, -1))


def _penalised(loss, weight, entropy):
    return loss - weight * entropy if weight else loss


def _cross_entropy(logits, labels):
    return jnp.mean(optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels))


def _accuracy(logits, labels):
    return jnp.mean(jnp.argmax(logits, -1) == labels)


def _spans_frames(model):
    """Whether the scorer gives vectors, of which no probabilities are made."""
    return isinstance(model.group, MatrixGroup) and model.refine is None


def _pose_metrics(group, prior, prior_loss, pose, applied):
    if isinstance(group, MatrixGroup):
        applied = group.identity() if applied is None else applied
        error = away(pose, applied, prior.modes(group))
        return {"prior_loss": prior_loss, "pose_error": jnp.mean(error)}
    applied = jnp.zeros_like(pose) if applied is None else applied
    right = [pose == group.compose(applied, mode) for mode in prior.modes(group)]
    return {"prior_loss": prior_loss, "pose_accuracy": jnp.mean(jnp.stack(right).any(0))}
