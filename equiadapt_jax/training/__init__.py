"""Training: settings, objective, step, loop, checkpoints. Imports Orbax and, when run, Grain."""
