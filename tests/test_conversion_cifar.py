"""Published CIFAR ResNets on real test images: the accuracies measured with PyTorch."""

import importlib.util
from pathlib import Path

import pytest

SHARED = Path(__file__).parents[2] / "shared"
SCRIPT = Path(__file__).parents[1] / "benchmarks" / "pretrained_cifar.py"


@pytest.fixture(scope="module")
def script():
    if not (SHARED / "weights").is_dir():
        pytest.skip(f"no published weights and images in {SHARED}")
    spec = importlib.util.spec_from_file_location("pretrained_cifar", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("name", "turns"), [("resnet20", (0, 1, 2, 3)), ("resnet56", (0,))])
def test_accuracies_are_those_of_pytorch(script, name, turns):
    """To within two of the 5,000 images; the script does all turns of both."""
    images, labels = script.test_images(SHARED)
    assert images.shape == (5000, 32, 32, 3)
    accuracies = script.accuracies(SHARED, name, images, labels, turns)
    expected = [script.MEASURED_WITH_PYTORCH[name][turn] for turn in turns]
    assert accuracies == pytest.approx(expected, abs=0.04 + 1e-9)
