"""One optimisation step: a pure function of state and batch, jitted, its state donated."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from equiadapt_jax import devices
from equiadapt_jax.training.config import Optimizer
from equiadapt_jax.training.objective import Objective


class TrainState(NamedTuple):
    """What training changes: parameters, the networks' state, the optimizer's; and the step."""

    step: jax.Array
    params: dict[str, Any]
    state: dict[str, Any]
    optimizer: optax.OptState


def make_optimizer(
    settings: Optimizer, learning_rates: Mapping[str, float], steps: int
) -> optax.GradientTransformation:
    """AdamW for each trained part of the parameters, at its own peak learning rate.

    Of every `settings.accumulate` steps only the last changes parameters, by the mean of all their
    gradients.
    """
    updates = steps // settings.accumulate

    def one(peak):
        warmup = max(int(settings.warmup * updates), 1)
        schedule = optax.warmup_cosine_decay_schedule(0.0, peak, warmup, max(updates, warmup + 1))
        adamw = optax.adamw(schedule, weight_decay=settings.weight_decay)
        return optax.chain(optax.clip_by_global_norm(settings.clip), adamw)

    labels = {name: name for name in learning_rates}
    each = optax.multi_transform({n: one(rate) for n, rate in learning_rates.items()}, labels)
    if settings.accumulate == 1:
        return each
    return optax.MultiSteps(each, settings.accumulate).gradient_transformation()


def create_state(params, state, optimizer, trained: Sequence[str]) -> TrainState:
    """The state before the first step, on every device; copies, so that donating it is safe."""
    created = TrainState(
        jnp.zeros((), jnp.int32), params, state, optimizer.init({n: params[n] for n in trained})
    )
    return devices.copy(jax.tree.map(lambda x: x.copy(), created))


def make_step(
    objective: Objective, optimizer: optax.GradientTransformation, trained: Sequence[str]
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """`step(state, batch, key) -> (state, metrics)`; only `trained` parts of params change.

    The key of a step is folded from its number, so a run continued from a checkpoint draws what
    the uninterrupted one would have drawn.
    """

    def step(state: TrainState, batch, key):
        def loss(part):
            step_key = jax.random.fold_in(key, state.step)
            return objective({**state.params, **part}, state.state, batch, step_key, state.step)

        part = {name: state.params[name] for name in trained}
        gradients, (networks, metrics) = jax.grad(loss, has_aux=True)(part)
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, part)
        params = {**state.params, **optax.apply_updates(part, updates)}
        norms = {"gradient_norm": gradients, "parameter_norm": {n: params[n] for n in trained}}
        metrics |= {name: optax.tree.norm(tree) for name, tree in norms.items()}
        return TrainState(state.step + 1, params, networks, optimizer_state), metrics

    return jax.jit(step, donate_argnums=0)


def place_batch(batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """This process's part of a batch, spread over all devices along the first axis."""
    count, rows = jax.device_count(), len(batch["label"]) * jax.process_count()
    if rows % count:
        raise ValueError(
            f"A batch of {rows} images cannot be shared by {count} devices: choose a batch_size "
            f"that is a multiple of {count}."
        )
    sharding = devices.shared()
    return {n: jax.make_array_from_process_local_data(sharding, v) for n, v in batch.items()}
