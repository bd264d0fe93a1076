"""Speed of everything, beside every peer that is installed, in one table: python -m benchmarks.speed.run.

All ways to do a thing are timed in turns, at least fifteen times; ratios come first, because times
differ from machine to machine. Floors are what the machine was measured to copy and to multiply,
just before. `--reference PYTHON` is an interpreter with the PyTorch package equiadapt, which
`python -m benchmarks.accuracy.environment` makes; PyTorch, kornia and dm_pix are timed where they
can be imported here. `--scorers RUN …` are runs of train.py whose scorers are measured, each for
its group, with the poses they get right; other scorers have random parameters, which takes as long.
Writes speed.json, speed.md and speed.png to --output. `--check stored.json` measures and fails
where a ratio is larger than it was by more than --tolerance.
"""  # noqa: E501

import argparse
import datetime
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import sys
from pathlib import Path

import jax

from benchmarks.speed import results, timing
from benchmarks.speed.reference import Reference
from benchmarks.speed.results import Comparison
from benchmarks.speed.settings import Settings
from equiadapt_jax.training.build import group_of
from equiadapt_jax.training.workdir import read_config

PARTS = ("warp", "canonicalization", "adaptation", "training", "program")
PACKAGES = ("jax", "jaxlib", "flax", "numpy", "torch", "kornia", "dm-pix")


def measure(settings: Settings, parts: list[str]) -> list[Comparison]:
    """All comparisons of the parts; one that ends with an error is among the missing."""
    found: list[Comparison] = []
    for part in parts:
        print(f"Measuring {part}", file=sys.stderr, flush=True)
        try:
            found += importlib.import_module(f"benchmarks.speed.{part}").measure(settings)
        except (ImportError, RuntimeError) as error:
            settings.refuse(part, error)
    return found


def open_reference(asked: argparse.Namespace, missing: dict[str, str]) -> Reference | None:
    """The other process, if it is asked for and can be started."""
    if asked.reference is None:
        missing["equiadapt"] = "no --reference"
        return None
    try:
        return Reference(asked.reference, asked.threads)
    except (OSError, RuntimeError) as error:
        missing["equiadapt"] = str(error)
        return None


def trained_for(run: Path) -> str:
    """The group of a run whose scorer can be measured; a sentence and the end for another."""
    config, _ = read_config(run)
    if config.canonicalizer != "group_conv" or config.scorer.refine:
        sys.exit(
            f"The scorer of {run} is {config.canonicalizer}: give --scorers runs of group_conv for "
            "finite groups, as configs/cifar10_resnet20.py:light makes them."
        )
    return str(group_of(config))


def machine() -> dict[str, object]:
    """What was measured on, and with what."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "date": datetime.date.today().isoformat(),
        "device": jax.devices()[0].device_kind,
        "backend": jax.default_backend(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "versions": versions,
        "command": " ".join(["python -m benchmarks.speed.run", *sys.argv[1:]]),
    }


def text(comparisons: list[Comparison], about: dict, settings: Settings) -> str:
    """Everything as Markdown."""
    bandwidth, rate = settings.floors.bytes_per_second, settings.floors.operations_per_second
    facts = [
        f"{about['date']}; {about['device']}, {about['cores']} cores; `{about['command']}`",
        f"copies {bandwidth / 1e9:.1f} GB/s, multiplies {rate / 1e9:.0f} billion operations/s",
        ", ".join(f"{name} {version}" for name, version in about["versions"].items()),
    ]
    missing = [f"- {name}: {why}" for name, why in settings.missing.items()]
    parts = [
        "; ".join(facts), results.table(comparisons), results.costs_table(comparisons),
        *(["Not measured:\n\n" + "\n".join(missing) + "\n"] if missing else []),
    ]  # fmt: skip
    return "\n\n".join(parts)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--parts", default=",".join(PARTS), help="which of them, by commas")
    parser.add_argument("--rounds", type=int, default=15, help="of each comparison")
    parser.add_argument("--batch", type=int, default=32, help="images at a time in inference")
    parser.add_argument("--dtype", default="float32", help="of images and predictors there")
    parser.add_argument("--small", action="store_true", help="tiny sizes, to see that all runs")
    parser.add_argument("--reference", type=Path, help="a Python that has equiadapt")
    parser.add_argument(
        "--working",
        type=int,
        nargs="+",
        help="pixels to which equiadapt resizes in canonicalization; 32, 56 and 96 by default",
    )
    parser.add_argument("--scorers", type=Path, nargs="*", default=(), help="runs of train.py")
    parser.add_argument("--threads", type=int, help="of PyTorch; as many as it likes by default")
    parser.add_argument("--output", type=Path, default=Path("runs/speed"))
    parser.add_argument("--check", type=Path, help="ratios to hold, a speed.json")
    parser.add_argument("--tolerance", type=float, default=1.25, help="of the ratios")
    found = parser.parse_args()
    unknown = set(found.parts.split(",")) - set(PARTS)
    if unknown:
        parser.error(f"unknown parts {', '.join(sorted(unknown))}: choose of {', '.join(PARTS)}")
    if found.working and found.reference is None:
        parser.error(f"--working={found.working} is for equiadapt: give its --reference as well")
    if found.working and (min(found.working) < 1 or len(set(found.working)) < len(found.working)):
        parser.error(f"--working={found.working}: give different sizes of at least one pixel")
    return found


def main() -> None:
    asked = arguments()
    missing: dict[str, str] = {}
    if asked.threads and importlib.util.find_spec("torch"):
        importlib.import_module("torch").set_num_threads(asked.threads)
    reference = open_reference(asked, missing)
    scorers = {trained_for(run): run for run in asked.scorers}
    floors = timing.floors(asked.small)
    settings = Settings(
        asked.rounds, asked.small, asked.batch, asked.dtype, floors, reference, asked.working,
        scorers, missing,
    )  # fmt: skip
    comparisons = measure(settings, asked.parts.split(","))
    if reference:
        reference.close()
    about = machine()
    said = text(comparisons, about, settings)
    print(said)
    found = results.as_json(comparisons)
    asked.output.mkdir(parents=True, exist_ok=True)
    written = {**about, "floors": vars(floors), "missing": missing, "comparisons": found}
    (asked.output / "speed.json").write_text(json.dumps(written, indent=1))
    (asked.output / "speed.md").write_text(said)
    results.plot(comparisons, asked.output / "speed.png")
    if asked.check:
        for what in results.unmeasured(found, asked.check, asked.parts.split(",")):
            print(f"Not held, since it was not measured: {what}", file=sys.stderr)
        worse = results.slower(found, asked.check, asked.tolerance)
        sys.exit("\n".join(worse) if worse else None)


if __name__ == "__main__":
    main()
