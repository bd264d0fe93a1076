"""More figures of an outcome: how far confidence can be trusted, and what happens to each class."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from equiadapt_jax.evaluation.orbits import Outcome, figures

BINS = 15


@dataclasses.dataclass(frozen=True)
class Reliability:
    """Predictions sorted by confidence into equal bins of [0, 1]; `count`, the rest `(bins,)`.

    `accuracy` and `confidence` are means over a bin, nan where it is empty. `error` is the expected
    calibration error Σ count / N · |accuracy − confidence| (Guo et al. 2017, arXiv 1706.04599).
    """

    count: np.ndarray
    accuracy: np.ndarray
    confidence: np.ndarray
    error: float


def reliability(confidence: np.ndarray, right: np.ndarray, bins: int = BINS) -> Reliability:
    """Reliability of confidences in [0, 1], with `right` bool of the same shape.

    Bin m holds confidences in ((m − 1) / bins, m / bins], as in the paper.
    """
    confidence, right = np.ravel(confidence).astype(np.float64), np.ravel(right)
    place = np.searchsorted(np.linspace(0, 1, bins + 1), confidence, side="left") - 1
    place = np.clip(place, 0, bins - 1)
    count = np.bincount(place, minlength=bins)
    some = np.where(count, count, np.nan)
    accuracy = np.bincount(place, right, bins) / some
    mean = np.bincount(place, confidence, bins) / some
    error = np.nansum(count * np.abs(accuracy - mean)) / count.sum()
    return Reliability(count, accuracy, mean, float(error))


def per_class(outcome: Outcome, classes: int) -> dict[str, np.ndarray]:
    """Figures of each class, `(classes,)`: over its own images, nan where it has none.

    `images` how many; `accuracy` upright; `group_accuracy` over all turns; `changed_rate` over the
    turns other than the identity (left out where there are none); `identity_rate`, the share of
    upright images whose pose is the identity, or for matrices `pose_error` of upright images, in
    degrees (left out where there are no poses).
    """
    count = np.bincount(outcome.label, minlength=classes)
    some = np.where(count, count, np.nan)

    def mean(values):
        return np.bincount(outcome.label, values, classes) / some

    found = {
        "images": count,
        "accuracy": mean(outcome.right[:, 0]),
        "group_accuracy": mean(outcome.right.mean(1)),
    }
    if outcome.prediction.shape[1] > 1:
        changed = outcome.prediction[:, 1:] != outcome.prediction[:, :1]
        found["changed_rate"] = mean(changed.mean(1))
    if outcome.pose_error is not None:
        found["pose_error"] = mean(outcome.pose_error[:, 0])
    elif outcome.pose is not None:
        found["identity_rate"] = mean(outcome.pose[:, 0] == 0)
    return found


def all_figures(outcome: Outcome, classes: Sequence[str]) -> dict[str, float]:
    """`figures`, and with them calibration and classes, under flat names.

    `calibration_error` upright and `group_calibration_error` over all turns; for each class that
    has images `class/<name>/accuracy`, `/group_accuracy`, `/changed_rate` and `/identity_rate` or
    `/pose_error`.
    """
    found = figures(outcome)
    found["calibration_error"] = reliability(outcome.confidence[:, 0], outcome.right[:, 0]).error
    found["group_calibration_error"] = reliability(outcome.confidence, outcome.right).error
    for figure, values in per_class(outcome, len(classes)).items():
        if figure != "images":
            found |= {
                f"class/{name}/{figure}": float(value)
                for name, value in zip(classes, values, strict=True)
                if np.isfinite(value)
            }
    return found
