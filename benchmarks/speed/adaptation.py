"""What canonicalization adds to the inference of ResNet-50 and ViT-B/16, each measured apart.

Predictors have random weights: they do not change the time. The ratio is that of canonicalization
to the vanilla predictor, so that the noise of the large number does not drown the small one.
"""

import jax
import jax.numpy as jnp
import numpy as np

import equiadapt_jax as ea
from benchmarks.speed.canonicalization import SIZE, canonicalize
from benchmarks.speed.results import Comparison
from benchmarks.speed.settings import Settings
from benchmarks.speed.timing import compiled, interleaved
from equiadapt_jax.groups import Cyclic, Dihedral

PART = "adaptation"
GROUPS = {"C4": Cyclic(4), "C8": Cyclic(8), "D4": Dihedral(4)}


def predictors(small: bool):
    """The vanilla predictors, or small ones in their place."""
    if small:
        tiny = {"patch": 8, "width": 32, "depth": 2, "heads": 2}
        return {
            "ResNet-18": ea.predictors.ResNet.variant("resnet18", num_classes=10),
            "a small ViT": ea.predictors.ViT(10, **tiny),
        }
    return {
        "ResNet-50": ea.predictors.ResNet.variant("resnet50", num_classes=1000),
        "ViT-B/16": ea.predictors.ViT(1000),
    }


def measure(settings: Settings) -> list[Comparison]:
    """For each predictor, each group's canonicalization over it; for one, the group's size."""
    batch, size = (2, 32) if settings.small else (settings.batch, SIZE)
    x = np.random.default_rng(0).uniform(size=(batch, size, size, 3)).astype(np.float32)
    x = jnp.asarray(x, settings.dtype)
    adding = {}
    for name, group in GROUPS.items():
        function, params, _, accuracy = canonicalize(settings, group, settings.dtype)
        adding[name] = compiled(function, params, x)
        adding[name][1]["pose_accuracy"] = accuracy
    found = []
    for title, network in predictors(settings.small).items():
        variables = jax.jit(network.init)(jax.random.key(0), x[:1])
        variables = jax.tree.map(lambda a: a.astype(settings.dtype), variables)
        cases = {title: compiled(network.apply, variables, x), **adding}
        seconds = interleaved({n: case for n, (case, _) in cases.items()}, settings.rounds)
        for name in GROUPS:
            pair = {n: seconds[n] for n in (name, title)}
            costs = {n: cases[n][1] for n in (name, title)}
            floor = settings.floors.computing(costs[name]["operations"])
            what = f"canonicalization by {name} before {title}, {batch} images of {size} pixels"
            found.append(Comparison(PART, what, pair, name, title, floor, costs))
        if title.startswith("ResNet"):
            found.append(larger_group(settings, title, network, variables, x))
    return found


def larger_group(settings: Settings, title: str, network, variables, x) -> Comparison:
    """Inference from scores to predictions, with C64 over C4: without what makes the scores."""
    made = {}
    for n in (4, 64):
        scores = np.random.default_rng(0).normal(size=(len(x), n)).astype(np.float32)

        def inference(variables, scores, x, n=n):
            canonical = ea.canonicalization.from_scores(Cyclic(n), scores, x)
            return network.apply(variables, canonical.inputs)

        made[f"C{n}"] = compiled(inference, variables, scores, x)
    seconds = interleaved({name: case for name, (case, _) in made.items()}, settings.rounds)
    costs = {name: cost for name, (_, cost) in made.items()}
    floor = settings.floors.computing(costs["C64"]["operations"])
    what = (
        f"{title} with canonicalization from given scores, {len(x)} images of {x.shape[1]} pixels"
    )
    return Comparison(PART, what, seconds, "C64", "C4", floor, costs)
