"""What an evaluation leaves: a table, and a directory of per_image.csv, pictures, report.html."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

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
from equiadapt_jax.evaluation.orbits import GroupTurns, Outcome, displayed_turn
from equiadapt_jax.evaluation.page import write_report
from equiadapt_jax.groups import Group

PICTURED = 16  # images shown before and after canonicalization
SUSPECTS = 12  # images shown of those that are most confidently wrong
FILES = ("metrics.json", "per_image.csv", "report.html", "pose_histogram.png",
         "accuracy_against_angle.png", "canonicalization.png")  # fmt: skip


def table(metrics: Mapping[str, float], turns: tuple[str, ...], title: str) -> str:
    """A column per model, in percent: accuracy upright, over all turns and for each of them."""
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
    return "\n".join(lines)


def leave(
    directory: Path,
    findings: Findings,
    images: Images,
    *,
    group: Group | None = None,
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
    poses = GroupTurns(group).labels if group is not None else ()
    write_per_image(directory / "per_image.csv", findings.outcomes, findings.classes, poses)
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
        plots.pose_histogram(directory / "pose_histogram.png", findings.outcomes["adapted"], poses)
        _plot_pictures(directory / "canonicalization.png", findings, shown["pictures"], poses)
    write_report(directory / "report.html", findings, group=group, **shown, **page)
    for name in FILES:
        for path in directory.glob(f"{name}.*.tmp"):  # of an evaluation that was killed
            path.unlink(missing_ok=True)
        if name not in written:
            (directory / name).unlink(missing_ok=True)


def _plot_pictures(path, findings, pictures, poses):
    pose = findings.outcomes["adapted"].pose[pictures.image, pictures.turn]
    titles = [
        (
            f"turned {displayed_turn(findings.turns.labels[turn])}",
            f"pose {displayed_turn(poses[p])}",
        )
        for turn, p in zip(pictures.turn, pose, strict=True)
    ]
    plots.before_and_after(path, pictures.turned, pictures.canonical, titles)


def write_per_image(
    path: Path, outcomes: Mapping[str, Outcome], classes: Sequence[str], poses: Sequence[str]
) -> None:
    """One line per image and turn: what each model says, how sure it is, and the pose found."""
    header = ["image", "turn", "label"]
    for model, outcome in outcomes.items():
        header += [model, f"{model}_confidence"]
        if outcome.pose is not None:
            header += ["pose", "pose_right", "pose_probability"]
    first = next(iter(outcomes.values()))
    with whole(path) as unfinished, unfinished.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        for image, label in enumerate(first.label):
            for turn, name in enumerate(first.labels):
                cells = [
                    c for o in outcomes.values() for c in _cells(o, (image, turn), classes, poses)
                ]
                writer.writerow([first.name[image], name, classes[label], *cells])


def _cells(outcome, at, classes, poses):
    cells = [classes[outcome.prediction[at]], f"{outcome.confidence[at]:.6f}"]
    if outcome.pose is not None:
        probability = outcome.pose_probability
        cells += [poses[outcome.pose[at]], int(outcome.pose_right[at]),
                  "" if probability is None else f"{probability[at]:.6f}"]  # fmt: skip
    return cells
