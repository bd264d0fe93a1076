"""Equivariant adaptation of large pretrained networks in JAX.

A canonicalizer brings every input to the pose in which a pretrained predictor is at home, so
that the prediction no longer depends on how the input was turned. The layers, from pure functions
to runs: `groups`, `representations`, `actions`, `canonicalization`, `outputs`, `averaging`,
`priors`, `alignment`; `networks`, `energies`, `predictors`, `adapt`; `data`, `evaluation`,
`training`, `runs`. The last four are imported where they are needed.
"""

from typing import Any

from equiadapt_jax import (
    actions,
    alignment,
    averaging,
    canonicalization,
    energies,
    groups,
    networks,
    outputs,
    predictors,
    priors,
    representations,
)
from equiadapt_jax.adaptation import Adapted, adapt
from equiadapt_jax.interface import Network, from_function, from_linen, from_nnx
from equiadapt_jax.orbit_scoring import orbit_scorer

__version__ = "0.1.0"

__all__ = [
    "Adapted",
    "Network",
    "actions",
    "adapt",
    "alignment",
    "averaging",
    "canonicalization",
    "energies",
    "from_function",
    "from_linen",
    "from_nnx",
    "groups",
    "load",
    "networks",
    "orbit_scorer",
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
