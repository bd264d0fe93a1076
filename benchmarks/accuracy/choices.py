"""Every way of choosing among poses, in one table: python -m benchmarks.accuracy.choices SHARED --workdir RUN.

RUN is what train.py left of a predictor and a scorer, SHARED holds `data/cifar10_jpeg/test.tar`. The
images and measures are those of run.py. For each turn of each image the scores and the predictions
for all poses are computed once and kept in --cache; every row follows from them, so that a further
way of choosing costs nothing. For 5,000 images and a ResNet-20 with eight poses that is 360,000
passes: some ten minutes on two cores. Prints a Markdown table.
"""  # noqa: E501

import argparse
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import equiadapt_jax as ea
from benchmarks.accuracy import evaluation, images
from benchmarks.accuracy.evaluation import TURNS
from benchmarks.accuracy.table import COLUMNS, number, table
from equiadapt_jax import averaging, devices, energies
from equiadapt_jax.evaluation.predictions import draws
from equiadapt_jax.groups import Group

# Scores (N, |G|) and predictions (N, |G|, K) → predictions (N, K) and poses (N,) or None.
Choice = Callable[[Group, jax.Array, jax.Array], tuple[jax.Array, jax.Array | None]]


@dataclasses.dataclass(frozen=True)
class Poses:
    """Scores `(N, |G|)` and predictions `(N, |G|, K)` of all images under one turn."""

    scores: np.ndarray
    predictions: np.ndarray


def alone(group, scores, predictions):
    """The predictor without a canonicalizer: the identity's prediction."""
    return predictions[:, 0], None


def by_energy(energy: Callable, margin: float = 0.0) -> Choice:
    """The pose of the highest energy of its prediction, behind a gate."""

    def choose(group, scores, predictions):
        pose = energies.gate(energy(predictions), margin).argmax(-1)
        return jnp.take_along_axis(predictions, pose[:, None, None], 1)[:, 0], pose

    return choose


def by_scores(poses: int | None, weighting: str = "scores") -> Choice:
    """An average by the scorer's scores, see `averaging`; the pose is the best one."""

    def choose(group, scores, predictions):
        key = draws(0, scores.shape[0])  # as an evaluation of the run draws
        chosen = averaging.best(group, scores, poses=poses, weighting=weighting, key=key)
        pose = None if weighting == "equal" else scores.argmax(-1)
        return averaging.combine(*chosen, predictions), pose

    return choose


def choices(order: int, margin: float) -> dict[str, tuple[int, bool, Choice]]:
    """Title → passes of the predictor, whether a scorer is needed, the choice."""
    two = min(2, order)
    return {
        "vanilla": (1, False, alone),
        "group average": (order, False, by_scores(None, "equal")),
        "most confident pose": (order, False, by_energy(energies.confidence)),
        f"most confident pose, gate of {margin:g}": (
            order, False, by_energy(energies.confidence, margin)
        ),
        "pose of the least entropy": (order, False, by_energy(energies.entropy)),
        "pose of the highest logit energy": (order, False, by_energy(energies.logit_energy)),
        "single pose": (1, True, by_scores(1)),
        "top-2": (two, True, by_scores(two)),
        "top-2, fading weights": (two, True, by_scores(two, "faded")),
        "weighted frame": (order, True, by_scores(None)),
        "1 sampled pose": (1, True, by_scores(1, "sampled")),
        "2 sampled poses": (two, True, by_scores(two, "sampled")),
        "all sampled poses": (order, True, by_scores(None, "sampled")),
    }  # fmt: skip


def look_at(name: str, run, test: evaluation.Evaluation, cache: Path, batch: int):
    """`Poses` by turn of a run that was loaded, computed where the cache does not have them."""
    params, state, model = devices.copy(run[0]), devices.copy(run[1]), run[2]
    see = jax.jit(lambda networks, x: everything(model, *networks, x))
    whose = f"{name}-{images.digest(*jax.tree.leaves(params))}-{test.digest}"
    found = {}
    for turn in TURNS:
        path = cache / f"{whose}-{turn}.npz"
        if not path.exists():
            print(f"Predicting {path}", file=sys.stderr)
            size = min(batch, len(test.labels))
            parts = evaluation.in_batches(test.images(turn), size)
            seen = [jax.device_get(see((params, state), devices.spread(part))) for part in parts]
            columns = [np.concatenate(c)[: len(test.labels)] for c in zip(*seen, strict=True)]
            path.parent.mkdir(parents=True, exist_ok=True)
            unfinished = path.with_name(path.name + ".unfinished.npz")
            np.savez(unfinished, scores=columns[0], predictions=columns[1])
            unfinished.replace(path)
        with np.load(path) as file:
            found[turn] = Poses(file["scores"], file["predictions"])
    return found


def everything(model: ea.Adapted, params, state, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(scores, predictions for every pose) of images, whatever the scorer reads."""
    if model.features is not None:
        seen, predictions = model.orbit_features(params, state, x)
        return model.score(params, state, seen)[0], predictions
    how = {"pad": model.pad, "fill": model.fill, "interpolation": model.interpolation}
    every = [
        ea.canonicalization.canonicalize(model.group, g, x, **how) for g in range(model.group.order)
    ]
    predictions = jnp.stack([model.predict(params, state, x)[0] for x in every], 1)
    return model.score(params, state, x)[0], predictions


def measure(
    choice: Choice, group: Group, seen: dict[str, Poses], test: evaluation.Evaluation
) -> evaluation.Result:
    """`evaluation` and `turns` of a result, as evaluation.py has them, of what was seen."""
    turns, upright = {}, None
    for turn in TURNS:
        y, pose = choice(group, jnp.asarray(seen[turn].scores), jnp.asarray(seen[turn].predictions))
        classes = np.asarray(y).argmax(-1)
        upright = classes if upright is None else upright
        turns[turn] = {
            "accuracy": float(np.mean(classes == test.labels)),
            "changed": float(np.mean(classes != upright)),
            "pose_accuracy": None,
        }
        if pose is not None:  # of an element of D_n the rotation counts
            poses = np.asarray(pose) % group.n
            right = evaluation.pose_accuracy(poses, test.degrees(turn), group.n)
            turns[turn]["pose_accuracy"] = right
    return {"evaluation": test.digest, "turns": turns}


def results(
    model: ea.Adapted, seen: dict[str, Poses], test: evaluation.Evaluation, margin: float
) -> list[evaluation.Result]:
    """One row for each choice."""
    order, rows = model.group.order, []
    for title, (passes, scored, choice) in choices(order, margin).items():
        reads = scored and model.features is not None
        rows.append(
            measure(choice, model.group, seen, test)
            | {
                "method": title,
                "predictor_passes": order if reads else passes,
                "passes_alone": passes,
            }
        )
    return rows


def changed(result: evaluation.Result) -> str:
    """Predictions that a quarter turn changes, in percent."""
    return f"{100 * np.mean([result['turns'][t]['changed'] for t in ('90', '180', '270')]):.1f}"


SHOWN = {name: COLUMNS[name] for name in ("method", "upright", "over C4", "over C8")} | {
    "random angles": COLUMNS["random angles"],
    "changed by quarter turns": changed,
    "pose right": COLUMNS["pose right"],
    "passes per image": COLUMNS["predictor passes per image"],
    "with a scorer that reads no features": number("passes_alone", "g"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("shared", type=Path)
    parser.add_argument("--workdir", type=Path, required=True, help="what train.py left")
    parser.add_argument("--limit", type=int, help="use so many test images; all by default")
    parser.add_argument("--margin", type=float, default=2.0, help="of the gate, in log-odds")
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--cache", type=Path, default=Path("runs/accuracy/choices"))
    parser.add_argument("--table", type=Path, help="write the table there too")
    arguments = parser.parse_args()
    archive = arguments.shared / "data" / "cifar10_jpeg" / "test.tar"
    try:
        run = ea.load(arguments.workdir)
        turned = arguments.cache / f"evaluation-{arguments.limit or 'all'}.npz"
        images.make(archive, turned, arguments.limit)
        test = evaluation.load(turned)
        seen = look_at(arguments.workdir.name, run, test, arguments.cache, arguments.batch)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(str(error))
    text = table(results(run[-1], seen, test, arguments.margin), SHOWN)
    print(text, end="")
    if arguments.table:
        arguments.table.write_text(text)


if __name__ == "__main__":
    main()
