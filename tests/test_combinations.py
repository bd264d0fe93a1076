"""Settings in every combination: each is trained as it says, or refused with a reason."""

import dataclasses
import functools
import itertools
import random
import re

import jax
import jax.numpy as jnp
import pytest

from equiadapt_jax import energies
from equiadapt_jax.evaluation.predictions import adapted_prediction, vanilla_prediction
from equiadapt_jax.training import build, objective, poses, run
from equiadapt_jax.training import config as settings
from equiadapt_jax.training.step import TrainState, make_optimizer, make_step

SHAPE, CLASSES = (8, 8, 1), 3
CHOICES = {
    "group": ["cyclic1", "cyclic2", "cyclic4", "cyclic8", "dihedral1", "dihedral4", "so2", "o2"],
    "canonicalizer": list(build._SCORERS),
    "averaging": ["single", "top2", "top3", "weighted", "mean", "faded2", "sampled2"],
    "prior": ["identity", "mirror", "categorical", "estimated"],
    "method": ["straight_through", "gumbel", "soft", "predictions"],
    "mode": ["joint", "frozen", "prior", "vanilla", "augmentation"],
}
FREE = tuple(energies.NAMED)
CONTINUOUS = ("so2", "o2")
ORDER = {
    "cyclic1": 1, "cyclic2": 2, "cyclic4": 4, "cyclic8": 8, "dihedral1": 2, "dihedral4": 8,
}  # fmt: skip
_CONV = {"features": (2,), "kernels": (3,), "strides": (1,), "hidden": 2}
OPTIONS = {
    "group_conv": _CONV, "energy": _CONV, "features": {"hidden": 2, "grid": 1},
    "energy_resnet": {"stage_sizes": (1,), "block": "basic", "width": 2, "stem": "cifar"},
    "energy_vit": {"patch": 4, "width": 4, "depth": 1, "heads": 1},
}  # fmt: skip


def config_of(group, canonicalizer, averaging, prior, method, mode):
    probabilities = ()
    if prior == "categorical":
        probabilities = (1 / ORDER.get(group, 4),) * ORDER.get(group, 4)
    return settings.Config(
        group=group,
        canonicalizer=canonicalizer,
        averaging=averaging,
        prior=settings.Prior(name=prior, probabilities=probabilities),
        adaptation=settings.Adaptation(mode=mode, method=method),
        scorer=settings.Scorer(options=OPTIONS.get(canonicalizer, {})),
        predictor=settings.Predictor(name="resnet", options=OPTIONS["energy_resnet"]),
        data=settings.Data(size=SHAPE[0]),
    )


def reasons(group, canonicalizer, averaging, prior, method, mode):
    """Why a combination makes no sense, from what the documents say; none for those that do."""
    baseline, free = mode in ("vanilla", "augmentation"), canonicalizer in FREE
    digits = re.sub(r"\D", "", averaging)
    yield averaging, bool(digits) and int(digits) > ORDER[group]
    yield method, method == "predictions" and mode == "joint"
    yield method, method == "predictions" and averaging == "single" and not baseline
    yield canonicalizer, free and mode in ("frozen", "prior")
    yield prior, free and prior == "estimated" and not baseline


def refused(config):
    """The sentence with which a configuration is refused, or None."""
    try:
        run._check_settings(config)
        build.build_model(build.resolve(config), CLASSES)
    except ValueError as error:
        return str(error)
    return None


def assert_a_reason(sentence):
    assert re.search(r"config\.[a-z]+", sentence), sentence
    assert re.fullmatch(r"[^\n]+[^.]\.", sentence), sentence
    assert not re.search(r"\w\. [A-Z]", sentence), sentence


def test_every_combination_is_built_or_refused_with_one_sentence_that_names_the_setting():
    for combination in itertools.product(*CHOICES.values()):
        sentence = refused(config_of(*combination))
        if sentence is not None:
            assert_a_reason(sentence)
        if combination[0] not in CONTINUOUS:
            expected = any(wrong for _, wrong in reasons(*combination))
            assert (sentence is not None) == expected, (combination, sentence)
