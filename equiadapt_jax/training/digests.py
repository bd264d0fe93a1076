"""What a checkpoint holds, on record beside it: a SHA-256 digest of every leaf and of every file.

Orbax and the file system hand out flipped bits without a word. The digests of the leaves are taken
before anything is written and compared with what was read; those of the files find what reading
does not touch. The record carries a digest of itself.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

RECORD = "checkpoint.json"


class DamagedCheckpoint(ValueError):  # noqa: N818 - says what it is
    """A checkpoint is not what was saved."""


def of_leaves(tree: Any) -> dict[str, str]:
    """By the path of each array, "float32 (3, 4) <digest>": its type, shape and content."""
    return {path: f"{_kind(x)} {hashlib.sha256(_bytes(x)).hexdigest()}" for path, x in _paths(tree)}


def of_files(directory: Path) -> dict[str, str]:
    """By its path in the directory, the digest of each file's content, but for the record."""
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    return {
        path.relative_to(directory).as_posix(): _of_file(path)
        for path in paths
        if path != directory / RECORD
    }


def seal(values: Mapping[str, Any]) -> str:
    """The values as JSON that carries a digest of itself."""
    text = json.dumps(values, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return json.dumps({**values, "digest": digest}, indent=1) + "\n"


def unseal(path: Path, keys: set[str]) -> dict[str, Any]:
    """The values that were sealed into a file; DamagedCheckpoint if it is not as written.

    `keys` are those it must have.
    """
    try:
        text = path.read_text()
        values = json.loads(text)
        del values["digest"]
        whole = text == seal(values)
    except OSError as error:
        raise DamagedCheckpoint(f"{path} cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError):
        whole = False
    if not whole or not keys <= values.keys():
        raise DamagedCheckpoint(f"{path} is damaged, was edited, or is of another version")
    return values


def write_record(directory: Path, record: Mapping[str, Any]) -> None:
    """Write the record of a checkpoint into its directory."""
    (directory / RECORD).write_text(seal(record))


def read_record(directory: Path) -> dict[str, Any]:
    """The record in a directory named after the step; DamagedCheckpoint if it is not as written."""
    if not (directory / RECORD).exists():
        raise DamagedCheckpoint(
            f"{directory} has no {RECORD}: it was never finished, or comes from elsewhere"
        )
    record = unseal(directory / RECORD, {"step", "fingerprint", "figures", "leaves", "files"})
    if str(record["step"]) != directory.name:
        raise DamagedCheckpoint(f"{directory} holds the checkpoint of step {record['step']}")
    return record


def check_files(directory: Path, expected: Mapping[str, str]) -> None:
    """Raise DamagedCheckpoint for the first file that is missing or has another digest."""
    for name, digest in expected.items():
        path = directory / name
        try:
            found = _of_file(path)
        except FileNotFoundError:
            raise DamagedCheckpoint(f"{path} is missing") from None
        except OSError as error:
            raise DamagedCheckpoint(f"{path} cannot be read ({error.strerror})") from error
        if found != digest:
            raise DamagedCheckpoint(f"{path} is damaged")


def check_leaves(directory: Path, tree: Any, expected: Mapping[str, str]) -> None:
    """Raise DamagedCheckpoint for the first leaf of `tree` that differs from what was saved."""
    for path, digest in of_leaves(tree).items():
        if digest != expected[path]:
            raise DamagedCheckpoint(f"{path} in {directory} is damaged")


def check_kinds(directory: Path, like: Any, expected: Mapping[str, str]) -> None:
    """Raise ValueError unless the checkpoint has arrays of just these paths, types and shapes."""
    wanted = {path: _kind(x) for path, x in _paths(like)}
    kept = {path: entry.rpartition(" ")[0] for path, entry in expected.items()}
    differing = [p for p in sorted(wanted.keys() | kept.keys()) if wanted.get(p) != kept.get(p)]
    if differing:
        path = differing[0]
        raise ValueError(
            f"The checkpoint in {directory} is of another model: {len(differing)} arrays differ, "
            f"such as {path}, which is {kept.get(path, 'missing')} there and "
            f"{wanted.get(path, 'missing')} here."
        )


def _of_file(path: str | os.PathLike) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _paths(tree):
    for path, leaf in jax.tree.leaves_with_path(tree):
        yield jax.tree_util.keystr(path, simple=True, separator="/"), leaf


def _bytes(x):
    return memoryview(np.ascontiguousarray(x).reshape(-1).view(np.uint8))


def _kind(x):
    return f"{np.dtype(x.dtype).name} {tuple(x.shape)}"
