"""Scikit-learn's embedded handwritten digits as a TFDS dataset: real images, no download."""

import io
from collections.abc import Iterator

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

SPLITS = {"train": slice(0, 1237), "validation": slice(1237, 1437), "test": slice(1437, 1797)}


class Digits(tfds.core.GeneratorBasedBuilder):
    """1,797 digits, uint8 (8, 8, 1), in 1,237 training, 200 validation and 360 test images."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "image": tfds.features.Image(shape=(8, 8, 1), encoding_format="png"),
            "label": tfds.features.ClassLabel(num_classes=10),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description="Handwritten digits of 8×8 pixels, from scikit-learn.",
            features=tfds.features.FeaturesDict(features),
            supervised_keys=("image", "label"),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict:
        # RandomState's stream is frozen by NumPy, so the splits are the same for ever.
        order = np.random.RandomState(0).permutation(1797)
        return {name: self._generate_examples(order[part]) for name, part in SPLITS.items()}

    def _generate_examples(self, indices: np.ndarray) -> Iterator[tuple[int, dict]]:
        from sklearn.datasets import load_digits  # a prepared copy is read without scikit-learn

        digits = load_digits()
        images = np.round(digits.images * 255 / 16).astype(np.uint8)
        for index in map(int, indices):
            yield index, {"image": _png(images[index]), "label": int(digits.target[index])}


def _png(image: np.ndarray) -> io.BytesIO:
    # TFDS needs TensorFlow to encode an array, but takes the bytes of a finished file as they are.
    file = io.BytesIO()
    Image.fromarray(image).save(file, format="PNG")
    file.seek(0)
    return file
