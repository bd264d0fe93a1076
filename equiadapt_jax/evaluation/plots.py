"""Pictures of an evaluation, written as PNG files."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from equiadapt_jax.evaluation.files import whole
from equiadapt_jax.evaluation.orbits import Outcome, displayed_turn

_COLOURS = {"vanilla": "#c0562f", "adapted": "#20639b"}


def accuracy_against_angle(path: Path, sweep: Mapping[str, Outcome]) -> None:
    """Accuracy of each model over the circle of angles, upright at the top; dashed: mirrored."""
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(6, 6), subplot_kw={"projection": "polar"})
    axes.set_theta_zero_location("N")
    for model, outcome in sweep.items():
        accuracy = 100 * outcome.right.mean(0)
        for mirrored, style in ((False, "-"), (True, "--")):
            chosen = [i for i, name in enumerate(outcome.labels) if name.endswith("s") == mirrored]
            if not chosen:
                continue
            angle = np.linspace(0, 2 * np.pi, len(chosen) + 1)
            label = f"{model}{', mirrored' * mirrored}: mean {accuracy[chosen].mean():.1f} %"
            values = accuracy[[*chosen, chosen[0]]]
            axes.plot(angle, values, style, color=_COLOURS[model], label=label, linewidth=2)
    axes.set_ylim(0, 100)
    axes.set_rlabel_position(112.5)
    axes.set_title("Accuracy in % against the angle of the input", pad=24)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, -0.22), frameon=False)
    _save(figure, path)


def before_and_after(
    path: Path, inputs: np.ndarray, canonical: np.ndarray, titles: Sequence[tuple[str, str]]
) -> None:
    """Pairs of rows: inputs as turned, below them the canonical inputs; both `(N, S, S, C)`."""
    plt = _pyplot()
    columns = 8
    rows = -(-len(inputs) // columns)
    figure, axes = plt.subplots(
        2 * rows, columns, figsize=(1.5 * columns, 3.7 * rows), squeeze=False
    )
    for axis in axes.flat:
        axis.axis("off")
    for i, (before, after) in enumerate(zip(inputs, canonical, strict=True)):
        row, column = 2 * (i // columns), i % columns
        for offset, image in enumerate((before, after)):
            axis = axes[row + offset, column]
            axis.imshow(_displayed(image), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axis.set_title(titles[i][offset], fontsize=8)
    figure.suptitle("Inputs, and below each its canonical input")
    figure.tight_layout()
    _save(figure, path)


def pose_histogram(path: Path, found: np.ndarray, poses: Sequence[str]) -> None:
    """How often each of the poses was found, for upright inputs and for those of all turns.

    `found` are their numbers, `(N, E)`, the first turn being the identity.
    """
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(max(5, 0.5 * len(poses)), 3.6))
    place = np.arange(len(poses))
    for offset, name, chosen in (
        (-0.2, "upright inputs", found[:, 0]),
        (0.2, "all turned inputs", found),
    ):
        share = np.bincount(chosen.reshape(-1), minlength=len(poses)) / chosen.size
        axes.bar(place + offset, 100 * share, 0.4, label=name)
    axes.set_xticks(place, map(displayed_turn, poses), rotation=90 if len(poses) > 8 else 0)
    axes.set_xlabel("pose found")
    axes.set_ylabel("inputs, %")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    _save(figure, path)


def _displayed(image):
    """Three channels as colours, anything else by its mean."""
    return np.clip(image if image.shape[-1] == 3 else image.mean(-1), 0, 1)


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _save(figure, path):
    with whole(path) as unfinished:
        figure.savefig(unfinished, format="png", dpi=120, bbox_inches="tight")
    _pyplot().close(figure)
