"""The training loop: steps, logged lines, validation, checkpoints, a progress bar."""

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
from tqdm import tqdm

from equiadapt_jax.training.checkpoints import Checkpoints
from equiadapt_jax.training.config import Logging
from equiadapt_jax.training.step import TrainState, place_batch


class Stopped(KeyboardInterrupt):
    """A run was asked to stop, and left all that it needs to be continued."""


class Stop:
    """A request to stop, made from a signal handler.

    Training heeds it after the step or the batch at hand, and saves; elsewhere there is nothing to
    save, and `request` raises `Stopped` itself.
    """

    def __init__(self) -> None:
        self.requested = False
        self._training = False

    def request(self, *_: Any) -> None:
        """Ask for it; takes a signal handler's arguments."""
        self.requested = True
        if not self._training:
            raise Stopped("Stopped; nothing was being trained.")

    @contextlib.contextmanager
    def heeded(self) -> Iterator[None]:
        """Where `request` only leaves word, which `check` finds."""
        self._training = True
        try:
            yield
        finally:
            self._training = False

    def checked(self, batches: Iterable) -> Iterator:
        """The same batches, until stopping is asked for."""
        for batch in batches:
            if self.requested:
                raise Stopped
            yield batch


def fit(
    step: Callable[..., tuple[TrainState, dict[str, jax.Array]]],
    state: TrainState,
    batches: Iterator[Mapping[str, Any]],
    *,
    steps: int,
    key: jax.Array,
    validate: Callable[[TrainState], dict[str, float]],
    checkpoints: Checkpoints,
    log: Callable[[int, Mapping[str, float]], None],
    settings: Logging,
    title: str,
    stop: Stop,
) -> TrainState:
    """Train from `state.step` up to `steps`, saving a checkpoint at each validation.

    Figures leave the device only where they are logged. A checkpoint is written only after a look
    at loss, gradient, the parameters' norm and the validation, so nothing that is not finite is
    ever saved. With each go the "seconds" the run has taken up to it, over all its sessions.

    Raises:
      FloatingPointError: a figure is not finite.
      Stopped: it was asked for; the step that was reached is saved.
    """
    number = int(state.step)
    saved = checkpoints.figures(number) if number in checkpoints.steps() else {}
    earlier, began = saved.get("seconds", 0.0), time.monotonic()
    kept = number if saved else None

    def due(number):
        return number % settings.evaluate_every == 0 or number == steps

    def save(figures):
        nonlocal kept
        kept = number
        seconds = earlier + time.monotonic() - began
        checkpoints.save(state, batches, {**figures, "seconds": seconds})

    def validated(figures):
        try:
            validation = validate(state)
        except Stopped:
            save(figures)  # to be validated when the run is continued
            raise
        best_by = validation.pop("best_by")
        figures = {**figures, **{f"validation/{n}": v for n, v in validation.items()}}
        _check_finite(figures, number, checkpoints)
        # Logged before it is saved: a resumed run drops lines after its checkpoint, and can not
        # make up for one that is missing before it.
        log(number, figures)
        save({**figures, "best_by": best_by})

    if due(number) and "best_by" not in saved:
        validated({name: v for name, v in saved.items() if name.startswith("train/")})
    with _progress(title, number, steps) as bar:
        while number < steps:
            if stop.requested:
                if kept != number:
                    save({})
                raise Stopped
            state, metrics = step(state, place_batch(next(batches)), key)
            number += 1
            if number % settings.every and not due(number):
                continue
            checkpoints.check()
            figures = {f"train/{n}": float(v) for n, v in jax.device_get(metrics).items()}
            _check_finite(figures, number, checkpoints)
            bar.set_postfix(loss=f"{figures['train/loss']:.4g}", refresh=False)
            bar.update(number - bar.n)
            if due(number):
                validated(figures)
            else:
                log(number, figures)
    return state


def progress(title: str, batches: Iterable, total: int) -> Iterable:
    """The same batches, with a bar as that of training."""
    return tqdm(batches, title, total, unit="batch", **_bar())


def _progress(title, start, steps):
    return tqdm(total=steps, initial=start, desc=title, unit="step", **_bar())


def _bar():
    """A bar with rate and time left; a line now and then where nobody watches."""
    watched = sys.stderr.isatty()
    return {
        "dynamic_ncols": watched, "mininterval": 0.1 if watched else 15, "smoothing": 0.1
    }  # fmt: skip


def _check_finite(figures, step, checkpoints):
    for name, value in figures.items():
        if not math.isfinite(value):
            checkpoints.wait()
            good = [f"step {number}" for number in checkpoints.steps()] or ["none"]
            raise FloatingPointError(
                f"{name} is {value} at step {step}: training stopped, the last good checkpoint is "
                f"{good[-1]} in {checkpoints.directory}; lower the learning rates or look at the "
                "data."
            )
