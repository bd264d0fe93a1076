"""JPEG images in a tar archive, `<split>/<class>/<image>`; needs NumPy and Pillow only."""

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image


def read(archive: Path) -> tuple[list[bytes], np.ndarray]:
    """Files of an archive and their labels, both in the order of the files' names.

    A label, int64, is the place of the class among the sorted names of the classes. Raises
    FileNotFoundError for a missing archive, ValueError for a damaged or empty one.
    """
    if not archive.is_file():
        raise FileNotFoundError(f"There is no {archive}: give the folder that holds it.")
    try:
        with tarfile.open(archive) as tar:
            files = {m.name: tar.extractfile(m).read() for m in tar.getmembers() if m.isfile()}
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f"{archive} cannot be read as a tar archive: {error}.") from error
    if not files:
        raise ValueError(f"{archive} holds no files: pack <split>/<class>/<image> into it.")
    names = sorted(files)
    classes = [Path(name).parent.name for name in names]
    return [files[name] for name in names], np.unique(classes, return_inverse=True)[1]


def decode(files: Sequence[bytes]) -> np.ndarray:
    """Images (N, S, S, 3), bytes, of files that all have the same size."""
    return np.stack([np.asarray(Image.open(io.BytesIO(file)).convert("RGB")) for file in files])
