"""Data that are not upright: images turned once and for all, each by an element of its own."""

import zlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from equiadapt_jax.actions import images as image_actions
from equiadapt_jax.data.fitting import fit, to_unit
from equiadapt_jax.groups import Group


def drawn(probabilities: Sequence[float], images: int, *, seed: int, split: str) -> np.ndarray:
    """The elements of so many images, int32 `(N,)`, the same for the same seed and split.

    An image's element depends on its number, not on how many others there are. ValueError for
    probabilities that are not a distribution.
    """
    total = sum(probabilities)
    if not all(p >= 0 for p in probabilities) or not abs(total - 1) < 1e-6:
        raise ValueError(
            f"The probabilities {tuple(probabilities)} of config.data.poses sum to {total}: give "
            "one number of at least 0 for each element, summing to 1."
        )
    # RandomState's stream is frozen by NumPy, so the poses are the same for ever.
    random = np.random.RandomState([seed, zlib.crc32(split.encode())])
    edges = np.cumsum(probabilities)
    edges[np.flatnonzero(probabilities)[-1] :] = 1  # no rounding beyond the last that is possible
    return np.searchsorted(edges, random.random_sample(images), side="right").astype(np.int32)


class TurnedSource:
    """A source of examples whose images are fitted, then turned by the elements given.

    Images are float32 (size, size, C), to be used without a further fit; what else an example has
    stays as it is.
    """

    def __init__(
        self,
        source: Sequence,
        group: Group,
        elements: np.ndarray,
        *,
        size: int | None,
        how: str,
        pad: str = "edge",
        fill: float = 0.0,
    ) -> None:
        if len(elements) != len(source):
            raise ValueError(f"{len(elements)} elements for {len(source)} images: give one each.")
        self._source, self._group, self._elements = source, group, elements
        self._fit, self._how = (size, how), {"pad": pad, "fill": fill}

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = self._source[index]
        image = fit(to_unit(np.atleast_3d(example["image"])), *self._fit)
        turned = _act(self._group, self._elements[index], image, **self._how)
        return {**example, "image": np.asarray(turned)}


# Compiled once for all sources.
_act = jax.jit(image_actions.act, static_argnames=("pad", "fill"))


class RelabelledSource:
    """A source of examples with other labels, one for each: int32 `(N,)`."""

    def __init__(self, source: Sequence, labels: np.ndarray) -> None:
        if len(labels) != len(source):
            raise ValueError(f"{len(labels)} labels for {len(source)} images: give one each.")
        self._source, self._labels = source, labels

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self._source[index], "label": self._labels[index]}
