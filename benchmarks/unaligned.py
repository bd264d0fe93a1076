"""Digits in unknown poses, the prior estimated against known: python benchmarks/unaligned.py.

Training images are turned by poses drawn from --poses. Two runs of train.py for every seed, both
with a predictor pretrained on those images: one is told the distribution, the other estimates it.
Both are evaluated on the same test images in every pose. Finished runs under --runs are used again,
if they had the same flags. What is behind `--` goes to both:
python benchmarks/unaligned.py -- --config.adaptation.steps=200
"""

import argparse
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np

from equiadapt_jax import alignment, groups
from equiadapt_jax.evaluation import GroupTurns

COLUMNS = {
    "vanilla, group": "vanilla/group_accuracy",
    "adapted, group": "adapted/group_accuracy",
    "pose right": "adapted/pose_accuracy",
}


def figures(workdir: Path, arguments: list[str]) -> dict[str, float]:
    """The figures of a run, made now if they are not there."""
    path = workdir / "metrics.json"
    if not path.exists():
        command = [sys.executable, "train.py", f"--workdir={workdir}", "--resume", *arguments]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return json.loads(path.read_text())


def distance(group: groups.Group, found: dict[str, float], poses: tuple[float, ...]) -> float:
    """Total variation of the estimated prior and the true one, after the best common shift."""
    estimated = np.array([found[f"prior/{name}"] for name in GroupTurns(group).labels])
    return float(alignment.distance(group, estimated, np.array(poses)))


def shown(values: list[float]) -> str:
    """The mean, and the lowest and highest where there are several."""
    mean = f"{sum(values) / len(values):.4f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.4f} to {max(values):.4f})"


def main() -> None:
    """Run what is missing, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--group", default="cyclic4")
    parser.add_argument("--poses", default="0.6,0.3,0.1,0.0")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--runs", type=Path, default=Path("runs/unaligned"))
    parser.add_argument("more", nargs="*", help="flags of train.py, behind --")
    arguments = parser.parse_args()
    group = groups.from_name(arguments.group)
    poses = tuple(map(float, arguments.poses.split(",")))
    text = f"({','.join(map(str, poses))},)"
    shared = [f"--config.group={group}", f"--config.data.poses={text}", *arguments.more]
    priors = {
        "known": ["--config.prior.name=categorical", f"--config.prior.probabilities={text}"],
        "estimated": ["--config.prior.name=estimated"],
    }
    found: dict[str, list[dict[str, float]]] = {name: [] for name in priors}
    flags = hashlib.sha256(" ".join(arguments.more).encode()).hexdigest()[:8]
    kind = f"{group}-{arguments.poses}" + (f"-{flags}" if arguments.more else "")
    for seed in arguments.seeds.split(","):
        for name, own in priors.items():
            workdir = arguments.runs / f"{kind}-{name}-seed{seed}"
            found[name].append(figures(workdir, [*shared, f"--config.seed={seed}", *own]))
    print(f"| {group}, poses {arguments.poses}, seeds {arguments.seeds} | {' | '.join(found)} |")
    print("|---|" + "---|" * len(found))
    for title, key in COLUMNS.items():
        print(f"| {title} | {' | '.join(shown([m[key] for m in ms]) for ms in found.values())} |")
    distances = [distance(group, metrics, poses) for metrics in found["estimated"]]
    print(f"| total variation to the truth | 0 | {shown(distances)} |")
    seconds = [m["prior/seconds"] for m in found["estimated"]]
    print(f"| seconds to estimate | – | {sum(seconds) / len(seconds):.0f} |")


if __name__ == "__main__":
    main()
