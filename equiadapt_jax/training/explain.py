"""Every setting with its meaning, for people: what `train.py --explain` prints."""

import dataclasses
import difflib
import textwrap
from typing import Any

from equiadapt_jax.training.build import default_options
from equiadapt_jax.training.config import Config, network_name

_FLAG_WIDTH = 44


def explain(config: Config, path: str = "config", *, width: int = 100) -> str:
    """The settings below `path` as flags with their values, meanings, and defaults where others.

    ValueError for a path that names no setting, with the nearest that does.
    """
    paths = [name for name, *_ in _settings(config)]
    inside = (path, f"{path}.")
    lines: list[str] = []
    section = ""
    for name, value, field, owner in _settings(config):
        if name != inside[0] and not name.startswith(inside[1]):
            continue
        parent = name.rpartition(".")[0]
        if parent != section:
            section = parent
            lines += ["", f"{(owner.__doc__ or '').splitlines()[0]}"]
        if field.name == "options":
            role = name.split(".")[1]
            network = default_options(role, network_name(config, role))
            lines += _options(name, value, field.metadata["meaning"], network, width)
        else:
            lines += _entry(name, value, field, width)
    if not lines:
        near = difflib.get_close_matches(path, [*paths, *_sections(paths)], 1)
        hint = f"did you mean --{near[0]}=help?" if near else "--explain prints all."
        raise ValueError(f"{path} is not a setting; {hint}")
    return "\n".join(lines).strip()


def _settings(config: Any, path: str = "config"):
    """(path, value, field, the dataclass it is of) of all settings."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from _settings(value, f"{path}.{field.name}")
        else:
            yield f"{path}.{field.name}", value, field, type(config)


def _sections(paths):
    return {path.rpartition(".")[0] for path in paths}


def _entry(name, value, field, width):
    meaning = field.metadata["meaning"]
    if value != field.default:
        meaning += f" (default {_shown(field.default) or 'empty'})"
    return _columns(f"--{name}={_shown(value)}", meaning, width)


def _options(name, given, meaning, network, width):
    """Those that are set here, which flags can change; and what the others are by default."""
    others = [f"{n}={_shown(v)}" for n, v in network.items() if n not in given]
    return [
        *_columns(f"--{name}.…", meaning, width),
        *(f"  --{name}.{option}={_shown(value)}" for option, value in given.items()),
        *textwrap.wrap(
            f"set in a configuration file: {', '.join(others)}", width,
            initial_indent="  ", subsequent_indent="    ",
        ),
    ]  # fmt: skip


def _columns(flag, meaning, width):
    lines = textwrap.wrap(meaning, width - _FLAG_WIDTH - 4)
    if len(flag) <= _FLAG_WIDTH:
        first, rest = f"  {flag:{_FLAG_WIDTH}}  {lines[0]}", lines[1:]
    else:
        first, rest = f"  {flag}", lines
    return [first, *(f"{'':{_FLAG_WIDTH + 4}}{line}" for line in rest)]


def _shown(value):
    return str(value).replace(" ", "") if isinstance(value, tuple) else str(value)
