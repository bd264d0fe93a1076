"""The user's own images, in class folders or in a tar archive of them, as a TFDS dataset."""

import hashlib
import itertools
import os
import posixpath
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from absl import logging

from equiadapt_jax.data.decoding import EXTENSIONS, decode

LAYOUT = "<split>/<class>/<image>, with images of type " + ", ".join(EXTENSIONS)


class Files:
    """The files below a folder or in tar archives, which are read in place and never unpacked.

    A folder of archives `<split>.tar` and no folders stands for all that is in them: each name
    begins with the split, whether it does so in the archive or not. `names` are relative paths with
    forward slashes, `folders` likewise; hidden ones are left out. FileNotFoundError for a missing
    root, ValueError for an archive that is damaged or holds anything but plain files and folders
    with relative names.
    """

    def __init__(self, root: str | os.PathLike) -> None:
        self.root = Path(root).expanduser()
        if not self.root.exists():
            raise FileNotFoundError(
                f"There is no {self.root}; image_folder expects root to be a folder "
                f"or a tar archive of {LAYOUT}; or a folder of archives <split>.tar."
            )
        self.names: list[str] = []
        self.folders: set[str] = set()
        self._members: dict[str, tuple[Path, tarfile.TarInfo]] = {}
        archives = [self.root] if self.root.is_file() else split_archives(self.root)
        self.is_archive = bool(archives)
        for path in archives:
            self._list_archive(path)
        if not archives:
            self._list_folder()

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, bytes]]:
        """Yield (name, contents); an archive is passed over once if the names are in its order."""
        if not self.is_archive:
            yield from ((name, (self.root / name).read_bytes()) for name in names)
            return
        for path, members in itertools.groupby(names, lambda name: self._members[name][0]):
            with tarfile.open(path) as archive:
                for name in members:
                    yield name, archive.extractfile(self._members[name][1]).read()  # type: ignore[union-attr]

    def _list_folder(self) -> None:
        for folder, folders, names in os.walk(self.root, followlinks=True):
            here = Path(folder).relative_to(self.root)
            # Below a class folder nothing is expected, and a link may lead round in circles.
            folders[:] = [name for name in folders if name[0] != "." and len(here.parts) < 3]
            self.folders.update((here / name).as_posix() for name in folders)
            self.names += [(here / name).as_posix() for name in names if name[0] != "."]
        self.names.sort()

    def _list_archive(self, path: Path) -> None:
        try:
            with tarfile.open(path) as archive:
                members = archive.getmembers()
        except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
            raise ValueError(f"{path} cannot be read as a tar archive: {error}.") from error
        for member in members:
            _refuse_unsafe(path, member)
            name = posixpath.normpath(member.name)
            if any(part.startswith(".") for part in name.split("/")):
                continue
            if path != self.root and name.split("/")[0] != path.stem:
                name = f"{path.stem}/{name}"
            if member.isdir():
                self.folders.add(name)
            else:
                self._members[name] = path, member
                self.folders.add(posixpath.dirname(name))
        self.names = list(self._members)


def split_archives(root: Path) -> list[Path]:
    """The archives `<split>.tar` in a folder that has no folders in it."""
    entries = [path for path in root.iterdir() if path.name[0] != "."]
    if any(path.is_dir() for path in entries):
        return []
    return sorted(path for path in entries if path.suffix == ".tar")


def _refuse_unsafe(path: Path, member: tarfile.TarInfo) -> None:
    if member.name.startswith("/") or ".." in member.name.split("/"):
        raise ValueError(
            f"{path} holds {member.name!r}, an absolute or upward path; "
            "pack the archive with relative names."
        )
    if not (member.isreg() or member.isdir()) or member.issparse():
        raise ValueError(
            f"{path} holds {member.name!r}, which is a link or special file; "
            "pack the archive with plain files only (tar --dereference)."
        )


def fingerprint(root: str | os.PathLike) -> str:
    """Return 16 hexadecimal digits that change whenever an image is added, removed or modified.

    A folder is known by the path in it, size and time of modification of every image, archives by
    their name, size and time, wherever they lie: cheap enough to compute at every start, so that
    no stale copy is ever used.
    """
    path = Path(root).expanduser()
    if path.is_file():
        facts = [(path.name, path.stat())]
    elif path.is_dir() and (archives := split_archives(path)):
        facts = [(archive.name, archive.stat()) for archive in archives]
    else:
        files = Files(path)
        facts = [(name, (path / name).stat()) for name in files.names if _is_image(name)]
    return digest(facts)


def digest(facts: Iterable[tuple[str, os.stat_result]]) -> str:
    """Return 16 hexadecimal digits that stand for files of these names, sizes and times."""
    found = hashlib.sha256()
    for name, stat in facts:
        found.update(os.fsencode(f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}\0"))
    return found.hexdigest()[:16]


def arrange(files: Files) -> dict[str, dict[str, str]]:
    """Return split → image → class, images in the order of the listing.

    ValueError if an image lies elsewhere than <split>/<class>/, if a class folder has no image,
    if train has none of a class, or if there is none at all. In an archive one folder may enclose
    all the splits.
    """
    images = [name for name in files.names if _is_image(name)]
    parts = [name.split("/") for name in images]
    enclosed = (
        files.is_archive and {len(p) for p in parts} == {4} and len({p[0] for p in parts}) == 1
    )
    depth = 3 + enclosed
    splits: dict[str, dict[str, str]] = {}
    for name, part in zip(images, parts, strict=True):
        if len(part) != depth or not part[-3].isidentifier():
            raise ValueError(f"{name!r} in {files.root} is out of place; expected {LAYOUT}.")
        splits.setdefault(part[-3], {})[name] = part[-2]
    filled = {posixpath.dirname(name) for name in images}
    empty = {f for f in files.folders if f.count("/") == depth - 2} - filled
    if empty or not images:
        where = f"{min(empty)!r} in {files.root}" if empty else files.root
        raise ValueError(f"There is no image in {where}; expected {LAYOUT}.")
    learned = set(splits.get("train", {}).values())
    unknown = {label for of in splits.values() for label in of.values()} - learned
    if learned and unknown:
        raise ValueError(
            f"The class {min(unknown)!r} in {files.root} has images but none in train: add some, "
            "or mend the folder's name."
        )
    if len(images) < len(files.names):
        logging.warning(
            "%d files in %s are not images and were ignored.",
            len(files.names) - len(images),
            files.root,
        )
    return splits


def _is_image(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS)


# Not registered with TFDS, which has an ImageFolder of its own.
class ImageFolder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Images (H, W, C) of any size, uint8, uint16 or float32, with `label` and relative `name`.

    All images must have the same type and number of channels; the classes are the union over the
    splits, sorted. The fingerprint of the data is part of the directory of the prepared copy.
    """

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, root: str | os.PathLike, *, data_dir: str | os.PathLike | None) -> None:
        # First the fingerprint, then the listing: what changes in between is noticed next time.
        config = tfds.core.BuilderConfig(name=fingerprint(root))
        self._files = Files(root)
        self._splits = arrange(self._files)
        self._first, data = next(self._files.read(next(iter(self._splits.values()))))
        self._example = decode(data, self._full(self._first))
        super().__init__(data_dir=data_dir, config=config, file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        classes = sorted({label for split in self._splits.values() for label in split.values()})
        features = {
            # Raw bytes: array_record compresses anyway, and this reads four times as fast as zlib.
            "image": tfds.features.Tensor(
                shape=(None, None, self._example.shape[2]),
                dtype=self._example.dtype,
                encoding=tfds.features.Encoding.BYTES,
            ),
            "label": tfds.features.ClassLabel(names=classes),
            "name": tfds.features.Text(),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description=f"Images of {self._files.root}.",
            features=tfds.features.FeaturesDict(features),
            supervised_keys=("image", "label"),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict:
        return {split: self._generate_examples(split) for split in self._splits}

    def _generate_examples(self, split: str) -> Iterator[tuple[bytes, dict]]:
        labels = self._splits[split]
        for name, data in self._files.read(labels):
            image = decode(data, self._full(name))
            self._check_alike(image, name)
            key = os.fsencode(name)
            yield key, {"image": image, "label": labels[name], "name": key}

    def _check_alike(self, image: np.ndarray, name: str) -> None:
        kinds = [f"{x.shape[2]} channels of {x.dtype}" for x in (self._example, image)]
        if kinds[0] != kinds[1]:
            raise ValueError(
                f"{self._full(self._first)} has {kinds[0]} but {self._full(name)} has {kinds[1]}; "
                "convert the images so that all are alike."
            )

    def _full(self, name: str) -> str:
        return f"{self._files.root}/{name}"
