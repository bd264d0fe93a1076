"""Equivariant adaptation of pretrained networks in JAX."""

from equiadapt_jax import actions, canonicalization, groups, networks, predictors, priors
from equiadapt_jax.adaptation import Adapted, Network, adapt, from_function, from_linen, from_nnx

__version__ = "0.1.0"
