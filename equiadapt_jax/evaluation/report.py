"""What an evaluation leaves for people: a table, a CSV file with a line per image and turn."""

import csv
from collections.abc import Mapping
from pathlib import Path

from equiadapt_jax.evaluation.orbits import Outcome, displayed_turn


def table(metrics: Mapping[str, float], turns: tuple[str, ...], title: str) -> str:
    """Vanilla beside adapted, in percent: accuracy upright, over all turns and for each of them."""
    rows = [("accuracy upright", "accuracy"), (f"mean over {title}", "group_accuracy")]
    rows += [(f"  turned {displayed_turn(turn)}", f"accuracy/{turn}") for turn in turns]
    rows += [("predictions changed", "changed_rate"), ("pose right", "pose_accuracy")]
    width = max(len(name) for name, _ in rows)
    lines = [f"{'in %':{width}}  vanilla  adapted", "─" * (width + 18)]
    for name, key in rows:
        figures = [metrics.get(f"{model}/{key}") for model in ("vanilla", "adapted")]
        cells = ["" if figure is None else f"{100 * figure:.2f}" for figure in figures]
        lines.append(f"{name:{width}}  {cells[0]:>7}  {cells[1]:>7}")
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
