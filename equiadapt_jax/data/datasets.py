"""Open a dataset by name: our own, or anything TFDS has prepared."""

import contextlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

OWN = ("digits", "image_folder", "rotated_mnist")


@dataclass(frozen=True)
class Dataset:
    """What is known of a prepared dataset before any image is read.

    `classes` are the names of the labels in their order, `channels` the number of values per pixel,
    `sizes` the number of examples in each split.
    """

    name: str
    classes: tuple[str, ...]
    channels: int
    sizes: Mapping[str, int]
    builder: Any = field(repr=False, compare=False)

    @property
    def version(self) -> str:
        """Name and version of the prepared copy; of an image folder also a mark of its contents."""
        return self.builder.info.full_name

    def source(self, split: str) -> Any:
        """Return the examples of a split, for `len` and indexing: dicts with `image` and `label`.

        `split` may be sliced as TFDS does it, `train[:90%]`. ValueError for an unknown split.
        """
        try:
            return self.builder.as_data_source(split=split, file_format="array_record")
        except ValueError as error:
            raise ValueError(
                f"{self.name} has no split {split!r}; there are {', '.join(self.sizes)}, "
                "and slices such as 'train[:90%]'."
            ) from error


def open_dataset(
    name: str, *, root: str | os.PathLike = "", data_dir: str | os.PathLike = ""
) -> Dataset:
    """Open the dataset `name`, whose prepared copy lies under `data_dir` (TFDS's own by default).

    "digits", "image_folder" and "rotated_mnist" (the two whose files lie at `root`) are prepared if
    they are not yet. Any other name is TFDS's and must have been prepared as array_record: nothing
    is ever downloaded.
    FileNotFoundError if it is not there, ValueError if it is of no use here or TFDS knows no such
    name; both say what to do.
    """
    import tensorflow_datasets as tfds

    directory = Path(data_dir or tfds.core.constants.DATA_DIR).expanduser()
    if root and name not in ("image_folder", "rotated_mnist"):
        raise ValueError(
            f"root={str(root)!r} is only for image_folder and rotated_mnist, not for {name}."
        )
    if name == "digits":
        return _describe(name, _prepare_digits(directory))
    if name == "image_folder":
        return _describe(name, _prepare_image_folder(root, directory))
    if name == "rotated_mnist":
        return _describe(name, _prepare_rotated_mnist(root, directory))
    return _describe(name, _find_prepared(name, directory))


def _prepare_digits(directory: Path) -> Any:
    from equiadapt_jax.data.digits import Digits

    path = directory / "digits" / str(Digits.VERSION)
    return _prepare(path, lambda: Digits(data_dir=directory, file_format="array_record"))


def _prepare_image_folder(root: str | os.PathLike, directory: Path) -> Any:
    from equiadapt_jax.data.image_folder import ImageFolder, fingerprint

    if not root:
        raise ValueError(
            "image_folder needs root= (--config.data.root=), the folder or tar of the images."
        )
    path = directory / "image_folder" / fingerprint(root) / str(ImageFolder.VERSION)
    return _prepare(path, lambda: ImageFolder(root, data_dir=directory))


def _prepare_rotated_mnist(root: str | os.PathLike, directory: Path) -> Any:
    from equiadapt_jax.data.rotated_mnist import RotatedMnist, fingerprint

    if not root:
        raise ValueError(
            "rotated_mnist needs root= (--config.data.root=), the folder of its two .amat files."
        )
    path = directory / "rotated_mnist" / fingerprint(root) / str(RotatedMnist.VERSION)
    return _prepare(path, lambda: RotatedMnist(root, data_dir=directory))


def _prepare(path: Path, make_builder: Callable[[], Any]) -> Any:
    import tensorflow_datasets as tfds

    # TFDS writes to a folder of another name and renames it at the end: what is here is whole.
    if not path.exists():
        print(f"Preparing {path.parent}.")
        try:
            with contextlib.redirect_stdout(None):  # TFDS would call it a download
                make_builder().download_and_prepare()
        except OSError:
            if not path.exists():  # else another process finished the same preparation first
                raise
    return tfds.builder_from_directory(path)


def _find_prepared(name: str, directory: Path) -> Any:
    # By the files: TFDS's code for the dataset may want TensorFlow, or another version of it.
    from tensorflow_datasets.core.read_only_builder import builder_from_files
    from tensorflow_datasets.core.registered import DatasetNotFoundError

    if not _plain(name).isidentifier():
        check_known(name)
    try:
        builder = builder_from_files(name, data_dir=str(directory))
    except DatasetNotFoundError as error:
        check_known(name)
        raise FileNotFoundError(
            f"{name} is not prepared in {directory}; run "
            f"python -m equiadapt_jax.data.prepare {name} --data_dir={directory} "
            "(which needs pip install 'equiadapt-jax[prepare]')."
        ) from error
    formats = sorted(f.value for f in builder.info.available_file_formats())
    if "array_record" not in formats:
        raise ValueError(
            f"{name} is prepared in {directory} as {', '.join(formats)}, which has no random "
            f"access; run python -m equiadapt_jax.data.prepare {name} with another --data_dir."
        )
    return builder


def check_known(name: str) -> None:
    """Raise ValueError, with the nearest names, if TFDS has no dataset called `name`."""
    import tensorflow_datasets as tfds

    known = [*OWN, *tfds.list_builders(with_community_datasets=False)]
    if _plain(name) not in known:
        near = get_close_matches(_plain(name), known) or ["digits", "image_folder"]
        raise ValueError(f"TFDS has no dataset {name!r}; did you mean {' or '.join(near)}?")


def _plain(name: str) -> str:
    return name.split("/")[0].split(":")[0]  # without configuration and version


def _describe(name: str, builder: Any) -> Dataset:
    import tensorflow_datasets as tfds

    features = builder.info.features
    missing = {"image", "label"} - set(features)
    if missing:
        raise ValueError(
            f"{name} has the features {', '.join(features)}, but image and label are needed."
        )
    shape = features["image"].shape
    label = features["label"]
    if len(shape) != 3 or shape[2] is None or not isinstance(label, tfds.features.ClassLabel):
        raise ValueError(
            f"{name} has images of shape {shape} with labels of type {type(label).__name__}, "
            "but images (H, W, C) with one class label each are needed."
        )
    sizes = {split: info.num_examples for split, info in builder.info.splits.items()}
    return Dataset(name, tuple(label.names), int(shape[2]), sizes, builder)
