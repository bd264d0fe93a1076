"""Weight files on disk → arrays by key. Nothing is ever unpickled."""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

_SUFFIXES = (".safetensors", ".npz", ".pth", ".pt", ".bin")
_INDEX = ".safetensors.index.json"
# What of a Hugging Face directory is read, the first that is there.
STANDARD_NAMES = ("model.safetensors", f"model{_INDEX}", "pytorch_model.bin")
_TYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL")


def find(path: str | Path) -> Path:
    """Return the weight file that `path`, a file or a Hugging Face directory, stands for.

    Raises FileNotFoundError where there is none, ValueError for a file of another kind.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        found = next((path / name for name in STANDARD_NAMES if (path / name).is_file()), None)
        if found is None:
            raise FileNotFoundError(
                f"{path} holds none of {', '.join(STANDARD_NAMES)}: give the weight file itself."
            )
        return found
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: give a weight file, or its directory.")
    if not path.name.endswith((*_SUFFIXES, _INDEX)):
        raise ValueError(f"{path} is not one of {', '.join((*_SUFFIXES, _INDEX))}.")
    return path


def check_digest(path: Path, sha256: str) -> None:
    """Raise ValueError unless the file has this SHA-256, in hexadecimal."""
    if path.name.endswith(_INDEX):
        raise ValueError(f"{path} stands for several files: sha256 can be that of one file only.")
    if (found := digest(path)) != sha256.strip().lower():
        raise ValueError(f"{path} has SHA-256 {found}, not {sha256}: download it again.")


def digest(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal; of several, that of their digests in a row."""
    if path.name.endswith(_INDEX):
        parts = [digest(index_part) for index_part in _shards(path)]
        return hashlib.sha256("".join(parts).encode()).hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file, `{}` without the file; ValueError for other content."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}.") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not an object.")
    return content


def read(path: Path) -> dict[str, np.ndarray]:
    """Return the arrays of a file by key.

    `.safetensors`, also several by their index; `.npz`; and through PyTorch, which must be
    installed for that, `.pth`, `.pt` and `.bin`: a state dict itself or under "state_dict" or
    "model". A prefix `module.` that all keys have is taken away. Raises ValueError for whatever
    cannot be read, and ImportError where PyTorch is needed and absent.
    """
    if path.name.endswith(_INDEX):
        arrays = _read_shards(path)
    elif path.suffix == ".safetensors":
        arrays = _guarded(path, _read_safetensors)
    elif path.suffix == ".npz":
        arrays = _guarded(path, _read_npz)
    else:
        arrays = _guarded(path, _read_torch)
    if not arrays:
        raise ValueError(f"{path} holds no arrays.")
    if all(key.startswith("module.") for key in arrays):
        arrays = {key.removeprefix("module."): array for key, array in arrays.items()}
    return arrays


def _guarded(path: Path, reader) -> dict[str, np.ndarray]:
    try:
        return reader(path)
    except (ImportError, FileNotFoundError, PermissionError, _UnreadableError):
        raise
    except Exception as error:  # each library has its own errors, and PyTorch many
        first = str(error).strip().split("\n")[0] or type(error).__name__
        raise ValueError(
            f"{path} cannot be read, it is damaged or of another kind: {first}"
        ) from error


class _UnreadableError(ValueError):
    """What this module itself has to say of a file."""


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        types = {key: file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118
        other = [f"{key} is {kind}" for key, kind in types.items() if kind not in _TYPES]
        if other:
            raise _UnreadableError(f"{path} has arrays of wrong dtype: {'; '.join(other[:10])}.")
        return {key: file.get_tensor(key) for key in types}


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    # Opened here, because np.load leaves a file open that it cannot read.
    with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
        return {key: file[key] for key in file.files}


def _read_torch(path: Path) -> dict[str, np.ndarray]:
    try:
        import torch
    except ImportError:
        raise ImportError(
            f"{path} is read through PyTorch: install torch, or convert it to .safetensors."
        ) from None
    content = torch.load(path, weights_only=True, map_location="cpu")
    for name in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
    if not isinstance(content, Mapping):
        raise _UnreadableError(f"{path} holds a {type(content).__name__}, not a state dict.")
    other = [key for key, value in content.items() if not isinstance(value, torch.Tensor)]
    if other:
        raise _UnreadableError(f"{path} holds more than arrays: {', '.join(map(str, other[:10]))}.")
    return {str(key): _from_torch(value) for key, value in content.items()}


def _from_torch(tensor) -> np.ndarray:
    import ml_dtypes
    import torch

    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:  # which NumPy itself lacks
        return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def _read_shards(index: Path) -> dict[str, np.ndarray]:
    places = read_json(index).get("weight_map", {})
    arrays: dict[str, np.ndarray] = {}
    for path in _shards(index):
        part = _guarded(path, _read_safetensors)
        expected = {key for key, place in places.items() if place == path.name}
        if different := sorted(expected ^ set(part)):
            raise ValueError(
                f"{path} and {index.name} differ in {len(different)} keys: "
                f"{', '.join(different[:10])}."
            )
        arrays |= part
    return arrays


def _shards(index: Path) -> list[Path]:
    """The files that an index names, each once."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(p, str) for p in places.values()):
        raise ValueError(f"{index} has no weight_map from keys to file names.")
    names = sorted(set(places.values()))
    if outside := [name for name in names if not re.fullmatch(r"[\w.-]+\.safetensors", name)]:
        raise ValueError(f"{index} names {outside[0]!r}, which is no .safetensors beside it.")
    if absent := [name for name in names if not (index.parent / name).is_file()]:
        raise FileNotFoundError(f"{index} names {', '.join(absent)}, not there: download them too.")
    return [index.parent / name for name in names]
