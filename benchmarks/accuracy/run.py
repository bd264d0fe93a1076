"""Accuracy of methods on turned CIFAR-10 images, in one table: python -m benchmarks.accuracy.run SHARED.

SHARED holds `data/cifar10_jpeg/train.tar`, `data/cifar10_jpeg/test.tar` and
`weights/cifar10_resnet20.safetensors`. Turns the test images; measures what needs no training;
trains and measures ours and, in an environment of its own that is set up here, the PyTorch package
equiadapt, all on as many training images, each seen once; prints a Markdown table. `--workdirs a b`
adds a row for each run of train.py there, whatever its budget. Results are kept in --runs and
measured again with --overwrite or on other images; `--results a.json b.json` adds rows of the same
form, see evaluation.py. Three quarters of an hour on two cores.
"""  # noqa: E501

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Collection
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import equiadapt_jax as ea
from benchmarks.accuracy import environment, evaluation, images
from benchmarks.accuracy.table import table
from equiadapt_jax import devices
from equiadapt_jax.training.workdir import read_config

ROOT = Path(__file__).parents[2]
C4 = ea.groups.Cyclic(4)
WEIGHTS = "cifar10_resnet20.safetensors"
PREPROCESS = ea.predictors.Preprocess((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CANONICALIZERS = ("group_conv", "e2cnn")  # equiadapt's

# What train.py is told for a scorer of ours: the variant of the configuration, and settings.
OURS: dict[str, tuple[str, dict[str, str]]] = {
    "group_conv-c4": (":group_conv", {}),
    "features-c4": ("", {"group": "cyclic4"}),
    "features-d4": ("", {}),
    "features-c8": ("", {"group": "cyclic8", "adaptation.interpolation": "cubic"}),
}
BATCH = 60

# Images (B, S, S, 3) → logits (B, 10), and → logits with poses (B,) of C4 or None.
Logits = Callable[[jax.Array], jax.Array]
Method = Callable[[Logits, jax.Array], tuple[jax.Array, jax.Array | None]]


def vanilla(logits: Logits, x: jax.Array):
    """The predictor alone."""
    return logits(x), None


def mirrored(logits: Logits, x: jax.Array):
    """Mean logits of an image and its mirror image."""
    return (logits(x) + logits(ea.actions.images.reflect(x))) / 2, None


def averaged(logits: Logits, x: jax.Array):
    """Mean logits over C4 (equitune)."""
    return _over_c4(logits, x).mean(0), None


def most_confident(logits: Logits, x: jax.Array):
    """The logits of the most confident of the four canonical inputs (equizero)."""
    found = _over_c4(logits, x)
    # By the odds: probabilities themselves are often 1 to the last bit, and would tie.
    others = jnp.sort(found, -1)[..., :-1]
    pose = (found.max(-1) - jax.nn.logsumexp(others, -1)).argmax(0)
    return jnp.take_along_axis(found, pose[None, :, None], 0)[0], pose


def _over_c4(logits: Logits, x: jax.Array) -> jax.Array:
    """Logits (4, B, 10) of the canonical inputs for each pose."""
    act = ea.actions.images.act
    return jnp.stack([logits(act(C4, C4.inverse(pose), x)) for pose in range(4)])


# Name of the file → title, passes of the predictor, the method.
TRAINING_FREE: dict[str, tuple[str, int, Method]] = {
    "vanilla": ("vanilla", 1, vanilla),
    "mirrored": ("vanilla, mean with the mirror image", 2, mirrored),
    "averaged": ("mean over C4 (equitune)", 4, averaged),
    "most_confident": ("most confident of C4 (equizero)", 4, most_confident),
}


def predict_with(method: Method, weights: Path) -> evaluation.Predict:
    """A method without training on the pretrained predictor, as `evaluation.measure` calls it."""
    resnet = ea.predictors.load(weights, preprocess=PREPROCESS)

    def logits(x):
        return resnet.network.apply(resnet.params, resnet.state, resnet.preprocess(x))[0]

    compiled = jax.jit(lambda x: method(logits, x))

    def predict(batch):
        found, poses = compiled(devices.spread(batch))
        return np.asarray(found).argmax(-1), None if poses is None else np.asarray(poses)

    return predict


def measure_training_free(name: str, weights: Path, test: evaluation.Evaluation, output: Path):
    """Measure one of TRAINING_FREE."""
    title, passes, method = TRAINING_FREE[name]
    rotations = C4.n if method is most_confident else None
    result = evaluation.measure(predict_with(method, weights), test, rotations)
    result |= {"method": title, "predictor_passes": passes, "train_seconds": 0.0, "parameters": 0}
    evaluation.write(output, result)


def train_ours(name: str, arguments, workdir: Path) -> None:
    """Train one of OURS by train.py, on each of so many images once."""
    variant, changes = OURS[name]
    count, data = arguments.images_seen, arguments.shared / "data" / "cifar10_jpeg"
    changes = {
        "seed": str(arguments.seed),
        "data.root": str(data.absolute()),
        "data.train": f"train[:{count}]",
        "data.validation": "train[95%:]",
        "data.test": "test[:1%]",  # measured here, on all of them
        "predictor.weights": str((arguments.shared / "weights" / WEIGHTS).absolute()),
        "adaptation.steps": str(count // BATCH),
        "adaptation.batch_size": str(BATCH),
        "logging.evaluate_every": str(count // BATCH),
    } | changes
    subprocess.run(
        [sys.executable, "train.py", f"--config=configs/cifar10_resnet20.py{variant}",
         f"--workdir={workdir.absolute()}", "--overwrite",
         *(f"--config.{setting}={value}" for setting, value in changes.items())],
        check=True, cwd=ROOT,
    )  # fmt: skip


def measure_run(workdir: Path, test: evaluation.Evaluation, output: Path) -> None:
    """Measure what train.py left in a directory, by its best checkpoint."""
    params, state, model = ea.load(workdir)
    config, _ = read_config(workdir)
    figures = json.loads((workdir / "metrics.json").read_text())
    params, state = devices.copy((params, state))
    apply = jax.jit(model.apply)

    def predict(batch):
        (logits, canonical), _ = apply(params, state, devices.spread(batch), key=jax.random.key(0))
        # Of an element of D_n the rotation counts: mirrored or not, the image is brought upright.
        return np.asarray(logits).argmax(-1), np.asarray(canonical.pose) % model.group.n

    seen = config.adaptation.steps * config.adaptation.batch_size
    passes = model.group.order if model.features or model.poses is None else model.poses
    result = evaluation.measure(predict, test, model.group.n, batch=50)
    result |= {
        "method": f"ours, {config.canonicalizer}, {config.group}, {config.averaging}, "
        f"{config.adaptation.mode}, {seen:,} images seen",
        "predictor_passes": passes,
        "train_seconds": figures["train/seconds"],
        "parameters": figures["scorer/parameters"],
        "images_seen": seen,
        "seed": config.seed,
    }
    evaluation.write(output, result)


def measure_reference(name: str, arguments, weights: Path, test: Path, output: Path) -> None:
    """Train and measure one of equiadapt's networks, in an environment of its own."""
    python = environment.ensure(arguments.environment)
    command = [
        str(python), "-m", "benchmarks.accuracy.reference", f"--images={test.absolute()}",
        f"--train={(arguments.shared / 'data' / 'cifar10_jpeg').absolute()}",
        f"--weights={weights.absolute()}", f"--canonicalizer={name}",
        f"--rotations={arguments.rotations}", f"--working={arguments.working}",
        f"--images_seen={arguments.images_seen}",
        f"--seed={arguments.seed}", f"--output={output.absolute()}",
    ]  # fmt: skip
    if arguments.threads:
        command.append(f"--threads={arguments.threads}")
    # The project's own packages must not be found there.
    own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run(command, check=True, cwd=ROOT, env=own)


def results(arguments) -> list[evaluation.Result]:
    """All rows: without training, ours, the reference's, and those of other runs and files."""
    runs, shared, count = arguments.runs, arguments.shared, arguments.images_seen
    weights = shared / "weights" / WEIGHTS
    archive, turned = shared / "data" / "cifar10_jpeg" / "test.tar", runs / "evaluation.npz"
    if count < BATCH or count % BATCH:
        raise ValueError(f"--images_seen={count}: give a multiple of {BATCH}, a batch of ours.")
    if arguments.working < 1:
        raise ValueError(f"--working={arguments.working}: give at least one pixel.")
    reference = chosen("canonicalizers", arguments.canonicalizers, CANONICALIZERS)
    ours = chosen("ours", arguments.ours, OURS)
    images.make(archive, turned, arguments.limit)
    test = evaluation.load(turned)
    paths = []
    for name in TRAINING_FREE:
        paths.append(runs / f"{name}.json")
        if missing(paths[-1], test, arguments):
            measure_training_free(name, weights, test, paths[-1])
    for name in ours:
        workdir = runs / f"{name}-{count}-seed{arguments.seed}"
        paths.append(workdir.with_suffix(".json"))
        if missing(paths[-1], test, arguments):
            train_ours(name, arguments, workdir)
            measure_run(workdir, test, paths[-1])
    for name in reference:
        network = f"{name}-c{arguments.rotations}-{arguments.working}px"
        kind = f"{network}-{count}-seed{arguments.seed}"
        paths.append(runs / f"reference-{kind}.json")
        if missing(paths[-1], test, arguments):
            measure_reference(name, arguments, weights, turned, paths[-1])
    for workdir in arguments.workdirs:
        paths.append(runs / f"run-{workdir.name}.json")
        if missing(paths[-1], test, arguments):
            measure_run(workdir, test, paths[-1])
    return [evaluation.read(path) for path in (*paths, *arguments.results)]


def chosen(flag: str, names: str, known: Collection[str]) -> list[str]:
    """The names in a flag, each of which must be known."""
    found = [name for name in names.split(",") if name]
    for name in found:
        if name not in known:
            raise ValueError(f"Unknown {name!r} in --{flag}: choose of {', '.join(known)}.")
    return found


def missing(path: Path, test: evaluation.Evaluation, arguments) -> bool:
    """Whether a result has to be measured, which is then announced."""
    needed = arguments.overwrite or not evaluation.measured_on(path, test)
    if needed:
        print(f"Measuring {path}", file=sys.stderr)
    return needed


def settings() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("shared", type=Path)
    parser.add_argument("--ours", default=",".join(OURS), help="empty for none")
    parser.add_argument(
        "--canonicalizers", default=",".join(CANONICALIZERS), help="equiadapt's; empty for none"
    )
    parser.add_argument("--rotations", type=int, choices=(4, 8), default=4, help="of equiadapt's")
    parser.add_argument("--working", type=int, default=32, help="pixels equiadapt's networks see")
    parser.add_argument("--images_seen", type=int, default=30_000, help="in training")
    parser.add_argument("--seed", type=int, default=0, help="of training")
    parser.add_argument("--threads", type=int, help="of PyTorch; as many as it likes by default")
    parser.add_argument("--workdirs", type=Path, nargs="*", default=[], help="of train.py")
    parser.add_argument("--results", type=Path, nargs="*", default=[], help="more rows")
    parser.add_argument("--limit", type=int, help="use so many test images; all by default")
    parser.add_argument("--runs", type=Path, default=Path("runs/accuracy"))
    parser.add_argument("--environment", type=Path, default=environment.FOLDER)
    parser.add_argument("--overwrite", action="store_true", help="measure again")
    parser.add_argument("--table", type=Path, help="write the table there too")
    return parser.parse_args()


def main() -> None:
    arguments = settings()
    try:
        text = table(results(arguments))
    except (ValueError, FileNotFoundError, RuntimeError) as error:
        sys.exit(str(error))
    except subprocess.CalledProcessError as error:
        command = " ".join(map(str, error.cmd))
        sys.exit(f"{command} ended with {error.returncode}; what it said stands above.")
    print(text, end="")
    if arguments.table:
        arguments.table.write_text(text)


if __name__ == "__main__":
    main()
