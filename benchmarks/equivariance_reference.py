"""What the PyTorch package equiadapt makes of turned images, as JSON; see equivariance.py.

Runs inside the environment that accuracy/environment.py makes, from the root of the repository. Its
networks are e2cnn's, of seed 0, untrained: 8 fields, kernels of 5, 3 layers for finite groups; for
SO(2) its steerable one with 4 fields, kernels of 5, 2 layers. Its O(2) is not implemented. What it
cannot do is left out, with a sentence.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from omegaconf import OmegaConf

from benchmarks.accuracy import reference  # declares operators before others import torchvision

# isort: split
from equiadapt.images.canonicalization.continuous_group import SteerableImageCanonicalization
from equiadapt.images.canonicalization.discrete_group import GroupEquivariantImageCanonicalization
from equiadapt.images.canonicalization_networks import ESCNNEquivariantNetwork
from equiadapt.images.canonicalization_networks.escnn_networks import ESCNNSteerableNetwork

SIDE = reference.WORKING
SETTINGS = OmegaConf.create({**reference.CANONICALIZATION, "resize_shape": SIDE})


def build(group: str, size: int) -> torch.nn.Module:
    """The canonicalizer of a group, for images (B, 3, size, size)."""
    torch.manual_seed(0)
    if group in ("so2", "o2"):
        kind = {"so2": "rotation", "o2": "roto-reflection"}[group]
        network = ESCNNSteerableNetwork((3, SIDE, SIDE), 4, 5, kind, 2)
        return SteerableImageCanonicalization(network, SETTINGS, (3, size, size)).eval()
    kind = "rotation" if group.startswith("cyclic") else "roto-reflection"
    rotations = int("".join(filter(str.isdigit, group)))
    network = ESCNNEquivariantNetwork((3, SIDE, SIDE), 8, 5, kind, rotations, 3)
    return GroupEquivariantImageCanonicalization(network, SETTINGS, (3, size, size)).eval()


@torch.inference_mode()
def outputs(model, predictor, images: np.ndarray, continuous: bool):
    """(scores, angles or None, logits) of images (N, S, S, 3)."""
    x = reference.normalized(images)
    seen = model.transformations_before_canonicalization_network_forward(x)
    scores = model.canonicalization_network(seen)
    logits = predictor(model(x))
    element = model.canonicalization_info_dict["group_element"]
    if continuous:
        scores = scores[:, 0]  # the vector that the rotation is made of
        angles = torch.rad2deg(torch.atan2(scores[:, 1], scores[:, 0]))
    else:
        angles = None if "reflection" in element else element["rotation"]
    return scores.tolist(), None if angles is None else angles.tolist(), logits.tolist()


def look(group: str, turned: np.ndarray, moved: np.ndarray, predictor) -> dict:
    """Scores, angles and logits for every turn (E, N, S, S, 3), scores for exact ones."""
    model, continuous = build(group, turned.shape[2]), group in ("so2", "o2")
    scores, angles, logits = zip(
        *(outputs(model, predictor, x, continuous) for x in turned), strict=True
    )
    exact = [outputs(model, predictor, x, continuous)[0] for x in moved]
    return {
        "scores": scores, "angles": None if angles[0] is None else angles, "logits": logits,
        "exact": exact,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    predictor = reference.CifarResNet(arguments.weights)
    found: dict = {}
    with np.load(arguments.images) as file:
        for name in file.files:
            if name.startswith("exact/"):
                continue
            kind, group = name.split("/")
            try:
                made = look(group, file[name], file[f"exact/{name}"], predictor)
                found.setdefault(kind, {})[group] = made
            except Exception as error:
                print(f"equiadapt, {name}: {type(error).__name__}: {error}", flush=True)
    arguments.output.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
