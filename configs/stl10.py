"""STL-10 with ImageNet networks, fine-tuned and made invariant to eighth turns, as in the paper.

    python -m equiadapt_jax.data.prepare stl10    # once; needs pip install -e '.[prepare]'
    python train.py --config=configs/stl10.py:resnet50
    python train.py --config=configs/stl10.py:vit_b16

No figure of the paper is at hand for this data set, and nothing was run here.

The group is the paper's; the weight of the prior, the batch size and the 100 epochs are those
of its code for CIFAR-10. Here half of the epochs fine-tune the predictor on upright images,
which gives the vanilla one, and half adapt it. The network of the scorer, AdamW and its
learning rates are this project's.

Needs an accelerator of 40 GB or more. An estimate, not a measurement: 0.45 million images
through the predictor, forward and backward, 0.1 hours with ResNet-50 and 0.3 with ViT-B/16
where 1,000 and 400 images a second go through.
"""

import dataclasses

from ml_collections import ConfigDict

from equiadapt_jax.training import config as settings

PREDICTORS = {
    "resnet50": settings.Predictor(
        name="resnet",
        options={"variant": "resnet50"},
        weights="hf://timm/resnet50.tv2_in1k",
        head="fresh",
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
    ),
    "vit_b16": settings.Predictor(
        name="vit",
        options={"variant": "B/16"},
        weights="hf://google/vit-base-patch16-224",
        head="fresh",
        mean=(0.5,),
        std=(0.5,),
    ),
    "tiny": settings.Predictor(
        name="resnet",
        options={"stage_sizes": (1,), "block": "basic", "width": 8, "stem": "cifar"},
    ),
}

# AdamW's, for fine-tuning.
LEARNING_RATES = {"resnet50": 1e-4, "vit_b16": 3e-5, "tiny": 1e-3}


def get_config(variant: str = "") -> ConfigDict:
    """The settings for `:resnet50`, the default, or `:vit_b16`; with `:tiny` a small run."""
    variant = variant or "resnet50"
    predictor = settings.chosen("stl10", PREDICTORS, variant)
    config = settings.Config(
        name=f"stl10_{variant}",
        group="cyclic8",
        dtype="bfloat16",
        evaluation_batch_size=128,
        data=settings.Data(
            name="stl10",
            size=224,
            train="train[:90%]",
            validation="train[90%:]",
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
        augmentation=settings.Augmentation(angle=0.09, shift=0.12),
        pretrain=settings.Pretrain(
            steps=1750, batch_size=128, learning_rate=LEARNING_RATES[variant]
        ),
        adaptation=settings.Adaptation(
            steps=1750,
            batch_size=128,
            scorer_learning_rate=1e-3,
            predictor_learning_rate=LEARNING_RATES[variant],
        ),
        logging=settings.Logging(every=100, evaluate_every=250),
    )
    if variant == "tiny":
        config = settings.tiny(
            dataclasses.replace(config, name="stl10"),
            variant,
            predictor=predictor.options,
            scorer={"features": (4, 4), "kernels": (4, 2), "strides": (2, 2), "hidden": 8},
        )
        data = dataclasses.replace(
            config.data, size=32, train="train[:1%]", validation="train[99%:]", test="test[:1%]"
        )
        config = dataclasses.replace(config, data=data, dtype="float32")
    return ConfigDict(dataclasses.asdict(config))
