"""What an evaluation leaves for people: a table, a CSV file with a line per image and turn."""

import csv
from collections.abc import Mapping
from pathlib import Path

from equiadapt_jax.evaluation.orbits import Outcome, displayed_turn


def table(metrics: Mapping[str, float], turns: tuple[str, ...], title: str) -> str:
    """Accuracy of vanilla and adapted, in percent: upright, over all turns, for each of them."""
    rows = [("upright", "accuracy"), (f"mean over {title}", "group_accuracy")]
    rows += [(f"  turned {displayed_turn(turn)}", f"accuracy/{turn}") for turn in turns]
    width = max(len(name) for name, _ in rows)
    lines = [f"{'accuracy in %':{width}}  vanilla  adapted", "─" * (width + 18)]
    lines += [
        f"{name:{width}}  {100 * metrics[f'vanilla/{key}']:7.2f}  "
        f"{100 * metrics[f'adapted/{key}']:7.2f}"
        for name, key in rows
    ]
    if "adapted/changed_rate" in metrics:
        changed = [100 * metrics[f"{model}/changed_rate"] for model in ("vanilla", "adapted")]
        lines += [f"{'predictions changed':{width}}  {changed[0]:7.2f}  {changed[1]:7.2f}"]
    lines += [f"{'pose right':{width}}           {100 * metrics['adapted/pose_accuracy']:7.2f}"]
    return "\n".join(lines)


def write_per_image(path: Path, vanilla: Outcome, adapted: Outcome, classes, poses) -> None:
    """One line per image and turn: what both models say, how sure they are, and the pose found."""
    header = ["image", "turn", "label", "vanilla", "vanilla_confidence", "adapted",
              "adapted_confidence", "pose", "pose_right"]  # fmt: skip
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        for image, label in enumerate(adapted.label):
            for turn, name in enumerate(adapted.labels):
                at = (image, turn)
                told = [
                    cell
                    for outcome in (vanilla, adapted)
                    for cell in (classes[outcome.prediction[at]], f"{outcome.confidence[at]:.6f}")
                ]
                pose = (poses[adapted.pose[at]], int(adapted.pose_right[at]))
                writer.writerow([adapted.name[image], name, classes[label], *told, *pose])
