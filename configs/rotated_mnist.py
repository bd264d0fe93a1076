"""Rotated MNIST from scratch: digits that come in every pose, without a prior.

    python train.py --config=configs/rotated_mnist.py --config.data.root=mnist_rotation_new

The folder holds the two .amat files of Larochelle et al. 2007, 12,000 training and 50,000 test
images. No pose is special in these data, so the prior has no weight and the scorer learns from
the task alone (Kaba et al. 2023, arXiv 2211.06489). "vanilla" is then the network before any
training: compare with a run of --config.adaptation.mode=vanilla. No figure of the papers is at
hand for this data set, and nothing was run here.

Needs an accelerator. An estimate, not a measurement: 1.9 million images of 28×28 pixels, an
hour where 500 a second go through.
"""

import dataclasses

from ml_collections import ConfigDict

from equiadapt_jax.training import config as settings


def get_config(variant: str = "") -> ConfigDict:
    """The settings; with `:tiny` behind the file's name, those of a small run."""
    config = settings.Config(
        name="rotated_mnist",
        group="cyclic8",
        evaluation_batch_size=128,
        data=settings.Data(name="rotated_mnist", size=28),
        predictor=settings.Predictor(
            name="resnet",
            options={"variant": "resnet50", "stem": "cifar"},
            mean=(0.13,),
            std=(0.3,),
        ),
        canonicalizer="group_conv",
        scorer=settings.Scorer(
            options={
                "features": (32, 64, 64),
                "kernels": (4, 2, 3),
                "strides": (2, 2, 1),
                "grid": 7,
            },
        ),
        pretrain=settings.Pretrain(steps=0),
        adaptation=settings.Adaptation(
            steps=15000,
            batch_size=128,
            scorer_learning_rate=1e-3,
            predictor_learning_rate=1e-3,
            prior_weight=0.0,
            turn_inputs="no",
        ),
        prior=settings.Prior(name="uniform"),
        logging=settings.Logging(every=100, evaluate_every=1500),
    )
    if variant:
        config = settings.tiny(
            config,
            variant,
            predictor={"stage_sizes": (1,), "block": "basic", "width": 8, "stem": "cifar"},
            scorer={"features": (4, 4), "kernels": (4, 2), "strides": (2, 2), "hidden": 8},
        )
        data = dataclasses.replace(config.data, validation="validation[:5%]", test="test[:1%]")
        config = dataclasses.replace(config, data=data)
    return ConfigDict(dataclasses.asdict(config))
