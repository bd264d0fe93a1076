"""The whole canonicalization, scorer and all, beside equiadapt's; and from C4 to C64 without it."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np

import equiadapt_jax as ea
from benchmarks.speed.results import Comparison
from benchmarks.speed.settings import Settings
from benchmarks.speed.timing import compiled, interleaved
from equiadapt_jax.groups import SO, Cyclic, Dihedral
from equiadapt_jax.training.workdir import read_config

PART = "canonicalization"
SIZE, SMALL = 224, 32  # pixels
# Of configs/cifar10_resnet20.py:light, which trains it.
SCORER = {
    "features": (12, 24, 64), "kernels": (4, 4, 2), "strides": (2, 2, 2), "size": 56, "grid": 7,
}  # fmt: skip
STEERABLE = {"size": 48}
EXAMPLES = 96  # pixels to which equiadapt's examples resize
# Those compared, if not told: of the photographs that accuracy is measured on, ours, its examples'.
WORKING = (32, SCORER["size"], EXAMPLES)
GROUPS = {
    "C4": (Cyclic(4), "rotation"),
    "C8": (Cyclic(8), "rotation"),
    "C16": (Cyclic(16), "rotation"),
    "D4": (Dihedral(4), "roto-reflection"),
    "SO(2)": (SO(2), "so2"),
}


def canonicalize(settings: Settings, group, dtype: str = "float32"):
    """(function, parameters, side of what the scorer sees, pose accuracy) of canonicalization.

    The function makes canonical inputs and poses of images `(B, S, S, 3)`.

    The scorer computes in dtype. Where a run of the group is among `settings.scorers` it is that of
    the run; else its parameters are random and the accuracy None.
    """
    run, networks = settings.scorers.get(str(group)), ea.networks
    if isinstance(group, SO):
        kind, options = networks.SteerableNet, {} if settings.small else STEERABLE
        finish = ea.canonicalization.from_vectors
    else:
        kind, options = networks.GroupConvNet, SCORER
        finish = ea.canonicalization.from_scores
    network = kind(group, dtype=dtype, **(read_config(run)[0].scorer.options if run else options))
    accuracy = None
    if run:
        params = ea.load(run)[0]["scorer"]
        accuracy = json.loads((run / "metrics.json").read_text())["adapted/pose_accuracy"]
    else:
        side = SMALL if settings.small else SIZE
        params = jax.jit(network.init)(jax.random.key(0), jnp.zeros((1, side, side, 3)))["params"]

    def function(params, x):
        canonical = finish(group, network.apply({"params": params}, x), x)
        return canonical.inputs, canonical.pose

    return function, params, network.size or SMALL, accuracy


def measure(settings: Settings) -> list[Comparison]:
    """One comparison for each group and size that equiadapt resizes to, and one of known poses."""
    batch, size = (2, SMALL) if settings.small else (16, SIZE)
    x = np.random.default_rng(0).uniform(size=(batch, size, size, 3)).astype(np.float32)
    found = [comparison for name in GROUPS for comparison in beside_reference(settings, name, x)]
    return [*found, known_pose(settings, x)]


def beside_reference(settings: Settings, name: str, x) -> list[Comparison]:
    """The same images by both packages, in the same rounds: ours with equiadapt at each size."""
    group, theirs = GROUPS[name]
    function, params, sees, accuracy = canonicalize(settings, group)
    case, cost = compiled(function, params, x)
    cost["pose_accuracy"] = accuracy
    cases, costs = {"ours": case}, {"ours": cost}
    sizes = settings.working or ((SMALL,) if settings.small else WORKING)
    for size in sizes if settings.reference else ():
        try:
            cases[size], costs[size] = settings.reference.case(
                "canonicalization", batch=len(x), size=x.shape[1], group=theirs,
                order=getattr(group, "n", 0), network="e2cnn", working=size,
            )  # fmt: skip
        except RuntimeError as error:
            settings.refuse(f"equiadapt for {name} at {size} pixels", error)
    seconds = interleaved(cases, settings.rounds)
    if settings.reference:
        settings.reference.forget()
    floor = settings.floors.computing(cost["operations"])
    what = f"canonicalization, {name}, {len(x)} images of {x.shape[1]} pixels, ours sees {sees}"
    found = [
        Comparison(
            PART, f"{what}, equiadapt {size}", {"ours": seconds["ours"], "equiadapt": times},
            floor=floor, costs={"equiadapt": costs[size]},
        )
        for size, times in seconds.items() if size != "ours"
    ]  # fmt: skip
    alone = Comparison(PART, what, {"ours": seconds["ours"]}, floor=floor, costs={"ours": cost})
    return [alone, *found]


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
