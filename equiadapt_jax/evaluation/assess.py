"""From models and images to findings: outcomes under a group, at random angles, on a circle."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from equiadapt_jax import canonicalization
from equiadapt_jax.data import evaluation_batches
from equiadapt_jax.evaluation.measures import all_figures
from equiadapt_jax.evaluation.orbits import GroupTurns, Outcome, RandomTurns, make_evaluator
from equiadapt_jax.groups import Group, MatrixGroup, O


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model to evaluate: what `make_evaluator` takes, and its parameters and state."""

    predict: Callable[..., tuple]
    params: Any = None
    state: Any = None
    group: Group | MatrixGroup | None = None
    modes: tuple = (0,)
    traced: bool = True
    name: str = ""


@dataclasses.dataclass(frozen=True)
class Images:
    """Where the images come from, and how they are brought to one size and into batches.

    `split` is the name of the part of the data, for people.
    """

    source: Any  # for len and indexing, as `Dataset.source` gives it
    size: int
    fit: str
    batch_size: int
    split: str = ""

    def __len__(self) -> int:
        return len(self.source)

    def first(self, count: int) -> "Images":
        """The same with the first images only."""
        return dataclasses.replace(self, source=_Chosen(self.source, range(len(self))[:count]))

    def chosen(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """The images of these numbers, float32 `(N, S, S, C)`."""
        chosen = dataclasses.replace(self, source=_Chosen(self.source, indices))
        return next(dataclasses.replace(chosen, batch_size=len(indices)).batches())["image"]

    def batches(self) -> Iterator[dict[str, np.ndarray]]:
        """Every image once, see `data.evaluation_batches`."""
        return evaluation_batches(
            self.source, size=self.size, how=self.fit, batch_size=self.batch_size
        )


class _Chosen:
    """Some examples of a source."""

    def __init__(self, source, indices):
        self._source, self._indices = source, indices

    def __len__(self):
        return len(self._indices)

    def __getitem__(self, index):
        return self._source[int(self._indices[index])]


@dataclasses.dataclass(frozen=True)
class Findings:
    """What an evaluation found.

    `outcomes` under every element, `random` at random angles and `sweep` around the circle are
    dicts by the name of the model, "vanilla" and where there is one "adapted"; the last two may be
    empty. `metrics` are the flat figures of all of them.
    """

    turns: GroupTurns
    classes: tuple[str, ...]
    outcomes: Mapping[str, Outcome]
    random: Mapping[str, Outcome]
    sweep: Mapping[str, Outcome]
    metrics: Mapping[str, float]


def assess(
    subjects: Mapping[str, Subject],
    images: Images,
    turns: GroupTurns,
    classes: Sequence[str],
    *,
    random_angles: int = 0,
    sweep: int = 0,
    sweep_images: int = 1000,
    watch: Callable[[str, Iterable, int], Iterable] = lambda title, batches, total: batches,
) -> Findings:
    """Evaluate models on images, all of them in the same poses.

    Args:
      subjects: the models by their names.
      images: on which.
      turns: the elements by which every image is turned.
      classes: the names of the labels.
      random_angles: so many more turns of every image, each by an angle of its own.
      sweep: so many angles around the circle, for the first `sweep_images` images.
      watch: `watch(title, batches, how many)` passes batches on and may show progress.
    """

    def outcomes(turns, images=images):
        found = {}
        for name, subject in subjects.items():
            evaluate = make_evaluator(
                subject.predict, turns, subject.group, subject.modes,
                traced=subject.traced, name=subject.name or f"the {name} model",
            )  # fmt: skip
            title = f"evaluating {name}, {len(images)} images × {len(turns)} turns"
            total = -(-len(images) // images.batch_size)
            found[name] = evaluate(
                subject.params, subject.state, watch(title, images.batches(), total)
            )
        return found

    found = outcomes(turns)
    random = RandomTurns(random_angles, pad=turns.pad, fill=turns.fill)
    circle = GroupTurns(type(turns.group)(max(sweep, 1)), turns.pad, turns.fill)
    at_random = outcomes(random) if random_angles else {}
    around = outcomes(circle, images.first(sweep_images)) if sweep else {}
    metrics = {
        f"{model}/{name}": value
        for model, outcome in found.items()
        for name, value in all_figures(outcome, classes).items()
    }
    if metrics.get("vanilla/accuracy") and "adapted" in found:
        metrics["adapted/retention"] = (
            metrics["adapted/group_accuracy"] / metrics["vanilla/accuracy"]
        )
    metrics |= _random_figures(at_random) | _sweep_figures(around)
    return Findings(turns, tuple(classes), found, at_random, around, metrics)


def _random_figures(outcomes):
    found = {}
    for model, outcome in outcomes.items():
        found[f"{model}/random_accuracy"] = float(outcome.right[:, 1:].mean())
        if outcome.pose_error is not None:
            found[f"{model}/random_pose_error"] = float(outcome.pose_error[:, 1:].mean())
        if outcome.pose_right is not None:
            found[f"{model}/random_pose_accuracy"] = float(outcome.pose_right[:, 1:].mean())
    return found


def _sweep_figures(outcomes):
    return {
        f"{model}/sweep/{turn}": float(right)
        for model, outcome in outcomes.items()
        for turn, right in zip(outcome.labels, outcome.right.mean(0), strict=True)
    }


@dataclasses.dataclass(frozen=True)
class Pictures:
    """Images to look at: number of the image and of the turn `(N,)`, and pixels `(N, S, S, C)`.

    `turned` is what the model got; `canonical` what the canonicalizer made of it, None without one.
    """

    image: np.ndarray
    turn: np.ndarray
    upright: np.ndarray
    turned: np.ndarray
    canonical: np.ndarray | None


def picture(
    findings: Findings,
    images: Images,
    chosen: Sequence[tuple[int, int]],
    group: Group | MatrixGroup | None,
    interpolation: str = "linear",
) -> Pictures | None:
    """The images of these (image, turn), canonicalized by the poses found, elements of `group`.

    None where nothing was chosen.
    """
    if not chosen:
        return None
    image, turn = np.asarray(chosen, np.int32).reshape(-1, 2).T
    upright, turns = images.chosen(image), findings.turns
    one = jax.jit(lambda x, g: turns.apply(x[None], g, 0)[0][0])
    turned = jnp.stack([one(x, g) for x, g in zip(upright, turn, strict=True)])
    canonical = None
    if group is not None:
        pose = jnp.asarray(findings.outcomes["adapted"].pose[image, turn])
        canonical = canonicalization.canonicalize(
            group, pose, turned, pad=turns.pad, fill=turns.fill, interpolation=interpolation
        )
    return Pictures(image, turn, upright, *jax.device_get((turned, canonical)))


def first_images(findings: Findings, count: int) -> list[tuple[int, int]]:
    """The first images, each under another element."""
    number = len(findings.outcomes["vanilla"].label)
    return [(i, i % len(findings.turns)) for i in range(min(count, number))]


def wrong_poses(
    findings: Findings, count: int, group: Group | MatrixGroup
) -> list[tuple[int, int]]:
    """The (image, turn) whose pose is wrong with the highest probability, one for each image.

    Of SO(2) and O(2) those furthest away. Mirrored images are left out where the group has no
    mirrors: there every pose is wrong.
    """
    outcome = findings.outcomes["adapted"]
    mirrors = group == O(2) if isinstance(group, MatrixGroup) else group.order > group.n
    possible = [mirrors or not name.endswith("s") for name in outcome.labels]
    if outcome.pose_error is not None:
        return _highest(np.where(possible, outcome.pose_error, -1), count)
    if outcome.pose_probability is None:
        return []
    return _highest(np.where(~outcome.pose_right & possible, outcome.pose_probability, -1), count)


def broken_images(findings: Findings, count: int) -> list[tuple[int, int]]:
    """The (image, turn) right upright and wrong when turned, with the highest confidence."""
    outcome = findings.outcomes["vanilla"]
    broken = outcome.right[:, :1] & ~outcome.right
    return _highest(np.where(broken, outcome.confidence, -1), count)


def _highest(values, count):
    """Where the largest values are that are not negative, at most one in each row."""
    column = values.argmax(1)
    best = values[np.arange(len(values)), column]
    rows = np.argsort(-best, kind="stable")[:count]
    return [(int(row), int(column[row])) for row in rows if best[row] >= 0]
