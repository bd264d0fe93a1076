"""What a frozen predictor makes of every pose of the training images, made once and kept.

A scorer that reads features then trains without a predictor pass, many epochs in minutes.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from equiadapt_jax import devices
from equiadapt_jax.actions import images as image_actions
from equiadapt_jax.adaptation import Adapted
from equiadapt_jax.evaluation.predictions import draws
from equiadapt_jax.training.config import Augmentation
from equiadapt_jax.training.objective import augment, turn

Arrays = dict[str, np.ndarray]


def size(model: Adapted, params, state, shape: tuple[int, ...], rows: int) -> int:
    """Bytes that `make` keeps for so many versions of images of a shape (S, S, C)."""
    images = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    features, predictions = jax.eval_shape(model.orbit_features, params, state, images)
    return rows * (2 * features.size + 4 * predictions.size)


def make(
    model: Adapted,
    params: Any,
    state: Any,
    batches: Iterable[Mapping[str, np.ndarray]],
    count: int,
    *,
    key: jax.Array,
    variants: int = 1,
    augmentation: Augmentation | None = None,
    turn_inputs: bool = False,
) -> Arrays:
    """Features and predictions of the predictor for the orbits of images.

    Args:
      model: with a scorer that reads features.
      params: its parameters, of which only the predictor's are used; and
      state: its state.
      batches: of `data.evaluation_batches`, every image once.
      count: how many images they hold.
      key: for what is random.
      variants: versions of each image. The first is the image itself, the others are augmented;
        with `augmentation.mirror` every second one is mirrored.
      augmentation: of all but the first.
      turn_inputs: turn each version by an angle of its own, see `objective.adaptation`.

    Returns:
      Arrays with a row for each version of each image: `features` float16 (N, |G|, F),
      `predictions` float32 (N, |G|, K), `label` int32 (N,), and `applied` int32 (N,), the element
      that is nearest to how the image was turned.
    """

    def version(image, variant, number):
        """What is random about an image depends on its number, not on the batch it comes in."""
        augment_key, turn_key = jax.random.split(
            jax.random.fold_in(jax.random.fold_in(key, variant), number)
        )
        image = image[None]
        if augmentation is not None:
            unmirrored = dataclasses.replace(augmentation, mirror=False)
            changed = augment(image, augment_key, unmirrored, angle=not turn_inputs)
            changed = image_actions.reflect(changed, augmentation.mirror & (variant % 2 == 1))
            image = jnp.where(variant > 0, changed, image)
        applied = jnp.zeros(1, jnp.int32)
        if turn_inputs:
            image, applied = turn(model.group, turn_key, image, model.pad, model.fill)
        return image[0], applied[0]

    @jax.jit
    def look(networks, images, variant, first):
        numbers = first + jnp.arange(images.shape[0])
        images, applied = jax.vmap(version, in_axes=(0, None, 0))(images, variant, numbers)
        features, predictions = model.orbit_features(*networks, images)
        return features.astype(jnp.float16), predictions.astype(jnp.float32), applied

    # Arguments of the compiled function, in which they would otherwise be constants.
    networks = devices.copy(tuple({"predictor": tree["predictor"]} for tree in (params, state)))

    def begun():
        first = 0
        for batch in batches:
            images = devices.spread(batch["image"])
            for variant in range(variants):
                seen = look(networks, images, np.int32(variant), np.int32(first))
                yield (batch, variant, first), seen
            first += int(batch["mask"].sum())

    kept: Arrays = {}
    last = 0
    for (batch, variant, first), seen in devices.fetched(begun()):
        mask = batch["mask"]
        rows = slice(first, last := first + int(mask.sum()))
        for name, values in zip(_NAMES, (*seen, batch["label"]), strict=True):
            if name not in kept:
                kept[name] = np.empty((variants, count, *values.shape[1:]), values.dtype)
            kept[name][variant, rows] = values[mask]
    if last != count:
        raise ValueError(f"The batches hold {last} images, not {count}: give their number.")
    return {name: values.reshape(-1, *values.shape[2:]) for name, values in kept.items()}


def make_validation(
    model: Adapted, arrays: Arrays, modes: tuple[int, ...], batch_size: int
) -> Callable[[Any, Any], tuple[float, float]]:
    """`validate(params, state) -> (pose accuracy, accuracy)` on features of held-out images."""

    @jax.jit
    def look(params, state, first, features, predictions, label, applied):
        scores, _ = model.score(params, state, features.astype(jnp.float32))
        pose = jnp.argmax(scores, -1)
        right = [pose == model.group.compose(applied, mode) for mode in modes]
        key = draws(first, scores.shape[0])
        prediction = model.combine(scores, predictions, key=key).argmax(-1)
        return prediction == label, jnp.stack(right).any(0)

    def validate(params, state):
        params, state = devices.copy((params, state))
        seen = []
        for start in range(0, len(arrays["label"]), batch_size):
            part = [devices.spread(arrays[name][start : start + batch_size]) for name in _ARGUMENTS]
            seen.append(jax.device_get(look(params, state, np.int32(start), *part)))
        accuracy, pose = (
            float(np.concatenate(column).mean()) for column in zip(*seen, strict=True)
        )
        return pose, accuracy

    return validate


_NAMES = ("features", "predictions", "applied", "label")
_ARGUMENTS = ("features", "predictions", "label", "applied")
