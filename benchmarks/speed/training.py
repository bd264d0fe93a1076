"""One training step of the adapted model, beside equiadapt with the same predictor."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import equiadapt_jax as ea
from benchmarks.speed.canonicalization import EXAMPLES, SCORER, SIZE, SMALL
from benchmarks.speed.results import Comparison
from benchmarks.speed.settings import Settings
from benchmarks.speed.timing import Case, compile_, interleaved
from equiadapt_jax.groups import Cyclic

PART = "training"
PRIOR_WEIGHT, LEARNING_RATE = 100.0, 1e-4


def measure(settings: Settings) -> list[Comparison]:
    """C4 and C8, scorer and predictor trained together."""
    return [beside_reference(settings, n) for n in (4, 8)]


def beside_reference(settings: Settings, n: int) -> Comparison:
    batch, size, name = (2, 64, "resnet18") if settings.small else (8, SIZE, "resnet50")
    working = SMALL if settings.small else EXAMPLES
    cases, costs = {}, {}
    cases["ours"], costs["ours"] = ours(Cyclic(n), name, batch, size)
    if settings.reference:
        try:
            cases["equiadapt"], costs["equiadapt"] = settings.reference.case(
                "training", batch=batch, size=size, name=name, group="rotation", order=n,
                working=working, network="e2cnn",
            )  # fmt: skip
        except RuntimeError as error:
            settings.refuse(f"training with equiadapt, C{n}", error)
    seconds = interleaved(cases, settings.rounds)
    floor = settings.floors.computing(costs["ours"]["operations"])
    if settings.reference:
        settings.reference.forget()
    what = f"a training step, C{n} and {name}, {batch} images of {size} pixels"
    return Comparison(PART, what, seconds, floor=floor, costs=costs)


def ours(group, name: str, batch: int, size: int) -> tuple[Case, dict]:
    """A step with AdamW, its state donated."""
    predictor = ea.from_linen(ea.predictors.ResNet.variant(name, num_classes=1000))
    scorer = ea.from_linen(ea.networks.GroupConvNet(group, **SCORER))
    model = ea.adapt(group, scorer, predictor)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.uniform(size=(batch, size, size, 3)), jnp.float32)
    y = jnp.asarray(rng.integers(0, 1000, batch))
    params, state = jax.jit(model.init)(jax.random.key(0), x[:1])
    optimizer = optax.adamw(LEARNING_RATE)

    def loss(params, state, x, y):
        (logits, canonical), state = model.apply(params, state, x, train=True)
        task = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
        prior = ea.priors.Identity().loss(group, canonical.scores)
        return task + PRIOR_WEIGHT * prior, state

    def step(carry, x, y):
        params, state, moments = carry
        gradients, state = jax.grad(loss, has_aux=True)(params, state, x, y)
        updates, moments = optimizer.update(gradients, moments, params)
        return optax.apply_updates(params, updates), state, moments

    carry = params, state, optimizer.init(params)
    executable, costs = compile_(step, carry, x, y, donate_argnums=0)

    def case() -> None:
        nonlocal carry
        carry = jax.block_until_ready(executable(carry, x, y))

    return case, costs
