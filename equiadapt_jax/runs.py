"""What a run left: load it into other code, or evaluate it."""

import dataclasses
import datetime
import json
import os
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from equiadapt_jax import groups
from equiadapt_jax.adaptation import Adapted
from equiadapt_jax.data import Dataset, open_dataset
from equiadapt_jax.evaluation import GroupTurns
from equiadapt_jax.evaluation.assess import Images, Subject, assess
from equiadapt_jax.evaluation.files import whole
from equiadapt_jax.evaluation.orbits import BINS
from equiadapt_jax.evaluation.predictions import adapted_prediction, vanilla_prediction
from equiadapt_jax.evaluation.report import leave, table
from equiadapt_jax.evaluation.upright import MOST, upright_evidence
from equiadapt_jax.evaluation.wording import about_evidence, about_the_checkpoint, about_the_prior
from equiadapt_jax.groups import MatrixGroup
from equiadapt_jax.priors import Identity, Uniform, VonMises
from equiadapt_jax.training.build import (
    BASELINES,
    build_model,
    build_prior,
    evaluation_group,
    group_of,
    probabilities,
    with_averaging,
)
from equiadapt_jax.training.checkpoints import Checkpoints
from equiadapt_jax.training.config import differences
from equiadapt_jax.training.logging import read_log
from equiadapt_jax.training.poses import estimates_prior, open_split, with_estimated_prior
from equiadapt_jax.training.workdir import (
    environment,
    read_config,
    read_environment,
    read_fingerprint,
)


def load(workdir: str | os.PathLike, step: int | None = None) -> tuple[Any, Any, Adapted]:
    """(params, state, model) of a run's best checkpoint, or of the given step.

    Step 0 is the predictor before adaptation, behind a scorer that has learned nothing; it is the
    best, too, where no later step was better, as in a run stopped early. Checkpoints are compared
    with the digests they were saved with; where the best is damaged, the next best is taken, with a
    warning.

    Raises:
      FileNotFoundError: there is no run, or no such checkpoint.
      ValueError: it is damaged (`DamagedCheckpoint`), or belongs to other settings.
    """
    model, like, checkpoints = _open(workdir)
    if step is None:
        _, (params, state), _ = checkpoints.restore_best(like)
    else:
        params, state = checkpoints.restore_model(step, like)
    return params, state, model


def _open(workdir, averaging=""):
    """(model, shapes of its (params, state), checkpoints) of a run."""
    config, dataset = read_config(workdir)
    if averaging:
        config = with_averaging(config, averaging)
    directory = Path(workdir) / "checkpoints"
    checkpoints = Checkpoints(directory, read_fingerprint(workdir)) if directory.is_dir() else None
    if not (checkpoints and checkpoints.steps()):
        raise FileNotFoundError(
            f"There are no checkpoints in {workdir}: the run was stopped before its first one, or "
            "has not come so far; continue it with --resume (it was begun by: "
            f"{read_environment(workdir)['command']})."
        )
    model = build_model(config, len(dataset["classes"]))
    like = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *dataset["shape"])))
    return model, like, checkpoints


def evaluate(
    workdir: str | os.PathLike,
    *,
    group: str = "",
    averaging: str = "",
    random_angles: int = 0,
    sweep: int = 0,
    sweep_images: int = 1000,
    split: str = "",
    root: str = "",
    data_dir: str = "",
    batch_size: int = 0,
    finetuned: str | os.PathLike = "",
    pictures: str | os.PathLike = "",
    command: str = "",
) -> tuple[dict[str, float], str]:
    """(metrics, table) of a run's vanilla predictor and adapted model, from its checkpoints alone.

    Where the run is unfinished, or its best checkpoint untrained, the table says so below. The
    adapted model of a baseline is the predictor that was fine-tuned, without poses.

    Args:
      workdir: where train.py left the run.
      group: whose elements turn every image; the run's evaluation_group, or group, by default.
      averaging: over poses, as in the configuration; the run's own by default.
      random_angles: so many more turns of every image, each by an angle of its own.
      sweep: so many angles around the circle, for the first `sweep_images` images.
      split: of the run's dataset; its test split by default.
      root: another image folder of the same classes.
      data_dir: where the prepared dataset lies now.
      batch_size: images per batch.
      finetuned: a run of the mode vanilla on the same data, from the same predictor, with as many
        images: adds `finetuned/accuracy`, `finetuned/group_accuracy` and
        `adapted/retention_finetuned`, the adapted model's group accuracy over the former.
      pictures: a directory for report.html, per_image.csv and PNG files; none without it.
      command: what was typed, for the report.

    Raises:
      FileNotFoundError, ValueError: no run, no such split, other classes; `finetuned` was trained
        otherwise.
      FloatingPointError: a model gives logits that are not finite.
    """
    config, facts = read_config(workdir)
    baseline = config.adaptation.mode in BASELINES
    if averaging and baseline:
        raise ValueError(
            f"averaging={averaging!r} averages over poses, and the run in {workdir} has none, by "
            f"its mode {config.adaptation.mode}: leave it out."
        )
    if finetuned:
        _check_finetuned(config, facts, finetuned)
    model, like, checkpoints = _open(workdir, averaging)
    step, (params, state), damaged = checkpoints.restore_best(like)
    vanilla = checkpoints.restore_model(0, like)
    checkpoint, caveat = about_the_checkpoint(
        step, checkpoints.steps()[-1], config.adaptation.steps
    )
    split = split or config.data.test
    dataset = open_dataset(
        config.data.name, root=root or config.data.root, data_dir=data_dir or config.data.data_dir
    )
    check_same_kind(dataset, facts)
    images = Images(
        dataset.source(split), config.data.size, config.data.fit,
        batch_size or config.evaluation_batch_size, split,
    )  # fmt: skip
    known = with_estimated_prior(config, Path(workdir)).prior
    if baseline:
        prior, adapted = None, Subject(vanilla_prediction(model), params, state)
    else:
        prior = build_prior(known, model.group)
        modes = prior.modes(model.group)
        adapted = Subject(adapted_prediction(model), params, state, model.group, modes)
    turned_by = groups.finite(groups.from_name(group or _turned_by(config)), "--group")
    turns = GroupTurns(turned_by, model.pad, model.fill)
    findings = assess(
        {
            "vanilla": Subject(vanilla_prediction(model), vanilla[0], vanilla[1]),
            "adapted": adapted,
        },
        images,
        turns,
        dataset.classes,
        random_angles=random_angles, sweep=sweep, sweep_images=sweep_images, watch=watch,
    )  # fmt: skip
    text = table(findings.metrics, turns.labels, str(turns.group))
    more: dict[str, str] = {}
    if estimates_prior(config):
        found = map(float, _probabilities(prior, model.group))
        shares = dict(zip(GroupTurns(model.group).labels, found, strict=True))
        figures = {f"prior/{turn}": share for turn, share in shares.items()}
        findings = dataclasses.replace(findings, metrics={**findings.metrics, **figures})
        more["estimated prior"] = about_the_prior(shares)
        text = f"{text}\n\n{more['estimated prior']}"
    evidence, about_data = _check_upright(
        config, facts, dataset, images, build_prior(known, group_of(config))
    )
    if evidence is not None:
        findings = dataclasses.replace(findings, metrics={**findings.metrics, **evidence.figures})
    if finetuned:
        metrics, sentence = _compare_finetuned(finetuned, findings, images, turns)
        findings = dataclasses.replace(findings, metrics=metrics)
        more["fine-tuned alike"] = f"{finetuned}: {sentence}"
        text = f"{text}\n\n{sentence}"
    if pictures:
        leave(
            Path(pictures), findings, images, group=None if baseline else model.group,
            interpolation=model.interpolation,
            name=Path(workdir).name,
            facts=_training_facts(workdir) | circumstances(command) | more | {
                "seed": str(config.seed),
                "mode": config.adaptation.mode,
                **({} if baseline else {
                    "adapted to": config.group, "averaging": averaging or config.averaging,
                }),
                "turned by": f"{findings.turns.group}, {len(findings.turns)} elements",
                "data": describe_data(dataset, images, root or config.data.root),
                "checkpoint": checkpoint,
                **({"damaged": damaged} if damaged else {}),
            },
            caveat=caveat,
            evidence=about_data,
            settings=dataclasses.asdict(config),
            prior=None if baseline else _probabilities(prior, model.group),
            history=read_log(Path(workdir) / "metrics.jsonl"),
        )  # fmt: skip
    return dict(findings.metrics), text + warning(caveat)


def _check_upright(config, facts, dataset, images, prior):
    """(evidence, its sentence) of the run's training images, or of others where those are not here.

    (None, "") where nothing can be said.
    """
    which = "evaluated"
    if dataset.version == facts["version"]:
        stored = open_split(config, dataset, config.data.train)
        images, which = Images(stored["source"], stored["size"], stored["how"], 1), "training"
    images = images.first(MOST)
    group, modes = _exact_poses(group_of(config), prior)
    evidence = upright_evidence(images.chosen(range(len(images))), group, modes)
    if evidence is None:
        return None, ""
    name = "identity" if prior == Identity() else config.prior.name
    return evidence, about_evidence(evidence, which, name)


def _exact_poses(group, prior):
    """(a group, its most probable elements) of which the exact ones can be compared.

    Of SO(2) and O(2) the quarter turns and mirrors, seen from the stored pose, whatever its angle;
    of a uniform prior none, since it says nothing that could be checked.
    """
    if isinstance(prior, Uniform):
        return groups.Cyclic(1), (0,)
    if not isinstance(group, MatrixGroup):
        return group, prior.modes(group)
    mirror = isinstance(prior, VonMises) and prior.mirror == 0.5 and prior.angle == 0
    return group.subgroup(4), (0, 4) if mirror else (0,)


def warning(caveat: str) -> str:
    """What follows a table whose figures should not be believed as they are, if anything."""
    return f"\n\nWarning: {caveat}" if caveat else ""


def evaluation_directory(
    workdir: str | os.PathLike,
    group: str = "",
    split: str = "",
    root: str = "",
    averaging: str = "",
) -> Path:
    """Where `evaluate` of the same arguments leaves its files by default.

    It is `eval` in the run's directory for the run's own group, averaging, test split and images,
    else a name such as `eval-cyclic16` or `eval-photos-top2-train`, so that evaluations that differ
    in these do not replace each other.
    """
    config, _ = read_config(workdir)
    others = [
        file_name(root) if root not in ("", config.data.root) else "",
        group if group and groups.from_name(group) != groups.from_name(_turned_by(config)) else "",
        averaging if averaging not in ("", config.averaging) else "",
        file_name(split) if split not in ("", config.data.test) else "",
    ]
    return Path(workdir) / "-".join(["eval", *filter(None, others)])


def _turned_by(config):
    return str(evaluation_group(config))


def file_name(text: str) -> str:
    """What names data, a split or a predictor in the name of a file; a path by its last part."""
    path = Path(os.path.abspath(Path(text).expanduser()))
    if path.exists():
        text = re.sub(r"\.(tar(\.\w+)?|tgz)$", "", path.name)
    text = re.sub(r"\[.*:.*\]", lambda part: part[0].replace(":", "-to-"), text)
    return re.sub(r"[^\w.-]+", "-", text).strip("-").replace("--", "-")


def _check_finetuned(config, facts, finetuned):
    """Refuse a fine-tuned predictor that does not compare with the run of `config`."""
    other, other_facts = read_config(finetuned)
    if other.adaptation.mode != "vanilla":
        raise ValueError(
            f"{finetuned} is a run of the mode {other.adaptation.mode}: retention is taken against "
            "one of the mode vanilla, which fine-tunes the predictor alone."
        )
    kept = ("data.", "predictor.", "pretrain.")
    different = [d for d in differences(config, other) if d.startswith(kept)]
    if facts != other_facts:
        different.append("data: the images are others")
    seen = [c.adaptation.steps * c.adaptation.batch_size for c in (config, other)]
    if seen[0] != seen[1]:
        different.append(f"steps × batch_size: {seen[0]} → {seen[1]}")
    if different:
        raise ValueError(
            f"{finetuned} was not fine-tuned alike ({'; '.join(different)}): train one with these "
            "settings and --config.adaptation.mode=vanilla."
        )


def _compare_finetuned(finetuned, findings, images, turns):
    """The metrics with those of the fine-tuned predictor, and what they say."""
    params, state, model = load(finetuned)
    subject = Subject(vanilla_prediction(model), params, state)
    found = assess({"finetuned": subject}, images, turns, findings.classes, watch=watch).metrics
    names = ("finetuned/accuracy", "finetuned/group_accuracy")
    metrics = {**findings.metrics, **{name: found[name] for name in names}}
    upright, over = (f"{100 * found[name]:.2f} %" for name in names)
    sentence = (
        f"Fine-tuned alike, the predictor alone: {upright} upright, {over} over {turns.group}"
    )
    if found["finetuned/accuracy"]:
        retention = metrics["adapted/group_accuracy"] / found["finetuned/accuracy"]
        metrics["adapted/retention_finetuned"] = retention
        sentence += f"; retention {100 * retention:.2f} %"
    return metrics, f"{sentence}."


def write_metrics(path: str | os.PathLike, metrics: Mapping[str, float]) -> None:
    """Write figures as JSON, whole or not at all."""
    with whole(path) as unfinished:
        unfinished.write_text(json.dumps(dict(metrics), indent=2) + "\n")


def watch(title: str, batches: Iterable, total: int) -> Iterable:
    """The same batches, with a progress bar that goes; a line now and then where nobody watches."""
    watched = sys.stderr.isatty()
    seldom = {} if watched else {"mininterval": 15, "delay": 15}
    return tqdm(batches, title, total, leave=not watched, unit="batch", **seldom)


def circumstances(command: str = "") -> dict[str, str]:
    """What was typed, with which versions, on what and when, in the words of the report."""
    here = environment()
    found = {"evaluation command": command} if command else {}
    return found | {
        "versions": _listed(here["versions"]),
        "device": here["device"],
        "date": datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
    }


def describe_data(dataset: Dataset, images: Images, place: str = "") -> str:
    """Which images they were, in the words of the report; `place` is the path of a folder."""
    where = f"{place} ({dataset.version})" if place else dataset.version
    return f"{where}, split {images.split}, {len(images)} images"


def _training_facts(workdir):
    """How the run was begun; with what, where that is not what evaluates it."""
    begun, here = read_environment(workdir), environment()
    found = {"training command": begun["command"]}
    if begun["versions"] != here["versions"] or begun["device"] != here["device"]:
        found["trained with"] = f"{_listed(begun['versions'])}; {begun['device']}"
    return found


def _listed(versions):
    return ", ".join(f"{name}\N{NO-BREAK SPACE}{version}" for name, version in versions.items())


def _probabilities(prior, group):
    """Of the elements; for SO(2) and O(2) of those that `orbits.binned` counts."""
    if isinstance(group, MatrixGroup):
        return _binned(prior, group.subgroup(BINS))
    return probabilities(prior, group)


def _binned(prior, bins):
    if isinstance(prior, Uniform):
        return np.full(bins.order, 1 / bins.order)
    if not isinstance(prior, VonMises):
        return np.eye(bins.order)[0]
    angle = 2 * np.pi * np.arange(bins.n) / bins.n
    share = np.exp(prior.kappa * (np.cos(angle - prior.angle) - 1))
    share /= share.sum()
    sides = [1 - prior.mirror, prior.mirror][: bins.order // bins.n]
    return np.concatenate([side * share for side in sides])


def check_same_kind(dataset: Dataset, facts: Mapping[str, Any]) -> None:
    """Raise ValueError if data have other classes or channels than the run's, its `facts`."""
    if list(dataset.classes) != facts["classes"]:
        raise ValueError(
            f"The run's classes are {facts['classes']}, those of {dataset.name} are "
            f"{list(dataset.classes)}: evaluate on the classes it was trained on."
        )
    if dataset.channels != facts["shape"][-1]:
        raise ValueError(
            f"The run's images have {facts['shape'][-1]} channels, those of {dataset.name} "
            f"{dataset.channels}: evaluate on images of the same kind."
        )
