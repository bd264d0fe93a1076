"""A run: pretrain the predictor if none is kept, adapt it, leave a workdir behind."""

import dataclasses
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from equiadapt_jax.adaptation import Adapted
from equiadapt_jax.data import Dataset, evaluation_batches, open_dataset, training_batches
from equiadapt_jax.evaluation.orbits import GroupTurns, figures, make_evaluator
from equiadapt_jax.groups import Cyclic
from equiadapt_jax.training import objective
from equiadapt_jax.training.build import build_model, build_prior, turns_inputs
from equiadapt_jax.training.checkpoints import Checkpoints
from equiadapt_jax.training.config import Config, differences, fingerprint, from_dict
from equiadapt_jax.training.logging import MetricsLog
from equiadapt_jax.training.loop import fit
from equiadapt_jax.training.step import create_state, make_optimizer, make_step

_FILES = (
    "config.json", "metrics.jsonl", "metrics.json", "checkpoints", "pretraining", "eval"
)  # fmt: skip


def train(
    config: Config, workdir: str | os.PathLike, *, resume: bool = False, overwrite: bool = False
) -> dict[str, float]:
    """Make what `config` describes and leave it in `workdir`; returns the run's own figures.

    Args:
      config: the settings.
      workdir: a directory that is new, or holds a run with the same settings to `resume`.
      resume: continue from the latest checkpoint, or start where there is none.
      overwrite: remove the run that is there first.

    Raises:
      ValueError, TypeError, FileNotFoundError: settings, data or a workdir that cannot be used;
        found before anything is written, removed or trained.
      FloatingPointError: training diverged.
    """
    workdir = Path(workdir)
    dataset = open_dataset(config.data.name, root=config.data.root, data_dir=config.data.data_dir)
    model = build_model(config, len(dataset.classes))
    shape = _check(config, model, dataset)
    _open_workdir(config, dataset, shape, workdir, resume, overwrite)
    checkpoints = Checkpoints(workdir / "checkpoints", create=True)
    started = bool(checkpoints.steps())
    checkpoints.close()
    predictor = None if started else _pretrain(config, model, dataset, shape, workdir)
    seconds = _adapt(config, model, dataset, shape, workdir, predictor)
    params, _ = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *shape)))
    return {
        "scorer/parameters": sum(x.size for x in jax.tree.leaves(params["scorer"])),
        "train/seconds": seconds,
        "train/images_per_second": config.adaptation.steps * config.adaptation.batch_size / seconds,
    }


def _check(config: Config, model: Adapted, dataset: Dataset) -> tuple[int, ...]:
    """The shape of the images; raise for whatever would otherwise end the run later."""
    if jax.process_count() > 1:
        raise ValueError(
            f"{jax.process_count()} processes were started: train with one, which uses all the "
            "devices that it sees."
        )
    batch_sizes = {
        "pretrain.batch_size": config.pretrain.batch_size,
        "adaptation.batch_size": config.adaptation.batch_size,
    }
    counts = {
        "logging.every": config.logging.every,
        "logging.evaluate_every": config.logging.evaluate_every,
        "adaptation.steps": config.adaptation.steps,
        "evaluation_batch_size": config.evaluation_batch_size,
        **batch_sizes,
    }
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"config.{name} is {count}: it must be at least 1.")
    for split in (config.data.train, config.data.validation, config.data.test):
        if not len(dataset.source(split)):
            raise ValueError(f"The split {split!r} of {dataset.name} is empty: choose another.")
    images, devices = len(dataset.source(config.data.train)), jax.device_count()
    for name, size in batch_sizes.items():
        if size > images or size % devices:
            raise ValueError(
                f"config.{name} is {size}: with {images} images in {config.data.train!r} and "
                f"{devices} device(s), choose a multiple of {devices} of at most {images}."
            )
    turns_inputs(config)
    shape = next(_evaluation(config, dataset, config.data.train))["image"].shape[1:]

    def everything(key, images):
        params, state = model.init(key, images)
        (logits, canonical), _ = model.apply(params, state, images)
        return logits, build_prior(config.prior, model.group).loss(model.group, canonical.scores)

    jax.eval_shape(everything, jax.random.key(0), jnp.zeros((1, *shape)))
    return shape


def read_config(workdir: str | os.PathLike) -> tuple[Config, Mapping[str, Any]]:
    """The settings of the run in `workdir`, and of its data the `classes` and the image `shape`."""
    path = Path(workdir) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{workdir} holds no run (no config.json): train one first.")
    values = json.loads(path.read_text())
    dataset = values.pop("dataset")
    return from_dict(values), dataset


def _open_workdir(config, dataset, shape, workdir, resume, overwrite):
    """Refuse a workdir that holds something else, and leave config.json in one that does not."""
    if overwrite:
        for name in _FILES:
            path = workdir / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    if (workdir / "config.json").is_file():
        different = differences(read_config(workdir)[0], config)
        if read_config(workdir)[1] != _facts(dataset, shape):
            different.append("data: the images are others")
        if different:
            raise ValueError(
                f"{workdir} holds a run with other settings ({'; '.join(different)}): choose "
                "another --workdir, or replace it with --overwrite."
            )
        if not resume:
            raise ValueError(
                f"{workdir} holds a run with these settings: continue it with --resume, replace it "
                "with --overwrite, or choose another --workdir."
            )
    workdir.mkdir(parents=True, exist_ok=True)
    values = {**dataclasses.asdict(config), "dataset": _facts(dataset, shape)}
    text = json.dumps(values, indent=2)
    unfinished = workdir / "config.json.tmp"
    unfinished.write_text(text + "\n")
    unfinished.replace(workdir / "config.json")


def _facts(dataset, shape):
    """What is known of the data, enough to rebuild the model without it."""
    return {
        "classes": list(dataset.classes), "shape": list(shape), "version": dataset.version
    }  # fmt: skip


def _pretrain(config: Config, model: Adapted, dataset: Dataset, shape, workdir: Path):
    """(params, state) of the predictor trained on upright images, by this run or an earlier one."""
    settings = config.pretrain
    key = jax.random.key(config.seed)
    predictor = model.predictor.init(key, model.prepare(jnp.zeros((1, *shape))))
    if not settings.steps:
        return predictor
    kept = _pretrained_directory(config, dataset)
    params, state = ({"predictor": tree} for tree in predictor)
    if kept.is_dir():
        print(f"Using the {config.predictor.name} pretrained in {kept}.")
    else:
        trainable = dataclasses.replace(model, freeze_predictor=False)
        _fit(
            config, dataset, workdir / "pretraining", f"pretraining {config.predictor.name}",
            params=params, state=state,
            objective=objective.pretraining(trainable, config.augmentation),
            learning_rates={"predictor": settings.learning_rate},
            steps=settings.steps, batch_size=settings.batch_size,
            validate=_validation_upright(config, trainable, dataset),
            key=jax.random.fold_in(key, 1),
        )  # fmt: skip
        _keep(workdir / "pretraining", kept)
    checkpoints = Checkpoints(kept / "checkpoints")
    params, state = checkpoints.restore_model(checkpoints.best_step(), (params, state))
    checkpoints.close()
    return params["predictor"], state["predictor"]


def _keep(made: Path, kept: Path) -> None:
    """Move a finished stage to where it is found; what is there is always whole."""
    kept.parent.mkdir(parents=True, exist_ok=True)
    near = kept.with_name(f"{kept.name}.{os.getpid()}")
    shutil.move(made, near)
    try:
        near.rename(kept)
    except OSError:  # another run was quicker with the same
        shutil.rmtree(near)


def _pretrained_directory(config: Config, dataset: Dataset) -> Path:
    """Where the predictor of these settings is kept; all that shapes it is in the name."""
    mark = fingerprint(
        dataclasses.replace(config.data, data_dir="", root="", test=""), config.predictor,
        config.augmentation, config.optimizer, dataclasses.replace(config.pretrain, directory=""),
        config.dtype, config.seed, config.logging.evaluate_every, dataset.version,
    )  # fmt: skip
    name = f"{config.data.name.replace('/', '-')}-{config.predictor.name}-{mark}"
    return Path(config.pretrain.directory) / name


def _validation_upright(config: Config, model: Adapted, dataset: Dataset):
    evaluate = make_evaluator(vanilla_prediction(model), _UPRIGHT)

    def validate(state):
        batches = _evaluation(config, dataset, config.data.validation)
        found = figures(evaluate(state.params, state.state, batches), elements=False)
        return {**found, "best_by": found["accuracy"]}

    return validate


def _validation_over_orbits(config: Config, model: Adapted, dataset: Dataset):
    """By group accuracy, or where there are no labels by pose accuracy and with no predictor."""
    labels = config.adaptation.mode != "prior"
    predict = adapted_prediction(model) if labels else _scores_only(model)
    turns = GroupTurns(model.group, model.pad, model.fill)
    modes = build_prior(config.prior, model.group).modes
    evaluate = make_evaluator(predict, turns, model.group, modes)

    def validate(state):
        batches = _evaluation(config, dataset, config.data.validation)
        found = figures(evaluate(state.params, state.state, batches), elements=False)
        if not labels:
            found = {name: found[name] for name in ("identity_rate", "pose_accuracy")}
        return {**found, "best_by": found["group_accuracy" if labels else "pose_accuracy"]}

    return validate


def _adapt(
    config: Config, model: Adapted, dataset: Dataset, shape, workdir: Path, predictor
) -> float:
    """Train the scorer, and in joint mode the predictor with it; returns the seconds it took."""
    settings = config.adaptation
    key = jax.random.key(config.seed)
    params, state = model.init(key, jnp.zeros((1, *shape)), predictor=predictor)
    rates = {"scorer": settings.scorer_learning_rate}
    if settings.mode == "joint":
        rates["predictor"] = settings.predictor_learning_rate
    return _fit(
        config, dataset, workdir, f"adapting to {model.group}", params=params, state=state,
        objective=objective.adaptation(
            model, build_prior(config.prior, model.group), prior_weight=settings.prior_weight,
            augmentation=config.augmentation, turn_inputs=turns_inputs(config),
            labels=settings.mode != "prior",
        ),
        learning_rates=rates, steps=settings.steps, batch_size=settings.batch_size,
        validate=_validation_over_orbits(config, model, dataset), key=jax.random.fold_in(key, 2),
    )  # fmt: skip


def _fit(
    config, dataset, workdir, title, *, params, state, objective, learning_rates, steps, batch_size,
    validate, key,
) -> float:  # fmt: skip
    """Train one stage in its directory, from its latest checkpoint if there is one; its seconds."""
    workdir.mkdir(parents=True, exist_ok=True)
    checkpoints = Checkpoints(workdir / "checkpoints", create=True)
    optimizer = make_optimizer(config.optimizer, learning_rates, steps)
    train_state = create_state(params, state, optimizer, tuple(learning_rates))
    batches = training_batches(
        dataset.source(config.data.train), size=config.data.size, how=config.data.fit,
        batch_size=batch_size, seed=config.seed,
    )  # fmt: skip
    if checkpoints.steps():
        train_state = checkpoints.restore(checkpoints.steps()[-1], train_state, batches)
    start = int(train_state.step)
    log = MetricsLog(workdir, config.logging, after=start, name=workdir.name)
    try:
        fit(
            make_step(objective, optimizer, tuple(learning_rates)), train_state, batches,
            steps=steps, key=key, validate=validate, checkpoints=checkpoints, log=log,
            settings=config.logging, title=title,
        )  # fmt: skip
    finally:
        log.close()
        checkpoints.wait()
    seconds = checkpoints.metrics(steps)["seconds"]
    checkpoints.close()
    return seconds


def adapted_prediction(model: Adapted):
    """`predict(params, state, images) -> (logits, pose)` of the adapted model."""

    def predict(params, state, images):
        (logits, canonical), _ = model.apply(params, state, images)
        return logits, canonical.pose

    return predict


def vanilla_prediction(model: Adapted):
    """`predict(params, state, images) -> (logits, None)` of the predictor alone."""
    return lambda params, state, images: (model.predict(params, state, images)[0], None)


def _scores_only(model):
    def predict(params, state, images):
        canonical, _ = model.canonicalize(params, state, images)
        return canonical.scores, canonical.pose

    return predict


def _evaluation(config, dataset, split):
    return evaluation_batches(
        dataset.source(split), size=config.data.size, how=config.data.fit,
        batch_size=config.evaluation_batch_size,
    )  # fmt: skip


_UPRIGHT = GroupTurns(Cyclic(1))
