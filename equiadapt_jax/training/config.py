"""The settings of a run: frozen dataclasses, each field with its meaning.

Configuration files turn a `Config` into a dict, flags change it, and `from_dict` brings it back,
refusing what it does not know.
"""

import dataclasses
import difflib
import hashlib
import json
import operator
from collections.abc import Mapping
from typing import Any


def _setting(default: Any, meaning: str) -> Any:
    if isinstance(default, dict):
        return dataclasses.field(
            default_factory=lambda: dict(default), metadata={"meaning": meaning}
        )
    return dataclasses.field(default=default, metadata={"meaning": meaning})


@dataclasses.dataclass(frozen=True)
class Data:
    """Which images, and how they become squares of one size."""

    name: str = _setting(
        "digits", "digits, image_folder, rotated_mnist, or a prepared TFDS dataset"
    )
    root: str = _setting(
        "",
        "image_folder: the folder or tar with <split>/<class>/<image>; rotated_mnist: the folder "
        "of its files",
    )
    data_dir: str = _setting("", "where prepared copies lie; TFDS's own directory by default")
    size: int = _setting(24, "side in pixels to which images are brought; 0 leaves them alone")
    fit: str = _setting("pad", "how: pad (to a centred square), crop, stretch or none")
    train: str = _setting("train", "split to train on; slices such as train[:90%] work")
    validation: str = _setting("validation", "split that chooses the best checkpoint")
    test: str = _setting("test", "split of the final figures")
    poses: tuple[float, ...] = _setting(
        (),
        "make data that are not upright: the probability of each element of the group, by which "
        "training and validation images are turned once and for all",
    )


@dataclasses.dataclass(frozen=True)
class Scorer:
    """The network of the canonicalizer, which scores poses."""

    options: Mapping[str, Any] = _setting({}, "fields of the network")
    reference: str = _setting(
        "learned",
        "energy: score by the cosine with a vector that is learned or fixed; none: by the "
        "network's own number",
    )
    embedding: int = _setting(64, "energy: length of that vector")
    refine: str = _setting(
        "",
        "so2 and o2: score the elements of this group, such as cyclic16 or dihedral16, by "
        "group_conv or energy, and refine the angle between them; empty for steerable",
    )
    margin: float = _setting(
        0.0, "confidence and the like: by how much a pose must beat the identity, else that is kept"
    )


@dataclasses.dataclass(frozen=True)
class Predictor:
    """The network to be adapted, and its own preprocessing."""

    name: str = _setting("vit", "vit or resnet")
    options: Mapping[str, Any] = _setting({}, "fields of the network, or variant='B/16' and others")
    weights: str = _setting(
        "",
        "weight file, Hugging Face directory or hf://owner/name; name and options are then those "
        "of the file",
    )
    sha256: str = _setting("", "of the weight file, which is then compared with it")
    head: str = _setting("keep", "weights: keep the classifier, or a fresh one of zeros")
    remat: bool = _setting(
        False, "keep only what enters each block for the way back, for less memory (resnet, vit)"
    )
    mean: tuple[float, ...] = _setting(
        (0.5,), "per channel, or one for all; empty: what is said beside the weights"
    )
    std: tuple[float, ...] = _setting((0.5,), "likewise")


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """Small random changes of training images; uniform in plus and minus these."""

    angle: float = _setting(0.0, "radians; left out where inputs are turned by any angle")
    scale: float = _setting(0.0, "logarithm of the magnification")
    shift: float = _setting(0.0, "fraction of the side")
    mirror: bool = _setting(False, "mirror half of the images left to right, as suits photographs")


@dataclasses.dataclass(frozen=True)
class Pretrain:
    """Training of the predictor on upright images before it is adapted."""

    steps: int = _setting(1000, "0 leaves the predictor as initialised, or as its weights are")
    batch_size: int = _setting(64, "images per step, all devices together")
    learning_rate: float = _setting(3e-3, "peak, after warm-up and before cosine decay")
    directory: str = _setting("runs/pretrained", "where pretrained predictors are kept and found")


@dataclasses.dataclass(frozen=True)
class Adaptation:
    """Training of the scorer, with or without the predictor; or of the predictor alone."""

    mode: str = _setting(
        "joint",
        "joint; frozen (predictor kept); prior (kept, and no labels); and to compare with, the "
        "predictor alone on upright images (vanilla) or turned ones (augmentation)",
    )
    steps: int = _setting(400, "optimisation steps")
    batch_size: int = _setting(64, "images per step, all devices together")
    scorer_learning_rate: float = _setting(3e-3, "peak")
    predictor_learning_rate: float = _setting(3e-4, "peak; where it is trained")
    prior_weight: float = _setting(100.0, "of the prior's loss beside the task's")
    method: str = _setting(
        "straight_through",
        "weights: straight_through, gumbel, soft (sums images) or predictions (sums predictions, "
        "with the predictor kept)",
    )
    temperature: float = _setting(1.0, "of the weights")
    contrastive_weight: float = _setting(
        0.0, "canonicalizer energy: of the term that keeps embeddings of one image's poses apart"
    )
    artefact_weight: float = _setting(
        0.0, "canonicalizer energy: of the term that makes embeddings blind to interpolation"
    )
    temperature_end: float = _setting(0.0, "to which it goes until the last step; 0 keeps it")
    temperature_decay: str = _setting("cosine", "how: cosine or exponential")
    confidence_penalty: float = _setting(
        0.0,
        "weight of the entropy of the poses' probabilities, which the loss is lowered by: above 0 "
        "against scores that are too sure, below 0 for surer ones",
    )
    turn_inputs: str = _setting(
        "auto",
        "turn training inputs by any angle: yes, no, or auto: where the group interpolates (but "
        "augmentation by its elements)",
    )
    pad: str = _setting("edge", "what lies outside the image: edge or constant")
    fill: float = _setting(0.0, "its value for constant, in [0, 1]")
    start: str = _setting(
        "", "a run with the same networks, from whose best checkpoint this one goes on"
    )
    start_mark: str = _setting("", "which checkpoint that was; set by the program")
    interpolation: str = _setting(
        "linear", "how inputs are turned back where pixels fall between others: linear or cubic"
    )
    variants: int = _setting(
        1,
        "canonicalizer features, predictor kept: versions of each image, augmented, made "
        "beforehand",
    )
    cache_gigabytes: float = _setting(
        8.0, "their size up to which they are kept in memory; beyond it none are made beforehand"
    )


@dataclasses.dataclass(frozen=True)
class Prior:
    """Where the predictor's own data lie in the group."""

    name: str = _setting(
        "identity",
        "identity, mirror (half of it on the mirror; the identity where a group has none), uniform "
        "(none preferred), categorical, or estimated from the training images, which need not be "
        "upright; for so2 and o2 identity, mirror, uniform or von_mises",
    )
    probabilities: tuple[float, ...] = _setting((), "categorical: one per element")
    kl_weight: float = _setting(0.0, "categorical: weight of KL(prior ‖ batch mean of poses)")
    per_sample: bool = _setting(False, "categorical: KL per input, as in the papers")
    kappa: float = _setting(
        10.0, "von_mises: its concentration; where it is large the width is 1/√kappa radians"
    )
    angle: float = _setting(0.0, "von_mises: its most probable angle, in radians")
    mirror: float = _setting(0.0, "von_mises, for o2: how much of it is mirrored")
    rounds: int = _setting(4, "estimated: how often images are aligned anew, at least 2")
    steps: int = _setting(200, "estimated: optimisation steps of the scorer in each round")


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """AdamW with warm-up and cosine decay, for both stages."""

    weight_decay: float = _setting(0.05, "of AdamW")
    warmup: float = _setting(0.1, "fraction of the steps")
    clip: float = _setting(1.0, "largest norm of the gradient")
    accumulate: int = _setting(
        1, "steps whose gradients are averaged before parameters change, for larger batches"
    )


@dataclasses.dataclass(frozen=True)
class Logging:
    """How often, and where to."""

    every: int = _setting(20, "steps between logged ones")
    evaluate_every: int = _setting(200, "steps between validation and checkpoint")
    tensorboard: bool = _setting(False, "also write event files (extra tensorboard)")
    wandb: str = _setting("", "also log to this Weights & Biases project (extra wandb)")


@dataclasses.dataclass(frozen=True)
class Config:
    """One run."""

    name: str = _setting("digits_vit", "first part of the run's directory")
    seed: int = _setting(0, "of initialisation, order of images and augmentation, in both stages")
    group: str = _setting("cyclic4", "cyclic<n> or dihedral<n>, or of all angles so2 or o2")
    canonicalizer: str = _setting(
        "group_conv",
        "what finds the pose: group_conv; features (of the predictor in every pose; slower, "
        "better); energy (a plain network sees every pose), energy_resnet, energy_vit; or without "
        "any training of its own what the predictor gives for every pose: confidence, entropy, "
        "logit_energy, feature_norm; steerable (vectors, for so2 and o2)",
    )
    averaging: str = _setting(
        "single",
        "single (the best pose), top<k> (the k best, weighted by their scores), weighted (all), "
        "faded<k> (the k best, weights that fade before poses change), mean (all alike) or "
        "sampled<k> (k drawn by their scores)",
    )
    chunk: int = _setting(
        0, "poses that share a pass of the predictor where it sees several; 0 for all"
    )
    mask: str = _setting(
        "none",
        "none, or disk: outside the inscribed disk scorer and predictor see adaptation.fill",
    )
    dtype: str = _setting("float32", "compute dtype: float32 or bfloat16; parameters are float32")
    evaluation_batch_size: int = _setting(60, "images per evaluated batch")
    evaluation_group: str = _setting(
        "",
        "whose elements turn the test images of the final figures; the group by default, for so2 "
        "cyclic16 and for o2 dihedral8",
    )
    data: Data = dataclasses.field(default_factory=Data)
    scorer: Scorer = dataclasses.field(default_factory=Scorer)
    predictor: Predictor = dataclasses.field(default_factory=Predictor)
    augmentation: Augmentation = dataclasses.field(default_factory=Augmentation)
    pretrain: Pretrain = dataclasses.field(default_factory=Pretrain)
    adaptation: Adaptation = dataclasses.field(default_factory=Adaptation)
    prior: Prior = dataclasses.field(default_factory=Prior)
    optimizer: Optimizer = dataclasses.field(default_factory=Optimizer)
    logging: Logging = dataclasses.field(default_factory=Logging)


# The setting that says which network has a role.
NAMED_BY = {"scorer": "canonicalizer", "predictor": "predictor.name"}


def network_name(config: Any, role: str) -> str:
    """Which network the settings name as `scorer` or `predictor`."""
    return operator.attrgetter(NAMED_BY[role])(config)


def chosen(name: str, variants: Mapping[str, Any], variant: str) -> Any:
    """What a variant of the configuration `name` stands for; ValueError where there is none."""
    if variant not in variants:
        raise ValueError(
            f"Unknown variant {variant!r} of {name}: there are {', '.join(map(repr, variants))}."
        )
    return variants[variant]


def tiny(
    config: Config, variant: str, *, predictor: Mapping[str, Any], scorer: Mapping[str, Any]
) -> Config:
    """The same run made small: two steps of each stage, with networks of these options.

    Weights are taken as they are, if they are so. Raises ValueError for a variant of another name.
    """
    if variant != "tiny":
        raise ValueError(f"Unknown variant {variant!r} of {config.name}: there is 'tiny'.")
    return dataclasses.replace(
        config,
        name=f"{config.name}_tiny",
        predictor=dataclasses.replace(config.predictor, options=predictor),
        scorer=dataclasses.replace(config.scorer, options=scorer),
        pretrain=dataclasses.replace(
            config.pretrain, steps=min(config.pretrain.steps, 2), batch_size=8
        ),
        adaptation=dataclasses.replace(config.adaptation, steps=2, batch_size=8),
        prior=dataclasses.replace(config.prior, rounds=2, steps=2),
        logging=dataclasses.replace(config.logging, every=1, evaluate_every=1),
    )


def from_dict(values: Mapping[str, Any], cls: type = Config, path: str = "config") -> Any:
    """A `Config` from nested dicts; ValueError for an unknown field, TypeError for a wrong type."""
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for name in values:
        if name not in fields:
            near = difflib.get_close_matches(name, fields, 1) or sorted(fields)
            raise ValueError(f"{path}.{name} is not a setting; did you mean {', '.join(near)}?")
    return cls(
        **{name: _value(fields[name], value, f"{path}.{name}") for name, value in values.items()}
    )


def _value(field, value, path):
    if dataclasses.is_dataclass(field.type):
        return from_dict(value, field.type, path)
    if field.name == "options":
        return {name: _freeze(option) for name, option in value.items()}
    default = field.default
    if isinstance(default, tuple) and isinstance(value, list | tuple):
        return tuple(map(float, value))
    number = isinstance(value, int) and not isinstance(value, bool)
    if isinstance(default, float) and number:
        return float(value)
    if type(value) is not type(default):
        raise TypeError(
            f"{path} is {value!r}, a {type(value).__name__}: give a {type(default).__name__}."
        )
    return value


def _freeze(value):
    return tuple(map(_freeze, value)) if isinstance(value, list | tuple) else value


# Images are known by their names, sizes and times, weights by content: neither by their place.
_WITHOUT_EFFECT = (
    "name", "data.root", "data.data_dir", "adaptation.start", "predictor.weights",
    "predictor.remat", "pretrain.directory", "chunk", "evaluation_group", "logging.every",
    "logging.tensorboard", "logging.wandb",
)  # fmt: skip

# Younger than the fingerprints of some predictors that are kept; with these values as if not there.
_YOUNGER = {"poses": (), "accumulate": 1}


def fingerprint(*parts: Any) -> str:
    """Eight hexadecimal digits that change with any of the given settings, not with their place."""

    def whole(part):
        if isinstance(part, Config):
            return _with_effect(part)
        values = dataclasses.asdict(part)
        values.pop("remat", None)
        return {n: v for n, v in values.items() if n not in _YOUNGER or v != _YOUNGER[n]}

    text = json.dumps(parts, default=whole, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def differences(old: Config, new: Config) -> list[str]:
    """`field: old → new` for all that differ and can change a result."""
    before, after = _with_effect(old), _with_effect(new)
    return [
        f"{name}: {before.get(name)!r} → {after.get(name)!r}"
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
    ]


def _with_effect(config):
    flat = _flatten(dataclasses.asdict(config))
    return {name: value for name, value in flat.items() if name not in _WITHOUT_EFFECT}


def _flatten(tree, prefix=""):
    flat = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat.update(_flatten(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = value
    return flat
