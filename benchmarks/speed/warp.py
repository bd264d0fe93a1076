"""Rotation of a batch of images, by any angle and by quarter turns, forward and backward.

Every way turns the same images by the same angles, bilinearly, and continues the edge; that they
agree is seen before they are timed. JAX's are compiled; PyTorch's images are (B, C, H, W).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.speed.results import Comparison
from benchmarks.speed.settings import Settings
from benchmarks.speed.timing import Case, compiled, interleaved
from equiadapt_jax.actions import images as actions
from equiadapt_jax.groups import Cyclic

PART = "warp"
C4 = Cyclic(4)


def measure(settings: Settings) -> list[Comparison]:
    """Five comparisons: both kinds of turns, forward and with the ways back."""
    batch, size = (2, 32) if settings.small else (64, 224)
    rng = np.random.default_rng(0)
    x, y = rng.uniform(size=(2, batch, size, size, 3)).astype(np.float32)
    angles = rng.uniform(-np.pi, np.pi, batch).astype(np.float32)
    quarters = np.arange(batch, dtype=np.int32) % 4
    once = 2 * x.nbytes
    kinds = {"any angle": (angles, any_angle), "quarter turns": (quarters, quarter_turns)}
    found = []
    for back, moved in (("", once), (" and back to the images", 2 * once)):
        for kind, (by, ways) in kinds.items():
            what = f"{batch} images of {size} pixels by {kind}{back}"
            found.append(comparison(settings, what, ways(settings), (x, y, by, back), moved))
    back = " and back to the images and angles"
    what = f"{batch} images of {size} pixels by any angle{back}"
    ways = any_angle(settings)
    return [*found, comparison(settings, what, ways, (x, y, angles, back), 3 * once)]


def comparison(settings: Settings, what: str, ways: dict, arguments, moved: float) -> Comparison:
    """All ways that agree with ours; `moved` bytes are the least that any can read and write."""
    cases, costs = {}, {}
    for name, make in ways.items():
        try:
            cases[name], cost = make(*arguments)
        except RuntimeError as error:
            settings.refuse(f"{name}, {what}", error)
        else:
            costs |= {name: cost} if cost else {}
    seconds = interleaved(cases, settings.rounds)
    return Comparison(PART, what, seconds, floor=settings.floors.moving(moved), costs=costs)


def any_angle(settings: Settings) -> dict[str, Any]:
    """Ways to turn by angles: name → make(x, y, angles, back) → (case, costs)."""
    ways = {
        "ours": functools.partial(with_jax, actions.rotate),
        "map_coordinates": functools.partial(with_jax, map_coordinates),
    }
    if settings.installed("dm_pix"):
        import dm_pix

        turn = functools.partial(dm_pix.rotate, order=1, mode="nearest")
        ways["dm_pix"] = functools.partial(with_jax, jax.vmap(turn))
    if settings.installed("torch"):
        ways["grid_sample"] = functools.partial(with_torch, grid_sample)
    if settings.installed("kornia"):
        ways["kornia"] = functools.partial(with_torch, kornia)
    return ways


def quarter_turns(settings: Settings) -> dict[str, Any]:
    """Ways to turn by quarter turns, a different one for each image."""
    ways = {"ours": functools.partial(with_jax, lambda x, g: actions.act(C4, g, x))}
    if settings.installed("torch"):
        ways["torch.rot90"] = functools.partial(with_torch, rot90)
    by_angle = any_angle(settings)
    ways |= {name: by_angle[name] for name in ("grid_sample", "kornia") if name in by_angle}
    return ways


def map_coordinates(x, angles):
    """jax.scipy.ndimage, for each image and channel."""
    half = (x.shape[1] - 1) / 2
    i, j = jnp.mgrid[: x.shape[1], : x.shape[2]] - half

    def turn(image, angle):
        c, s = jnp.cos(angle), jnp.sin(angle)
        places = [s * j + c * i + half, c * j - s * i + half]
        sample = functools.partial(
            jax.scipy.ndimage.map_coordinates, coordinates=places, order=1, mode="nearest"
        )
        return jax.vmap(sample, 2, 2)(image)

    return jax.vmap(turn)(x, angles)


def with_jax(function, x, y, by, back: str) -> tuple[Case, dict]:
    """A compiled case; what goes back is y."""
    if back:
        count = 2 if "angles" in back else 1

        def there_and_back(x, by, y):
            arguments, others = (x, by)[:count], (x, by)[count:]
            turned, pull = jax.vjp(lambda *arguments: function(*arguments, *others), *arguments)
            return turned, pull(y)

        case, costs = compiled(there_and_back, x, by, y)
    else:
        case, costs = compiled(function, x, by)
    agree(jax.jit(function)(x, by), x, by)
    return case, costs


def with_torch(function, x, y, by, back: str) -> tuple[Case, dict]:
    """The same with PyTorch."""
    import torch

    device = "cuda" if torch.cuda.is_available() and jax.default_backend() == "gpu" else "cpu"
    x_, y_ = (torch.from_numpy(a.transpose(0, 3, 1, 2).copy()).to(device) for a in (x, y))
    by_ = torch.from_numpy(by).to(device)
    agree(np.asarray(function(x_, by_).cpu()).transpose(0, 2, 3, 1), x, by)
    x_.requires_grad_(bool(back))
    by_.requires_grad_("angles" in back)

    def case() -> None:
        x_.grad = by_.grad = None
        turned = function(x_, by_)
        if back:
            turned.backward(y_)
        if device == "cuda":
            torch.cuda.synchronize()

    return case, {}


def angle_of(by):
    """Radians of angles, or of numbers of quarter turns."""
    return by if by.is_floating_point() else by * (np.pi / 2)


def grid_sample(x, by):
    import torch
    from torch.nn import functional

    angles = angle_of(by).to(x.dtype)
    c, s, zero = torch.cos(angles), torch.sin(angles), torch.zeros_like(angles)
    rows = torch.stack([torch.stack([c, -s, zero], -1), torch.stack([s, c, zero], -1)], -2)
    grid = functional.affine_grid(rows, x.shape, align_corners=True)
    return functional.grid_sample(x, grid, padding_mode="border", align_corners=True)


def kornia(x, by):
    import torch
    from kornia.geometry.transform import rotate

    degrees = torch.rad2deg(angle_of(by).to(x.dtype))
    return rotate(x, degrees, padding_mode="border", align_corners=True)


def rot90(x, by):
    import torch

    return torch.stack([torch.rot90(a, k, (1, 2)) for a, k in zip(x, by.tolist(), strict=True)])


def agree(turned, x, by) -> None:
    """Raise unless it is what ours makes of the images, well inside the edge."""
    angles = by if by.dtype == np.float32 else by * np.float32(np.pi / 2)
    expected = np.asarray(jax.jit(actions.rotate)(x, angles))
    edge = max(x.shape[1] // 5, 2)
    inside = (slice(None), slice(edge, -edge), slice(edge, -edge))
    worst = np.abs(np.asarray(turned)[inside] - expected[inside]).max()
    if not worst < 1e-2:
        raise RuntimeError(f"A peer turns the images otherwise: it differs by up to {worst:.3g}.")
