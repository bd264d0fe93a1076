"""Train and measure the PyTorch package equiadapt on the images that all methods are measured on.

Runs inside the environment that environment.py makes, from the root of the repository:

    runs/reference-env/bin/python -m benchmarks.accuracy.reference --images=runs/accuracy/evaluation.npz \
        --train=SHARED/data/cifar10_jpeg --weights=SHARED/weights/cifar10_resnet20.safetensors \
        --canonicalizer=e2cnn --images_seen=30000 --output=result.json

The canonicalizer is equiadapt's GroupEquivariantImageCanonicalization on its group-convolution or
its e2cnn network, 16 fields, kernels of 5, 3 layers; crop, weights of the losses, optimizer and
learning rate as in its examples (AdamW, which they use for all predictors but ResNets), without
their augmentation of the training images. The predictor is frozen. Their crop, 0.8 of the side, is 26
of 32 pixels, in the middle; 0.9 would be 29, off the middle, and quarter turns would change poses.
What is left is resized to `--working` pixels, 32 unless told: as there are; its examples have 96.
"""  # noqa: E501

import argparse
import importlib.metadata
import platform
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf

from benchmarks.accuracy import evaluation, photos

# torchvision declares more operators than it has without its binary for this build of torch.
TORCHVISION = torch.library.Library("torchvision", "DEF")
TORCHVISION.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
TORCHVISION.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
warnings.filterwarnings("ignore", "indexing with dtype torch.uint8")  # e2cnn

from equiadapt.images.canonicalization.discrete_group import (  # noqa: E402
    GroupEquivariantImageCanonicalization,
)
from equiadapt.images.canonicalization_networks import (  # noqa: E402
    CustomEquivariantNetwork,
    ESCNNEquivariantNetwork,
)

NETWORKS = {"group_conv": CustomEquivariantNetwork, "e2cnn": ESCNNEquivariantNetwork}
TITLES = {"group_conv": "its own network", "e2cnn": "e2cnn network"}
NETWORK = {"out_channels": 16, "kernel_size": 5, "num_layers": 3, "group_type": "rotation"}
CANONICALIZATION = {"beta": 1.0, "input_crop_ratio": 0.8}
WORKING = 32  # pixels to which the canonicalizer resizes what its network sees
PRIOR_WEIGHT, LEARNING_RATE, BATCH = 100.0, 1e-3, 64
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PACKAGES = ("equiadapt", "e2cnn", "kornia", "torch", "torchvision", "numpy")


class CifarResNet:
    """A CIFAR ResNet with frozen weights: three stages, shortcuts without parameters."""

    def __init__(self, weights: Path):
        self.weights = safetensors.torch.load_file(weights)
        blocks = {name.split(".conv1.")[0] for name in self.weights if ".conv1." in name}
        self.blocks = sorted(blocks, key=lambda name: (name[:6], int(name[7:])))  # layer1.0, …

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Normalized images (B, 3, S, S) → logits (B, 10)."""
        x = F.relu(self._convolved("", 1, x))
        for block in self.blocks:
            x = self._block(f"{block}.", x)
        return F.linear(x.mean((2, 3)), self.weights["linear.weight"], self.weights["linear.bias"])

    def _block(self, name: str, x: torch.Tensor) -> torch.Tensor:
        more = len(self.weights[f"{name}conv1.weight"]) - x.shape[1]
        stride = 2 if more else 1
        y = self._convolved(name, 2, F.relu(self._convolved(name, 1, x, stride)))
        shortcut = x[:, :, ::stride, ::stride]
        return F.relu(y + F.pad(shortcut, (0, 0, 0, 0, more // 2, more - more // 2)))

    def _convolved(self, block: str, i: int, x: torch.Tensor, stride: int = 1) -> torch.Tensor:
        x = F.conv2d(x, self.weights[f"{block}conv{i}.weight"], stride=stride, padding=1)
        parts = ("running_mean", "running_var", "weight", "bias")
        return F.batch_norm(x, *(self.weights[f"{block}bn{i}.{part}"] for part in parts))


class Fixed(torch.nn.Module):
    """A canonicalization network that always finds the same pose."""

    group_type = "rotation"

    def __init__(self, rotations: int, pose: int):
        super().__init__()
        self.num_rotations = rotations
        self.scores = F.one_hot(torch.tensor(pose), rotations).float()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, S, S) → scores (B, rotations)."""
        return self.scores.repeat(len(x), 1)


def canonicalizer(
    network: torch.nn.Module, size: int, working: int
) -> GroupEquivariantImageCanonicalization:
    """The canonicalizer of equiadapt for images (B, 3, size, size) on one of its networks."""
    settings = OmegaConf.create({**CANONICALIZATION, "resize_shape": working})
    return GroupEquivariantImageCanonicalization(network, settings, (3, size, size))


def build(
    name: str, rotations: int, size: int, working: int
) -> GroupEquivariantImageCanonicalization:
    """The same on a new network of NETWORKS, which sees images (B, 3, working, working)."""
    shape = (3, working, working)
    network = NETWORKS[name](in_shape=shape, num_rotations=rotations, **NETWORK)
    # Its own network does not say what the canonicalizer asks of it.
    network.group_type, network.num_rotations = "rotation", rotations
    return canonicalizer(network, size, working)


def sense(rotations: int, images: torch.Tensor, working: int) -> int:
    """1 if its element by an angle θ is what turned the image by θ counter-clockwise, else −1.

    Seen from what it makes of images turned by a quarter when that element is found.
    """
    fixed = canonicalizer(Fixed(rotations, rotations // 4), images.shape[-1], working).eval()
    undone = fixed(torch.rot90(images, 1, (2, 3)))
    errors = [(undone - torch.rot90(images, k, (2, 3))).abs().max() for k in (0, 2)]
    if min(errors) > 1e-2:
        raise RuntimeError(f"Its canonical images are no quarter turns, but off by {min(errors)}.")
    return 1 if errors[0] < errors[1] else -1


def normalized(images: np.ndarray) -> torch.Tensor:
    """Images (B, S, S, 3), float32 in [0, 1] → (B, 3, S, S) as the predictor takes them."""
    x = (images - np.asarray(MEAN, np.float32)) / np.asarray(STD, np.float32)
    return torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))


def batches(images: np.ndarray, labels: np.ndarray, seen: int, rng) -> Iterator[tuple]:
    """Batches of the first `seen` images of one random order after the other."""
    epochs = -(-seen // len(labels))
    order = np.concatenate([rng.permutation(len(labels)) for _ in range(epochs)])[:seen]
    for part in np.split(order, range(BATCH, seen, BATCH)):
        yield normalized(images[part].astype(np.float32) / 255), torch.from_numpy(labels[part])


def train(model, predictor, images, labels, seen: int, seed: int) -> float:
    """Train the canonicalizer, and return the seconds it took."""
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE)
    model.train()
    began = time.perf_counter()
    for step, (x, y) in enumerate(batches(images, labels, seen, np.random.default_rng(seed))):
        task = F.cross_entropy(predictor(model(x)), y)
        loss = task + PRIOR_WEIGHT * model.get_prior_regularization_loss()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0:
            upright = model.get_identity_metric().item()
            print(f"step {step}: loss {loss.item():.2f}, {upright:.0%} upright", flush=True)
    return time.perf_counter() - began


def predict_with(model, predictor, rotations: int, sign: int) -> evaluation.Predict:
    """What `evaluation.measure` calls."""
    model.eval()

    @torch.inference_mode()
    def predict(images):
        classes = predictor(model(normalized(images))).argmax(-1)
        angle = model.canonicalization_info_dict["group_element"]["rotation"].numpy()
        return classes.numpy(), np.rint(sign * angle * rotations / 360) % rotations

    return predict


def settings() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=Path, required=True, help="what images.py wrote")
    parser.add_argument("--train", type=Path, required=True, help="the folder of train.tar")
    parser.add_argument("--weights", type=Path, required=True, help="of the predictor")
    parser.add_argument("--canonicalizer", choices=list(NETWORKS), required=True)
    parser.add_argument("--rotations", type=int, choices=(4, 8), default=4)
    parser.add_argument("--working", type=int, default=WORKING, help="pixels its network sees")
    parser.add_argument("--images_seen", type=int, default=50_000, help="while training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="of PyTorch; as many as it likes by default")
    parser.add_argument("--output", type=Path, required=True)
    return parser.parse_args()


def main() -> None:
    arguments = settings()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    name, rotations, seen = arguments.canonicalizer, arguments.rotations, arguments.images_seen
    working = arguments.working
    test = evaluation.load(arguments.images)
    files, labels = photos.read(arguments.train / "train.tar")
    images = photos.decode(files)
    predictor = CifarResNet(arguments.weights)
    model = build(name, rotations, images.shape[1], working)
    seconds = train(model, predictor, images, labels, seen, arguments.seed)
    sign = sense(rotations, normalized(test.images("0")[:100]), working)
    result = {
        "method": f"equiadapt, {TITLES[name]} at {working} pixels, C{rotations}, "
        f"{seen:,} images seen",
        **evaluation.measure(predict_with(model, predictor, rotations, sign), test, rotations),
        "predictor_passes": 1,
        "train_seconds": seconds,
        "parameters": sum(p.numel() for p in model.parameters()),
        "images_seen": seen,
        "seed": arguments.seed,
        "threads": torch.get_num_threads(),
        "sense": sign,
        "settings": {**NETWORK, **CANONICALIZATION, "resize_shape": working,
                     "prior_weight": PRIOR_WEIGHT, "batch": BATCH,
                     "optimizer": f"AdamW, {LEARNING_RATE}"},
        "versions": {"python": platform.python_version()}
        | {package: importlib.metadata.version(package) for package in PACKAGES},
    }  # fmt: skip
    evaluation.write(arguments.output, result)


if __name__ == "__main__":
    main()
