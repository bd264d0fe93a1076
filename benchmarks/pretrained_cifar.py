"""Published CIFAR-10 ResNets, loaded and evaluated: python benchmarks/pretrained_cifar.py SHARED.

SHARED holds `weights/cifar10_resnet20.safetensors`, `weights/cifar10_resnet56.safetensors` (from
akamaster/pytorch_resnet_cifar10) and `data/cifar10_jpeg/test.tar` (5,000 of the test images,
JPEG). Prints the accuracy of each network on the images turned by 0°, 90°, 180° and 270°, beside
that measured with PyTorch; exits with 1 if one differs by more than two images. About two minutes
on two cores.
"""

import io
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from PIL import Image

import equiadapt_jax as ea

MEASURED_WITH_PYTORCH = {
    "resnet20": (81.00, 32.22, 35.64, 31.80),
    "resnet56": (83.12, 32.48, 34.50, 32.18),
}
PREPROCESS = ea.predictors.Preprocess((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def test_images(shared: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images (5000, 32, 32, 3), bytes, and labels by the order of the classes' names."""
    with tarfile.open(shared / "data" / "cifar10_jpeg" / "test.tar") as tar:
        files = {m.name: tar.extractfile(m).read() for m in tar.getmembers() if m.isfile()}
    images = [np.asarray(Image.open(io.BytesIO(content))) for content in files.values()]
    classes = [Path(name).parent.name for name in files]
    return np.stack(images), np.unique(classes, return_inverse=True)[1]


def accuracies(
    shared: Path, name: str, images: np.ndarray, labels: np.ndarray, turns: Sequence[int]
) -> list[float]:
    """Percentages, one for each number of quarter turns."""
    network = ea.predictors.load(
        shared / "weights" / f"cifar10_{name}.safetensors", preprocess=PREPROCESS
    )

    @jax.jit
    def predict(batch):
        x = network.preprocess(batch.astype(np.float32) / 255)
        return network.network.apply(network.params, network.state, x)[0].argmax(-1)

    result = []
    for turn in turns:
        turned = np.rot90(images, turn, (1, 2))
        predicted = [predict(turned[i : i + 500]) for i in range(0, len(turned), 500)]
        result.append(100.0 * float(np.mean(np.concatenate(predicted) == labels)))
    return result


def main(shared: Path) -> int:
    images, labels = test_images(shared)
    worst = 0.0
    for name, expected in MEASURED_WITH_PYTORCH.items():
        measured = accuracies(shared, name, images, labels, range(4))
        for turn, (ours, theirs) in enumerate(zip(measured, expected, strict=True)):
            print(f"{name} turned by {90 * turn:3}°: {ours:.2f} %, with PyTorch {theirs:.2f} %")
            worst = max(worst, abs(ours - theirs))
    return int(worst > 200 / len(labels) + 1e-9)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
