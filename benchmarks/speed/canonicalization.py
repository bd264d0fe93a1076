"""The whole canonicalization, scorer and all, beside equiadapt's; and from C4 to C64 without it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import equiadapt_jax as ea
from benchmarks.speed.results import Comparison
from benchmarks.speed.settings import Settings
from benchmarks.speed.timing import compiled, interleaved
from equiadapt_jax.groups import SO, Cyclic, Dihedral

PART = "canonicalization"
SIZE, WORKING = 224, 96  # pixels; the second are those to which equiadapt resizes
# Ours: 35 million multiplications per image for C4, fold included. Trained by
# configs/cifar10_resnet20.py:group_conv with --config.scorer.options.size=56 and so on.
SCORER = {
    "features": (16, 32, 64), "kernels": (4, 4, 2), "strides": (2, 2, 2), "size": 56, "grid": 7,
}  # fmt: skip
STEERABLE = {"size": 48}
GROUPS = {
    "C4": (Cyclic(4), "rotation"),
    "C8": (Cyclic(8), "rotation"),
    "C16": (Cyclic(16), "rotation"),
    "D4": (Dihedral(4), "roto-reflection"),
    "SO(2)": (SO(2), "so2"),
}


def canonicalize(group, small: bool = False, dtype: str = "float32"):
    """(function, parameters): images `(B, S, S, 3)` to canonical inputs and poses.

    The scorer computes in dtype.
    """
    if isinstance(group, SO):
        options = {} if small else STEERABLE
        network = ea.networks.SteerableNet(group, dtype=dtype, **options)
        finish = ea.canonicalization.from_vectors
    else:
        network = ea.networks.GroupConvNet(group, dtype=dtype, **SCORER)
        finish = ea.canonicalization.from_scores
    side = 32 if small else SIZE
    params = jax.jit(network.init)(jax.random.key(0), jnp.zeros((1, side, side, 3)))

    def function(params, x):
        canonical = finish(group, network.apply(params, x), x)
        return canonical.inputs, canonical.pose

    return function, params


def measure(settings: Settings) -> list[Comparison]:
    """One comparison for each group, and one over groups for a known pose."""
    batch, size = (2, 32) if settings.small else (16, SIZE)
    x = np.random.default_rng(0).uniform(size=(batch, size, size, 3)).astype(np.float32)
    found = [beside_reference(settings, name, x) for name in GROUPS]
    return [*found, known_pose(settings, x)]


def beside_reference(settings: Settings, name: str, x) -> Comparison:
    """The same images, by both packages."""
    group, theirs = GROUPS[name]
    function, params = canonicalize(group, settings.small)
    cases = {"ours": compiled(function, params, x)}
    if settings.reference:
        try:
            cases["equiadapt"] = settings.reference.case(
                "canonicalization", batch=len(x), size=x.shape[1], group=theirs,
                order=getattr(group, "n", 0), network="e2cnn",
                working=32 if settings.small else WORKING,
            )  # fmt: skip
        except RuntimeError as error:
            settings.refuse(f"equiadapt for {name}", error)
    seconds = interleaved({name: case for name, (case, _) in cases.items()}, settings.rounds)
    costs = {name: cost for name, (_, cost) in cases.items()}
    floor = settings.floors.computing(costs["ours"]["operations"])
    what = f"canonicalization, {name}, {len(x)} images of {x.shape[1]} pixels"
    if settings.reference:
        settings.reference.forget()
    return Comparison(PART, what, seconds, floor=floor, costs=costs)


def known_pose(settings: Settings, x) -> Comparison:
    """Canonical inputs for given poses: what a larger group costs beside its scorer."""
    cases = {}
    for n in (4, 8, 16, 64):
        pose = jnp.arange(len(x), dtype=jnp.int32) * 5 % n
        function = functools.partial(ea.canonicalization.canonicalize, Cyclic(n))
        cases[f"C{n}"] = compiled(function, pose, x)
    seconds = interleaved({name: case for name, (case, _) in cases.items()}, settings.rounds)
    costs = {name: cost for name, (_, cost) in cases.items()}
    what = f"canonical inputs of known poses, {len(x)} images of {x.shape[1]} pixels"
    floor = settings.floors.moving(2 * x.nbytes)
    return Comparison(PART, what, seconds, "C64", "C4", floor, costs)
