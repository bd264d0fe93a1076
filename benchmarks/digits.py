"""Accuracy on the test digits, means over seeds: python benchmarks/digits.py [--seeds=0,1,2].

Runs train.py for every group and seed that has no finished run under --runs yet, and prints a
table of the figures in their metrics.json.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

COLUMNS = {
    "vanilla upright": "vanilla/accuracy",
    "vanilla, group": "vanilla/group_accuracy",
    "adapted upright": "adapted/accuracy",
    "adapted, group": "adapted/group_accuracy",
    "changed rate": "adapted/changed_rate",
    "pose right at 0°": "adapted/pose_accuracy/r0",
    "pose right at 45°": "adapted/pose_accuracy/r45",
    "retention": "adapted/retention",
    "seconds": "train/seconds",
}


def figures(runs: Path, group: str, seed: int) -> dict[str, float]:
    """The figures of a run, made now if they are not there."""
    workdir = runs / f"digits_vit-{group}-seed{seed}"
    path = workdir / "metrics.json"
    if not path.exists():
        command = [sys.executable, "train.py", f"--workdir={workdir}", "--overwrite",
                   f"--config.group={group}", f"--config.seed={seed}"]  # fmt: skip
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return json.loads(path.read_text())


def row(found: list[dict[str, float]], name: str) -> str:
    """The mean of a figure over runs, and the lowest and highest of them."""
    values = [metrics[name] for metrics in found if name in metrics]
    if not values:
        return "–"
    if name.endswith("seconds"):
        return f"{sum(values) / len(values):.0f}"
    return f"{sum(values) / len(values):.4f} ({min(values):.4f} to {max(values):.4f})"


def main() -> None:
    """Run what is missing, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--groups", default="cyclic4,cyclic8,dihedral4")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    arguments = parser.parse_args()
    groups, seeds = arguments.groups.split(","), [int(s) for s in arguments.seeds.split(",")]
    found = {g: [figures(arguments.runs, g, seed) for seed in seeds] for g in groups}
    print(f"| mean of seeds {arguments.seeds} (range) | {' | '.join(groups)} |")
    print("|---|" + "---|" * len(groups))
    for title, name in COLUMNS.items():
        print(f"| {title} | {' | '.join(row(found[g], name) for g in groups)} |")


if __name__ == "__main__":
    main()
