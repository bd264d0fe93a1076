"""ImageNet with published networks, kept as they are and made invariant to eighth turns.

    python -m equiadapt_jax.data.prepare imagenet2012    # once; needs pip install -e '.[prepare]'
    python train.py --config=configs/imagenet2012.py:resnet50
    python train.py --config=configs/imagenet2012.py:vit_b16

No figure of the paper is at hand for this data set, and nothing was run here. The published
classifier is kept, so that only the scorer is trained; the order of TFDS's classes is that of
the weights. The last hundredth of train chooses the checkpoint, TFDS's validation gives the
final figures.

Needs an accelerator of 40 GB or more, and some 300 GB of disk for the data, which have to be
downloaded by hand (TFDS says how). An estimate, not a measurement: 2.6 million images through
the predictor, two hours where 400 a second go through; evaluating 50,000 images in eight poses,
by both models, takes 0.8 million more.
"""

import dataclasses

from ml_collections import ConfigDict

from equiadapt_jax.training import config as settings

PREDICTORS = {
    "resnet50": settings.Predictor(
        name="resnet",
        options={"variant": "resnet50"},
        weights="hf://timm/resnet50.tv2_in1k",
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
    ),
    "vit_b16": settings.Predictor(
        name="vit",
        options={"variant": "B/16"},
        weights="hf://google/vit-base-patch16-224",
        mean=(0.5,),
        std=(0.5,),
    ),
    "tiny": settings.Predictor(
        name="resnet",
        options={"stage_sizes": (1,), "block": "basic", "width": 8, "stem": "cifar"},
    ),
}


def get_config(variant: str = "") -> ConfigDict:
    """The settings for `:resnet50`, the default, or `:vit_b16`; with `:tiny` a small run."""
    variant = variant or "resnet50"
    predictor = settings.chosen("imagenet2012", PREDICTORS, variant)
    config = settings.Config(
        name=f"imagenet2012_{variant}",
        group="cyclic8",
        dtype="bfloat16",
        evaluation_batch_size=128,
        data=settings.Data(
            name="imagenet2012",
            size=224,
            fit="crop",
            train="train[:99%]",
            validation="train[99%:]",
            test="validation",
        ),
        predictor=predictor,
        canonicalizer="group_conv",
        scorer=settings.Scorer(
            options={
                "size": 64,
                "features": (32, 64, 64),
                "kernels": (4, 4, 2),
                "strides": (2, 2, 2),
                "grid": 4,
            },
        ),
        pretrain=settings.Pretrain(steps=0),
        adaptation=settings.Adaptation(
            mode="frozen", steps=20000, batch_size=128, scorer_learning_rate=1e-3
        ),
        logging=settings.Logging(every=100, evaluate_every=5000),
    )
    if variant == "tiny":
        config = settings.tiny(
            dataclasses.replace(config, name="imagenet2012"),
            variant,
            predictor=predictor.options,
            scorer={"features": (4, 4), "kernels": (4, 2), "strides": (2, 2), "hidden": 8},
        )
        data = dataclasses.replace(
            config.data,
            size=32,
            train="train[:1%]",
            validation="train[99%:]",
            test="validation[:1%]",
        )
        config = dataclasses.replace(config, data=data, dtype="float32")
    return ConfigDict(dataclasses.asdict(config))
