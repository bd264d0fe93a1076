"""An image turned by small steps: what jumps, and what does not.

    python -m benchmarks.continuity SHARED --workdir RUN [--output docs/continuity.png]

RUN is what train.py left of a predictor and a scorer, SHARED holds `data/cifar10_jpeg/test.tar`.
The first --images of benchmarks/accuracy/images.py are turned around the circle in steps of --step
degrees. Saves a plot of the probability of its class for the image --shown, and prints, for each
way of choosing poses, the largest change of that probability in one step, and what is left of it
when the step is halved ten times: a jump stays, a slope goes. 360 steps of 20 images and eight
poses are 58,000 passes of the predictor.
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
HALVINGS = 10


def looker(model, networks):
    """`look(image, label, degrees)`: the probability of the label at angles, by choice."""

    @jax.jit
    def see(networks, image, label, angles):
        images = jnp.broadcast_to(image, (len(angles), *image.shape))
        turned = ea.actions.images.rotate(images, angles, pad=model.pad, fill=model.fill)
        scores, predictions = everything(model, *networks, turned)
        chosen = {n: choose(model.group, scores, predictions)[0] for n, choose in CHOICES.items()}
        return {n: jax.nn.softmax(y, -1)[:, label] for n, y in chosen.items()}

    def look(image, label, degrees):
        angles = jnp.asarray(np.radians(degrees), jnp.float32)
        return jax.device_get(see(networks, image, np.int32(label), angles))

    return look


def around(look, pixels: np.ndarray, label: int, degrees: np.ndarray, batch: int):
    """The probability of the label at every angle, by choice."""
    padded = np.resize(degrees, (-(-len(degrees) // batch), batch))
    parts = [look(pixels, label, part) for part in padded]
    return {n: np.concatenate([p[n] for p in parts])[: len(degrees)] for n in CHOICES}


def largest_step(curve: np.ndarray) -> tuple[int, float]:
    """(where it begins, its size) of the largest change between neighbours on the circle."""
    steps = np.abs(np.diff(curve, append=curve[:1]))
    return int(steps.argmax()), float(steps.max())


def narrowed(look, pixels, label, degrees, curves, halvings: int = HALVINGS) -> dict[str, float]:
    """What is left of the largest change when its step is halved so many times.

    The half with the larger change is kept: a jump stays, a slope goes.
    """
    step, ends = degrees[1] - degrees[0], {}
    for name, curve in curves.items():
        at, _ = largest_step(curve)
        ends[name] = [degrees[at], curve[at], degrees[at] + step, curve[(at + 1) % len(curve)]]
    for _ in range(halvings):
        middles = [(low + high) / 2 for low, _, high, _ in ends.values()]
        seen = look(pixels, label, np.asarray(middles))
        for i, (name, (low, at_low, high, at_high)) in enumerate(ends.items()):
            middle, value = middles[i], seen[name][i]
            below = abs(value - at_low) >= abs(at_high - value)
            ends[name] = [low, at_low, middle, value] if below else [middle, value, high, at_high]
    return {name: float(abs(value[3] - value[1])) for name, value in ends.items()}


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


def table(steps, left, arguments) -> str:
    """Markdown: the largest changes in one step, and what is left of them."""
    fine = arguments.step / 2**HALVINGS
    lines = [
        f"| largest change | the image shown, in {arguments.step:g}° | in {fine:.2g}° | "
        f"median of {arguments.images}, in {arguments.step:g}° | in {fine:.2g}° |",
        "|---|---|---|---|---|",
    ]
    for name in CHOICES:
        figures = [steps[name][arguments.shown], left[name][arguments.shown]]
        figures += [np.median(steps[name]), np.median(left[name])]
        lines.append(f"| {name} | {' | '.join(f'{value:.3f}' for value in figures)} |")
    return "\n".join(lines)


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
    look = looker(model, (params, state))
    pixels = jnp.asarray(pixels, jnp.float32) / 255
    curves, left = [], []
    for image, label in zip(pixels, labels, strict=True):
        curves.append(around(look, image, label, degrees, arguments.batch))
        left.append(narrowed(look, image, label, degrees, curves[-1]))
    plot(degrees, curves[arguments.shown], arguments.output)
    steps = {n: [largest_step(curve[n])[1] for curve in curves] for n in CHOICES}
    print(table(steps, {n: [of[n] for of in left] for n in CHOICES}, arguments))
    print(f"\nLeft in {arguments.output}.")


if __name__ == "__main__":
    main()
