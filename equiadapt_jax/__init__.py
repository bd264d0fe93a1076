"""Equivariant adaptation of large pretrained networks in JAX.

A canonicalizer brings every input to the pose in which a pretrained predictor is at home, so
that the prediction no longer depends on how the input was turned. The layers, from pure functions
to runs: `groups`, `representations`, `actions`, `canonicalization`, `outputs`, `averaging`,
`priors`; `networks`, `predictors`, `adapt`; `data`, `evaluation`, `training`, `runs`. The last four
are imported where they are needed.
"""

from typing import Any

from equiadapt_jax import (
    actions,
    averaging,
    canonicalization,
    groups,
    networks,
    outputs,
    predictors,
    priors,
    representations,
)
from equiadapt_jax.adaptation import Adapted, adapt
from equiadapt_jax.interface import Network, from_function, from_linen, from_nnx

__version__ = "0.1.0"

__all__ = [
    "Adapted",
    "Network",
    "actions",
    "adapt",
    "averaging",
    "canonicalization",
    "from_function",
    "from_linen",
    "from_nnx",
    "groups",
    "load",
    "networks",
    "outputs",
    "predictors",
    "priors",
    "representations",
]


def load(workdir: Any, step: int | None = None) -> tuple[Any, Any, Adapted]:
    """(params, state, model) of the run in `workdir`: its best checkpoint, or that of `step`.

    See `equiadapt_jax.runs.load`.
    """
    from equiadapt_jax import runs

    return runs.load(workdir, step)
