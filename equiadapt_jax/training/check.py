"""Settings with which a run would not be trained as they say, refused with a reason."""

import numpy as np

from equiadapt_jax import energies, groups
from equiadapt_jax.training.build import (
    BASELINES,
    ENERGIES,
    build_prior,
    check_names,
    choose,
    group_of,
    probabilities,
    refined,
)
from equiadapt_jax.training.config import Adaptation, Config, Prior, Scorer
from equiadapt_jax.training.objective import DECAYS

_OF_ELEMENTS = ("probabilities", "kl_weight", "per_sample")
_OF_ANGLES = ("kappa", "angle", "mirror")
# What each prior has of them, and the prior to choose for one that it has not.
_PRIOR_HAS = {
    "categorical": _OF_ELEMENTS,
    "estimated": _OF_ELEMENTS,
    "mirror": ("kl_weight", "per_sample"),
    "von_mises": _OF_ANGLES,
}


def check_training(config: Config) -> None:
    """Refuse settings with which a run would not be trained as they say; ValueError.

    A run that is there is evaluated all the same, with another averaging too.
    """
    check_names(config)
    _check_ranges(config)
    _check_prior(config)
    if config.adaptation.mode in BASELINES:
        _check_baseline(config)
        return
    if isinstance(group_of(config), groups.MatrixGroup):
        _check_any_angle(config)
    _check_weights(config)
    _check_mirrored(config)
    _check_of_others(config)
    _check_averaging(config)
    if config.canonicalizer in energies.NAMED:
        _check_free(config)


def _check_ranges(config):
    """Refuse numbers that are none of their kind."""
    adaptation, clip = config.adaptation, config.optimizer.clip
    accumulate = config.optimizer.accumulate
    stages = {"adaptation": adaptation.steps}
    if not adaptation.start:
        stages["pretrain"] = config.pretrain.steps
    if config.prior.name == "estimated":
        stages["prior"] = config.prior.steps
    for stage, steps in stages.items():
        if accumulate < 1 or steps % accumulate:
            raise ValueError(
                f"config.optimizer.accumulate is {accumulate}, and config.{stage}.steps {steps}: "
                "give 1, or a number of steps that divides it."
            )
    if not 0 <= adaptation.fill <= 1:
        raise ValueError(
            f"config.adaptation.fill is {adaptation.fill}: give a value from 0 to 1, as in images."
        )
    if not clip > 0:
        raise ValueError(
            f"config.optimizer.clip is {clip}, the largest norm of a gradient: give more than 0; "
            "a large one, such as 1e9, clips nothing."
        )


def _check_prior(config):
    """Refuse a prior that is none over the group, and settings that the one named does not have."""
    settings, group = config.prior, group_of(config)
    build_prior(settings, group, refined(config))
    if settings.name == "uniform" and config.adaptation.mode == "prior":
        raise ValueError(
            "config.prior.name=uniform prefers no pose, and config.adaptation.mode=prior trains by "
            "the prior alone: choose another prior, or config.adaptation.mode=frozen."
        )
    of_elements = () if isinstance(group, groups.MatrixGroup) else _OF_ELEMENTS
    for setting in (*of_elements, *_OF_ANGLES):
        value = getattr(settings, setting)
        if value != getattr(Prior(), setting) and setting not in _PRIOR_HAS.get(settings.name, ()):
            other = "categorical" if setting in _OF_ELEMENTS else "von_mises"
            raise ValueError(
                f"config.prior.{setting} is {value!r}, and the prior {settings.name} has none: "
                f"choose config.prior.name={other}, or leave it out."
            )


def _check_baseline(config):
    """Refuse what a predictor without a canonicalizer does not have."""
    adaptation = config.adaptation
    if adaptation.mode == "vanilla" and adaptation.turn_inputs == "yes":
        raise ValueError(
            "config.adaptation.turn_inputs=yes turns images, and config.adaptation.mode=vanilla "
            "trains on upright ones: choose config.adaptation.mode=augmentation."
        )


def _check_weights(config):
    """Refuse to reward what a term of the objective is there to avoid."""
    for name in ("prior_weight", "contrastive_weight", "artefact_weight"):
        weight = getattr(config.adaptation, name)
        if not weight >= 0:
            raise ValueError(f"config.adaptation.{name} is {weight}: give 0 or more.")


def _check_mirrored(config):
    """Refuse mirrored images where the prior says something else of them than of others.

    The mirror image of an image in the pose g is in the pose s·g of a group with the mirror s, and
    in the pose s·g·s of rotations.
    """
    group, settings = group_of(config), config.prior
    if not config.augmentation.mirror or settings.name in ("uniform", "estimated"):
        return
    prior = build_prior(settings, group)
    if isinstance(group, groups.MatrixGroup):
        mirror, angle = getattr(prior, "mirror", 0.0), getattr(prior, "angle", 0.0)
        alike = angle == 0 and (mirror == 0.5 or isinstance(group, groups.SO))
    else:
        shares, elements = probabilities(prior, group), np.arange(group.order)
        reflects = group.order > group.n
        others = group.compose(group.n, elements) if reflects else group.inverse(elements)
        alike = np.allclose(shares, shares[others])
    if not alike:
        reflects = isinstance(group, groups.O | groups.Dihedral)
        way = "choose config.prior.name=mirror" if reflects else "choose another prior"
        raise ValueError(
            f"config.augmentation.mirror mirrors half of the images, whose poses over {group} are "
            f"then others than the prior {settings.name} says: leave it out, or {way}."
        )


def _check_of_others(config):
    """Refuse settings that say something of another canonicalizer or method."""
    settings, adaptation, name = config.scorer, config.adaptation, config.canonicalizer
    for setting in ("reference", "embedding"):
        value, default = getattr(settings, setting), getattr(Scorer(), setting)
        if value != default and name not in ENERGIES:
            raise ValueError(
                f"config.scorer.{setting} is {value!r}, and the canonicalizer {name} has none: "
                f"only {', '.join(ENERGIES)} have one."
            )
    if adaptation.variants > 1 and name != "features":
        raise ValueError(
            f"config.adaptation.variants is {adaptation.variants}, of images whose features are "
            f"kept, and the canonicalizer {name} sees new variants at every step: leave it out."
        )
    if adaptation.temperature_decay != Adaptation().temperature_decay:
        choose("adaptation.temperature_decay", adaptation.temperature_decay, DECAYS)
        if not adaptation.temperature_end:
            raise ValueError(
                f"config.adaptation.temperature_decay is {adaptation.temperature_decay}, and the "
                "temperature stays as it is: give config.adaptation.temperature_end too."
            )


def _check_averaging(config):
    """Refuse to train weights that the prediction does not use."""
    adaptation = config.adaptation
    if adaptation.method == "predictions":
        if config.averaging == "single":
            raise ValueError(
                "config.adaptation.method=predictions trains weights of the predictions for all "
                "poses, of which config.averaging=single would use one: choose "
                "config.averaging=weighted."
            )
        if adaptation.temperature_end:
            raise ValueError(
                "config.adaptation.method=predictions uses the weights that it trains, of one "
                "temperature: leave config.adaptation.temperature_end at 0."
            )
    if config.averaging == "mean" and adaptation.mode in ("frozen", "prior"):
        raise ValueError(
            "config.averaging=mean weighs all poses alike, so that config.adaptation.mode="
            f"{adaptation.mode} trains a scorer for nothing: choose config.averaging=weighted."
        )


def _check_any_angle(config):
    """Refuse what is trained with probabilities of all poses where there are none."""
    settings, adaptation, group = config.prior, config.adaptation, group_of(config)
    if adaptation.temperature_end:
        groups.finite(group, "config.adaptation.temperature_end, of weights over all poses,")
    if adaptation.confidence_penalty and config.canonicalizer == "steerable":
        raise ValueError(
            f"config.adaptation.confidence_penalty is {adaptation.confidence_penalty}, and vectors "
            "have no probabilities to be sure of: leave it out, or choose config.scorer.refine."
        )
    if settings.kl_weight or settings.per_sample or settings.probabilities:
        groups.finite(group, "config.prior.probabilities, kl_weight or per_sample")


def _check_free(config):
    """Refuse what would train a scorer that has nothing to train."""
    adaptation = config.adaptation
    useless = {
        "prior.name=estimated": config.prior.name == "estimated",
        "adaptation.confidence_penalty": adaptation.confidence_penalty != 0,
        "adaptation.temperature_end": adaptation.temperature_end != 0,
    }
    for setting, given in useless.items():
        if given:
            raise ValueError(
                f"config.{setting} is for scorers that are trained, and config.canonicalizer="
                f"{config.canonicalizer} is not: leave it out."
            )
