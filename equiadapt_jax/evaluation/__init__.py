"""Figures over orbits, and what is written of them."""

from equiadapt_jax.evaluation.orbits import (
    GroupTurns,
    Outcome,
    RandomTurns,
    figures,
    make_evaluator,
)

__all__ = ["GroupTurns", "Outcome", "RandomTurns", "figures", "make_evaluator"]
