"""Where logged figures go: metrics.jsonl always, TensorBoard and Weights & Biases on request."""

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from equiadapt_jax.evaluation.files import whole
from equiadapt_jax.training.config import Logging


class MetricsLog:
    """Writes one JSON line per logged step, `{"step": 20, "train/loss": 1.2, …}`.

    An existing file is continued: its lines up to `after` are kept, later ones dropped, and a step
    that has its line already gets no second one.
    """

    def __init__(self, workdir: Path, settings: Logging, *, after: int = 0, name: str = ""):
        path = workdir / "metrics.jsonl"
        kept = [entry for entry in read_log(path) if entry["step"] <= after]
        with whole(path) as unfinished:
            unfinished.write_text("".join(map(_line, kept)))
        self._last = kept[-1]["step"] if kept else -1
        self._file = path.open("a")
        self._tensorboard, self._wandb = None, None
        if settings.tensorboard:
            self._tensorboard = _import("tensorboardX", "tensorboard").SummaryWriter(
                str(workdir), purge_step=after + 1
            )
        if settings.wandb:
            wandb = _import("wandb", "wandb")
            self._wandb = wandb.init(project=settings.wandb, name=name, dir=str(workdir))

    def __call__(self, step: int, figures: Mapping[str, float]) -> None:
        """Write the figures of a step."""
        if step <= self._last:
            return
        try:
            self._file.write(_line({"step": step, **figures}))
            self._file.flush()
            os.fsync(self._file.fileno())  # a checkpoint that comes after it counts on it
        except OSError as error:
            raise OSError(
                f"{self._file.name} could not be continued at step {step}: {error.strerror}; make "
                "room, then go on with --resume."
            ) from error
        if self._tensorboard:
            for name, value in figures.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb:
            self._wandb.log(dict(figures), step=step)

    def close(self) -> None:
        """Finish all files."""
        with contextlib.suppress(OSError):  # a line that could not be written was told already
            self._file.close()
        if self._tensorboard:
            self._tensorboard.close()
        if self._wandb:
            self._wandb.finish()


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, but for those that are damaged; none where there is no file."""
    if not path.is_file():
        return []
    entries = []
    for line in path.read_text(errors="replace").splitlines():
        with contextlib.suppress(ValueError):  # it was being written when the run was killed
            entry = json.loads(line)
            if isinstance(entry, dict) and isinstance(entry.get("step"), int):
                entries.append(entry)
    return entries


def _line(entry):
    return json.dumps(entry) + "\n"


def _import(module, extra):
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(
            f"Logging to {extra} needs {module}: pip install 'equiadapt-jax[{extra}]'."
        ) from error
