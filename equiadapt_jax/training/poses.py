"""Images that are not upright: the poses that a run gives them, and the prior that it estimates."""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from equiadapt_jax import devices, groups
from equiadapt_jax.adaptation import Adapted
from equiadapt_jax.data import Dataset
from equiadapt_jax.data.turned import TurnedSource, drawn
from equiadapt_jax.evaluation.files import whole
from equiadapt_jax.priors import Identity
from equiadapt_jax.training.build import BASELINES, group_of
from equiadapt_jax.training.config import Augmentation, Config
from equiadapt_jax.training.digests import seal, unseal
from equiadapt_jax.training.objective import Objective, augment, turn

FILE = "prior.json"


def open_split(config: Config, dataset: Dataset, split: str) -> dict[str, Any]:
    """`source`, `size` and `how` of a split, as `training_batches` and others take them.

    Turned by elements of the group where `data.poses` says so; ValueError where it does not fit.
    """
    data, source = config.data, dataset.source(split)
    if not data.poses:
        return {"source": source, "size": data.size, "how": data.fit}
    group = groups.finite(group_of(config), "config.data.poses")
    if len(data.poses) != group.order:
        raise ValueError(
            f"config.data.poses has {len(data.poses)} probabilities and {group} {group.order} "
            "elements: give one for each."
        )
    turned = TurnedSource(
        source, group, drawn(data.poses, len(source), seed=config.seed, split=split),
        size=data.size, how=data.fit, pad=config.adaptation.pad, fill=config.adaptation.fill,
    )  # fmt: skip
    return {"source": turned, "size": None, "how": "none"}


def estimates_prior(config: Config) -> bool:
    """Whether a run estimates its prior; ValueError for settings that make no sense then."""
    settings = config.prior
    if settings.name != "estimated":
        return False
    groups.finite(group_of(config), "config.prior.name=estimated")
    if settings.probabilities:
        raise ValueError(
            "config.prior.probabilities are found by the run where config.prior.name is estimated: "
            "leave them out, or choose categorical."
        )
    if settings.rounds < 2 or settings.steps < 1:
        raise ValueError(
            f"config.prior.rounds is {settings.rounds} and config.prior.steps {settings.steps}: "
            "give at least 2 rounds of at least 1 step."
        )
    if config.augmentation.mirror:
        raise ValueError(
            "config.augmentation.mirror turns poses the other way round: leave it out where "
            "config.prior.name is estimated."
        )
    return config.adaptation.mode not in BASELINES


def with_estimated_prior(config: Config, workdir: Path) -> Config:
    """The settings of a run with the prior that it found, if it was to find one.

    FileNotFoundError where it has not come so far, DamagedCheckpoint where the file is damaged.
    """
    if not estimates_prior(config):
        return config
    if not (workdir / FILE).is_file():
        raise FileNotFoundError(
            f"There is no {FILE} in {workdir}: the run has not estimated its prior yet (continue "
            "it with --resume), or the file was removed."
        )
    found = unseal(workdir / FILE, {"probabilities"})["probabilities"]
    return dataclasses.replace(
        config, prior=dataclasses.replace(config.prior, probabilities=tuple(found))
    )


def keep_prior(workdir: Path, probabilities: Iterable[float], seconds: float) -> None:
    """Write the prior that was found, and in how many seconds, beside the run's settings."""
    found = np.asarray(probabilities, np.float64)
    values = {"probabilities": list(found / found.sum()), "seconds": seconds}
    with whole(workdir / FILE) as unfinished:
        unfinished.write_text(seal(values))


def kept_seconds(workdir: Path) -> float:
    """In how many seconds the prior was found."""
    return unseal(workdir / FILE, {"seconds"})["seconds"]


def aligning(model: Adapted, augmentation: Augmentation, *, turn_inputs: bool) -> Objective:
    """−log p(h|x) for images labelled with their poses h; see `alignment.bootstrap`.

    Inputs are augmented and turned as in `objective.adaptation`.
    """

    def objective(params, state, batch, key, step=0):
        augment_key, turn_key, model_key = jax.random.split(key, 3)
        images = augment(batch["image"], augment_key, augmentation, angle=not turn_inputs)
        poses = batch["label"]
        if turn_inputs:
            images, turned = turn(model.group, turn_key, images, model.pad, model.fill)
            poses = model.group.compose(turned, poses)
        canonical, state = model.canonicalize(params, state, images, train=True, key=model_key)
        loss = Identity().loss(model.group, canonical.scores, applied=poses)
        found = jnp.argmax(canonical.scores, -1)
        return loss, (state, {"loss": loss, "pose_accuracy": jnp.mean(found == poses)})

    return objective


def pose_probabilities(
    model: Adapted, params: Any, state: Any, batches: Iterable[Mapping[str, np.ndarray]]
) -> jax.Array:
    """P(g|x) of every image of `data.evaluation_batches`, float32 `(N, |G|)`."""

    @jax.jit
    def look(params, state, images):
        canonical, _ = model.canonicalize(params, state, images)
        return jax.nn.softmax(canonical.scores, -1)

    params, state = devices.copy((params, state))
    begun = (
        (batch["mask"], look(params, state, devices.spread(batch["image"]))) for batch in batches
    )
    rows = [probabilities[mask] for mask, probabilities in devices.fetched(begun)]
    return jnp.asarray(np.concatenate(rows))
