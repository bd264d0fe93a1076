"""A predictor that starts from a weight file, and the settings that follow from it."""

import dataclasses
from typing import Any

import numpy as np

from equiadapt_jax.conversion import files
from equiadapt_jax.predictors import Preprocess, ViT, loading
from equiadapt_jax.training.build import options_of
from equiadapt_jax.training.config import Config, Predictor

HEADS = ("keep", "fresh")


def read_weights(
    config: Config, classes: int, shape: tuple[int, ...]
) -> tuple[Config, tuple[Any, Any] | None]:
    """The settings with what the weight file says, and its (params, state); None without a file.

    `shape` (S, S, C) is that of the images: a ViT's position embeddings are resampled to it, and
    the first convolution is adapted to other channels. Name, options, mean, std and the digest are
    then part of the settings, so that what was trained is rebuilt without the file.

    Raises ValueError, or FileNotFoundError for a missing file, as `predictors.load` does; and
    ValueError for a digest that differs, a classifier for another number of classes, and a fresh
    classifier that nothing would train.
    """
    settings = config.predictor
    _check(config)
    if not settings.weights:
        return config, None
    file = loading.find(settings.weights)
    digest = files.digest(file)
    if settings.sha256 and settings.sha256.strip().lower() != digest:
        raise ValueError(
            f"{file} has SHA-256 {digest}, not {settings.sha256} of config.predictor.sha256: "
            "download it again."
        )
    module, params, state, preprocess = loading.read(
        file, preprocess=_preprocess(settings), image_size=shape[0], channels=shape[-1],
        head=classes if settings.head == "fresh" else "keep",
    )  # fmt: skip
    if module.num_classes != classes:
        raise ValueError(
            f"The classifier in {file} is for {module.num_classes} classes, and the data have "
            f"{classes}: take --config.predictor.head=fresh, which must be trained first "
            "(--config.pretrain.steps)."
        )
    name = "vit" if isinstance(module, ViT) else "resnet"
    mean, std = (tuple(map(float, np.atleast_1d(m))) for m in (preprocess.mean, preprocess.std))
    print(f"The predictor is the {name} in {file}, for images with mean {mean} and std {std}.")
    settings = dataclasses.replace(
        settings, name=name, options=options_of(module), mean=mean, std=std, sha256=digest
    )
    return dataclasses.replace(config, predictor=settings), (params, state)


def _check(config):
    settings = config.predictor
    if settings.head not in HEADS:
        raise ValueError(
            f"config.predictor.head is {settings.head!r}: choose one of {', '.join(HEADS)}."
        )
    if settings.sha256 and not settings.weights:
        raise ValueError("config.predictor.sha256 is given without config.predictor.weights.")
    if bool(settings.mean) != bool(settings.std):
        raise ValueError("Give config.predictor.mean and config.predictor.std, or none of both.")
    if not (settings.mean or settings.weights):
        raise ValueError(
            "config.predictor.mean and config.predictor.std are empty: that is only for weights, "
            "beside which they are looked for."
        )
    trained = config.pretrain.steps or config.adaptation.mode == "joint"
    if settings.weights and settings.head == "fresh" and not trained:
        raise ValueError(
            "A fresh classifier is all zeros, and nothing would train it: set "
            "--config.pretrain.steps, or --config.adaptation.mode=joint."
        )


def _preprocess(settings: Predictor) -> Preprocess | None:
    if not settings.mean:
        return None
    mean, std = (m[0] if len(m) == 1 else m for m in (settings.mean, settings.std))
    return Preprocess(mean, std)
