"""What an evaluation leaves: a table, and a directory of per_image.csv, pictures, report.html."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from equiadapt_jax.evaluation import plots
from equiadapt_jax.evaluation.assess import (
    Findings,
    Images,
    broken_images,
    first_images,
    picture,
    wrong_poses,
)
from equiadapt_jax.evaluation.files import whole
from equiadapt_jax.evaluation.orbits import (
    GroupTurns,
    Outcome,
    binned,
    displayed_turn,
    pose_labels,
)
from equiadapt_jax.evaluation.page import write_report
from equiadapt_jax.groups import Group, MatrixGroup

PICTURED = 16  # images shown before and after canonicalization
SUSPECTS = 12  # images shown of those that are most confidently wrong
FILES = ("metrics.json", "per_image.csv", "report.html", "pose_histogram.png",
         "accuracy_against_angle.png", "canonicalization.png")  # fmt: skip


def table(metrics: Mapping[str, float], turns: tuple[str, ...], title: str) -> str:
    """A column per model, in percent: accuracy upright, over all turns and for each of them.

    Below it the mean pose error in degrees, where there is one.
    """
    rows = [("accuracy upright", "accuracy"), (f"mean over {title}", "group_accuracy")]
    rows += [(f"  turned {displayed_turn(turn)}", f"accuracy/{turn}") for turn in turns]
    rows += [("predictions changed", "changed_rate")]
    models = [model for model in ("vanilla", "adapted") if f"{model}/accuracy" in metrics]
    if "adapted/pose_accuracy" in metrics:
        rows += [("pose right", "pose_accuracy")]
    width = max(len(name) for name, _ in rows)
    lines = [f"{'in %':{width}}" + "".join(f"  {model}" for model in models)]
    lines.append("─" * len(lines[0]))
    for name, key in rows:
        figures = [metrics.get(f"{model}/{key}") for model in models]
        cells = ["" if figure is None else f"{100 * figure:.2f}" for figure in figures]
        lines.append(f"{name:{width}}" + "".join(f"  {cell:>7}" for cell in cells))
    if "adapted/pose_error" in metrics:
        lines.append(_pose_error(metrics))
    return "\n".join(lines)


def _pose_error(metrics):
    """How far poses are from where they should be, in one line."""
    of = {"mean": "pose_error", "median": "median_pose_error", "random angles": "random_pose_error"}
    found = [
        f"{name} {metrics[f'adapted/{key}']:.2f}"
        for name, key in of.items()
        if f"adapted/{key}" in metrics
    ]
    return f"pose error in °: {', '.join(found)}"


def leave(
    directory: Path,
    findings: Findings,
    images: Images,
    *,
    group: Group | MatrixGroup | None = None,
    interpolation: str = "linear",
    **page: Any,
) -> None:
    """Write per_image.csv, the pictures and report.html to a directory.

    What an earlier evaluation left there under these names, and this one does not make, is removed.

    Args:
      directory: made if it does not exist.
      findings: of the evaluation.
      images: on which it was made.
      group: whose elements the poses of the adapted model are, None where it has none.
      interpolation: of its canonicalization.
      page: further arguments of `page.write_report`.
    """
    directory.mkdir(parents=True, exist_ok=True)
    written = {"metrics.json", "per_image.csv", "report.html"}
    write_per_image(directory / "per_image.csv", findings.outcomes, findings.classes, group)
    if findings.sweep:
        written.add("accuracy_against_angle.png")
        plots.accuracy_against_angle(directory / "accuracy_against_angle.png", findings.sweep)
    shown: dict[str, Any]
    if group is None:
        shown = {"broken": picture(findings, images, broken_images(findings, SUSPECTS), None)}
    else:
        written |= {"pose_histogram.png", "canonicalization.png"}
        chosen = {
            "pictures": first_images(findings, PICTURED),
            "wrong_poses": wrong_poses(findings, SUSPECTS, group),
        }
        shown = {
            name: picture(findings, images, which, group, interpolation)
            for name, which in chosen.items()
        }
        bins, poses = binned(group, findings.outcomes["adapted"].pose)
        plots.pose_histogram(directory / "pose_histogram.png", poses, GroupTurns(bins).labels)
        _plot_pictures(directory / "canonicalization.png", findings, shown["pictures"], group)
    write_report(directory / "report.html", findings, group=group, **shown, **page)
    for name in FILES:
        for path in directory.glob(f"{name}.*.tmp"):  # of an evaluation that was killed
            path.unlink(missing_ok=True)
        if name not in written:
            (directory / name).unlink(missing_ok=True)


def _plot_pictures(path, findings, pictures, group):
    found = findings.outcomes["adapted"].pose[pictures.image, pictures.turn]
    titles = [
        (f"turned {displayed_turn(findings.turns.labels[turn])}", f"pose {displayed_turn(pose)}")
        for turn, pose in zip(pictures.turn, pose_labels(group, found), strict=True)
    ]
    plots.before_and_after(path, pictures.turned, pictures.canonical, titles)


def write_per_image(
    path: Path,
    outcomes: Mapping[str, Outcome],
    classes: Sequence[str],
    group: Group | MatrixGroup | None,
) -> None:
    """One line per image and turn: what each model says, how sure it is, and the pose found.

    With whether the pose is right and its probability, or for SO(2) and O(2) the error in degrees.
    """
    header, columns = ["image", "turn", "label"], []
    for model, outcome in outcomes.items():
        for name, column in _columns(model, outcome, classes, group).items():
            header.append(name)
            columns.append(column)
    first = next(iter(outcomes.values()))
    with whole(path) as unfinished, unfinished.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        for image, label in enumerate(first.label):
            for turn, name in enumerate(first.labels):
                cells = [column[image][turn] for column in columns]
                writer.writerow([first.name[image], name, classes[label], *cells])


def _columns(model, outcome, classes, group):
    """The cells of each column of a model, (image, turn)."""
    found = {
        model: np.asarray(classes)[outcome.prediction],
        f"{model}_confidence": _written(outcome.confidence, "{:.6f}"),
    }
    if outcome.pose is None:
        return found
    found["pose"] = pose_labels(group, outcome.pose)
    if outcome.pose_error is not None:
        return {**found, "pose_error": _written(outcome.pose_error, "{:.3f}")}
    probability = outcome.pose_probability
    found["pose_right"] = outcome.pose_right.astype(int)
    found["pose_probability"] = (
        np.full(outcome.pose.shape, "") if probability is None else _written(probability, "{:.6f}")
    )
    return found


def _written(values, form):
    return np.vectorize(form.format)(values)
