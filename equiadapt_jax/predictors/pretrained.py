"""A pretrained network with everything that is needed to run it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from equiadapt_jax.interface import Network


class Pretrained(NamedTuple):
    """A network, its parameters and state, and what it expects to be done to its images.

    Attributes:
      network: an `equiadapt_jax.Network`, as from `from_linen`, `from_nnx` or `from_function`.
      params: its parameters.
      state: its state, such as batch statistics; `{}` where there is none.
      preprocess: images (B, S, S, C) in [0, 1] to what the network takes; None for nothing.
    """

    network: Network
    params: Any
    state: Any
    preprocess: Callable[[jax.Array], jax.Array] | None = None
