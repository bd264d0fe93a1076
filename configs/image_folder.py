"""Your own images: a ResNet trained on them upright, then made invariant to rotation.

    python train.py --config=configs/image_folder.py --config.data.root=photos

`photos`, a folder or a tar, holds <split>/<class>/<image> with the splits train and test; a tenth
of train chooses the best checkpoint. For finer angles use --config.group=cyclic8, for images that
may also be mirrored --config.group=dihedral4. The numbers of steps suit a few thousand images.
"""

import dataclasses

from ml_collections import ConfigDict

from equiadapt_jax.training import config as settings


def get_config(variant: str = "") -> ConfigDict:
    """The settings; with `:tiny` behind the file's name, those of a small run."""
    config = settings.Config(
        name="image_folder",
        group="cyclic4",
        evaluation_batch_size=64,
        data=settings.Data(
            name="image_folder",
            size=64,
            train="train[:90%]",
            validation="train[90%:]",
        ),
        predictor=settings.Predictor(
            name="resnet",
            options={"variant": "resnet18", "stem": "cifar"},
            mean=(0.5,),
            std=(0.25,),
        ),
        canonicalizer="group_conv",
        scorer=settings.Scorer(
            options={
                "features": (16, 32, 32),
                "kernels": (4, 4, 2),
                "strides": (2, 2, 2),
                "grid": 4,
            },
        ),
        augmentation=settings.Augmentation(angle=0.1, scale=0.1, shift=0.05),
        pretrain=settings.Pretrain(steps=4000, learning_rate=1e-3),
        adaptation=settings.Adaptation(steps=2000),
        prior=settings.Prior(name="mirror"),
        logging=settings.Logging(evaluate_every=200),
    )
    if variant:
        config = settings.tiny(
            config,
            variant,
            predictor={"stage_sizes": (1,), "block": "basic", "width": 8, "stem": "cifar"},
            scorer={"features": (4, 4), "kernels": (4, 2), "strides": (2, 2), "hidden": 8},
        )
    return ConfigDict(dataclasses.asdict(config))
