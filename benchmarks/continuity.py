"""An image turned by small steps: what jumps, and what does not.

    python -m benchmarks.continuity SHARED --workdir RUN [--output docs/continuity.png]

RUN is what train.py left of a predictor and a scorer, SHARED holds `data/cifar10_jpeg/test.tar`.
The first --images of benchmarks/accuracy/images.py are turned around the circle in steps of --step
degrees. Saves a plot of the probability of its class for the image --shown, and prints, for
each way of choosing poses, the largest change of that probability in one step: of that image, and
over all of them. 360 steps of 20 images and eight poses are 57,600 passes of the predictor.
"""

import argparse
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import equiadapt_jax as ea
from benchmarks.accuracy import photos
from benchmarks.accuracy.choices import alone, by_scores, everything

CHOICES = {
    "vanilla": alone,
    "single pose": by_scores(1),
    "top-2": by_scores(2),
    "top-2, fading weights": by_scores(2, "faded"),
    "weighted frame": by_scores(None),
}
PLOTTED = ("single pose", "weighted frame")


def probabilities(model, networks, pixels: np.ndarray, label: int, degrees: np.ndarray, batch: int):
    """The probability of the label at every angle, by the name of the choice."""

    @jax.jit
    def see(networks, image, angles):
        turned = ea.actions.images.rotate(
            jnp.broadcast_to(image, (len(angles), *image.shape)), angles, pad=model.pad,
            fill=model.fill,
        )  # fmt: skip
        scores, predictions = everything(model, *networks, turned)
        chosen = {n: choose(model.group, scores, predictions)[0] for n, choose in CHOICES.items()}
        return {n: jax.nn.softmax(y, -1)[:, label] for n, y in chosen.items()}

    image = jnp.asarray(pixels, jnp.float32) / 255
    padded = np.resize(np.radians(degrees), -(-len(degrees) // batch) * batch)
    parts = [
        jax.device_get(see(networks, image, jnp.asarray(part, jnp.float32)))
        for part in padded.reshape(-1, batch)
    ]
    return {n: np.concatenate([p[n] for p in parts])[: len(degrees)] for n in CHOICES}


def largest_steps(curve: np.ndarray) -> float:
    """The largest change between neighbours on the circle."""
    return float(np.abs(np.diff(curve, append=curve[:1])).max())


def plot(degrees, curves, output: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3), layout="constrained")
    for name in PLOTTED:
        axes.plot(degrees, curves[name], label=name, linewidth=1.2)
    axes.set(xlabel="the image is turned by (degrees)", ylabel="probability of its class")
    axes.set(xlim=(0, 360), ylim=(0, 1.02), xticks=range(0, 361, 45))
    axes.legend(loc="lower left", frameon=False)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=120)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("shared", type=Path)
    parser.add_argument("--workdir", type=Path, required=True, help="what train.py left")
    parser.add_argument("--images", type=int, default=20, help="how many")
    parser.add_argument("--shown", type=int, default=0, help="the image of the plot")
    parser.add_argument("--step", type=float, default=1.0, help="in degrees")
    parser.add_argument("--batch", type=int, default=60, help="angles at a time")
    parser.add_argument("--output", type=Path, default=Path("runs/continuity.png"))
    arguments = parser.parse_args()
    if not 0 <= arguments.shown < arguments.images:
        sys.exit(f"--shown={arguments.shown} is none of the {arguments.images} images.")
    try:
        files, labels = photos.read(arguments.shared / "data" / "cifar10_jpeg" / "test.tar")
        params, state, model = ea.load(arguments.workdir)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(str(error))
    order = np.random.default_rng(0).permutation(len(files))[: arguments.images]
    pixels, labels = photos.decode([files[i] for i in order]), labels[order]
    degrees = np.arange(0, 360, arguments.step)
    curves = [
        probabilities(model, (params, state), image, label, degrees, arguments.batch)
        for image, label in zip(pixels, labels, strict=True)
    ]
    plot(degrees, curves[arguments.shown], arguments.output)
    print(f"| largest change in {arguments.step:g}° | the image shown | median of all | all |")
    print("|---|---|---|---|")
    for name in CHOICES:
        steps = [largest_steps(curve[name]) for curve in curves]
        print(f"| {name} | {steps[arguments.shown]:.3f} | {np.median(steps):.3f} | "
              f"{max(steps):.3f} |")  # fmt: skip
    print(f"\nLeft in {arguments.output}.")


if __name__ == "__main__":
    main()
