"""Predictors: the pretrained networks that are adapted, and what they expect of their input."""

from equiadapt_jax.predictors.loading import load
from equiadapt_jax.predictors.preprocess import Preprocess
from equiadapt_jax.predictors.pretrained import Pretrained
from equiadapt_jax.predictors.resnet import ResNet
from equiadapt_jax.predictors.stem import adapt_stem
from equiadapt_jax.predictors.vit import ViT

__all__ = ["Preprocess", "Pretrained", "ResNet", "ViT", "adapt_stem", "load"]
