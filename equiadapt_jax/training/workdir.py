"""The directory of a run: whose it is, and config.json in it."""

import contextlib
import dataclasses
import errno
import os
import platform
import shlex
import shutil
import sys
import warnings
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from equiadapt_jax.data import Dataset
from equiadapt_jax.evaluation.files import whole
from equiadapt_jax.training.config import Config, differences, fingerprint, from_dict
from equiadapt_jax.training.digests import DamagedCheckpoint, seal, unseal

_PARTS = (
    "metrics.jsonl", "metrics.json", "checkpoints", "pretraining", "estimating", "prior.json",
    "eval", "config.json",
)  # fmt: skip
_EVALUATIONS = "eval-*/report.html"  # of other turns or images, see runs.evaluation_directory


def read_config(workdir: str | os.PathLike) -> tuple[Config, Mapping[str, Any]]:
    """The settings of the run in `workdir`, and of its data the `classes` and the image `shape`.

    Raises FileNotFoundError where there is no run, ValueError where config.json is not one's.
    """
    values = _read(workdir)
    settings = values["settings"]
    if "name" in settings["scorer"]:  # of a run from when the canonicalizer was named there
        settings["canonicalizer"] = settings["scorer"].pop("name")
    return from_dict(settings), values["dataset"]


def read_environment(workdir: str | os.PathLike) -> dict[str, Any]:
    """How the run in `workdir` was started: command, versions, device."""
    return _read(workdir)["environment"]


def read_fingerprint(workdir: str | os.PathLike) -> str:
    """What the checkpoints of the run in `workdir` carry."""
    return _read(workdir)["fingerprint"]


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
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in packages},
        },
        "device": f"{len(devices)} × {devices[0].device_kind}, {cores} CPU cores",
    }


def _version(package):
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # used from where it lies
        return "not installed"


def open_workdir(
    config: Config, dataset: Mapping[str, Any], workdir: Path, *, resume: bool, overwrite: bool
) -> str:
    """Refuse a workdir that holds something else, leave config.json in one that does not.

    Returns the fingerprint that the run's checkpoints carry. Warns where a run is continued with
    other versions or on another device.
    """
    present = [name for name in _PARTS if (workdir / name).exists()]
    if overwrite:
        for path in workdir.glob(_EVALUATIONS):
            shutil.rmtree(path.parent)
        for name in present:  # config.json last: until then the rest is known to be a run's
            path = workdir / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        present = []
    here, carried = environment(), fingerprint(config, dataset)
    if "config.json" in present:
        _compare(config, dataset, workdir, resume)
        here, carried = _continued(workdir, here), read_fingerprint(workdir)
    elif present:
        raise ValueError(
            f"{workdir} holds {', '.join(present)} of a run, but no config.json: choose another "
            "--workdir, or replace them with --overwrite."
        )
    workdir.mkdir(parents=True, exist_ok=True)
    for path in (p for name in _PARTS for p in workdir.glob(f"{name}.*.tmp")):
        path.unlink()  # a session that was killed left it
    settings = dataclasses.asdict(config)
    values = {
        "settings": settings, "dataset": dataset, "fingerprint": carried, "environment": here
    }  # fmt: skip
    with whole(workdir / "config.json") as unfinished:
        unfinished.write_text(seal(values))
    return carried


@contextlib.contextmanager
def only_one(workdir: Path) -> Iterator[None]:
    """Hold the directory while training in it; ValueError where another process does."""
    workdir.mkdir(parents=True, exist_ok=True)
    with (workdir / ".lock").open("w") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (OSError, ImportError) as error:  # Windows has no such module
            if getattr(error, "errno", None) in (errno.EACCES, errno.EAGAIN):
                raise ValueError(
                    f"Another process is training in {workdir}: wait until it has ended, or choose "
                    "another --workdir."
                ) from None
        yield  # also where the file system knows no locks


def _read(workdir):
    path = Path(workdir) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{workdir} holds no run (no config.json): train one first.")
    try:
        return unseal(path, {"settings", "dataset", "fingerprint", "environment"})
    except DamagedCheckpoint as error:
        raise DamagedCheckpoint(f"{error}: put back what it was, or train anew.") from None


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
