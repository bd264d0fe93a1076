"""Networks of our own that score the poses of an input, or that are trained to be an energy."""

from equiadapt_jax.networks.conv_net import ConvNet
from equiadapt_jax.networks.feature_scorer import FeatureScorer
from equiadapt_jax.networks.group_conv import GroupConvNet
from equiadapt_jax.networks.steerable import SteerableNet

__all__ = ["ConvNet", "FeatureScorer", "GroupConvNet", "SteerableNet"]
