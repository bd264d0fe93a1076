"""Position embeddings: brought to the order of `ViT`, and to another grid of patches."""

import numpy as np


def arrange(
    leaves: dict[str, np.ndarray], *, class_token: bool, grid: int, new_grid: int, antialias: bool
) -> dict[str, np.ndarray]:
    """Return leaves in which `pos_embed` is (1, class token + new_grid², width).

    A class token without position gets zeros. A distillation token becomes a register, which has
    no position, by adding its position to it. Everything else is passed on.
    """
    leaves = dict(leaves)
    positions = leaves["pos_embed"]
    extra = positions.shape[1] - grid**2
    before, patches = positions[:, :extra], positions[:, extra:]
    if "dist_token" in leaves:
        leaves["reg_token"] = leaves.pop("dist_token") + before[:, 1:2]
    if class_token and not extra:
        before = np.zeros_like(patches[:, :1])
    if new_grid != grid:
        patches = resample(patches, grid, new_grid, antialias=antialias)
    leaves["pos_embed"] = np.concatenate([before[:, : int(class_token)], patches], axis=1)
    return leaves


def resample(positions: np.ndarray, old: int, new: int, *, antialias: bool) -> np.ndarray:
    """Return embeddings (1, old², width) of a square grid as (1, new², width), bicubic.

    With `antialias`, Keys' kernel (a = -1/2) is widened by old / new where the grid shrinks and its
    weights add up to one at the border; so do timm and `jax.image.resize`. Without, the kernel has
    a = -3/4, is never widened, and the border repeats; so do Hugging Face and the authors of
    DINOv2. Computed in float64, whatever the type.
    """
    weights = _weights(old, new, antialias)
    square = positions.reshape(old, old, -1).astype(np.float64)
    square = np.einsum("ai,bj,ijw->abw", weights, weights, square, optimize=True)
    return square.reshape(1, new**2, -1).astype(positions.dtype)


def _weights(old: int, new: int, antialias: bool) -> np.ndarray:
    """What each of `new` points takes from each of `old`, (new, old)."""
    scale = old / new
    centre = (np.arange(new)[:, None] + 0.5) * scale - 0.5
    if antialias:
        weights = _cubic((np.arange(old) - centre) / max(scale, 1.0), -0.5)
        return weights / weights.sum(axis=1, keepdims=True)
    taps = np.floor(centre).astype(int) + np.arange(-1, 3)
    weights = np.zeros((new, old))
    rows = np.broadcast_to(np.arange(new)[:, None], taps.shape)
    np.add.at(weights, (rows, taps.clip(0, old - 1)), _cubic(taps - centre, -0.75))
    return weights


def _cubic(x: np.ndarray, a: float) -> np.ndarray:
    """Keys' cubic convolution kernel (1981, doi:10.1109/TASSP.1981.1163711)."""
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x**2 + 1
    far = a * (((x - 5) * x + 8) * x - 4)
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))
