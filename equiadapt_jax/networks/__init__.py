"""Scorers: Flax networks that score the poses of an input."""

from equiadapt_jax.networks.feature_scorer import FeatureScorer
from equiadapt_jax.networks.group_conv import GroupConvNet
from equiadapt_jax.networks.steerable import SteerableNet

__all__ = ["FeatureScorer", "GroupConvNet", "SteerableNet"]
