"""A run that goes on from the networks of another one."""

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from equiadapt_jax.adaptation import Adapted
from equiadapt_jax.training.build import BASELINES
from equiadapt_jax.training.checkpoints import Checkpoints, finished_steps
from equiadapt_jax.training.config import Config
from equiadapt_jax.training.digests import of_leaves
from equiadapt_jax.training.workdir import read_config, read_fingerprint

# The predictor's digest too: vanilla figures are those of step 0.
_SAME = ("group", "canonicalizer", "scorer.options", "scorer.reference", "scorer.embedding",
         "scorer.refine",
         "predictor.name", "predictor.options", "predictor.mean", "predictor.std",
         "predictor.sha256")  # fmt: skip


def read_start(
    config: Config, model: Adapted, facts: Mapping[str, Any], workdir: Path, *, resume: bool
) -> tuple[Config, tuple[Any, Any] | None]:
    """The settings with a mark of where the run starts, and the (params, state) of that place.

    None where `adaptation.start` is empty, and where a run is continued from checkpoints of its
    own. The best checkpoint of the run there is taken; `facts` describe the data of this one.

    Raises FileNotFoundError where there is no run, ValueError where its networks or classes are
    others, it trained the predictor (step 0 of this run would not be vanilla), or its checkpoints
    are damaged.
    """
    if not config.adaptation.start:
        if config.adaptation.start_mark:
            raise ValueError(
                "config.adaptation.start_mark is set by the program: give config.adaptation.start."
            )
        return config, None
    if resume and finished_steps(workdir / "checkpoints"):
        return _marked(config, read_config(workdir)[0].adaptation.start_mark), None
    place = Path(config.adaptation.start).expanduser()
    if config.adaptation.mode in BASELINES:
        raise ValueError(
            f"config.adaptation.start goes on with a scorer, which the mode "
            f"{config.adaptation.mode} has not: leave it out."
        )
    earlier, earlier_facts = read_config(place)
    if earlier.adaptation.mode not in ("prior", "frozen"):
        raise ValueError(
            f"The run in {place} trained its predictor, by the mode {earlier.adaptation.mode}: "
            "start from one of the mode prior or frozen, which has the vanilla one."
        )
    different = [
        f"{name}: {_value(earlier, name)!r} there, {_value(config, name)!r} here"
        for name in _SAME
        if _value(earlier, name) != _value(config, name)
    ]
    different += [
        f"{name}: {earlier_facts[name]} there, {facts[name]} here"
        for name in ("classes", "shape")
        if earlier_facts[name] != facts[name]
    ]
    if different:
        raise ValueError(
            f"The run in {place} has other networks ({'; '.join(different)}): give this one the "
            "same settings, or leave out --config.adaptation.start."
        )
    like = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *facts["shape"])))
    checkpoints = Checkpoints(place / "checkpoints", read_fingerprint(place))
    step, networks, _ = checkpoints.restore_best(like)
    content = "".join(of_leaves(networks).values())
    mark = f"step {step}, {hashlib.sha256(content.encode()).hexdigest()[:16]}"
    return _marked(config, mark), networks


def _marked(config, mark):
    settings = dataclasses.replace(config.adaptation, start_mark=mark)
    return dataclasses.replace(config, adaptation=settings)


def _value(config, name):
    for part in name.split("."):
        config = getattr(config, part)
    return config
