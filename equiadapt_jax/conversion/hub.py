"""Weights from the Hugging Face hub, by name."""

import re
from pathlib import Path

_FILES = (
    "config.json",
    "preprocessor_config.json",
    "model*.safetensors",
    "model*.safetensors.index.json",
)


def is_remote(path: str | Path) -> bool:
    """Whether a path names a repository, as in "hf://owner/name"."""
    return isinstance(path, str) and path.startswith("hf://")


def download(name: str | Path) -> Path:
    """Return the directory of "hf://owner/name" or "hf://owner/name@revision", kept in its cache.

    Needs the package huggingface_hub. Raises ValueError for a name of another form, ImportError
    without the package, and FileNotFoundError where the files cannot be had.
    """
    match = re.fullmatch(r"hf://([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", str(name))
    if match is None:
        raise ValueError(
            f"{name!r} is not of the form hf://owner/name or hf://owner/name@revision."
        )
    repository, revision = match.groups()
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ImportError(
            f"{name} needs the package huggingface_hub: pip install 'equiadapt-jax[hub]'."
        ) from None
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=list(_FILES)))
    except Exception as error:  # offline, not there, not allowed, no space: each its own class
        first = str(error).strip().split("\n")[0] or type(error).__name__
        raise FileNotFoundError(
            f"{name} could not be downloaded ({first}). Download {', '.join(_FILES)} from "
            f"https://huggingface.co/{repository}/tree/{revision or 'main'} into one directory "
            "and give its path."
        ) from error
