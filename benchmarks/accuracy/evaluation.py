"""Turned test images, and what a method makes of them; needs NumPy only.

Every method is measured by `measure`, on the arrays of one file that `images.py` makes, so that all
see the very same pixels. A result is a dictionary, kept as a JSON file:

    method                what the table calls it
    evaluation            the digest of the images it was measured on
    turns                 {"0": {…}, "45": {…}, …, "315": {…}, "random": {…}}, each with
      accuracy              share of the predictions that are right
      changed               share of the predictions that differ from those for the upright images
      pose_accuracy         share of poses that are the element nearest to the turn applied; null
                            where there is no pose, or where the turn lies between two elements
    rotations             n of the method's C_n; null where it has none
    predictor_passes      of the predictor, for one image
    seconds_per_1000      seconds for 1,000 images, compilation left out
    train_seconds         of training, reading the images left out; 0 without training
    parameters            that were trained

and anything else: settings, versions.
"""

import dataclasses
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ELEMENTS = tuple(str(45 * i) for i in range(8))  # of C8, in degrees
RANDOM = "random"
TURNS = (*ELEMENTS, RANDOM)

# Images (B, S, S, 3), float32 in [0, 1] → classes (B,), and poses (B,) in C_n or None.
Predict = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray | None]]
Result = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """A file of turned images: labels (N,), the random angles (N,) in radians, and a digest."""

    path: Path
    labels: np.ndarray
    angles: np.ndarray
    digest: str

    def images(self, turn: str) -> np.ndarray:
        """Images (N, S, S, 3), float32 in [0, 1], all turned as `turn` says, one of TURNS."""
        with np.load(self.path) as file:
            return file[f"turned_{turn}"]

    def degrees(self, turn: str) -> np.ndarray:
        """Angles (N,) that the images were turned by, counter-clockwise."""
        if turn == RANDOM:
            return np.degrees(self.angles)
        return np.full(len(self.labels), float(turn))


def load(path: Path) -> Evaluation:
    """Return what images.py wrote; FileNotFoundError if it did not."""
    if not path.is_file():
        raise FileNotFoundError(f"There is no {path}: make it with benchmarks/accuracy/images.py.")
    with np.load(path) as file:
        return Evaluation(path, file["labels"], file["angles"], str(file["digest"]))


def measure(
    predict: Predict, evaluation: Evaluation, rotations: int | None = None, batch: int = 500
) -> Result:
    """Return `evaluation`, `turns`, `rotations` and `seconds_per_1000` of a result.

    All batches have `batch` images, the last of them padded, so that nothing is compiled twice.
    """
    batch = min(batch, len(evaluation.labels))
    predict(in_batches(evaluation.images("0"), batch)[0])
    turns: dict[str, dict[str, float | None]] = {}
    seconds, upright = 0.0, None
    for turn in TURNS:
        images = evaluation.images(turn)
        began = time.perf_counter()
        outputs = [predict(part) for part in in_batches(images, batch)]
        seconds += time.perf_counter() - began
        classes = np.concatenate([c for c, _ in outputs])[: len(images)]
        upright = classes if upright is None else upright
        turns[turn] = {
            "accuracy": float(np.mean(classes == evaluation.labels)),
            "changed": float(np.mean(classes != upright)),
            "pose_accuracy": None,
        }
        if rotations is not None:
            poses = np.concatenate([p for _, p in outputs])[: len(images)]
            turns[turn]["pose_accuracy"] = pose_accuracy(poses, evaluation.degrees(turn), rotations)
    return {
        "evaluation": evaluation.digest,
        "turns": turns,
        "rotations": rotations,
        "seconds_per_1000": 1000 * seconds / (len(TURNS) * len(evaluation.labels)),
    }


def pose_accuracy(poses: np.ndarray, degrees: np.ndarray, rotations: int) -> float | None:
    """Share of poses that are the element of C_n nearest to the angle; None if two are as near."""
    steps = degrees * rotations / 360
    if np.allclose(np.abs(steps - np.rint(steps)), 0.5):
        return None
    return float(np.mean(poses == np.rint(steps) % rotations))


def write(path: Path, result: Result) -> None:
    """Write a result, all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(json.dumps(result, indent=2) + "\n")
    unfinished.replace(path)


def read(path: Path) -> Result:
    """Return a result; ValueError, naming the file, if it is none."""
    try:
        result = json.loads(path.read_text())
        missing = [name for name in ("method", "evaluation", "turns") if name not in result]
        missing += [f"turns/{turn}" for turn in TURNS if turn not in result.get("turns", {})]
    except (json.JSONDecodeError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} is not a result: {error}. Measure it again.") from error
    if missing:
        raise ValueError(f"{path} is not a result, it lacks {', '.join(missing)}: measure again.")
    return result


def measured_on(path: Path, evaluation: Evaluation) -> bool:
    """Whether there is a result that was measured on these images."""
    return path.exists() and read(path)["evaluation"] == evaluation.digest


def in_batches(images: np.ndarray, size: int) -> list[np.ndarray]:
    """The images in batches of one size, the last filled up with the first of them."""
    padded = np.resize(np.arange(len(images)), math.ceil(len(images) / size) * size)
    return [images[part] for part in np.split(padded, len(padded) // size)]
