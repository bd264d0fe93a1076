"""A run: pretrain the predictor if none is kept, adapt it, leave a workdir behind."""

import contextlib
import dataclasses
import functools
import os
import shutil
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from equiadapt_jax import alignment, groups
from equiadapt_jax.actions import images as image_actions
from equiadapt_jax.adaptation import Adapted
from equiadapt_jax.data import (
    Dataset,
    array_batches,
    evaluation_batches,
    open_dataset,
    training_batches,
)
from equiadapt_jax.data.turned import RelabelledSource
from equiadapt_jax.evaluation import GroupTurns, figures, make_evaluator
from equiadapt_jax.evaluation.predictions import adapted_prediction, vanilla_prediction
from equiadapt_jax.groups import Cyclic
from equiadapt_jax.priors import Uniform
from equiadapt_jax.training import cache, objective, poses
from equiadapt_jax.training.build import (
    BASELINES,
    build_model,
    build_prior,
    evaluation_group,
    group_of,
    resolve,
    trains_nothing,
    turning,
    turns_inputs,
)
from equiadapt_jax.training.check import check_training
from equiadapt_jax.training.checkpoints import Checkpoints
from equiadapt_jax.training.config import Augmentation, Config, fingerprint
from equiadapt_jax.training.digests import DamagedCheckpoint
from equiadapt_jax.training.logging import MetricsLog
from equiadapt_jax.training.loop import Stop, Stopped, fit, progress
from equiadapt_jax.training.start import read_start
from equiadapt_jax.training.step import create_state, make_optimizer, make_step
from equiadapt_jax.training.weights import read_weights
from equiadapt_jax.training.workdir import describe, only_one, open_workdir


class _Run(NamedTuple):
    """What both stages of a run work on.

    `weights` is the predictor's (params, state) of a weight file, `start` those of an earlier run.
    """

    config: Config
    model: Adapted
    dataset: Dataset
    shape: tuple[int, ...]
    weights: tuple[Any, Any] | None
    start: tuple[Any, Any] | None
    stop: Stop


def train(
    config: Config,
    workdir: str | os.PathLike,
    *,
    resume: bool = False,
    overwrite: bool = False,
    stop: Stop | None = None,
) -> dict[str, float]:
    """Make what `config` describes and leave it in `workdir`; returns the run's own figures.

    Args:
      config: the settings.
      workdir: a directory that is new, or holds a run with the same settings to `resume`.
      resume: continue from the latest checkpoint, or start where there is none.
      overwrite: remove the run that is there first.
      stop: how to ask for an early end, after which the run can be continued.

    Raises:
      ValueError, TypeError, FileNotFoundError: settings, data, weights or a workdir that cannot be
        used; found before anything is trained or removed, or written but the prepared copy of the
        images.
      FloatingPointError: training diverged.
      OSError: a file could not be written.
      Stopped: `stop` asked for it.
    """
    workdir = Path(workdir)
    if resume and overwrite:
        raise ValueError("--resume continues a run and --overwrite removes it: give one of both.")
    check_training(config)
    dataset = open_dataset(config.data.name, root=config.data.root, data_dir=config.data.data_dir)
    shape = _check(config, dataset)
    config, weights = read_weights(config, len(dataset.classes), shape)
    config = resolve(config)
    model = build_model(config, len(dataset.classes))
    _check_model(config, model, shape)
    facts = describe(dataset, shape)
    config, start = read_start(config, model, facts, workdir, resume=resume)
    run = _Run(config, model, dataset, shape, weights, start, stop or Stop())
    with only_one(workdir):
        fingerprint = open_workdir(config, facts, workdir, resume=resume, overwrite=overwrite)
        begun = workdir / "checkpoints"
        started = begun.is_dir() and bool(Checkpoints(begun, fingerprint).steps())
        predictor = None if started or start else _pretrain(run, workdir)
        run = _with_prior(run, workdir, fingerprint, predictor, started)
        stage = _fine_tune if config.adaptation.mode in BASELINES else _adapt
        seconds = stage(run, workdir, fingerprint, predictor)
    params, _ = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *shape)))
    return {
        "scorer/parameters": sum(x.size for x in jax.tree.leaves(params["scorer"])),
        "train/seconds": seconds,
        "train/images_per_second": config.adaptation.steps * config.adaptation.batch_size / seconds,
        **({"prior/seconds": poses.kept_seconds(workdir)} if poses.estimates_prior(config) else {}),
    }


def _check(config: Config, dataset: Dataset) -> tuple[int, ...]:
    """The shape of the images; raise for whatever would otherwise end the run later."""
    if jax.process_count() > 1:
        raise ValueError(
            f"{jax.process_count()} processes were started: train with one, which uses all the "
            "devices that it sees."
        )
    batch_sizes = {"adaptation.batch_size": config.adaptation.batch_size}
    if config.pretrain.steps:
        batch_sizes["pretrain.batch_size"] = config.pretrain.batch_size
    counts = {
        "logging.every": config.logging.every,
        "logging.evaluate_every": config.logging.evaluate_every,
        "adaptation.steps": config.adaptation.steps,
        "adaptation.variants": config.adaptation.variants,
        "evaluation_batch_size": config.evaluation_batch_size,
        **batch_sizes,
    }
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"config.{name} is {count}: it must be at least 1.")
    evaluation_group(config)
    poses.estimates_prior(config)
    if config.pretrain.steps < 0:
        raise ValueError(f"config.pretrain.steps is {config.pretrain.steps}: give 0 or more.")
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
    first = next(_evaluation(config, dataset, config.data.train))
    if (first["label"] < 0).any() and (config.adaptation.mode != "prior" or config.pretrain.steps):
        raise ValueError(
            f"The split {config.data.train!r} of {dataset.name} has images without labels: train "
            "with config.adaptation.mode=prior and config.pretrain.steps=0, or on another split."
        )
    return first["image"].shape[1:]


def _check_model(config: Config, model: Adapted, shape: tuple[int, ...]) -> None:
    """Raise for what does not go together, as training would."""
    _weighing(config)

    def everything(key, images):
        params, state = model.init(key, images)
        if config.adaptation.mode in BASELINES:
            return model.predict(params, state, images)
        (logits, canonical), _ = model.apply(params, state, images, key=key)
        return logits, _prior(config, model).loss(model.group, canonical.scores)

    images = jnp.zeros((1, *shape))
    for group in (turning(group_of(config)), evaluation_group(config)):
        jax.eval_shape(functools.partial(image_actions.act, group, 0), images)
    jax.eval_shape(everything, jax.random.key(0), images)


def _pretrain(run: "_Run", workdir: Path):
    """(params, state) of the predictor before adaptation.

    It starts from its weights, if any, and is trained on upright images, by this run or an earlier
    one.
    """
    config, model, settings = run.config, run.model, run.config.pretrain
    key = jax.random.key(config.seed)
    predictor = run.weights or model.predictor.init(key, model.prepare(jnp.zeros((1, *run.shape))))
    if not settings.steps:
        return predictor
    kept = _pretrained_directory(config, run.dataset)
    params, state = ({"predictor": tree} for tree in predictor)
    if kept.is_dir():
        print(f"Using the {config.predictor.name} pretrained in {kept}.")
    else:
        trainable = dataclasses.replace(model, freeze_predictor=False)
        _fit(
            run, workdir / "pretraining", f"pretraining {config.predictor.name}",
            fingerprint=_pretraining_fingerprint(config, run.dataset), params=params, state=state,
            objective=objective.pretraining(trainable, config.augmentation),
            learning_rates={"predictor": settings.learning_rate},
            steps=settings.steps, batches=_training(run, settings.batch_size),
            validate=_validation_upright(run, trainable), key=jax.random.fold_in(key, 1),
        )  # fmt: skip
        _keep(workdir / "pretraining", kept)
    checkpoints = Checkpoints(kept / "checkpoints", _pretraining_fingerprint(config, run.dataset))
    try:
        best = checkpoints.best_steps()[0]
        params, state = checkpoints.restore_model(best, (params, state))
    except (DamagedCheckpoint, IndexError) as error:
        raise DamagedCheckpoint(
            f"The pretrained predictor in {kept} is damaged ({error}): remove that directory, so "
            "that it is trained anew."
        ) from error
    return params["predictor"], state["predictor"]


def _keep(made: Path, kept: Path) -> None:
    """Move a finished stage to where it is found; what is there is always whole."""
    kept.parent.mkdir(parents=True, exist_ok=True)
    try:
        made.rename(kept)
    except OSError:  # it lies on another file system, or another run was quicker with the same
        near = kept.with_name(f"{kept.name}.{os.getpid()}")
        shutil.copytree(made, near)
        try:
            near.rename(kept)
        except OSError:
            shutil.rmtree(near)
        shutil.rmtree(made)


def _pretrained_directory(config: Config, dataset: Dataset) -> Path:
    """Where the predictor of these settings is kept."""
    name = config.data.name.replace("/", "-")
    print_ = _pretraining_fingerprint(config, dataset)
    return Path(config.pretrain.directory).expanduser() / f"{name}-{config.predictor.name}-{print_}"


def _pretraining_fingerprint(config: Config, dataset: Dataset) -> str:
    """A fingerprint of all that shapes a pretrained predictor."""
    how_turned = (config.group, config.adaptation.pad, config.adaptation.fill)
    return fingerprint(
        dataclasses.replace(config.data, data_dir="", root="", test=""),
        dataclasses.replace(config.predictor, weights=""), config.augmentation, config.optimizer,
        dataclasses.replace(config.pretrain, directory=""), config.dtype, config.seed,
        config.logging.evaluate_every, dataset.version,
        *(how_turned if config.data.poses else ()),
    )  # fmt: skip


def _validation_upright(run: _Run, model: Adapted):
    evaluate = make_evaluator(vanilla_prediction(model), _UPRIGHT)

    def validate(state):
        batches = _evaluation(run.config, run.dataset, run.config.data.validation)
        outcome = evaluate(state.params, state.state, run.stop.checked(batches))
        found = figures(outcome, elements=False)
        return {**found, "best_by": found["accuracy"]}

    return validate


def _validation_over_orbits(run: _Run):
    """By group accuracy, or where there are no labels by pose accuracy and with no predictor."""
    config, model = run.config, run.model
    labels = config.adaptation.mode != "prior"
    predict = adapted_prediction(model) if labels else _scores_only(model)
    turns = GroupTurns(turning(model.group), model.pad, model.fill)
    modes = _prior(config, model).modes(model.group)
    evaluate = make_evaluator(predict, turns, model.group, modes)

    def validate(state):
        batches = _evaluation(config, run.dataset, config.data.validation)
        outcome = evaluate(state.params, state.state, run.stop.checked(batches))
        found = figures(outcome, elements=False)
        if not labels:
            of_poses = ("identity_rate", "pose_accuracy", "pose_error", "median_pose_error")
            found = {name: found[name] for name in of_poses if name in found}
        if labels:
            return {**found, "best_by": found["group_accuracy"]}
        by = found.get("pose_accuracy", -found.get("pose_error", 0.0))
        return {**found, "best_by": by}

    return validate


def _prior(config: Config, model: Adapted):
    return build_prior(config.prior, model.group, model.refine)


def _with_prior(run: _Run, workdir: Path, fingerprint: str, predictor, started: bool) -> _Run:
    """The run with the prior that it is to estimate, if any; found now, unless it is kept.

    A run that has `started` to adapt had one: FileNotFoundError where that is lost.
    """
    config, model, settings = run.config, run.model, run.config.prior
    if not poses.estimates_prior(config):
        return run
    directory = workdir / "estimating"
    if started or (workdir / poses.FILE).exists():
        config = poses.with_estimated_prior(config, workdir)
        shutil.rmtree(directory, ignore_errors=True)  # a session that was killed left it
        return run._replace(config=config)
    key, seconds = jax.random.key(config.seed), 0.0
    images = poses.open_split(config, run.dataset, config.data.train)
    like = run.start or model.init(key, jnp.zeros((1, *run.shape)), predictor=predictor)

    def train(number, found):
        nonlocal seconds
        place = directory / str(number)
        round_key = jax.random.fold_in(jax.random.fold_in(key, 5), number)
        init_key, fit_key = jax.random.split(round_key)
        # Anew, even where the run starts from another: what that learned were poses as stored.
        params, state = model.init(
            init_key,
            jnp.zeros((1, *run.shape)),
            predictor=(like[0]["predictor"], like[1]["predictor"]),
        )
        source = RelabelledSource(images["source"], np.asarray(found))
        seconds += _fit(
            run, place, f"estimating the prior, round {number + 1} of {settings.rounds}",
            fingerprint=fingerprint, params=params, state=state,
            objective=poses.aligning(
                model, config.augmentation, turn_inputs=turns_inputs(config)
            ),
            learning_rates={"scorer": config.adaptation.scorer_learning_rate},
            steps=settings.steps, validate=lambda _: {"best_by": 0.0}, key=fit_key,
            batches=training_batches(
                **{**images, "source": source}, batch_size=config.adaptation.batch_size,
                seed=config.seed,
            ),
        )  # fmt: skip
        checkpoints = Checkpoints(place / "checkpoints", fingerprint)
        return checkpoints.restore_model(settings.steps, (params, state))

    def score(networks):
        batches = _evaluation(config, run.dataset, config.data.train)
        return poses.pose_probabilities(model, *networks, batches)

    prior, _ = alignment.bootstrap(
        groups.finite(model.group, "config.prior.name=estimated"),
        len(images["source"]),
        train,
        score,
        rounds=settings.rounds,
    )
    poses.keep_prior(workdir, prior, seconds)
    shutil.rmtree(directory)
    return run._replace(config=poses.with_estimated_prior(config, workdir))


def _adapt(run: _Run, workdir: Path, fingerprint: str, predictor) -> float:
    """Train the scorer, and in joint mode the predictor with it; returns the seconds it took."""
    config, model, settings = run.config, run.model, run.config.adaptation
    key = jax.random.key(config.seed)
    params, state = run.start or model.init(key, jnp.zeros((1, *run.shape)), predictor=predictor)
    rates = {"scorer": settings.scorer_learning_rate}
    if settings.mode == "joint":
        rates["predictor"] = settings.predictor_learning_rate
    if trains_nothing(config) and settings.prior_weight:
        print(
            f"The canonicalizer {config.canonicalizer} has nothing to train: the prior's loss is "
            "logged, and config.adaptation.prior_weight has no effect."
        )
    made = 0.0
    if _keeps_features(run, params, state):
        began = time.monotonic()
        if not (run.start or predictor):  # which the run's own checkpoints hold
            checkpoints = Checkpoints(workdir / "checkpoints", fingerprint)
            _, (params, state), _ = checkpoints.restore_best((params, state))
        how = _on_features(run, params, state)
        made = time.monotonic() - began
    else:
        how = {
            "objective": _objective(config, model),
            "batches": _training(run, settings.batch_size),
            "validate": _validation_over_orbits(run),
        }
    return made + _fit(
        run, workdir, f"adapting to {model.group}", fingerprint=fingerprint, params=params,
        state=state, learning_rates=rates, steps=settings.steps, key=jax.random.fold_in(key, 2),
        **how,
    )  # fmt: skip


def _objective(config: Config, model: Adapted, *, kept: bool = False) -> objective.Objective:
    """What adaptation minimises: of images, or of the features that are `kept` of them."""
    settings, prior = config.adaptation, _prior(config, model)
    shared = {
        "prior_weight": settings.prior_weight, "labels": settings.mode != "prior",
        **_weighing(config),
    }  # fmt: skip
    if kept:
        return objective.adaptation_from_features(model, prior, **shared)
    return objective.adaptation(
        model, prior, augmentation=config.augmentation, turn_inputs=turns_inputs(config),
        contrastive_weight=settings.contrastive_weight, artefact_weight=settings.artefact_weight,
        **shared,
    )  # fmt: skip


def _weighing(config: Config) -> dict[str, Any]:
    """How sure the weights over poses are to be."""
    settings = config.adaptation
    return {
        "confidence_penalty": settings.confidence_penalty,
        "temperature": objective.temperatures(
            settings.temperature, settings.temperature_end, settings.temperature_decay,
            settings.steps,
        ),
    }  # fmt: skip


def _keeps_features(run: _Run, params, state) -> bool:
    """Whether the predictor's features are made beforehand: it is kept, and they fit."""
    settings, model = run.config.adaptation, run.model
    if model.features is None or not model.freeze_predictor:
        return False
    splits = ((run.config.data.train, settings.variants), (run.config.data.validation, 1))
    rows = sum(len(run.dataset.source(split)) * versions for split, versions in splits)
    gigabytes = cache.size(model, params, state, run.shape, rows) / 1e9
    if gigabytes <= settings.cache_gigabytes:
        return True
    print(
        f"The features of {rows} images take {gigabytes:.1f} GB, more than "
        f"config.adaptation.cache_gigabytes={settings.cache_gigabytes:g}: they are made anew at "
        "each step."
    )
    return False


def _on_features(run: _Run, params, state) -> dict[str, Any]:
    """Objective, batches and validation on features made beforehand."""
    config, model, settings = run.config, run.model, run.config.adaptation
    prior, key = build_prior(config.prior, model.group), jax.random.key(config.seed)
    turned = turns_inputs(config)
    if settings.variants == 1 and config.augmentation != Augmentation():
        print(
            "Features are made of the images as they are: config.augmentation takes effect with "
            "config.adaptation.variants above 1."
        )

    def make(split, number, **how):
        images = len(run.dataset.source(split))
        total = -(-images // config.evaluation_batch_size)
        batches = run.stop.checked(_evaluation(config, run.dataset, split))
        title = f"features of {images} images in {model.group.order} poses"
        try:
            with run.stop.heeded():
                return cache.make(
                    model, params, state, progress(title, batches, total), images,
                    key=jax.random.fold_in(key, number), turn_inputs=turned, **how,
                )  # fmt: skip
        except Stopped:
            raise Stopped(f"Stopped while making {title}, of which nothing is kept.") from None

    train = make(config.data.train, 3, variants=settings.variants, augmentation=config.augmentation)
    modes = prior.modes(model.group)
    validate = cache.make_validation(
        model, make(config.data.validation, 4), modes, config.evaluation_batch_size
    )
    labels = settings.mode != "prior"

    def validation(state):
        pose, accuracy = validate(state.params, state.state)
        found = {"pose_accuracy": pose}
        if labels:
            found["random_accuracy" if turned else "group_accuracy"] = accuracy
        # By the pose, because the predictor was often trained on the very images held out here;
        # but where all poses are as likely, none is wrong.
        all_right = labels and (isinstance(prior, Uniform) or len(modes) == model.group.order)
        return {**found, "best_by": accuracy if all_right else pose}

    return {
        "objective": _objective(config, model, kept=True),
        "batches": array_batches(train, batch_size=settings.batch_size, seed=config.seed),
        "validate": validation,
    }


def _fine_tune(run: _Run, workdir: Path, fingerprint: str, predictor) -> float:
    """Train the predictor alone, a baseline; returns the seconds it took."""
    config, model, settings = run.config, run.model, run.config.adaptation
    key = jax.random.key(config.seed)
    params, state = model.init(key, jnp.zeros((1, *run.shape)), predictor=predictor)
    title, turned_by = f"fine-tuning {config.predictor.name}", None
    if settings.mode == "augmentation":
        turned_by = group_of(config)
        title += f" on images turned by {turned_by}"
    return _fit(
        run, workdir, title, fingerprint=fingerprint, params=params, state=state,
        objective=objective.pretraining(
            model, config.augmentation, turned_by, any_angle=settings.turn_inputs == "yes"
        ),
        learning_rates={"predictor": settings.predictor_learning_rate}, steps=settings.steps,
        batches=_training(run, settings.batch_size), validate=_validation_of_baseline(run),
        key=jax.random.fold_in(key, 2),
    )  # fmt: skip


def _validation_of_baseline(run: _Run):
    """By upright accuracy, or where images are turned in training by group accuracy."""
    config, model = run.config, run.model
    turns = GroupTurns(turning(group_of(config)), model.pad, model.fill)
    evaluate = make_evaluator(vanilla_prediction(model), turns)
    best_by = "accuracy" if config.adaptation.mode == "vanilla" else "group_accuracy"

    def validate(state):
        batches = _evaluation(config, run.dataset, config.data.validation)
        outcome = evaluate(state.params, state.state, run.stop.checked(batches))
        found = figures(outcome, elements=False)
        return {**found, "best_by": found[best_by]}

    return validate


def _fit(
    run, workdir, title, *, fingerprint, params, state, objective, learning_rates, steps,
    batches, validate, key,
) -> float:  # fmt: skip
    """Train one stage in its directory, from its latest checkpoint if there is one; its seconds."""
    config = run.config
    workdir.mkdir(parents=True, exist_ok=True)
    checkpoints = Checkpoints(workdir / "checkpoints", fingerprint, create=True)
    optimizer = make_optimizer(config.optimizer, learning_rates, steps)
    train_state = create_state(params, state, optimizer, tuple(learning_rates))
    try:
        with run.stop.heeded():
            if checkpoints.steps():
                train_state = checkpoints.restore(train_state, batches)
            after = int(train_state.step)
            log = MetricsLog(workdir, config.logging, after=after, name=workdir.name)
            with contextlib.closing(log):
                fit(
                    make_step(objective, optimizer, tuple(learning_rates)), train_state, batches,
                    steps=steps, key=key, validate=validate, checkpoints=checkpoints, log=log,
                    settings=config.logging, title=title, stop=run.stop,
                )  # fmt: skip
            checkpoints.wait()
    except Stopped:
        checkpoints.wait()
        last = checkpoints.steps()[-1]
        raise Stopped(f"Stopped {title} after step {last}, which is saved.") from None
    finally:
        checkpoints.close()
    if run.stop.requested:
        raise Stopped(f"Stopped after {title}, which is saved.")
    return checkpoints.figures(steps)["seconds"]


def _scores_only(model):
    def predict(params, state, images):
        canonical, _ = model.canonicalize(params, state, images)
        return canonical.scores.reshape(len(images), -1), canonical.pose

    return predict


def _training(run, batch_size):
    config = run.config
    images = poses.open_split(config, run.dataset, config.data.train)
    return training_batches(**images, batch_size=batch_size, seed=config.seed)


def _evaluation(config, dataset, split):
    images = poses.open_split(config, dataset, split)
    return evaluation_batches(**images, batch_size=config.evaluation_batch_size)


_UPRIGHT = GroupTurns(Cyclic(1))
