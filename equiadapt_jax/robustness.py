"""How a network that is not adapted breaks when its images are turned.

And what canonicalization without training makes of it: poses chosen by an energy of its outputs.
"""

import dataclasses
import importlib
import importlib.util
import inspect
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from equiadapt_jax import energies, groups, runs
from equiadapt_jax.adaptation import adapt
from equiadapt_jax.data import Dataset, open_dataset
from equiadapt_jax.evaluation import GroupTurns
from equiadapt_jax.evaluation.assess import Images, Subject, assess
from equiadapt_jax.evaluation.predictions import (
    adapted_prediction,
    as_sentence,
    check_prediction,
    pretrained_prediction,
    vanilla_prediction,
)
from equiadapt_jax.evaluation.report import leave, table
from equiadapt_jax.evaluation.wording import about_probabilities, verdict
from equiadapt_jax.interface import Network
from equiadapt_jax.predictors import Pretrained
from equiadapt_jax.training.workdir import read_config

BATCH_SIZE = 64


def evaluate(
    predictor: str,
    data: str = "",
    *,
    size: int | None = None,
    fit: str = "",
    split: str = "",
    group: str = "cyclic4",
    random_angles: int = 0,
    sweep: int = 0,
    sweep_images: int = 1000,
    data_dir: str = "",
    batch_size: int = 0,
    adapt_by: str = "",
    margin: float = 0.0,
    pictures: str | os.PathLike = "",
    command: str = "",
) -> tuple[dict[str, float], str, str]:
    """(metrics, table, verdict) of a predictor alone, on images turned by a group.

    With `adapt_by` also of the same predictor behind a canonicalizer that needs no training: it is
    shown every pose of the group, and the one of the highest energy is taken (`energies`). Where
    it seems to return probabilities for logits, the table says so below.

    Args:
      predictor: `path/to/file.py:name` or `package.module:name`, see `read_predictor`; or the
        workdir of a run, for its predictor before adaptation.
      data: digits, the folder or tar of an image folder, or the name of a prepared TFDS dataset;
        with a run's workdir the run's by default.
      size: side in pixels to which images are brought; 0, the default, leaves them alone.
      fit: how, see `data.fit`; "pad" by default.
      split: of the data; "test" by default.
      group: whose elements turn every image.
      random_angles: so many more turns of every image, each by an angle of its own.
      sweep: so many angles around the circle, for the first `sweep_images` images.
      sweep_images: see `sweep`.
      data_dir: where prepared datasets lie.
      batch_size: images per batch.
      adapt_by: confidence, entropy, logit_energy or feature_norm; or `file.py:name` of a function
        of prediction and feature maps; empty for the predictor alone.
      margin: by how much a pose must beat the identity, else that is kept; see `energies.gate`.
      pictures: a directory for report.html, per_image.csv and PNG files; none without it.
      command: what was typed, for the report.

    Raises:
      FileNotFoundError, ValueError, TypeError: no such predictor or data, or they do not fit.
      FloatingPointError: logits that are not finite.
    """
    turned_by = groups.finite(groups.from_name(group), "--group")
    name = display_name(predictor)
    opened: dict[str, ModuleType] = {}
    energy = _energy(adapt_by, margin, opened)
    run = read_config(predictor) if Path(predictor).is_dir() else None
    found = None if run else _read_predictor(predictor, opened)
    dataset, images = _images(run, data, data_dir, size, fit, split, batch_size)
    if run:
        params, state, model = runs.load(predictor, step=0)
        subject, how = Subject(vanilla_prediction(model), params, state, name=name), "step 0"
        turns = GroupTurns(turned_by, model.pad, model.fill)
        interpolation = model.interpolation
    else:
        subject, how = _subject(found, name, images, len(dataset.classes))
        turns, interpolation = GroupTurns(turned_by), "linear"
    subjects = {"vanilla": subject}
    if energy is not None:
        if run:
            own = params["predictor"], state["predictor"]
            found = Pretrained(model.predictor, *own, model.preprocess)
        elif not isinstance(found, Pretrained):
            found = _as_pretrained(subject, images.batch_size)
        adapted = _adapted(energy, found, subject, turns, interpolation)
        shape = (images.batch_size, *images.chosen([0]).shape[1:])
        _try(adapted, shape)
        subjects["adapted"] = adapted
    findings = assess(
        subjects, images, turns, dataset.classes,
        random_angles=random_angles, sweep=sweep, sweep_images=sweep_images, watch=runs.watch,
    )  # fmt: skip
    caveat = about_probabilities(name) if findings.outcomes["vanilla"].probabilities else ""
    if pictures:
        facts = runs.circumstances(command) | {
            "predictor": f"{predictor} ({how})",
            "turned by": f"{turned_by}, {len(turns)} elements",
            "data": runs.describe_data(dataset, images, data if data != dataset.name else ""),
        }
        if energy is not None:
            facts["adapted by"] = (
                f"{adapt_by} over {turned_by}, margin {margin:g}, {turned_by.order} passes of the "
                "predictor for an image, no training"
            )
        leave(
            Path(pictures), findings, images, group=turned_by if energy else None, name=name,
            facts=facts, caveat=caveat, interpolation=interpolation,
        )  # fmt: skip
    text = table(findings.metrics, turns.labels, str(turned_by)) + runs.warning(caveat)
    return dict(findings.metrics), text, verdict(findings, turned_by if energy else None)


def evaluation_directory(
    predictor: str, data: str = "", group: str = "cyclic4", split: str = "", adapt_by: str = "",
    margin: float = 0.0,
) -> Path:  # fmt: skip
    """Where `evaluate` of the same arguments leaves its files by default.

    Its name has the predictor, data and group, and a split, an energy or a margin that is given;
    files and folders are named by their last part: `runs/eval-my_network-predict-photos-cyclic8`.
    """
    if not data and Path(predictor).is_dir():
        own = read_config(predictor)[0].data
        data = own.root or own.name
    by = display_name(adapt_by) if adapt_by else ""
    gate = f"margin{margin:g}" if margin else ""
    parts = (display_name(predictor), data, str(groups.from_name(group)), split, by, gate)
    return Path("runs", "-".join(["eval", *(runs.file_name(part) for part in parts if part)]))


def display_name(predictor: str) -> str:
    """A short name: that of the file or module with the function's, or of the run."""
    path, _, name = predictor.rpartition(":")
    if not path or Path(predictor).is_dir():
        return Path(predictor).name or Path(predictor).absolute().name
    return f"{Path(path).stem if path.endswith('.py') else path}:{name}"


def read_predictor(predictor: str) -> Pretrained | Callable[[Any], Any]:
    """What `file.py:name` or `module:name` is: a `Pretrained`, or a function images → logits.

    A function without arguments is called, to return a `Pretrained`. FileNotFoundError for a
    missing file or module, ValueError for a missing name or where the file itself raises, TypeError
    for anything else.
    """
    return _read_predictor(predictor, {})


def _read_predictor(predictor, opened):
    """The same; `opened` are modules by their paths, of which none is executed twice."""
    path, colon, name = predictor.rpartition(":")
    if not (colon and path and name.isidentifier()):
        raise ValueError(
            f"--predictor={predictor} is neither path/to/file.py:name, package.module:name nor the "
            "workdir of a run."
        )
    module = _module(path, "predictor", opened)
    if not hasattr(module, name):
        near = [n for n in vars(module) if not n.startswith("_") and callable(vars(module)[n])]
        raise ValueError(f"{path} has no {name!r}; what it has is {', '.join(near) or 'nothing'}.")
    found = getattr(module, name)
    if isinstance(found, Pretrained) or _accepts(found, "images"):
        return found
    if _accepts(found):
        made = _users(f"{predictor}", found)
        if isinstance(made, Pretrained):
            return made
        found = made
    raise TypeError(
        f"{predictor} is or returns a {type(found).__name__}: a function of images, an "
        "equiadapt_jax.predictors.Pretrained, or a function without arguments that returns one "
        "is needed (what can be called with one argument is called with images)."
    )


def find_data(data: str, data_dir: str = "") -> Dataset:
    """The image folder or tar at the path `data` if there is one, else the dataset of that name."""
    path = Path(data).expanduser()
    if path.exists() or data.startswith((".", "/", "~")) or re.search(r"\.(tar|tgz)\b", data):
        return open_dataset("image_folder", root=path, data_dir=data_dir)
    try:
        return open_dataset(data, data_dir=data_dir)
    except ValueError as error:
        raise ValueError(f"There is no folder or tar {data!r} here, and {error}") from error


def _images(run, data, data_dir, size, fit, split, batch_size):
    """(dataset, its images); what is not given is the run's, if there is one."""
    if not (data or run):
        raise ValueError("--predictor needs --data=: digits, a folder or tar, or a TFDS dataset.")
    own = run[0].data if run else None
    if data:
        dataset = find_data(data, data_dir)
        if run:
            runs.check_same_kind(dataset, run[1])
    else:
        dataset = open_dataset(own.name, root=own.root, data_dir=data_dir or own.data_dir)
    split = split or ("test" if data else own.test)
    size = (own.size if own else 0) if size is None else size
    fit = fit or (own.fit if own else "pad")
    return dataset, Images(dataset.source(split), size, fit, batch_size or BATCH_SIZE, split)


def _subject(found, name, images, classes):
    """(subject, how it is called) of what the user gave."""
    if isinstance(found, Pretrained):
        call, params, state = pretrained_prediction(found), found.params, found.state
    else:
        call, params, state = (lambda params, state, images: found(images)), {}, {}
    shape = (images.batch_size, *images.chosen([0]).shape[1:])
    predict, reason = check_prediction(call, params, state, name, shape, classes)
    if reason:
        print(f"{name} gets NumPy arrays, since JAX cannot trace it ({reason}).")
    how = "called with NumPy arrays" if reason else "compiled by JAX"
    return Subject(predict, params, state, traced=not reason, name=name), how


def _energy(name, margin, opened):
    """The `Energy` of a name or of the user's own function; None where there is no name."""
    if not name:
        if margin:
            raise ValueError(f"--margin={margin:g} is that of --adapt=: give both.")
        return None
    if name in energies.NAMED:
        return energies.Energy(energies.NAMED[name], margin)
    path, _, function = name.rpartition(":")
    if not (path and function.isidentifier()):
        raise ValueError(
            f"--adapt={name} is no energy: choose {', '.join(energies.NAMED)}, or give "
            "path/to/file.py:name of a function of prediction and feature maps."
        )
    module = _module(path, "adapt", opened)
    own = getattr(module, function, None)
    if not callable(own):
        raise ValueError(f"{path} has no function {function!r} (--adapt={name}).")
    return energies.Energy(lambda y, maps: _users(f"--adapt={name}", own, y, maps), margin)


def _as_pretrained(subject, batch_size):
    """A function of images, as `check_prediction` wrapped it, in the form of a network."""

    def apply(params, state, x, *, train=False, key=None):
        if subject.traced:
            return subject.predict(params, state, x)[0], state
        parts = np.split(np.array(x), range(batch_size, len(x), batch_size))  # as it was tried
        return jnp.concatenate([subject.predict(params, state, p)[0] for p in parts]), state

    return Pretrained(Network(lambda key, x: ({}, {}), apply), {}, {})


def _adapted(energy, network, subject, turns, interpolation):
    """A pretrained network behind a canonicalizer that chooses poses by an energy."""
    model = adapt(
        turns.group, energy, network.network, preprocess=network.preprocess, freeze_predictor=True,
        pad=turns.pad, fill=turns.fill, interpolation=interpolation,
    )  # fmt: skip
    params, state = ({"scorer": {}, "predictor": own} for own in (network.params, network.state))
    return dataclasses.replace(
        subject, predict=adapted_prediction(model), params=params, state=state, group=turns.group
    )


def _try(subject, shape):
    """Raise what the energy or its shapes would raise, before anything is evaluated."""
    if subject.traced:
        images = jax.ShapeDtypeStruct(shape, np.float32)
        jax.eval_shape(subject.predict, subject.params, subject.state, images)
    else:
        subject.predict(subject.params, subject.state, np.zeros(shape, np.float32))


def _accepts(function, *arguments):
    try:
        inspect.signature(function).bind(*arguments)
    except TypeError:  # not callable, or not like that
        return False
    except ValueError:  # some built-in functions tell nothing of their arguments
        return bool(arguments)
    return True


def _users(what, function, *arguments):
    """The result of the user's own code; its errors as one sentence."""
    try:
        return function(*arguments)
    except Exception as error:
        raise ValueError(as_sentence(what, error)) from error


def _module(path, flag, opened):
    """The file or module that a flag names, executed unless it is among those `opened`."""
    where = os.path.realpath(path) if path.endswith(".py") else path
    if where not in opened:
        opened[where] = (_import_file if path.endswith(".py") else _import_module)(path, flag)
    return opened[where]


def _import_file(path, flag):
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no file {path} (--{flag}={path}:…).")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(spec.name, module)  # where pickle and dataclasses look
    _look_in(Path(path).absolute().parent)  # where it may import its neighbours
    _users(path, spec.loader.exec_module, module)
    return module


def _import_module(name, flag):
    _look_in(Path.cwd())
    try:
        missing = importlib.util.find_spec(name) is None
    except ModuleNotFoundError:  # nor its package
        missing = True
    if missing:
        raise FileNotFoundError(f"There is no module {name} (--{flag}={name}:…).")
    return _users(name, importlib.import_module, name)


def _look_in(folder):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
