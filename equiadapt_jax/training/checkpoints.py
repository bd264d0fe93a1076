"""Checkpoints with Orbax: one directory per step, holding all that continuing or evaluating needs.

    <directory>/<step>/model       params and state of the networks
    <directory>/<step>/optimizer   the optimizer's state
    <directory>/<step>/data        the data iterator's state
    <directory>/<step>/metrics     validation figures, "best_by" among them

Kept are step 0 (the predictor before training), the latest step and the best.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy as keep

from equiadapt_jax.training.step import TrainState


class Checkpoints:
    """The checkpoints of one run; those with the highest `best_by` are the best."""

    def __init__(self, directory: str | os.PathLike, *, create: bool = False):
        self.directory = Path(directory).expanduser().absolute()
        if not create and not self.directory.is_dir():
            raise FileNotFoundError(
                f"There are no checkpoints in {self.directory}: give the workdir of a training run."
            )
        policy = keep.AnyPreservationPolicy(
            [keep.CustomSteps([0]), keep.LatestN(1), keep.BestN(get_metric_fn=_best_by, n=1)]
        )
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                create=create, preservation_policy=policy, best_fn=_best_by
            ),
        )

    def steps(self) -> list[int]:
        """The steps there are, ascending."""
        return sorted(self._manager.all_steps())

    def best_step(self) -> int:
        """The step with the highest `best_by`, the latest of equals."""
        if not self.steps():
            raise FileNotFoundError(f"There is no finished checkpoint in {self.directory}.")
        return self._manager.best_step()

    def metrics(self, step: int) -> dict[str, float]:
        """The validation figures saved with a step."""
        return self._manager.metrics(step)

    def save(self, state: TrainState, data: Any, metrics: Mapping[str, float]) -> None:
        """Save in the background the state, the Grain iterator as it stands, and figures."""
        import grain

        self._manager.save(
            int(state.step),
            args=ocp.args.Composite(
                model=ocp.args.StandardSave({"params": state.params, "state": state.state}),
                optimizer=ocp.args.StandardSave(state.optimizer),
                data=grain.checkpoint.CheckpointSave(data),
            ),
            metrics=dict(metrics),
        )

    def restore(self, step: int, like: TrainState, data: Any) -> TrainState:
        """The state of a step, laid out as `like`; sets the Grain iterator to where it stood."""
        import grain

        model = {"params": like.params, "state": like.state}
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                model=ocp.args.StandardRestore(model),
                optimizer=ocp.args.StandardRestore(like.optimizer),
                data=grain.checkpoint.CheckpointRestore(data),
            ),
        )
        number = jax.device_put(np.int32(step), like.step.sharding)
        return TrainState(number, **restored["model"], optimizer=restored["optimizer"])

    def restore_model(self, step: int, like: tuple[Any, Any]) -> tuple[Any, Any]:
        """(params, state) of a step, for arrays or shapes like these."""
        if step not in self.steps():
            raise FileNotFoundError(
                f"There is no checkpoint of step {step} in {self.directory}, but of {self.steps()}."
            )
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])  # whatever saved it
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device),
            {"params": like[0], "state": like[1]},
        )
        restored = self._manager.restore(
            step, args=ocp.args.Composite(model=ocp.args.StandardRestore(abstract))
        )
        # Committed to no device, so that the caller can use them with arrays on any.
        model = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), restored["model"])
        return model["params"], model["state"]

    def wait(self) -> None:
        """Return once everything is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait, and let go of the directory."""
        self._manager.wait_until_finished()
        self._manager.close()


def _best_by(metrics):
    return metrics["best_by"]
