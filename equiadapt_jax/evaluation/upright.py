"""Whether data have a preferred pose at all, which is what a prior takes for granted.

A two-sample test by classification, in the spirit of arXiv 2510.01349: a small classifier learns to
tell images as they are stored from the same images turned, on one half of them; on the other half
it picks, of all poses of an image, the one it takes for stored. If turning made no difference to
how the data are distributed, every pick would be as likely. Only elements that move pixels onto
pixels take part, so that nothing is told by an interpolation. NumPy alone, without chance.
"""

import dataclasses
import math

import numpy as np

from equiadapt_jax.evaluation.orbits import GroupTurns
from equiadapt_jax.groups import Group
from equiadapt_jax.networks.feature_scorer import cells

SIDE = 16  # pixels to which images are averaged
RIDGE = 0.03
SURE = 1.96  # standard deviations: 95 %
FEWEST, MOST = 20, 400  # images: below nothing is said, beyond nothing more is needed


@dataclasses.dataclass(frozen=True)
class Evidence:
    """What the classifier picked of `images` held-out images, among the poses `turns`.

    `picked` is the share of each pose `(len(turns),)`, the stored one first. `alike` are the places
    of those that the prior takes for as likely as the stored one, that one among them; `low` to
    `high` is the 95 % interval of their share together (Wilson's).
    """

    turns: tuple[str, ...]
    picked: np.ndarray
    low: float
    high: float
    images: int
    alike: tuple[int, ...] = (0,)

    @property
    def rate(self) -> float:
        """The share of images whose stored pose was picked, or one that is as likely."""
        return float(self.picked[list(self.alike)].sum())

    @property
    def figures(self) -> dict[str, float]:
        """The flat figures of it."""
        return {
            "data/upright_evidence": self.rate,
            "data/upright_evidence_low": self.low,
            "data/upright_evidence_high": self.high,
            "data/upright_chance": self.chance,
            **{f"data/picked/{t}": float(p) for t, p in zip(self.turns, self.picked, strict=True)},
        }

    @property
    def chance(self) -> float:
        """What the rate would be if no pose was preferred."""
        return len(self.alike) / len(self.turns)


def upright_evidence(
    images: np.ndarray, group: Group, modes: tuple[int, ...] = (0,)
) -> Evidence | None:
    """Whether a classifier can tell in which pose images `(N, H, W, C)` are stored.

    Kernel ridge regression with a Gaussian kernel, whose width is the median distance, on every
    second image in all poses; of the first 400. `modes` are the most probable elements of the
    prior: an image stored in one of them is as likely in each, so that h∘g⁻¹ is as good a pick as
    the identity for all of them g and h. None where no element but the identity is exact, where one
    would reshape the images, or for fewer than 20 of them.
    """
    lattice, images = group.lattice, images[:MOST]
    reshapes = group.n > 2 and images.shape[1] != images.shape[2]
    if len(lattice) < 2 or len(images) < FEWEST or reshapes:
        return None
    small = _standardized(np.stack([_averaged(image) for image in images]))
    orbits = np.stack([_turned(small, group, int(g)) for g in lattice], 1)
    orbits = orbits.reshape(len(images), len(lattice), -1)
    train, held_out = orbits[::2], orbits[1::2]
    target = np.where(np.arange(len(lattice)) == 0, 1.0, -1 / (len(lattice) - 1))
    known = train.reshape(-1, train.shape[-1])
    apart = _distances(known, known)
    width = np.median(apart) or 1.0
    kernel = np.exp(-apart / width) + RIDGE * np.eye(len(known))
    alpha = np.linalg.solve(kernel, np.tile(target, len(train)))
    unknown = held_out.reshape(-1, known.shape[-1])
    scores = (np.exp(-_distances(unknown, known) / width) @ alpha).reshape(-1, len(lattice))
    # Poses that look the same share the pick.
    best = scores >= scores.max(1, keepdims=True) - 1e-9
    picked = (best / best.sum(1, keepdims=True)).mean(0)
    found = {int(group.compose(h, group.inverse(g))) for g in modes for h in modes}
    alike = tuple(i for i, g in enumerate(lattice) if int(g) in found)
    low, high = wilson(min(float(picked[list(alike)].sum()), 1.0), len(held_out))
    names = GroupTurns(group).labels
    return Evidence(tuple(names[g] for g in lattice), picked, low, high, len(held_out), alike)


def wilson(share: float, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share among so many (Wilson 1927)."""
    z = SURE**2 / count
    middle = (share + z / 2) / (1 + z)
    half = SURE * math.sqrt(share * (1 - share) / count + z / (4 * count)) / (1 + z)
    return middle - half, middle + half


def _averaged(image):
    """Means of an image over cells of equal area, at most 16 × 16 of them."""
    rows, columns = (cells(size, min(size, SIDE)) for size in image.shape[:2])
    return np.einsum("hwc,ih,jw->ijc", image, rows, columns, optimize=True)


def _standardized(images):
    """Each image with mean 0 and norm 1, which turning does not change."""
    images = images - images.mean((1, 2, 3), keepdims=True)
    norm = np.sqrt((images**2).sum((1, 2, 3), keepdims=True))
    return images / np.where(norm > 1e-12, norm, 1)


def _turned(images, group, g):
    """Images under an element that only moves pixels."""
    mirrored = images[:, :, ::-1] if group.reflects(g) else images
    return np.rot90(mirrored, group.steps(g) * 4 // group.n, (1, 2))


def _distances(one, other):
    """Squared distances of rows."""
    squares = (one**2).sum(1)[:, None] + (other**2).sum(1)
    return np.maximum(squares - 2 * one @ other.T, 0)
