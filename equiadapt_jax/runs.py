"""What a run left: load it into other code, or evaluate it."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from equiadapt_jax import groups
from equiadapt_jax.adaptation import Adapted
from equiadapt_jax.data import evaluation_batches, open_dataset
from equiadapt_jax.evaluation import (
    GroupTurns,
    Outcome,
    RandomTurns,
    figures,
    make_evaluator,
    plots,
)
from equiadapt_jax.evaluation.orbits import displayed_turn
from equiadapt_jax.evaluation.report import table, write_per_image
from equiadapt_jax.training.build import build_model, build_prior
from equiadapt_jax.training.checkpoints import Checkpoints
from equiadapt_jax.training.run import adapted_prediction, vanilla_prediction
from equiadapt_jax.training.workdir import mark, read_config

PICTURED = 16  # images shown before and after canonicalization


def load(workdir: str | os.PathLike, step: int | None = None) -> tuple[Any, Any, Adapted]:
    """(params, state, model) of a run's best checkpoint, or of the given step.

    Step 0 is the predictor before adaptation, behind a scorer that has learned nothing. Checkpoints
    are compared with the digests they were saved with; where the best is damaged, the next best is
    taken, with a warning.

    Raises:
      FileNotFoundError: there is no run, or no such checkpoint.
      ValueError: it is damaged (`DamagedCheckpoint`), or belongs to other settings.
    """
    config, dataset = read_config(workdir)
    model = build_model(config, len(dataset["classes"]))
    example = jnp.zeros((1, *dataset["shape"]))
    like = jax.eval_shape(model.init, jax.random.key(0), example)
    checkpoints = Checkpoints(Path(workdir) / "checkpoints", mark(config, dataset))
    if step is None:
        params, state = checkpoints.restore_best(like)
    else:
        params, state = checkpoints.restore_model(step, like)
    return params, state, model


def evaluate(
    workdir: str | os.PathLike,
    *,
    group: str = "",
    random_angles: int = 0,
    sweep: int = 0,
    sweep_images: int = 1000,
    split: str = "",
    root: str = "",
    data_dir: str = "",
    batch_size: int = 0,
    pictures: str | os.PathLike = "",
) -> tuple[dict[str, float], str]:
    """(metrics, table) of a run's vanilla predictor and adapted model, from its checkpoints alone.

    Args:
      workdir: where train.py left the run.
      group: whose elements turn every image; the run's own by default.
      random_angles: so many more turns of every image, each by an angle of its own.
      sweep: so many angles around the circle, for the first `sweep_images` images.
      split: of the run's dataset; its test split by default.
      root: another image folder of the same classes.
      data_dir: where the prepared dataset lies now.
      batch_size: images per batch.
      pictures: a directory for per_image.csv and PNG files; none are written without it.

    Raises:
      FileNotFoundError, ValueError: no run, no such split, other classes.
    """
    config, facts = read_config(workdir)
    params, state, model = load(workdir)
    vanilla_params, vanilla_state, _ = load(workdir, step=0)
    source = _source(config, facts, split or config.data.test, root, data_dir)

    modes = build_prior(config.prior, model.group).modes

    def watched(name, turns, source):
        batches = _batches(config, source, batch_size)
        total = -(-len(source) // (batch_size or config.evaluation_batch_size))
        title = f"evaluating {name}, {len(source)} images × {len(turns)} turns"
        return tqdm(batches, title, total, leave=False, unit="batch", disable=None)

    def outcomes(turns, source=source):
        vanilla = make_evaluator(vanilla_prediction(model), turns)
        adapted = make_evaluator(adapted_prediction(model), turns, model.group, modes)
        return {
            "vanilla": vanilla(vanilla_params, vanilla_state, watched("vanilla", turns, source)),
            "adapted": adapted(params, state, watched("adapted", turns, source)),
        }

    turns = GroupTurns(groups.from_name(group or config.group), model.pad, model.fill)
    found = outcomes(turns)
    metrics = _measure(found)
    text = table(metrics, turns.labels, str(turns.group))
    if random_angles:
        metrics |= _measure_random(
            outcomes(RandomTurns(random_angles, pad=model.pad, fill=model.fill))
        )
    around = {}
    if sweep:
        first = _First(source, sweep_images)
        around = outcomes(GroupTurns(type(model.group)(sweep), model.pad, model.fill), first)
        metrics |= _measure_sweep(around)
    if pictures:
        directory = Path(pictures)
        directory.mkdir(parents=True, exist_ok=True)
        poses = GroupTurns(model.group).labels
        write_per_image(
            directory / "per_image.csv", found["vanilla"], found["adapted"], facts["classes"], poses
        )
        plots.pose_histogram(directory / "pose_histogram.png", found["adapted"], poses)
        if around:
            plots.accuracy_against_angle(directory / "accuracy_against_angle.png", around)
        batch = next(_batches(config, _First(source, PICTURED), PICTURED))
        _picture(directory / "canonicalization.png", model, params, state, batch["image"], turns)
    return metrics, text


def write_metrics(path: str | os.PathLike, metrics: Mapping[str, float]) -> None:
    """Write figures as JSON, whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps(dict(metrics), indent=2) + "\n")
    unfinished.replace(path)


class _First:
    """The first examples of a source."""

    def __init__(self, source, count):
        self._source, self._count = source, min(count, len(source))

    def __len__(self):
        return self._count

    def __getitem__(self, index):
        return self._source[index]


def _source(config, facts, split, root, data_dir):
    dataset = open_dataset(
        config.data.name, root=root or config.data.root, data_dir=data_dir or config.data.data_dir
    )
    if list(dataset.classes) != facts["classes"]:
        raise ValueError(
            f"The run's classes are {facts['classes']}, those of {dataset.name} are "
            f"{list(dataset.classes)}: evaluate on the classes it was trained on."
        )
    if dataset.channels != facts["shape"][-1]:
        raise ValueError(
            f"The run's images have {facts['shape'][-1]} channels, those of {dataset.name} "
            f"{dataset.channels}: evaluate on images of the same kind."
        )
    return dataset.source(split)


def _batches(config, source, batch_size):
    return evaluation_batches(
        source, size=config.data.size, how=config.data.fit,
        batch_size=batch_size or config.evaluation_batch_size,
    )  # fmt: skip


def _measure(outcomes: Mapping[str, Outcome]) -> dict[str, float]:
    """The figures of both models, each under its name; and the retention."""
    found = {
        f"{model}/{name}": value
        for model, outcome in outcomes.items()
        for name, value in figures(outcome).items()
    }
    if found["vanilla/accuracy"]:
        found["adapted/retention"] = found["adapted/group_accuracy"] / found["vanilla/accuracy"]
    return found


def _measure_random(outcomes):
    found = {}
    for model, outcome in outcomes.items():
        right = outcome.prediction[:, 1:] == outcome.label[:, None]
        found[f"{model}/random_accuracy"] = float(right.mean())
    found["adapted/random_pose_accuracy"] = float(outcomes["adapted"].pose_right[:, 1:].mean())
    return found


def _measure_sweep(outcomes):
    return {
        f"{model}/sweep/{turn}": float(right)
        for model, outcome in outcomes.items()
        for turn, right in zip(
            outcome.labels, (outcome.prediction == outcome.label[:, None]).mean(0), strict=True
        )
    }


def _picture(path, model, params, state, images, turns):
    """Some images turned, each by another element, with what the canonicalizer makes of them."""
    elements = np.arange(len(images)) % len(turns)
    inputs = jnp.concatenate(
        [turns.apply(images[i : i + 1], int(g), i)[0] for i, g in enumerate(elements)]
    )
    canonical, _ = model.canonicalize(params, state, inputs)
    poses = GroupTurns(model.group).labels
    titles = [
        (
            f"turned {displayed_turn(turns.labels[g])}",
            f"pose {displayed_turn(poses[pose])}",
        )
        for g, pose in zip(elements, np.asarray(canonical.pose), strict=True)
    ]
    plots.before_and_after(path, np.asarray(inputs), np.asarray(canonical.inputs), titles)
