"""Batches of fitted images: an endless, resumable stream to train on, one pass to evaluate on."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from equiadapt_jax.data.fitting import fit, to_unit

MEMORY_LIMIT = 256 * 2**20  # bytes of images that are kept rather than read anew


class FittedSource:
    """A source of examples, each fitted: dicts of image float32 (S, S, C) and label int32 ().

    With `keep`, images stay in memory once read, if together they take less than 256 MiB: as the
    integers that were stored where nothing is resized, else as floats. With `named` examples also
    have a name, their own or their number, and none are kept.
    ValueError for an image of another shape than the first one's, where nothing is resized.
    """

    def __init__(
        self, source: Sequence, *, size: int | None, how: str, keep: bool, named: bool = False
    ) -> None:
        if not len(source):
            raise ValueError("The source has no examples; choose another split or slice.")
        self._source, self._size, self._how, self._named = source, size, how, named
        stored, first = self._read(0)
        self.shape = first["image"].shape
        whole = stored.dtype.kind == "u" and stored.shape == self.shape
        kept = stored if whole else first["image"]
        self._keeps = keep and not named and len(source) * kept.nbytes < MEMORY_LIMIT
        count = len(source) if self._keeps else 0
        self._images = np.empty((count, *self.shape), kept.dtype)
        self._labels = np.full(count, -1, np.int32)  # where none is kept

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if self._keeps and self._labels[index] >= 0:
            return {"image": to_unit(self._images[index]), "label": self._labels[index]}
        stored, example = self._read(index)
        self._check_shape(index, example["image"].shape)
        if self._keeps:
            self._keep(index, stored, example)
        return example

    def batch(self, indices: Sequence[int]) -> dict[str, np.ndarray]:
        """Several examples, each value with a leading axis of their number."""
        rows = list(indices)
        if self._keeps and (self._labels[rows] >= 0).all():
            return {"image": to_unit(self._images[rows]), "label": self._labels[rows]}
        examples = [self[index] for index in rows]
        return {key: np.stack([example[key] for example in examples]) for key in examples[0]}

    def _read(self, index: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """The image as stored (H, W, C), and the fitted example."""
        example = self._source[index]
        stored = np.atleast_3d(example["image"])
        image = fit(to_unit(stored), self._size, self._how)
        made = {"image": image, "label": np.asarray(example["label"], np.int32)}
        if self._named:
            made["name"] = np.asarray(_name(example, index))
        return stored, made

    def _keep(self, index: int, stored: np.ndarray, example: dict[str, np.ndarray]) -> None:
        image = example["image"] if self._images.dtype.kind == "f" else stored
        if image.shape == self.shape and image.dtype == self._images.dtype:
            self._images[index] = image
            self._labels[index] = example["label"]  # last: another thread may look for it

    def _check_shape(self, index: int, shape: tuple[int, ...]) -> None:
        if shape != self.shape:
            name = _name(self._source[index], index)
            raise ValueError(
                f"Image {name} is {shape[0]}×{shape[1]} pixels, the first one is "
                f"{self.shape[0]}×{self.shape[1]}; bring all to one size with fit='pad' and a size."
            )


def _name(example: dict[str, Any], index: int) -> str:
    name = example.get("name", str(index))
    return name.decode(errors="replace") if isinstance(name, bytes) else str(name)


def training_batches(
    source: Sequence,
    *,
    size: int | None,
    how: str = "pad",
    batch_size: int,
    seed: int,
    epochs: int | None = None,
    threads: int = 4,
) -> Any:
    """Return a Grain iterator of shuffled batches: image float32 (B, S, S, C), label int32 (B,).

    Every epoch is shuffled anew from `seed`; without `epochs` the stream is endless. The state
    (`get_state`, `set_state`, `grain.checkpoint`) continues it exactly where it stood. `batch_size`
    counts all processes: each gets its own B = batch_size / jax.process_count() images of the
    batch that a single process would get. ValueError if there are fewer examples than a batch.
    """
    import grain
    import jax

    if batch_size < 1 or batch_size % jax.process_count():
        raise ValueError(
            f"batch_size={batch_size} cannot be shared by {jax.process_count()} processes; "
            "choose a positive multiple of their number."
        )
    if len(source) < batch_size:
        raise ValueError(
            f"The source has {len(source)} examples, fewer than batch_size={batch_size}; "
            "choose a smaller batch or a larger split."
        )
    fitted = FittedSource(source, size=size, how=how, keep=True)
    # Of numbers rather than examples, which are cheaper to read a batch at a time.
    numbers = grain.MapDataset.range(len(fitted)).seed(seed).shuffle().repeat(epochs)
    numbers = numbers[jax.process_index() :: jax.process_count()]
    share = batch_size // jax.process_count()
    batches = numbers.batch(share, drop_remainder=True, batch_fn=list).map(fitted.batch)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    return iter(batches.to_iter_dataset(options))


def array_batches(arrays: Mapping[str, np.ndarray], *, batch_size: int, seed: int) -> Any:
    """Return a Grain iterator of shuffled batches of rows of arrays `(N, ...)`, endless.

    Shuffled and resumable as `training_batches`. ValueError for arrays of different N, or fewer
    rows than a batch.
    """
    import grain

    rows = {name: len(array) for name, array in arrays.items()}
    count = min(rows.values())
    if max(rows.values()) != count or count < batch_size:
        raise ValueError(
            f"The arrays have {rows} rows and a batch {batch_size}: give them all the same number, "
            "at least that of a batch."
        )
    numbers = grain.MapDataset.range(count).seed(seed).shuffle().repeat(None)
    batches = numbers.batch(batch_size, drop_remainder=True)
    taken = batches.map(lambda chosen: {name: array[chosen] for name, array in arrays.items()})
    return iter(taken.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)))


def evaluation_batches(
    source: Sequence, *, size: int | None, how: str = "pad", batch_size: int
) -> Iterator[dict[str, np.ndarray]]:
    """Yield all examples once, in order: image (B, S, S, C), label, name, and mask, bool (B,).

    The last batch is filled up with copies of the last example where mask is False, so that all
    have the same shape and none is lost. Every process gets the whole batch.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1.")
    fitted = FittedSource(source, size=size, how=how, keep=False, named=True)
    return _evaluation_batches(fitted, batch_size)


def _evaluation_batches(source: FittedSource, size: int) -> Iterator[dict[str, np.ndarray]]:
    for start in range(0, len(source), size):
        rows = np.arange(start, start + size)
        mask = rows < len(source)
        batch = source.batch(rows[mask].tolist())
        if not mask.all():
            repeated = np.minimum(np.arange(size), mask.sum() - 1)
            batch = {key: array[repeated] for key, array in batch.items()}
        yield {**batch, "mask": mask}
