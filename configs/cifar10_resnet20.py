"""A published CIFAR-10 ResNet-20, kept as it is, becomes invariant to quarter turns and mirrors.

    python train.py --config=configs/cifar10_resnet20.py

--config.data.root and --config.predictor.weights say where images and weights lie, if elsewhere.
The weights are those of akamaster/pytorch_resnet_cifar10 as safetensors. `cifar10_jpeg` holds
train.tar and test.tar with <class>/<image>, 50,000 and 5,000 images; JPEG compression costs these
weights ten points. Vanilla there: 81.0 % upright, 45.2 % over C4. Adapted: 81.3 % in every pose, no
prediction changed. Two CPU cores: nine minutes of adaptation, three more in all.

A small head on the network's own features scores the poses, and predictions for all poses are
weighted by the scores. With --config.group=cyclic4 --config.adaptation.variants=2
--config.augmentation.mirror 79.1 % in half of the passes; with --config.group=cyclic8
--config.evaluation_group=cyclic8 --config.adaptation.interpolation=cubic 77.1 % over C8.
`:group_conv` behind this file's name trains a scorer of its own instead, for one pass of the
network: 73.1 % in every pose, after eighteen minutes. `:light` is one of little work
on larger images, for the speed benchmark, trained for two minutes.
"""

import dataclasses

from ml_collections import ConfigDict

from equiadapt_jax.training import config as settings


def get_config(variant: str = "") -> ConfigDict:
    """The settings; `:group_conv`, `:light` with a scorer of its own, `:tiny` for a small run."""
    config = settings.Config(
        name="cifar10_resnet20",
        group="dihedral4",
        evaluation_batch_size=16,
        evaluation_group="cyclic4",
        data=settings.Data(
            name="image_folder",
            root="../shared/data/cifar10_jpeg",
            size=32,
            train="train[:90%]",  # prepared copies are shuffled: every class is in both
            validation="train[90%:]",
        ),
        predictor=settings.Predictor(
            name="resnet",
            options={"variant": "resnet20"},
            weights="../shared/weights/cifar10_resnet20.safetensors",
            mean=(0.485, 0.456, 0.406),
            std=(0.229, 0.224, 0.225),
        ),
        canonicalizer="features",
        scorer=settings.Scorer(options={"grid": 4, "hidden": 192, "dropout": 0.3}),
        pretrain=settings.Pretrain(steps=0),
        adaptation=settings.Adaptation(
            mode="prior", steps=3000, batch_size=128, scorer_learning_rate=1e-3
        ),
        prior=settings.Prior(name="mirror"),
        averaging="weighted",
        optimizer=settings.Optimizer(weight_decay=0.2, warmup=0.05),
        logging=settings.Logging(evaluate_every=1000),
    )
    if variant == "group_conv":
        return ConfigDict(dataclasses.asdict(_own_scorer(config)))
    if variant == "light":
        return ConfigDict(dataclasses.asdict(_light(config)))
    if variant:
        config = settings.tiny(
            config,
            variant,
            predictor=config.predictor.options,
            scorer={"grid": 2, "hidden": 8},
        )
        data = dataclasses.replace(
            config.data, train="train[:1%]", validation="train[99%:]", test="test[:10%]"
        )
        config = dataclasses.replace(config, data=data)
    return ConfigDict(dataclasses.asdict(config))


def _own_scorer(config: settings.Config) -> settings.Config:
    """A scorer that looks at the image itself, so that the predictor makes one pass."""
    return dataclasses.replace(
        config,
        name=f"{config.name}_group_conv",
        group="cyclic4",
        evaluation_batch_size=50,
        averaging="single",
        canonicalizer="group_conv",
        scorer=settings.Scorer(
            options={
                "features": (24, 48, 96),
                "kernels": (4, 4, 2),
                "strides": (2, 2, 2),
                "grid": 4,
                "size": 32,
            },
        ),
        augmentation=settings.Augmentation(mirror=True),
        adaptation=dataclasses.replace(config.adaptation, scorer_learning_rate=3e-3, batch_size=60),
        optimizer=settings.Optimizer(weight_decay=0.05, warmup=0.05),
    )


def _light(config: settings.Config) -> settings.Config:
    """The same with the scorer of benchmarks/speed, which sees every image in 56×56 pixels.

    Of an image of 224×224 pixels, which it halves twice, C4 takes some 23 million multiplications.
    """
    config = _own_scorer(config)
    options = {**config.scorer.options, "features": (12, 24, 64), "size": 56, "grid": 7}
    return dataclasses.replace(
        config,
        name="cifar10_resnet20_light",
        scorer=dataclasses.replace(config.scorer, options=options),
        adaptation=dataclasses.replace(config.adaptation, steps=500),
    )
