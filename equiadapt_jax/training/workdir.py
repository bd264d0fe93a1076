"""The directory of a run: whose it is, and config.json in it."""

import dataclasses
import json
import os
import platform
import shlex
import shutil
import sys
import warnings
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from equiadapt_jax.data import Dataset
from equiadapt_jax.evaluation.files import whole
from equiadapt_jax.training.config import Config, differences, fingerprint, from_dict

_PARTS = (
    "metrics.jsonl", "metrics.json", "checkpoints", "pretraining", "eval", "config.json"
)  # fmt: skip


def read_config(workdir: str | os.PathLike) -> tuple[Config, Mapping[str, Any]]:
    """The settings of the run in `workdir`, and of its data the `classes` and the image `shape`.

    Raises FileNotFoundError where there is no run, ValueError where config.json is not one's.
    """
    values = _read(workdir)
    dataset = values.pop("dataset")
    del values["environment"]
    return from_dict(values), dataset


def read_environment(workdir: str | os.PathLike) -> dict[str, Any]:
    """How the run in `workdir` was started: command, versions, device."""
    return _read(workdir)["environment"]


def mark(config: Config, dataset: Mapping[str, Any]) -> str:
    """The fingerprint that a run's checkpoints carry."""
    return fingerprint(config, dataset)


def describe(dataset: Dataset, shape: tuple[int, ...]) -> dict[str, Any]:
    """What is known of the data, enough to rebuild the model without it."""
    return {
        "classes": list(dataset.classes), "shape": list(shape), "version": dataset.version
    }  # fmt: skip


def environment() -> dict[str, Any]:
    """The command, versions and device of this process."""
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "equiadapt-jax")
    devices = jax.devices()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "command": shlex.join(["python", *sys.argv]),
        "versions": {"python": platform.python_version()}
        | {name: metadata.version(name) for name in packages},
        "device": f"{len(devices)} × {devices[0].device_kind}, {cores} CPU cores",
    }


def open_workdir(
    config: Config, dataset: Mapping[str, Any], workdir: Path, *, resume: bool, overwrite: bool
) -> None:
    """Refuse a workdir that holds something else, and leave config.json in one that does not.

    Warns where a run is continued with other versions or on another device.
    """
    present = [name for name in _PARTS if (workdir / name).exists()]
    if overwrite:
        for name in present:  # config.json last: until then the rest is known to be a run's
            path = workdir / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        present = []
    here = environment()
    if "config.json" in present:
        _compare(config, dataset, workdir, resume)
        here = _continued(workdir, here)
    elif present:
        raise ValueError(
            f"{workdir} holds {', '.join(present)} of a run, but no config.json: choose another "
            "--workdir, or replace them with --overwrite."
        )
    workdir.mkdir(parents=True, exist_ok=True)
    values = {**dataclasses.asdict(config), "dataset": dataset, "environment": here}
    with whole(workdir / "config.json") as unfinished:
        unfinished.write_text(json.dumps(values, indent=2) + "\n")


def _read(workdir):
    path = Path(workdir) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{workdir} holds no run (no config.json): train one first.")
    try:
        values = json.loads(path.read_text())
        if not {"dataset", "environment"} <= values.keys():
            raise KeyError
    except (ValueError, KeyError, AttributeError):
        raise ValueError(
            f"{path} is damaged, or not of a run: put back what it was, or train anew."
        ) from None
    return values


def _compare(config, dataset, workdir, resume):
    earlier, earlier_dataset = read_config(workdir)
    different = differences(earlier, config)
    if earlier_dataset != dataset:
        different.append("data: the images are others")
    if different:
        raise ValueError(
            f"{workdir} holds a run with other settings ({'; '.join(different)}): choose "
            "another --workdir, or replace it with --overwrite."
        )
    if not resume:
        raise ValueError(
            f"{workdir} holds a run with these settings: continue it with --resume, replace it "
            "with --overwrite, or choose another --workdir."
        )


def _continued(workdir, here):
    """How the run was begun; a warning if it now goes on differently."""
    begun = read_environment(workdir)
    was, now = ({**e["versions"], "device": e["device"]} for e in (begun, here))
    changed = [f"{n} {was.get(n)} → {now[n]}" for n in now if was.get(n) != now[n]]
    if changed:
        warnings.warn(
            f"The run in {workdir} goes on, but not bit for bit as it would have: "
            f"{', '.join(changed)}.",
            stacklevel=2,
        )
    return begun
