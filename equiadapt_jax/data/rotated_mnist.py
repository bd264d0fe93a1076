"""Rotated MNIST (Larochelle et al. 2007), from the two text files that its authors published."""

import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

from equiadapt_jax.data.image_folder import digest

TRAIN = "mnist_all_rotation_normalized_float_train_valid.amat"
TEST = "mnist_all_rotation_normalized_float_test.amat"
SIDE = 28
_LINES_AT_ONCE = 1000


def find(root: str | os.PathLike) -> tuple[Path, Path]:
    """The files of the training and validation images, and of the test images, in a folder."""
    paths = Path(root).expanduser() / TRAIN, Path(root).expanduser() / TEST
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(
                f"There is no {path}; rotated_mnist expects root to be the folder of {TRAIN} and "
                f"{TEST}, as unpacked from mnist_rotation_new.zip."
            )
    return paths


def fingerprint(root: str | os.PathLike) -> str:
    """Return 16 hexadecimal digits that change with the size or time of either file."""
    return digest((path.name, path.stat()) for path in find(root))


def read(path: Path) -> Iterator[tuple[np.ndarray, int]]:
    """Yield (image float32 (28, 28, 1) in [0, 1], label from 0 to 9) for every line of a file.

    A line holds 784 pixels, row after row, and the label. That is how published loaders read these
    two files; of the other variations of the same authors some were saved column after column.
    Raises ValueError, naming the line, for anything else.
    """
    with path.open() as file:
        for first in itertools.count(1, _LINES_AT_ONCE):
            lines = list(itertools.islice(filter(str.strip, file), _LINES_AT_ONCE))
            if not lines:
                return
            try:
                values = np.loadtxt(lines, np.float32, ndmin=2)
            except ValueError as error:
                raise ValueError(f"{path}, from line {first}: {error}") from None
            _check(path, first, values)
            for row in values:
                yield row[:-1].reshape(SIDE, SIDE, 1), int(row[-1])


def _check(path: Path, first: int, values: np.ndarray) -> None:
    if values.shape[1:] != (SIDE**2 + 1,):
        raise ValueError(
            f"{path} holds {values.shape[-1]} numbers in line {first}: {SIDE**2} pixels and a "
            "label are expected."
        )
    pixels, labels = values[:, :-1], values[:, -1]
    bad = ~((pixels >= 0) & (pixels <= 1)).all(1) | ~np.isin(labels, range(10))
    if bad.any():
        raise ValueError(
            f"{path}, line {first + int(bad.argmax())}, is not {SIDE**2} pixels in [0, 1] and a "
            "label from 0 to 9."
        )


# Not registered with TFDS, which would look for its own code.
class RotatedMnist(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Digits turned by random angles, float32 (28, 28, 1): 10,000, 2,000 and 50,000 images.

    The first five sixths of the first file are train, the others validation, as is usual; the
    second file is test. The fingerprint of the files is part of the directory of the prepared copy.
    """

    name = "rotated_mnist"
    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, root: str | os.PathLike, *, data_dir: str | os.PathLike | None) -> None:
        self._paths = find(root)
        config = tfds.core.BuilderConfig(name=fingerprint(root))
        super().__init__(data_dir=data_dir, config=config, file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "image": tfds.features.Tensor(
                shape=(SIDE, SIDE, 1), dtype=np.float32, encoding=tfds.features.Encoding.BYTES
            ),
            "label": tfds.features.ClassLabel(num_classes=10),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description="MNIST digits turned by random angles (Larochelle et al. 2007).",
            features=tfds.features.FeaturesDict(features),
            supervised_keys=("image", "label"),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict:
        train, test = self._paths
        with train.open() as file:
            lines = sum(1 for _ in filter(str.strip, file))
        held_out = lines - lines // 6
        return {
            "train": self._generate_examples(train, 0, held_out),
            "validation": self._generate_examples(train, held_out, lines),
            "test": self._generate_examples(test, 0, None),
        }

    def _generate_examples(
        self, path: Path, start: int, stop: int | None
    ) -> Iterator[tuple[int, dict]]:
        for number, (image, label) in enumerate(itertools.islice(read(path), start, stop), start):
            yield number, {"image": image, "label": label}
