"""The training loop: steps, logged lines, validation, checkpoints, a progress bar."""

import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from tqdm import tqdm

from equiadapt_jax.training.checkpoints import Checkpoints
from equiadapt_jax.training.config import Logging
from equiadapt_jax.training.step import TrainState, place_batch


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
) -> TrainState:
    """Train from `state.step` up to `steps`, saving a checkpoint at each validation.

    Figures leave the device only where they are logged. A checkpoint is written only after a look
    at loss, gradient, the parameters' norm and the validation, so nothing that is not finite is
    ever saved.

    With each checkpoint go the "seconds" the run has taken up to it, over all its sessions.

    Raises:
      FloatingPointError: a figure is not finite.
    """
    start = int(state.step)
    earlier = checkpoints.metrics(start)["seconds"] if start else 0.0
    began = time.monotonic()

    def save(state, validation):
        seconds = earlier + time.monotonic() - began
        checkpoints.save(state, batches, {**validation, "seconds": seconds})

    if start == 0:
        save(state, validate(state))
    with _progress(title, start, steps) as bar:
        for number in range(start + 1, steps + 1):
            state, metrics = step(state, place_batch(next(batches)), key)
            evaluate = number % settings.evaluate_every == 0 or number == steps
            if number % settings.every and not evaluate:
                continue
            figures = {f"train/{n}": float(v) for n, v in jax.device_get(metrics).items()}
            _check_finite(figures, number, checkpoints)
            bar.set_postfix(loss=f"{figures['train/loss']:.4g}", refresh=False)
            bar.update(number - bar.n)
            validation = validate(state) if evaluate else {}
            figures |= {f"validation/{name}": v for name, v in validation.items()}
            _check_finite(figures, number, checkpoints)
            # Logged before it is saved: a resumed run drops lines after its checkpoint, and can
            # not make up for one that is missing before it.
            log(number, figures)
            if evaluate:
                save(state, validation)
    return state


def _progress(title, start, steps):
    """A bar with rate and time left; a line now and then where nobody watches."""
    watched = sys.stderr.isatty()
    return tqdm(
        total=steps, initial=start, desc=title, unit="step", dynamic_ncols=watched,
        mininterval=0.1 if watched else 15, smoothing=0.1,
    )  # fmt: skip


def _check_finite(figures, step, checkpoints):
    for name, value in figures.items():
        if not math.isfinite(value):
            raise FloatingPointError(
                f"{name} is {value} at step {step}: training stopped, the last good checkpoint is "
                f"step {checkpoints.steps()[-1]} in {checkpoints.directory}; lower the learning "
                "rates or look at the data."
            )
