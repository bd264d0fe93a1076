"""How equivariant scorers and models are, as tables: python -m benchmarks.equivariance SHARED.

SHARED holds `data/cifar10_jpeg/test.tar` and `weights/cifar10_resnet20.safetensors`. Three kinds of
images are turned by the elements of C_n, D_n, and by random elements of SO(2) and O(2): sums of
plane waves, turned without any interpolation; photographs that come with scikit-learn, turned
before they are made smaller; and CIFAR-10's, turned at their 32 pixels. For every group an
untrained scorer, of seed 0, stands before the frozen ResNet-20, and a table says, in means over
images and elements other than the identity,

    scorer        ‖s(g·x) − g·s(x)‖ / ‖s(x)‖ of scores, whose mean is left out, or vectors, in %
    pose          the angle between h(g·x) and g·h(x), 180° on the other side of a mirror
    invariance    ‖f(g·x) − f(x)‖ / ‖f(x)‖ of the logits f, in %
    bits          the share of scores that exact elements change in any bit, in %

and the same of the PyTorch package equiadapt, on its e2cnn networks, where its environment is
(`python -m benchmarks.accuracy.environment`; --environment says where). How its scores and poses
turn is not written down, so the best of all ways is taken for each element. Where two poses are
about as good, as they are for scorers that learned nothing, a small error of the scores is a large
one of the pose. Some minutes on one core.
"""

import argparse
import functools
import itertools
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import scipy.ndimage
from sklearn.datasets import load_sample_image

import equiadapt_jax as ea
from benchmarks.accuracy import environment, photos
from equiadapt_jax.groups import SO, Cyclic, Dihedral, O

ROOT = Path(__file__).parents[1]
WEIGHTS = "cifar10_resnet20.safetensors"
PREPROCESS = ea.predictors.Preprocess((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
GROUPS = [*map(Cyclic, (2, 3, 4, 6, 8, 16)), *map(Dihedral, (2, 4, 8)), SO(2), O(2)]
RANDOM = 12  # elements of SO(2) and of O(2)
KINDS = {
    "waves": "Band-limited images, 64 pixels, no wave shorter than 16",
    "crops": "Photographs, 64 pixels, turned at 192",
    "cifar": "CIFAR-10, turned at 32 pixels",
}
IMAGES = {"waves": 6, "crops": 6, "cifar": 12}


def elements() -> dict[str, np.ndarray]:
    """Matrices `(E, 2, 2)` by the name of the group, the identity first."""
    found = {}
    for i, group in enumerate(GROUPS):
        if group.order is None:
            random = group.random(jax.random.key(i), (RANDOM,))
            found[str(group)] = np.concatenate([np.eye(2)[None], random]).astype(np.float32)
        else:
            found[str(group)] = np.asarray(group.matrix(np.arange(group.order)))
    return found


# ---- images ----


def waves(matrix: np.ndarray, count: int, size: int = 64, shortest: float = 16) -> np.ndarray:
    """Sums of ten plane waves in three channels, turned: (g·x)(p) = x(g⁻¹p)."""
    rng = np.random.default_rng(0)
    frequency = 2 * np.pi / shortest * np.sqrt(rng.uniform(size=(count, 3, 10)))
    direction, phase = rng.uniform(0, 2 * np.pi, (2, count, 3, 10))
    vectors = frequency[..., None] * np.stack([np.cos(direction), np.sin(direction)], -1)
    angle = np.einsum("ijd,nckd->nijck", _grid(size) @ matrix, vectors)
    return (0.5 + 0.1 * np.cos(angle + phase[:, None, None]).sum(-1)).astype(np.float32)


def crops(matrix: np.ndarray, count: int, size: int = 64, scale: int = 3) -> np.ndarray:
    """Squares of two photographs about random places, turned at full size and averaged."""
    rng, found = np.random.default_rng(1), []
    for i in range(count):
        photo = _photo(("china.jpg", "flower.jpg")[i % 2])
        reach = int(np.ceil(size * scale / np.sqrt(2))) + 2
        centre = [rng.integers(reach, side - reach) for side in photo.shape[:2]]
        places = (_grid(size * scale) @ matrix)[..., ::-1] + centre  # (row, column)
        planes = [
            scipy.ndimage.map_coordinates(plane, np.moveaxis(places, -1, 0), order=3)
            for plane in np.moveaxis(photo, -1, 0)
        ]
        whole = np.clip(np.stack(planes, -1), 0, 1)
        found.append(whole.reshape(size, scale, size, scale, 3).mean((1, 3)))
    return np.stack(found).astype(np.float32)


def cifar(matrix: np.ndarray, count: int, archive: Path) -> np.ndarray:
    """Images of the test set, turned by one cubic interpolation."""
    files, _ = _read(archive)
    chosen = np.random.default_rng(2).permutation(len(files))[:count]
    pixels = photos.decode([files[i] for i in chosen]).astype(np.float32) / 255
    turned = _act(O(2), jnp.asarray(matrix, jnp.float32), pixels)
    return np.clip(turned, 0, 1)


_act = jax.jit(functools.partial(ea.actions.images.act, interpolation="cubic"))
_read = functools.lru_cache(photos.read)


@functools.lru_cache
def _photo(name):
    return load_sample_image(name).astype(np.float64) / 255


def _grid(size):
    middle = np.arange(size) - (size - 1) / 2
    return np.stack(np.meshgrid(middle, middle), -1)


# ---- ours ----


def scorer(group) -> ea.Network:
    """An untrained scorer of a group."""
    if group.order is None:
        return ea.from_linen(ea.networks.SteerableNet(group))
    layers = {"features": (8, 16, 16), "kernels": (4, 3, 3), "strides": (2, 1, 1)}
    return ea.from_linen(ea.networks.GroupConvNet(group, **layers, grid=4, hidden=32))


def looker(group, shape: tuple[int, ...]) -> Callable[[np.ndarray], tuple[np.ndarray, ...]]:
    """`look(images) -> (scores, matrices of the poses, canonical inputs)`."""
    model = ea.adapt(group, scorer(group), ea.from_function(lambda params, x: x))
    params, state = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, *shape)))

    @jax.jit
    def look(images):
        canonical, _ = model.canonicalize(params, state, images)
        return canonical.scores, group.matrix(canonical.pose), canonical.inputs

    return look


def ours(images: dict, matrices: dict[str, np.ndarray], weights: Path) -> dict:
    """What our scorers and models make of images, by kind and group, as `Outputs`."""
    found: dict = {kind: {} for kind in images}
    network = ea.predictors.load(weights, preprocess=PREPROCESS)
    logits = jax.jit(
        lambda x: network.network.apply(network.params, network.state, network.preprocess(x))[0]
    )
    for kind, of in images.items():
        for group in GROUPS:
            turned = of[str(group)]
            look = looker(group, turned.shape[2:])
            seen = [jax.device_get(look(x)) for x in turned]
            scores, poses, inputs = (np.stack(parts) for parts in zip(*seen, strict=True))
            found[kind][str(group)] = {
                "scores": scores, "poses": poses, "logits": np.stack([logits(x) for x in inputs]),
                "exact": [np.asarray(look(x)[0]) for x in moved(turned[0], group)],
            }  # fmt: skip
            print(f"{kind}, {group}", file=sys.stderr)
    return found


def lattice(group) -> tuple:
    """(the finite group of the exact elements, these but the identity)."""
    whole = group if group.order is not None else group.subgroup(4)
    return whole, [int(g) for g in whole.lattice if g]


def moved(images: np.ndarray, group) -> list[np.ndarray]:
    """Images under every exact element but the identity."""
    whole, exact = lattice(group)
    return [np.asarray(ea.actions.images.act(whole, g, images)) for g in exact]


# ---- figures ----


def turned_scores(group, matrix: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """G·s of scores `(N, |G|)` or vectors `(N, k, 2)`."""
    if scores.ndim == 3:
        return scores @ matrix.T
    every = np.asarray(group.matrix(np.arange(group.order)))
    g = int(np.abs(every - matrix).sum((1, 2)).argmin())
    found = np.empty_like(scores)
    found[:, group.compose(g, np.arange(group.order))] = scores
    return found


def figures(group, matrices: np.ndarray, outputs: dict) -> dict[str, float | None]:
    """The four figures of the table, of outputs whose way to turn is ours."""
    scores, poses = outputs["scores"], outputs["poses"]
    expected = [turned_scores(group, g, scores[0]) for g in matrices[1:]]
    whole, exact = lattice(group)
    moved = [
        turned_scores(group, np.asarray(whole.matrix(q)), scores[0]) != found
        for q, found in zip(exact, outputs["exact"], strict=True)
    ]
    return {
        "scorer": float(np.mean([apart(s, e) for s, e in zip(scores[1:], expected, strict=True)])),
        "pose": float(
            np.mean([degrees(p, g @ poses[0]) for p, g in zip(poses, matrices, strict=True)][1:])
        ),
        "invariance": invariance(outputs["logits"]),
        "bits": float(np.mean(moved)) if moved else None,
    }


def apart(found: np.ndarray, expected: np.ndarray) -> float:
    """Mean over images of the distance over the size, without the mean of scores."""
    if found.ndim == 2:
        found, expected = (x - x.mean(-1, keepdims=True) for x in (found, expected))
    found, expected = (np.asarray(x).reshape(len(x), -1) for x in (found, expected))
    size = np.linalg.norm(expected, axis=-1)
    return float(np.mean(np.linalg.norm(found - expected, axis=-1) / size))


def degrees(found: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """The angle between matrices `(N, 2, 2)`."""
    between = found @ np.linalg.inv(expected)
    angle = np.abs(np.rad2deg(np.arctan2(between[:, 0, 1], between[:, 1, 1])))
    return np.where(np.linalg.det(between) < 0, 180, angle)


def invariance(logits: np.ndarray) -> float:
    """Mean of ‖f(g·x) − f(x)‖ / ‖f(x)‖ of logits `(E, N, K)`, the identity first."""
    change = np.linalg.norm(logits[1:] - logits[0], axis=-1)
    return float(np.mean(change / np.linalg.norm(logits[0], axis=-1)))


# ---- the reference ----


def reference(folder: Path, arrays: dict, weights: Path) -> dict:
    """What equiadapt's scorers and models make of the same images, run in its environment."""
    python = folder.absolute() / "bin" / "python"
    if not python.exists():
        print(f"No environment of equiadapt in {folder}: it is left out.", file=sys.stderr)
        return {}
    with tempfile.TemporaryDirectory() as place:
        images, output = Path(place) / "images.npz", Path(place) / "outputs.json"
        np.savez(images, **arrays)
        command = [
            str(python), "-m", "benchmarks.equivariance_reference", f"--images={images}",
            f"--weights={weights.absolute()}", f"--output={output}",
        ]  # fmt: skip
        done = subprocess.run(command, cwd=ROOT)
        if done.returncode:
            print("equiadapt did not run: it is left out.", file=sys.stderr)
            return {}
        return json.loads(output.read_text())


def reference_figures(group, matrices: np.ndarray, outputs: dict) -> dict[str, float | None]:
    """The same figures where nothing is known but the outputs: the best way to turn counts."""
    scores, logits = (np.asarray(outputs[name]) for name in ("scores", "logits"))
    errors = [
        min(apart(s, way(scores[0])) for way in ways(group, g))
        for s, g in zip(scores[1:], matrices[1:], strict=True)
    ]
    pose = None
    if outputs["angles"] is not None:  # rotations: of a pose one angle, in either sense
        angles = np.asarray(outputs["angles"])
        turned = np.rad2deg(np.arctan2(matrices[:, 0, 1], matrices[:, 1, 1]))[:, None]
        away = [np.abs((angles - angles[0] - s * turned + 180) % 360 - 180) for s in (1, -1)]
        pose = min(float(a[1:].mean()) for a in away)
    whole, exact = lattice(group)
    moved = [
        min(np.mean(way(scores[0]) != found) for way in ways(group, np.asarray(whole.matrix(q))))
        for q, found in zip(exact, map(np.asarray, outputs["exact"]), strict=True)
    ]
    return {
        "scorer": float(np.mean(errors)), "pose": pose, "invariance": invariance(logits),
        "bits": float(np.mean(moved)) if moved else None,
    }  # fmt: skip


def ways(group, matrix: np.ndarray) -> list[Callable[[np.ndarray], np.ndarray]]:
    """All ways in which scores `(N, |G|)`, or vectors `(N, 2)`, may turn with an element."""
    if group.order is None:
        rotations = (matrix, matrix.T)
        return [functools.partial(lambda r, v: v @ r.T, r) for r in rotations]
    n, halves = group.n, group.order // group.n
    shifts = [(sign, k) for sign in (1, -1) for k in range(n)]
    mirrored = np.linalg.det(matrix) < 0

    def way(chosen, scores):
        parts = scores.reshape(len(scores), halves, n)[:, :: -1 if mirrored else 1]
        turned = [parts[:, i, (sign * np.arange(n) + k) % n] for i, (sign, k) in enumerate(chosen)]
        return np.concatenate(turned, -1)

    return [functools.partial(way, c) for c in itertools.product(shifts, repeat=halves)]


# ---- tables ----


def table(kind: str, found: dict[str, list[dict | None]]) -> str:
    """Markdown: a row for each group, four columns for ours and for the reference."""
    names = ("scorer", "pose", "invariance", "bits")
    sides = ("ours", "equiadapt") if any(b for _, b in found.values()) else ("ours",)
    header = [f"{side}: {name}" for side in sides for name in names]
    lines = [f"**{KINDS[kind]}** ({IMAGES[kind]} images)", ""]
    lines += [f"| group | {' | '.join(header)} |", "|---" * (len(header) + 1) + "|"]
    for group, both in found.items():
        cells = [
            _cell(name, (side or {}).get(name)) for side in both[: len(sides)] for name in names
        ]
        lines.append(f"| {group} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(name, value):
    if value is None:
        return ""
    if name == "pose":
        return f"{value:.2f}°"
    return "0" if value == 0 else f"{100 * value:.3g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("shared", type=Path)
    parser.add_argument("--environment", type=Path, default=environment.FOLDER)
    parser.add_argument("--output", type=Path, help="write the tables there too")
    arguments = parser.parse_args()
    weights = arguments.shared / "weights" / WEIGHTS
    archive = arguments.shared / "data" / "cifar10_jpeg" / "test.tar"
    make = {"waves": waves, "crops": crops, "cifar": functools.partial(cifar, archive=archive)}
    matrices = elements()
    try:
        images = {
            kind: {
                name: np.stack([make[kind](g, IMAGES[kind]) for g in of])
                for name, of in matrices.items()
            }
            for kind in KINDS
        }
        outputs = ours(images, matrices, weights)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(str(error))
    arrays = {f"{kind}/{name}": x for kind, of in images.items() for name, x in of.items()}
    for kind, of in images.items():
        for group in GROUPS:
            upright = of[str(group)][0]
            exact = moved(upright, group)  # none for C_3
            exact = np.asarray(exact, upright.dtype).reshape(len(exact), *upright.shape)
            arrays[f"exact/{kind}/{group}"] = exact
    theirs = reference(arguments.environment, arrays, weights)
    tables = []
    for kind in KINDS:
        rows: dict[str, list[dict | None]] = {}
        for group in GROUPS:
            name, of = str(group), matrices[str(group)]
            other = theirs.get(kind, {}).get(name)
            rows[name] = [
                figures(group, of, outputs[kind][name]),
                reference_figures(group, of, other) if other else None,
            ]
        tables.append(table(kind, rows))
    text = "\n\n".join(tables)
    print(text)
    if arguments.output:
        arguments.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
