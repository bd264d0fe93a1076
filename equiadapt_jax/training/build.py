"""From settings to a group, a prior and a model."""

import dataclasses
import difflib
import functools
import math
import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from equiadapt_jax import energies, groups, networks, predictors, priors
from equiadapt_jax.actions.images import INTERPOLATIONS, PADS
from equiadapt_jax.adaptation import METHODS, Adapted, adapt, seen_poses
from equiadapt_jax.interface import from_function, from_linen
from equiadapt_jax.orbit_scoring import REFERENCES, orbit_scorer
from equiadapt_jax.training.config import NAMED_BY, Config, Prior, network_name

# Networks that see every pose as an image of its own; and energies, which have no network.
ENERGIES = {
    "energy": networks.ConvNet,
    "energy_resnet": predictors.ResNet,
    "energy_vit": predictors.ViT,
}
_SCORERS = {
    "group_conv": networks.GroupConvNet,
    "features": networks.FeatureScorer,
    "steerable": networks.SteerableNet,
    **ENERGIES,
    **energies.NAMED,
}
_PREDICTORS = {"vit": predictors.ViT, "resnet": predictors.ResNet}
_DTYPES = {"float32": None, "bfloat16": jnp.bfloat16}
# Set elsewhere in the settings, or by Flax.
_NOT_OPTIONS = (
    "group",
    "num_classes",
    "outputs",
    "dtype",
    "remat",
    "pad",
    "fill",
    "parent",
    "name",
)
# What a network is made of where nothing is said of it.
_SMALL = {
    "energy_resnet": {"stage_sizes": (1, 1, 1), "block": "basic", "width": 16, "stem": "cifar"}
}
BASELINES = ("vanilla", "augmentation")  # the predictor alone
MODES = ("joint", "frozen", "prior", *BASELINES)


def check_names(config: Config) -> None:
    """Refuse a name that stands for nothing; ValueError."""
    settings = config.adaptation
    choose("dtype", config.dtype, tuple(_DTYPES))
    choose("mask", config.mask, ("none", "disk"))
    choose("adaptation.mode", settings.mode, MODES)
    choose("adaptation.method", settings.method, METHODS)
    choose("adaptation.pad", settings.pad, PADS)
    choose("adaptation.interpolation", settings.interpolation, INTERPOLATIONS)
    turns_inputs(config)


def build_model(config: Config, classes: int) -> Adapted:
    """The model of a run for so many classes; ValueError for a setting that does not exist.

    A baseline is the predictor behind the trivial group, which leaves images as they are.
    """
    group = group_of(config)
    check_names(config)
    mode, mask = config.adaptation.mode, None if config.mask == "none" else config.mask
    dtype = _DTYPES[config.dtype]
    scorer, features = _scorer(config, group, dtype)
    how = {"dtype": dtype} | ({"remat": True} if config.predictor.remat else {})
    predictor = _make(
        "predictor", _network("predictor", config.predictor.name), (classes,),
        config.predictor.options, **how,
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
        scorer,
        from_linen(predictor),
        preprocess=predictors.Preprocess(mean=mean, std=std),
        freeze_predictor=mode != "joint",
        method=config.adaptation.method,
        temperature=config.adaptation.temperature,
        pad=config.adaptation.pad,
        fill=config.adaptation.fill,
        interpolation=config.adaptation.interpolation,
        features=features,
        chunk=_chunk(config, group),
        **_averaging(config.averaging, group),
        mask=mask,
        refine=refined(config),
    )


def group_of(config: Config) -> groups.Group | groups.MatrixGroup:
    """The group of a run; ValueError for a name that stands for none."""
    return _group("group", config.group)


def _group(field, name):
    try:
        return groups.from_name(name)
    except ValueError as error:
        raise ValueError(f"config.{field}: {error}") from None


def turning(group: groups.Group | groups.MatrixGroup) -> groups.Group:
    """The finite group by whose elements images are turned to see what a model makes of them.

    Itself, or for SO(2) and O(2) a subgroup of 16 elements.
    """
    if not isinstance(group, groups.MatrixGroup):
        return group
    return group.subgroup(8 if isinstance(group, groups.O) else 16)


def evaluation_group(config: Config) -> groups.Group:
    """That of the final figures; ValueError for a setting that is no finite group."""
    if config.evaluation_group:
        return groups.finite(
            _group("evaluation_group", config.evaluation_group), "config.evaluation_group"
        )
    return turning(group_of(config))


def refined(config):
    """The group whose scores are refined, or None."""
    name, group = config.scorer.refine, group_of(config)
    if not name:
        return None
    if not isinstance(group, groups.MatrixGroup):
        raise ValueError(
            f"config.scorer.refine={name} finds poses between elements, and {group} has none "
            "there: leave it out, or choose config.group=so2 or o2."
        )
    return groups.finite(_group("scorer.refine", name), "config.scorer.refine")


def _scored(config):
    """What the scorer gives poses of: the group, or that whose scores are refined."""
    return refined(config) or group_of(config)


def _scorer(config, group, dtype):
    """(scorer, the features that it reads or None), as `adapt` takes them."""
    settings, adaptation, name = config.scorer, config.adaptation, config.canonicalizer
    cls = _network("scorer", name)
    _check_scorer(config)
    if name in energies.NAMED:
        return energies.Energy(cls, settings.margin), None
    if name == "steerable":
        return from_linen(_make("scorer", cls, (group,), settings.options, dtype=dtype)), None
    group = _scored(config)
    pad = adaptation.pad if config.mask == "none" else "constant"  # beyond the disk all is `fill`
    sampling = {"pad": pad, "fill": adaptation.fill}
    if name in ENERGIES:
        width = settings.embedding if settings.reference != "none" else 1
        options = settings.options or _SMALL.get(name, {})
        network = from_linen(_make("scorer", cls, (width,), options, dtype=dtype))
        return orbit_scorer(
            group, network, reference=settings.reference,
            interpolation=adaptation.interpolation, **sampling,
        ), None  # fmt: skip
    if name == "features":
        scorer = _make("scorer", cls, (group,), settings.options, dtype=dtype)
        return from_linen(scorer), scorer.read
    return from_linen(
        _make("scorer", cls, (group,), settings.options, dtype=dtype, **sampling)
    ), None


def _check_scorer(config):
    """Refuse settings that say something of another canonicalizer than the one named."""
    settings, adaptation, name = config.scorer, config.adaptation, config.canonicalizer
    free = name in energies.NAMED
    choose("scorer.reference", settings.reference, REFERENCES)
    if settings.embedding < 1:
        raise ValueError(f"config.scorer.embedding is {settings.embedding}: give 1 or more.")
    _check_group(config)
    if adaptation.method == "predictions" and adaptation.mode == "joint":
        raise ValueError(
            "config.adaptation.method=predictions runs the predictor as in inference: choose "
            "config.adaptation.mode=frozen."
        )
    if free and adaptation.mode in ("frozen", "prior"):
        raise ValueError(
            f"config.canonicalizer={name} has nothing to train where the predictor is kept "
            f"(config.adaptation.mode={adaptation.mode}): evaluate without a run, by "
            f"eval.py --predictor=… --data=… --adapt={name}."
        )
    if settings.margin and not free:
        raise ValueError(
            f"config.scorer.margin is {settings.margin}, and the canonicalizer {name} is "
            f"trained: only {', '.join(energies.NAMED)} have a margin."
        )
    for term in ("contrastive_weight", "artefact_weight"):
        embeds = name in ENERGIES and settings.reference != "none"
        if getattr(adaptation, term) and not embeds:
            raise ValueError(
                f"config.adaptation.{term} needs embeddings of the poses: choose "
                f"config.canonicalizer of {', '.join(ENERGIES)}, with a reference learned or "
                "fixed."
            )


def _check_group(config):
    """Refuse what needs the elements of a group counted where they are not, and the reverse."""
    name, group = config.canonicalizer, group_of(config)
    steers, between = name == "steerable", refined(config) is not None
    if not isinstance(group, groups.MatrixGroup):
        if steers:
            raise ValueError(
                "config.canonicalizer=steerable gives vectors, poses of so2 or o2, and the group "
                f"is {group}: choose group_conv."
            )
        return
    if steers == between or name in ("features", *energies.NAMED):
        raise ValueError(
            f"config.group={group} takes config.canonicalizer=steerable, or group_conv, energy, "
            "energy_resnet or energy_vit with config.scorer.refine, the group whose scores are "
            f"refined, such as {group.subgroup(16)}; here are {name} and "
            f"{config.scorer.refine or 'none'!r}."
        )
    adaptation = config.adaptation
    counted = {
        f"averaging={config.averaging}": config.averaging != "single",
        f"chunk={config.chunk}": config.chunk != 0,
        f"adaptation.method={adaptation.method}": adaptation.method != "straight_through",
        f"adaptation.temperature={adaptation.temperature}": adaptation.temperature != 1,
    }
    for setting, given in counted.items():
        if given:
            groups.finite(group, f"config.{setting}, of weights over all poses,")


def trains_nothing(config: Config) -> bool:
    """Whether the scorer has no parameters, so that no loss of the scores has any effect."""
    return config.canonicalizer in energies.NAMED and config.adaptation.mode not in BASELINES


def fitting_options(role: str, name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of another network's options that the network of this name has, no variant of it."""
    known = _options(_network(role, name))
    return {option: value for option, value in options.items() if option in known}


def canonicalizer_for(group: str, name: str, refine: str) -> str:
    """The canonicalizer that is meant where a group is chosen and none: the one named, if it gives
    poses of such a group.
    """
    any_angle = isinstance(groups.from_name(group), groups.MatrixGroup)
    if any_angle and not refine:
        return "steerable"
    return "group_conv" if name == "steerable" and not any_angle else name


def _averaging(averaging, group):
    """The poses and the weighting that the setting stands for, as `adapt` takes them."""
    if isinstance(group, groups.MatrixGroup):
        if averaging != "single":
            groups.finite(group, f"config.averaging={averaging}")
        return {}
    named = {"single": (1, "scores"), "weighted": (None, "scores"), "mean": (None, "equal")}
    kinds = {"top": "scores", "faded": "faded", "sampled": "sampled"}
    match = re.fullmatch(r"(top|faded|sampled)([1-9][0-9]*)", averaging)
    if averaging not in named and (match is None or int(match[2]) > group.order):
        raise ValueError(
            f"config.averaging is {averaging!r}: choose {', '.join(named)}, or top<k>, faded<k> or "
            f"sampled<k> with k from 1 to {group.order}, the order of {group}."
        )
    if match is None:
        poses, weighting = named[averaging]
    else:
        poses, weighting = int(match[2]), kinds[match[1]]
    return {"poses": poses, "weighting": weighting}


def with_averaging(config: Config, averaging: str) -> Config:
    """The settings with another averaging, and a chunk that divides its poses too."""
    config = dataclasses.replace(config, averaging=averaging)
    if not config.chunk:
        return config
    seen = _seen(config, group_of(config))
    return dataclasses.replace(config, chunk=math.gcd(config.chunk, seen))


def _seen(config, group):
    """How many poses the predictor sees, a divisor of those it sees in training."""
    reads = config.canonicalizer in ("features", *energies.NAMED)
    how = _averaging(config.averaging, group)
    return seen_poses(group, reads=reads, method=config.adaptation.method, **how)


def _chunk(config, group):
    """How many poses share a pass; None for all."""
    if isinstance(group, groups.MatrixGroup):
        return None
    seen = _seen(config, group)
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
    first = {"scorer": _scored(config), "predictor": None}
    resolved = {}
    for role, argument in first.items():
        settings, name = getattr(config, role), network_name(config, role)
        cls = _network(role, name)
        if name in energies.NAMED:  # no network: options are another scorer's
            resolved[role] = dataclasses.replace(settings, options={})
            continue
        options = settings.options or _SMALL.get(name, {})
        network = _make(role, cls, (argument,), options)
        resolved[role] = dataclasses.replace(settings, options=options_of(network))
    return dataclasses.replace(config, **resolved)


def options_of(network: Any) -> dict[str, Any]:
    """Every option of a network."""
    return {name: getattr(network, name) for name in _options(type(network))}


def build_prior(
    settings: Prior, group: groups.Group | groups.MatrixGroup, refine: groups.Group | None = None
):
    """The prior of a run over the elements of a group, or over angles refined between some.

    One that is to be estimated is the identity until its probabilities are known.
    """
    if isinstance(group, groups.MatrixGroup):
        prior = _prior_of_angles(settings, group)
        return prior if refine is None else priors.Refined(refine, prior)
    known = ("identity", "mirror", "uniform", "categorical", "estimated")
    name = choose("prior.name", settings.name, known)
    if name == "categorical" or (name == "estimated" and settings.probabilities):
        return _over(
            group, priors.Categorical, settings.probabilities, settings.kl_weight,
            settings.per_sample,
        )  # fmt: skip
    if name == "mirror" and group.order > group.n:
        half = np.zeros(group.order)
        half[[0, group.n]] = 0.5
        return _over(
            group, priors.Categorical, tuple(half), settings.kl_weight, settings.per_sample
        )
    return priors.Uniform() if name == "uniform" else priors.Identity()


def probabilities(prior, group: groups.Group) -> np.ndarray:
    """Those of a prior over a finite group, one for each element."""
    if isinstance(prior, priors.Uniform):
        return np.full(group.order, 1 / group.order)
    return np.asarray(getattr(prior, "probabilities", np.eye(group.order)[0]))


def _over(group, kind, *arguments):
    """A distribution over the group, if it is one."""
    try:
        prior = kind(*arguments)
        prior.check(group)
    except ValueError as error:
        raise ValueError(f"config.prior: {error}") from None
    return prior


def _prior_of_angles(settings, group):
    if settings.name in ("categorical", "estimated"):
        groups.finite(group, f"config.prior.name={settings.name}")
    name = choose("prior.name", settings.name, ("identity", "mirror", "von_mises", "uniform"))
    if name == "von_mises":
        return _over(group, priors.VonMises, settings.kappa, settings.angle, settings.mirror)
    if name == "mirror" and isinstance(group, groups.O):
        return priors.VonMises(1.0, mirror=0.5)
    return priors.Uniform() if name == "uniform" else priors.Identity()


def turns_inputs(config: Config) -> bool:
    """Whether training inputs are turned by any angle; always where the group interpolates."""
    choice = config.adaptation.turn_inputs
    exact = getattr(group_of(config), "n", None) in (1, 2, 4)
    always = {"yes": True, "no": False, "auto": not exact}
    return choose("adaptation.turn_inputs", choice, always)


def choose(field, name, choices):
    """What a name stands for, or where there are only names the name itself."""
    if name not in choices:
        raise ValueError(f"config.{field} is {name!r}: choose one of {', '.join(choices)}.")
    return choices[name] if isinstance(choices, dict) else name


def _network(role, name):
    return choose(NAMED_BY[role], name, {"scorer": _SCORERS, "predictor": _PREDICTORS}[role])


def default_options(role: str, name: str) -> dict[str, Any]:
    """What can be set of a network, with the defaults of what has one."""
    cls = _network(role, name)
    variant = {"variant": "…"} if hasattr(cls, "variant") else {}
    return variant | {option: getattr(cls, option, "…") for option in _options(cls)}


def _options(cls):
    """What can be set of a network; nothing of an energy, which is a function."""
    if not dataclasses.is_dataclass(cls):
        return []
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
