"""From settings to a group, a prior and a model."""

import dataclasses
import difflib
import functools
import re
from typing import Any

import jax.numpy as jnp
import numpy as np

from equiadapt_jax import groups, networks, predictors, priors
from equiadapt_jax.adaptation import Adapted, adapt
from equiadapt_jax.interface import from_function, from_linen
from equiadapt_jax.training.config import Config, Prior

_SCORERS = {"group_conv": networks.GroupConvNet, "features": networks.FeatureScorer}
_PREDICTORS = {"vit": predictors.ViT, "resnet": predictors.ResNet}
_DTYPES = {"float32": None, "bfloat16": jnp.bfloat16}
# Set elsewhere in the settings, or by Flax.
_NOT_OPTIONS = ("group", "num_classes", "dtype", "pad", "fill", "parent", "name")
BASELINES = ("vanilla", "augmentation")  # the predictor alone
MODES = ("joint", "frozen", "prior", *BASELINES)


def build_model(config: Config, classes: int) -> Adapted:
    """The model of a run for so many classes; ValueError for a setting that does not exist.

    A baseline is the predictor behind the trivial group, which leaves images as they are.
    """
    group = groups.from_name(config.group)
    dtype = _choose("dtype", config.dtype, _DTYPES)
    mode = _choose("adaptation.mode", config.adaptation.mode, MODES)
    images = config.scorer.name != "features"
    mask = _choose("mask", config.mask, {"none": None, "disk": "disk"})
    pad = config.adaptation.pad if mask is None else "constant"
    seen = {"pad": pad, "fill": config.adaptation.fill} if images else {}
    scorer = _make(
        "scorer", _network("scorer", config.scorer.name), (group,), config.scorer.options,
        dtype=dtype, **seen,
    )  # fmt: skip
    predictor = _make(
        "predictor", _network("predictor", config.predictor.name), (classes,),
        config.predictor.options, dtype=dtype,
    )  # fmt: skip
    mean, std = (m[0] if len(m) == 1 else m for m in (config.predictor.mean, config.predictor.std))
    if mode in BASELINES:
        return adapt(
            groups.Cyclic(1),
            from_function(_one_pose),
            from_linen(predictor),
            preprocess=predictors.Preprocess(mean=mean, std=std),
            pad=config.adaptation.pad,
            fill=config.adaptation.fill,
        )
    return adapt(
        group,
        from_linen(scorer),
        from_linen(predictor),
        preprocess=predictors.Preprocess(mean=mean, std=std),
        freeze_predictor=mode != "joint",
        method=config.adaptation.method,
        temperature=config.adaptation.temperature,
        pad=config.adaptation.pad,
        fill=config.adaptation.fill,
        interpolation=config.adaptation.interpolation,
        features=None if images else scorer.read,
        poses=_poses(config.averaging, group),
        chunk=_chunk(config, group),
        mask=mask,
    )


def _poses(averaging, group):
    """How many poses the setting averages over; None for all."""
    if averaging in ("single", "weighted"):
        return 1 if averaging == "single" else None
    match = re.fullmatch(r"top([1-9][0-9]*)", averaging)
    if match is None or int(match[1]) > group.order:
        raise ValueError(
            f"config.averaging is {averaging!r}: choose single, weighted, or top1 to "
            f"top{group.order} for {group}."
        )
    return int(match[1])


def _chunk(config, group):
    """How many poses share a pass; None for all."""
    poses = group.order if config.scorer.name == "features" else _poses(config.averaging, group)
    seen = group.order if poses is None else poses
    if config.chunk < 0 or (config.chunk and seen % config.chunk):
        raise ValueError(
            f"config.chunk is {config.chunk}: choose a divisor of the {seen} poses that the "
            "predictor sees, or 0 for all of them."
        )
    return config.chunk or None


def _one_pose(params, images):
    return jnp.zeros((images.shape[0], 1))


def resolve(config: Config) -> Config:
    """The same settings with every option of the networks, so that they outlive its default."""
    first = {"scorer": groups.from_name(config.group), "predictor": None}
    resolved = {}
    for role, argument in first.items():
        settings = getattr(config, role)
        cls = _network(role, settings.name)
        network = _make(role, cls, (argument,), settings.options)
        resolved[role] = dataclasses.replace(settings, options=options_of(network))
    return dataclasses.replace(config, **resolved)


def options_of(network: Any) -> dict[str, Any]:
    """Every option of a network."""
    return {name: getattr(network, name) for name in _options(type(network))}


def build_prior(settings: Prior, group: groups.Group) -> priors.Identity | priors.Categorical:
    """The prior of a run over the elements of a group."""
    name = _choose("prior.name", settings.name, ("identity", "mirror", "categorical"))
    if name == "categorical":
        return priors.Categorical(settings.probabilities, settings.kl_weight, settings.per_sample)
    if name == "mirror" and group.order > group.n:
        half = np.zeros(group.order)
        half[[0, group.n]] = 0.5
        return priors.Categorical(tuple(half), settings.kl_weight, settings.per_sample)
    return priors.Identity()


def turns_inputs(config: Config) -> bool:
    """Whether training inputs are turned by any angle; always where the group interpolates."""
    choice = config.adaptation.turn_inputs
    always = {"yes": True, "no": False, "auto": groups.from_name(config.group).n not in (1, 2, 4)}
    return _choose("adaptation.turn_inputs", choice, always)


def _choose(field, name, choices):
    """What a name stands for, or where there are only names the name itself."""
    if name not in choices:
        raise ValueError(f"config.{field} is {name!r}: choose one of {', '.join(choices)}.")
    return choices[name] if isinstance(choices, dict) else name


def _network(role, name):
    return _choose(f"{role}.name", name, {"scorer": _SCORERS, "predictor": _PREDICTORS}[role])


def default_options(role: str, name: str) -> dict[str, Any]:
    """What can be set of a network, with the defaults of what has one."""
    cls = _network(role, name)
    variant = {"variant": "…"} if hasattr(cls, "variant") else {}
    return variant | {option: getattr(cls, option, "…") for option in _options(cls)}


def _options(cls):
    """What can be set of a network."""
    return [field.name for field in dataclasses.fields(cls) if field.name not in _NOT_OPTIONS]


def _make(role, cls, arguments, options, **given):
    options = dict(options)
    variant = options.pop("variant", None)
    known = _options(cls)
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, ["variant", *known], 1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}."
            raise ValueError(
                f"config.{role}.options.{name} is not an option of {cls.__name__}; {hint}"
            )
    try:
        make = cls if variant is None else functools.partial(cls.variant, variant)
        return make(*arguments, **options, **given)
    except (TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"config.{role}.options do not fit {cls.__name__}: {error}") from error
