"""What a model does to every image in many poses: predictions, poses, and figures of them."""

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from equiadapt_jax import devices
from equiadapt_jax.actions import images as image_actions
from equiadapt_jax.groups import Group, MatrixGroup, O

BINS = 24  # of angles, where poses that may be any are counted


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class GroupTurns:
    """Every image under every element of a group, the identity first; `pad` as for `act`."""

    group: Group
    pad: str = "edge"
    fill: float = 0.0

    def __len__(self) -> int:
        return self.group.order

    @property
    def labels(self) -> tuple[str, ...]:
        """One name per element: "r90" for a rotation by 90°, "r90s" where a mirror precedes it."""
        steps = [(360 * self.group.steps(g) / self.group.n, g) for g in range(len(self))]
        return tuple(f"r{angle:g}" + "s" * self.group.reflects(g) for angle, g in steps)

    def apply(self, images, turn, first):
        """(images turned by element number `turn`, angle in radians `(B,)`, mirrored `(B,)`)."""
        angle = 2 * np.pi / self.group.n * self.group.steps(turn)
        mirrored = self.group.reflects(turn)
        shape = images.shape[:1]
        turned = image_actions.act(self.group, turn, images, pad=self.pad, fill=self.fill)
        return turned, jnp.full(shape, angle), jnp.full(shape, mirrored)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class RandomTurns:
    """Every image upright and then by so many angles of its own, uniform on the circle."""

    samples: int
    seed: int = 0
    pad: str = "edge"
    fill: float = 0.0

    def __len__(self) -> int:
        return 1 + self.samples

    @property
    def labels(self) -> tuple[str, ...]:
        """One name per turn: r0, random1, random2 and so on."""
        return ("r0", *(f"random{i + 1}" for i in range(self.samples)))

    def apply(self, images, turn, first):
        """(images turned, the angles, no mirrors); `first` is the number of the first image.

        An image's angles follow from its number, so that they do not depend on the batch size.
        """
        key = jax.random.fold_in(jax.random.key(self.seed), turn)
        numbers = first + jnp.arange(images.shape[0])
        draw = jax.vmap(lambda i: jax.random.uniform(jax.random.fold_in(key, i), maxval=2 * np.pi))
        angle = draw(numbers) * (turn > 0)
        turned = image_actions.rotate(images, angle, pad=self.pad, fill=self.fill)
        return turned, angle, jnp.zeros_like(angle, jnp.int32)


def displayed_turn(turn: str) -> str:
    """A turn's label as people read it: "r90s" is "90° mirrored"."""
    angle = turn.removeprefix("r").removesuffix("s")
    return f"{angle}°{' mirrored' * turn.endswith('s')}"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What was found for N images under E turns: `name` and `label` `(N,)`, the others `(N, E)`.

    `confidence` is the probability of the prediction and `pose_probability` that of the pose, both
    the largest of a softmax. `change` is ‖f(g·x) − f(x)‖ / ‖f(x)‖ of the logits f. A pose is right
    if none is nearer to the applied turn, up to the prior's modes; poses of SO(2) and O(2) are
    matrices `(N, E, 2, 2)`, and `pose_error` is how far they are away from it, in degrees. What a
    model does not give, its poses or their scores, is None. `probabilities` tells that what should
    be logits is nowhere negative and sums to one for every image and turn.
    """

    labels: tuple[str, ...]
    name: np.ndarray
    label: np.ndarray
    prediction: np.ndarray
    confidence: np.ndarray
    change: np.ndarray
    pose: Any
    pose_right: Any
    pose_probability: Any = None
    probabilities: bool = False
    pose_error: Any = None

    @property
    def right(self) -> np.ndarray:
        """Whether each prediction is the label, bool `(N, E)`."""
        return self.prediction == self.label[:, None]


def make_evaluator(
    predict: Callable[..., tuple],
    turns: GroupTurns | RandomTurns,
    group: Group | MatrixGroup | None = None,
    modes: tuple = (0,),
    *,
    traced: bool = True,
    name: str = "",
) -> Callable[[Any, Any, Iterable[Mapping[str, np.ndarray]]], Outcome]:
    """`evaluate(params, state, batches) -> Outcome`, compiled once.

    Args:
      predict: `predict(params, state, images) -> (logits, pose or None)`, or with the scores of the
        poses as a third. Where it also takes `first`, it is told the number of the first image.
      turns: in what poses every image is shown.
      group: whose elements the poses are; needed if there are any.
      modes: poses of an upright image that are right, those most probable under the prior; elements
        of the group.
      traced: whether JAX can trace `predict`; if not, it is called with NumPy arrays.
      name: of the model; `evaluate` then raises FloatingPointError for logits that are not finite,
        and ValueError for images without a label, which TFDS marks by -1.
    """
    numbered = "first" in inspect.signature(predict).parameters

    def look_at(angle, mirrored, logits, pose, *scores):
        if pose is None:
            return {"logits": logits}
        if isinstance(group, MatrixGroup):
            turned = O(2).mirrored(O(2).rotation(angle), mirrored)
            return {"logits": logits, "pose": pose, "pose_error": away(pose, turned, modes)}
        right = [
            _nearest(group, group.compose(pose, group.inverse(mode)), angle, mirrored)
            for mode in modes
        ]
        found = {"logits": logits, "pose": pose, "pose_right": jnp.stack(right).any(0)}
        return {**found, "scores": scores[0]} if scores else found

    @jax.jit
    def look_inside(params, state, images, turn, first):
        turned, angle, mirrored = turns.apply(images, turn, first)
        number = {"first": first} if numbered else {}
        return look_at(angle, mirrored, *predict(params, state, turned, **number))

    turn_only = jax.jit(turns.apply)

    def look_outside(params, state, images, turn, first):
        turned, angle, mirrored = turn_only(images, turn, first)
        turned = np.array(turned)  # a copy, as PyTorch wants to own it
        number = {"first": first} if numbered else {}
        return look_at(angle, mirrored, *predict(params, state, turned, **number))

    look = look_inside if traced else look_outside

    def begun(params, state, batches):
        if traced:
            params, state = devices.copy((params, state))
        first = 0
        for batch in batches:
            if name:
                _check_labelled(batch)
            images = devices.spread(batch["image"]) if traced else batch["image"]
            yield (
                batch,
                [
                    look(params, state, images, np.int32(turn), np.int32(first))
                    for turn in range(len(turns))
                ],
            )
            first += len(batch["mask"])

    def evaluate(params, state, batches):
        names, label, rows, probabilities = [], [], [], True
        for batch, every in devices.fetched(begun(params, state, batches)):
            mask = batch["mask"]
            seen = jax.tree.map(lambda *x: np.stack(x, 1), *every)
            if name:
                _check_finite(name, seen["logits"], batch["name"], turns.labels)
            probabilities = probabilities and _are_probabilities(seen["logits"][mask])
            rows.append(jax.tree.map(lambda x, mask=mask: x[mask], _summarise(**seen)))
            names.append(batch["name"][mask])
            label.append(batch["label"][mask])
        columns = jax.tree.map(lambda *x: np.concatenate(x), *rows)
        return Outcome(
            turns.labels, np.concatenate(names), np.concatenate(label), **columns,
            probabilities=probabilities,
        )  # fmt: skip

    return evaluate


def _summarise(logits, pose=None, pose_right=None, scores=None, pose_error=None):
    """The columns of `Outcome` for logits `(B, E, classes)`."""
    logits = logits.astype(np.float64)
    distance = np.linalg.norm(logits - logits[:, :1], axis=-1)
    size = np.linalg.norm(logits[:, :1], axis=-1)
    return {
        "prediction": logits.argmax(-1),
        "confidence": _largest_probability(logits),
        "change": distance / np.maximum(size, np.finfo(np.float64).tiny),
        "pose": pose,
        "pose_right": pose_right,
        "pose_probability": None if scores is None else _largest_probability(scores),
        "pose_error": pose_error,
    }


def _check_finite(model, logits, images, turns):
    bad = np.argwhere(~np.isfinite(logits))
    if len(bad):
        image, turn, logit = bad[0]
        raise FloatingPointError(
            f"Logit {logit} of {model} is {logits[image, turn, logit]} for image {images[image]}, "
            f"turned {displayed_turn(turns[turn])}: finite numbers are needed."
        )


def _check_labelled(batch):
    without = batch["name"][batch["label"] < 0]
    if len(without):
        raise ValueError(
            f"Image {without[0]} has no label: evaluate on another --split, whose images have one."
        )


def _are_probabilities(logits):
    sums = logits.astype(np.float64).sum(-1)
    return bool(logits.shape[-1] > 1 and (logits >= 0).all() and (abs(sums - 1) <= 1e-3).all())


def _largest_probability(logits):
    logits = logits.astype(np.float64)
    return 1 / np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)


def figures(outcome: Outcome, *, elements: bool = True) -> dict[str, float]:
    """Flat figures of an outcome, whose first turn is the identity.

    `accuracy` upright; `group_accuracy` over all turns; `changed_rate` and `invariance_error` means
    over the turns other than the identity; `identity_rate` and `pose_accuracy`, or for matrices
    `pose_error`, in degrees, and `median_pose_error`; with `elements` also `accuracy/<turn>` and
    `pose_accuracy/<turn>` or `pose_error/<turn>`.
    """
    right = outcome.right
    found = {"accuracy": right[:, 0].mean(), "group_accuracy": right.mean()}
    if right.shape[1] > 1:
        found["changed_rate"] = (outcome.prediction[:, 1:] != outcome.prediction[:, :1]).mean()
        found["invariance_error"] = outcome.change[:, 1:].mean()
    per_turn = {"accuracy": right.mean(0)}
    if outcome.pose_error is not None:
        found["pose_error"] = outcome.pose_error.mean()
        found["median_pose_error"] = np.median(outcome.pose_error)
        per_turn["pose_error"] = outcome.pose_error.mean(0)
    if outcome.pose_right is not None:
        found["identity_rate"] = (outcome.pose[:, 0] == 0).mean()
        found["pose_accuracy"] = outcome.pose_right.mean()
        per_turn["pose_accuracy"] = outcome.pose_right.mean(0)
    if elements:
        for name, values in per_turn.items():
            found |= {f"{name}/{turn}": v for turn, v in zip(outcome.labels, values, strict=True)}
    return {name: float(value) for name, value in found.items()}


def away(pose, turned, modes) -> jax.Array:
    """Degrees `(...)` from poses to what was turned, after the nearest of the modes.

    From 0 to 180, which is also how far away the other side of the mirror is. All are elements of
    O(2), `(..., 2, 2)`.
    """
    whole = O(2)

    def apart(mode):
        right = whole.compose(turned, jnp.asarray(mode, pose.dtype))
        between = whole.compose(pose, whole.inverse(right))
        return jnp.where(whole.reflects(between) == 1, 180, abs(jnp.rad2deg(whole.angle(between))))

    return jnp.stack([apart(mode) for mode in modes]).min(0)


def pose_labels(group: Group | MatrixGroup, poses) -> np.ndarray:
    """Names of poses, as turns have them: "r90", "r90s"; of matrices to a tenth of a degree."""
    if not isinstance(group, MatrixGroup):
        return np.asarray(GroupTurns(group).labels)[poses]
    degrees = np.round(np.rad2deg(group.angle(poses)) % 360, 1) % 360
    mirrored = np.asarray(group.reflects(poses))
    names = [f"r{d:g}" + "s" * m for d, m in zip(degrees.flat, mirrored.flat, strict=True)]
    return np.asarray(names).reshape(degrees.shape)


def binned(group: Group | MatrixGroup, poses) -> tuple[Group, np.ndarray]:
    """(a finite group, its elements nearest to the poses); a finite group's own are as they are."""
    if not isinstance(group, MatrixGroup):
        return group, np.asarray(poses)
    bins = group.subgroup(BINS)
    steps = np.round(np.asarray(group.angle(poses)) * BINS / (2 * np.pi)).astype(np.int32) % BINS
    return bins, steps + BINS * np.asarray(group.reflects(poses))


def _nearest(group, g, angle, mirrored):
    """Whether no element of the group is nearer to the turn than g is."""
    away = angle - 2 * np.pi / group.n * group.steps(g)
    away = jnp.abs((away + np.pi) % (2 * np.pi) - np.pi)
    return (away <= np.pi / group.n + 1e-4) & (group.reflects(g) == mirrored)
