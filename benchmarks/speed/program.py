"""What a run costs beside its steps: until the first of them, and between them."""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import equiadapt_jax as ea
from benchmarks.speed.reference import ROOT
from benchmarks.speed.results import Comparison
from benchmarks.speed.settings import Settings
from benchmarks.speed.timing import interleaved
from equiadapt_jax.data import training_batches
from equiadapt_jax.groups import Cyclic
from equiadapt_jax.training import config, objective
from equiadapt_jax.training.checkpoints import Checkpoints
from equiadapt_jax.training.loop import Stop, fit
from equiadapt_jax.training.step import create_state, make_optimizer, make_step, place_batch

PART = "program"


def measure(settings: Settings) -> list[Comparison]:
    """The start of train.py with what it compiled kept or not, and the loop around the steps."""
    return [start(settings), loop(settings)]


def start(settings: Settings) -> Comparison:
    """Seconds from the command to the line of its first step, with what was compiled kept or not.

    The digits are prepared and the predictor pretrained beforehand; adaptation begins at once.
    """
    rounds = 1 if settings.small else 5
    with tempfile.TemporaryDirectory() as place:
        first_step(Path(place), "prepare", kept=True)
        seconds = interleaved(
            {
                "kept": lambda: first_step(Path(place), "warm", kept=True),
                "compiled anew": lambda: first_step(Path(place), "cold", kept=False),
            },
            rounds,
        )
    return Comparison(PART, "python train.py, to the first step", seconds, "kept", "compiled anew")


def first_step(place: Path, name: str, *, kept: bool) -> float:
    """Run train.py on the digits until its log has a step of adaptation."""
    workdir = place / name
    compiled = place / "compiled" if kept else Path(tempfile.mkdtemp(dir=place))
    environment = {
        "JAX_COMPILATION_CACHE_DIR": str(compiled),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    log = workdir / "metrics.jsonl"
    log.unlink(missing_ok=True)
    began = time.perf_counter()
    command = [
        sys.executable, "train.py", f"--workdir={workdir}", "--overwrite",
        "--config=configs/digits_vit.py:tiny", f"--config.data.data_dir={place / 'data'}",
        f"--config.pretrain.directory={place / 'pretrained'}",
        "--config.logging.evaluate_every=1000",
    ]  # fmt: skip
    with (place / f"{name}.log").open("w") as said:
        process = subprocess.Popen(
            command, cwd=ROOT, env=os.environ | environment, stdout=said, stderr=said
        )
        while process.poll() is None and not _stepped(log):
            time.sleep(0.01)
    seconds = time.perf_counter() - began
    if process.wait():
        raise RuntimeError(f"train.py ended with {(place / f'{name}.log').read_text()[-500:]}")
    return seconds


def _stepped(log: Path) -> bool:
    if not log.exists():
        return False
    return any(json.loads(line)["step"] > 0 for line in log.read_text().splitlines(True)[:-1])


def loop(settings: Settings) -> Comparison:
    """Steps in the training loop, input pipeline and all, beside the same steps alone.

    The loop's seconds are those from its first step to the figures of the last, so without its
    validations and checkpoints; the other's are of one batch that is on the device. There are as
    many images as in CIFAR-10, all read before; Grain takes longer to shuffle a few hundred.
    """
    batch, steps = (8, 4) if settings.small else (128, 20)
    model, optimizer = (
        _model(settings.small),
        make_optimizer(config.Optimizer(), {"scorer": 1e-3}, 1000),
    )
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (4 * batch, 32, 32, 3), np.uint8)
    examples = [{"image": images[i % len(images)], "label": i % 10} for i in range(50_000)]
    params, state = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    step = make_step(
        objective.adaptation(
            model, ea.priors.Identity(), prior_weight=1.0, augmentation=config.Augmentation(),
            turn_inputs=False,
        ),
        optimizer, ("scorer",),
    )  # fmt: skip
    stream = training_batches(examples, size=32, batch_size=batch, seed=0)
    for _ in range(len(examples) // batch):
        taken = next(stream)
    key = jax.random.key(0)
    logging = dataclasses.replace(config.Logging(), evaluate_every=10 * steps)

    def fresh():
        return create_state(params, state, optimizer, ("scorer",))

    def alone() -> float:
        carry, resident = fresh(), place_batch(taken)
        carry, _ = step(carry, resident, key)
        jax.block_until_ready(carry)
        began = time.perf_counter()
        for _ in range(steps):
            carry, _ = step(carry, resident, key)
        jax.block_until_ready(carry)
        return time.perf_counter() - began

    def looped() -> float:
        began: list[float] = []
        ended: list[float] = []

        def marked(carry, batch, key):
            began.append(time.perf_counter())
            return step(carry, batch, key)

        def validate(_):
            ended.append(time.perf_counter())
            return {"best_by": 0.0}

        with tempfile.TemporaryDirectory() as place:
            checkpoints = Checkpoints(Path(place), "speed", create=True)
            fit(
                marked, fresh(), stream, steps=steps, key=key, checkpoints=checkpoints,
                validate=validate, log=lambda *_: None, settings=logging, title="speed",
                stop=Stop(),
            )  # fmt: skip
            checkpoints.wait()
            checkpoints.close()
        return ended[-1] - began[0]

    seconds = interleaved({"loop": looped, "steps": alone}, settings.rounds)
    what = f"{steps} steps in the training loop, {batch} of 50,000 images of 32 pixels"
    return Comparison(PART, what, seconds, "loop", "steps")


def _model(small: bool) -> ea.Adapted:
    """C4 before a frozen ResNet-20, as it is trained on CIFAR."""
    features = (4, 4) if small else (16, 32)
    group = Cyclic(4)
    scorer = ea.networks.GroupConvNet(group, features, kernels=(4, 2), strides=(2, 2))
    predictor = ea.predictors.ResNet.variant("resnet20", num_classes=10)
    return ea.adapt(group, ea.from_linen(scorer), ea.from_linen(predictor), freeze_predictor=True)
