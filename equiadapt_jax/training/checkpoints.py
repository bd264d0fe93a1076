"""Checkpoints with Orbax: one directory per step, holding all that continuing or evaluating needs.

    <directory>/<step>/model            params and state of the networks
    <directory>/<step>/optimizer        the optimizer's state
    <directory>/<step>/data             the data iterator's state
    <directory>/<step>/checkpoint.json  figures, fingerprint of the settings, digests

A step has its name only once all of it is written, and is believed only where the digests hold.
Until then it is called <step>.unfinished; while it is replaced or removed, <step>.replaced or
<step>.removed; one that was found damaged, <step>.damaged.
Kept are step 0 (the predictor before training), the best step and the two latest.
"""

import errno
import os
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from equiadapt_jax.training import digests
from equiadapt_jax.training.digests import DamagedCheckpoint
from equiadapt_jax.training.step import TrainState


def finished_steps(directory: Path) -> list[int]:
    """The steps whose checkpoints were finished in a directory, if it is there, ascending."""
    names = (p.name for p in directory.glob("*") if p.is_dir() and p.name.isdecimal())
    return sorted(int(name) for name in names if name == str(int(name)))


class Checkpoints:
    """The checkpoints of one run; the best has the highest figure `best_by`.

    Args:
      directory: where they are.
      fingerprint: of the settings they belong to; checkpoints of others are refused.
      create: make the directory, and remove what an interrupted run left half written.

    Raises:
      FileNotFoundError: without `create`, where there is no such directory.
    """

    def __init__(self, directory: str | os.PathLike, fingerprint: str, *, create: bool = False):
        self.directory = Path(directory).expanduser().absolute()
        self._fingerprint = fingerprint
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future | None = None
        if create:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._clear()
        elif not self.directory.is_dir():
            raise FileNotFoundError(
                f"There are no checkpoints in {self.directory}: give the workdir of a training run."
            )

    def steps(self) -> list[int]:
        """The steps there are, ascending, damaged or not."""
        return finished_steps(self.directory)

    def figures(self, step: int) -> dict[str, float]:
        """The figures saved with a step, "best_by" among them if it was validated.

        Raises DamagedCheckpoint where they cannot be believed.
        """
        return digests.read_record(self._path(step))["figures"]

    def best_steps(self) -> list[int]:
        """The validated steps, the best first, the latest of equals before the others.

        Raises DamagedCheckpoint where it cannot be known how good one is.
        """
        records, damaged = self._records()
        if damaged:
            raise next(iter(damaged.values()))
        return _by_merit(records)

    def save(self, state: TrainState, data: Any, figures: Mapping[str, float]) -> None:
        """Save in the background the state, the Grain iterator as it stands, and figures.

        Raises OSError if what was saved before could not be written.
        """
        self.wait()
        # Copies, because the next step overwrites the buffers.
        trees = jax.tree.map(np.array, _trees(state))
        self._pending = self._writer.submit(
            self._write, int(state.step), trees, data.get_state(), dict(figures)
        )

    def restore(self, like: TrainState, data: Any) -> TrainState:
        """The latest state that is not damaged, laid out as `like`; sets the Grain iterator to it.

        Damaged steps after it are set aside as <step>.damaged, with a warning.

        Raises:
          DamagedCheckpoint: there are steps, and all are damaged.
          ValueError: the checkpoints belong to other settings or another model.
        """
        damaged = {}
        for step in reversed(self.steps()):
            try:
                trees, position = self._read(step, _trees(like))
            except DamagedCheckpoint as error:
                damaged[step] = error
                continue
            for later, why in damaged.items():
                aside = self._path(later).with_name(f"{later}.damaged")
                shutil.rmtree(aside, ignore_errors=True)
                self._path(later).rename(aside)
                warnings.warn(f"{why}: continuing from step {step}.", stacklevel=2)
            data.set_state(position)
            restored = jax.tree.map(_place, trees, _trees(like))
            number = jax.device_put(np.int32(step), like.step.sharding)
            return TrainState(number, **restored["model"], optimizer=restored["optimizer"])
        raise DamagedCheckpoint(
            f"No checkpoint in {self.directory} can be used ("
            f"{'; '.join(map(str, damaged.values())) or 'there is none'}): train anew with "
            "--overwrite, or choose another --workdir."
        )

    def restore_model(self, step: int, like: tuple[Any, Any]) -> tuple[Any, Any]:
        """(params, state) of a step, for arrays or shapes like these; on no particular device.

        Raises FileNotFoundError where there is no such step, DamagedCheckpoint where it is damaged,
        ValueError where it belongs to other settings or another model.
        """
        if step not in self.steps():
            raise FileNotFoundError(
                f"There is no checkpoint of step {step} in {self.directory}, but of {self.steps()}."
            )
        like_model = {"params": like[0], "state": like[1]}
        model = jax.tree.map(jnp.asarray, self._read(step, {"model": like_model})[0]["model"])
        return model["params"], model["state"]

    def restore_best(self, like: tuple[Any, Any]) -> tuple[int, tuple[Any, Any], str]:
        """The best step that is not damaged, its (params, state), and what is wrong with others.

        Where some are damaged, that is a warning, too.

        Raises FileNotFoundError where no step is finished, DamagedCheckpoint where only the one
        before training is left.
        """
        records, damaged = self._records()
        errors = list(damaged.values())
        for step in _by_merit(records):
            if errors and step == 0:
                continue  # not trained: no substitute for a step that was
            try:
                restored = self.restore_model(step, like)
            except DamagedCheckpoint as error:
                errors.append(error)
                continue
            why = f"{'; '.join(map(str, errors))}: step {step} is used instead." if errors else ""
            if why:
                warnings.warn(why, stacklevel=2)
            return step, restored, why
        if not errors:
            raise FileNotFoundError(f"There is no finished checkpoint in {self.directory}.")
        why = "; ".join(map(str, errors))
        raise DamagedCheckpoint(f"{why}, and no other trained step is left.")

    def check(self) -> None:
        """Raise OSError if what was being saved is known not to have been written."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Return once everything is on disk; OSError if it could not be written."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Wait, and let go of the directory."""
        try:
            self.wait()
        finally:
            self._writer.shutdown()

    def _path(self, step):
        return self.directory / str(step)

    def _write(self, step, trees, position, figures):
        unfinished = self.directory / f"{step}.unfinished"
        record = {
            "step": step,
            "fingerprint": self._fingerprint,
            "figures": figures,
            "leaves": digests.of_leaves(trees),
        }
        try:
            self._find_room(trees)
            with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
                checkpointer.save(
                    unfinished,
                    args=ocp.args.Composite(
                        data=ocp.args.JsonSave(position),
                        **{name: ocp.args.StandardSave(tree) for name, tree in trees.items()},
                    ),
                    force=True,
                )
            digests.write_record(unfinished, {**record, "files": digests.of_files(unfinished)})
            _to_disk(unfinished)
            self._put(unfinished, step)
        except Exception as error:  # whatever Orbax and tensorstore raise
            for path in self.directory.glob(f"{step}.unfinished*"):
                shutil.rmtree(path, ignore_errors=True)
            last = ", ".join(f"step {good}" for good in self.steps()[-1:]) or "there is none"
            raise OSError(
                f"The checkpoint of step {step} could not be written to {self.directory}: make "
                f"room, then go on with --resume from the last good one, {last} "
                f"({_first_sentence(error)})."
            ) from error
        for old in self._superseded():
            # Under its own name half of it could pass for a checkpoint.
            removed = self._path(old).with_name(f"{old}.removed")
            self._path(old).rename(removed)
            shutil.rmtree(removed, ignore_errors=True)

    def _put(self, unfinished, step):
        """Give a finished step its name; one that has it was saved before its validation."""
        old = self.directory / f"{step}.replaced"
        if self._path(step).exists():
            self._path(step).rename(old)
        unfinished.rename(self._path(step))
        shutil.rmtree(old, ignore_errors=True)
        _sync(self.directory)

    def _clear(self):
        """Remove what an interrupted session left; put back a step that it was replacing."""
        for path in self.directory.iterdir():
            step, _, state = path.name.partition(".")
            if state == "replaced" and not self._path(step).exists():
                path.rename(self._path(step))
            elif state in ("replaced", "removed") or state.startswith("unfinished"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _find_room(self, trees):
        """Raise OSError where the disk is full; tensorstore would print tracebacks of its own."""
        if not hasattr(os, "posix_fallocate"):
            return
        leaves = jax.tree.leaves(trees)
        size = sum(x.nbytes for x in leaves) + 1024 * len(leaves) + 2**16  # and what describes them
        with tempfile.TemporaryFile(dir=self.directory) as file:
            try:
                os.posix_fallocate(file.fileno(), 0, size)
            except OSError as error:  # or the file system cannot tell
                if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                    raise

    def _records(self):
        """What is on record of each step; and of those without a record, what is wrong."""
        records, damaged = {}, {}
        for step in self.steps():
            try:
                records[step] = digests.read_record(self._path(step))
            except DamagedCheckpoint as error:
                damaged[step] = error
        return records, damaged

    def _superseded(self):
        records, _ = self._records()
        validated = _by_merit(records)
        # A run that was stopped between two validations saved a step that no other run has.
        stops = set(records) - set(validated) - {max(records)}
        kept = {0, *validated[:1], *sorted(set(records) - stops)[-2:]}
        return sorted(set(records) - kept)

    def _read(self, step, like):
        """The items of a step that `like` names, as NumPy arrays, and the data's position."""
        directory = self._path(step)
        record = digests.read_record(directory)
        digests.check_files(directory, record["files"])
        if record["fingerprint"] != self._fingerprint:
            raise ValueError(
                f"{directory} belongs to a run with other settings than those asked for: it has "
                f"the fingerprint {record['fingerprint']}, not {self._fingerprint}."
            )
        expected = {p: d for p, d in record["leaves"].items() if p.partition("/")[0] in like}
        digests.check_kinds(directory, like, expected)
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), like)
        items = {name: ocp.args.StandardRestore(tree) for name, tree in abstract.items()}
        try:
            with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
                restored = checkpointer.restore(
                    directory, args=ocp.args.Composite(data=ocp.args.JsonRestore(), **items)
                )
        except Exception as error:  # as above
            raise DamagedCheckpoint(
                f"{directory} cannot be read ({_first_sentence(error)})"
            ) from error
        trees = {name: jax.tree.map(np.asarray, restored[name]) for name in like}
        digests.check_leaves(directory, trees, expected)
        return trees, restored["data"]


def _trees(state: TrainState) -> dict[str, Any]:
    return {"model": {"params": state.params, "state": state.state}, "optimizer": state.optimizer}


def _by_merit(records):
    found = [(r["figures"]["best_by"], s) for s, r in records.items() if "best_by" in r["figures"]]
    return [step for _, step in sorted(found, reverse=True)]


def _to_disk(directory):
    """Return once all of a directory would survive a power cut."""
    for path in sorted(directory.rglob("*"), reverse=True):
        _sync(path)
    _sync(directory)


def _sync(path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _place(x, like):
    return jax.device_put(x, like.sharding)


def _first_sentence(error):
    return " ".join(str(error).split())[:200] or type(error).__name__
