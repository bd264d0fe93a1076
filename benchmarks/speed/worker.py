"""The other end of reference.py; runs in the environment of benchmarks.accuracy.environment.

Questions: {"do": "make", "name", "what", "settings"} builds a case and runs it once; {"do": "run",
"name"} runs it again and tells the seconds; {"do": "forget"}; {"do": "threads", "count"}.
"""

import contextlib
import json
import os
import resource
import sys
import time
from pathlib import Path

# Answers have the pipe to themselves: what libraries print goes to the errors.
ANSWERS = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from omegaconf import OmegaConf  # noqa: E402

from benchmarks.accuracy import reference  # noqa: E402

CROP = 0.9  # its examples' for images of 224 pixels, as are the settings of the networks
NETWORK = {"out_channels": 16, "kernel_size": 5, "num_layers": 3}
PRIOR_WEIGHT, LEARNING_RATE = 100.0, 1e-4


def canonicalizer(group: str, order: int, size: int, working: int, network: str):
    """A canonicalizer of equiadapt for images (B, 3, size, size), of `order` rotations.

    `group` is "rotation", "roto-reflection" or "so2".
    """
    settings = OmegaConf.create({"beta": 1.0, "input_crop_ratio": CROP, "resize_shape": working})
    shape = (3, size, size)
    if group == "so2":
        from equiadapt.images.canonicalization.continuous_group import (
            SteerableImageCanonicalization,
        )
        from equiadapt.images.canonicalization_networks import ESCNNSteerableNetwork

        steerable = ESCNNSteerableNetwork((3, working, working), 16, group_type="rotation")
        return SteerableImageCanonicalization(steerable, settings, shape)
    made = reference.NETWORKS[network](
        in_shape=(3, working, working), group_type=group, num_rotations=order, **NETWORK
    )
    made.group_type, made.num_rotations = group, order
    made.num_group = order * (2 if group == "roto-reflection" else 1)
    return reference.GroupEquivariantImageCanonicalization(made, settings, shape)


def canonicalization(batch: int, size: int, **settings):
    """The canonical images, in inference."""
    model, x = canonicalizer(size=size, **settings).eval(), torch.rand(batch, 3, size, size)

    def run():
        with torch.inference_mode():
            model(x)

    return run


def predictor(name: str) -> torch.nn.Module:
    """A network of torchvision, with random weights."""
    import torchvision

    return getattr(torchvision.models, name)(weights=None)


def vanilla(batch: int, size: int, name: str):
    """The predictor alone, in inference."""
    model, x = predictor(name).eval(), torch.rand(batch, 3, size, size)

    def run():
        with torch.inference_mode():
            model(x)

    return run


def training(batch: int, size: int, name: str, **settings):
    """One step of canonicalizer and predictor: task and prior, AdamW."""
    model, network = canonicalizer(size=size, **settings).train(), predictor(name).train()
    x, y = torch.rand(batch, 3, size, size), torch.randint(1000, (batch,))
    parameters = [*model.parameters(), *network.parameters()]
    optimizer = torch.optim.AdamW(parameters, LEARNING_RATE)

    def run():
        task = F.cross_entropy(network(model(x)), y)
        loss = task + PRIOR_WEIGHT * model.get_prior_regularization_loss()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return run


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def peak() -> int:
    """The most bytes there have been since `resident` was last reset, or ever."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def answer(question: dict, cases: dict) -> dict:
    """Do what is asked."""
    if question["do"] == "threads":
        torch.set_num_threads(question["count"])
        return {}
    if question["do"] == "forget":
        cases.clear()
        return {}
    name = question["name"]
    if question["do"] == "make":
        torch.manual_seed(0)
        cases[name] = WHAT[question["what"]](**question["settings"])
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
        before = resident()
        cases[name]()
        return {"bytes": max(peak() - before, 0)}
    began = time.perf_counter()
    cases[name]()
    return {"seconds": time.perf_counter() - began}


WHAT = {"canonicalization": canonicalization, "vanilla": vanilla, "training": training}


def main() -> None:
    cases: dict = {}
    for line in sys.stdin:
        try:
            answered = answer(json.loads(line), cases)
        except Exception as error:  # whatever a library raises is told to the other end
            answered = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
        print(json.dumps(answered), file=ANSWERS, flush=True)


if __name__ == "__main__":
    main()
