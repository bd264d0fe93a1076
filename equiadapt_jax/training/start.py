"""A run that goes on from the networks of another one."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from equiadapt_jax.adaptation import Adapted
from equiadapt_jax.training.build import BASELINES
from equiadapt_jax.training.checkpoints import Checkpoints
from equiadapt_jax.training.config import Config
from equiadapt_jax.training.workdir import read_config, read_fingerprint

_SAME = ("group", "scorer.name", "scorer.options", "predictor.name", "predictor.options",
         "predictor.mean", "predictor.std")  # fmt: skip


def read_start(
    config: Config, model: Adapted, shape: tuple[int, ...]
) -> tuple[Config, tuple[Any, Any] | None]:
    """The settings with a mark of where the run starts, and the (params, state) of that place.

    None where `adaptation.start` is empty. The best checkpoint of the run there is taken.

    Raises FileNotFoundError where there is no run, ValueError where its networks are others or its
    checkpoints damaged.
    """
    place = config.adaptation.start
    if not place:
        return config, None
    if config.adaptation.mode in BASELINES:
        raise ValueError(
            f"config.adaptation.start goes on with a scorer, which the mode "
            f"{config.adaptation.mode} has not: leave it out."
        )
    earlier, _ = read_config(place)
    different = [
        f"{name}: {_value(earlier, name)!r} there, {_value(config, name)!r} here"
        for name in _SAME
        if _value(earlier, name) != _value(config, name)
    ]
    if different:
        raise ValueError(
            f"The run in {place} has other networks ({'; '.join(different)}): give this one the "
            "same settings, or leave out --config.adaptation.start."
        )
    like = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *shape)))
    mark = read_fingerprint(place)
    step, networks, _ = Checkpoints(Path(place) / "checkpoints", mark).restore_best(like)
    settings = dataclasses.replace(config.adaptation, start_mark=f"{mark}, step {step}")
    return dataclasses.replace(config, adaptation=settings), networks


def _value(config, name):
    for part in name.split("."):
        config = getattr(config, part)
    return config
