"""Turn the test images once, for all methods: python -m benchmarks.accuracy.images SHARED.

SHARED holds `data/cifar10_jpeg/test.tar`. Writes --output, an uncompressed npz of

    images                  (N, S, S, 3) bytes, upright
    labels                  (N,) int64
    angles                  (N,) float32, radians in [0, 2π)
    turned_0 … turned_315   (N, S, S, 3) float32 in [0, 1], turned by the elements of C8
    turned_random           the same, each turned by its angle
    digest                  of images, labels and angles

The images are in a random order of their own, so that the first so many are a fair sample. About
600 MB and ten seconds for the 5,000.
"""

import argparse
import functools
import hashlib
from pathlib import Path

import jax
import numpy as np

import equiadapt_jax as ea
from benchmarks.accuracy import photos
from benchmarks.accuracy.evaluation import ELEMENTS, RANDOM

GROUP = ea.groups.Cyclic(len(ELEMENTS))


def make(archive: Path, output: Path, limit: int | None = None, seed: int = 0) -> None:
    """Write the file described above from an archive of images, the first `limit` of its order."""
    files, labels = photos.read(archive)
    rng = np.random.default_rng(seed)
    chosen = rng.permutation(len(files))[:limit]
    images, labels = photos.decode([files[i] for i in chosen]), labels[chosen]
    angles = rng.uniform(0, 2 * np.pi, len(images)).astype(np.float32)
    arrays = {"images": images, "labels": labels, "angles": angles}
    arrays["digest"] = np.asarray(digest(images, labels, angles))
    arrays |= {f"turned_{turn}": pixels for turn, pixels in turned(images, angles).items()}
    output.parent.mkdir(parents=True, exist_ok=True)
    unfinished = output.with_name(output.name + ".unfinished.npz")
    np.savez(unfinished, **arrays)
    unfinished.replace(output)


def turned(images: np.ndarray, angles: np.ndarray) -> dict[str, np.ndarray]:
    """Images under every element of C8 and under their random angles; bytes → float32."""
    x = images.astype(np.float32) / 255
    act = jax.jit(ea.actions.images.act, static_argnums=(0, 1))
    rotate = jax.jit(ea.actions.images.rotate)
    result = {}
    for g, turn in enumerate(ELEMENTS):
        result[turn] = _in_parts(functools.partial(act, GROUP, g), x)
    return result | {RANDOM: _in_parts(rotate, x, angles)}


def digest(*arrays: np.ndarray) -> str:
    """16 hexadecimal digits of the arrays' bytes."""
    return hashlib.sha256(b"".join(a.tobytes() for a in arrays)).hexdigest()[:16]


def _in_parts(function, *arrays: np.ndarray, size: int = 1000) -> np.ndarray:
    """Call it on so many images at a time, to spare memory."""
    parts = [[a[i : i + size] for a in arrays] for i in range(0, len(arrays[0]), size)]
    return np.concatenate([np.asarray(function(*part)) for part in parts])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("shared", type=Path)
    parser.add_argument("--output", type=Path, default=Path("runs/accuracy/evaluation.npz"))
    parser.add_argument("--limit", type=int, help="use so many images; all by default")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    archive = arguments.shared / "data" / "cifar10_jpeg" / "test.tar"
    make(archive, arguments.output, arguments.limit, arguments.seed)


if __name__ == "__main__":
    main()
