"""Settings in every combination: each is trained as it says, or refused with a reason."""

import dataclasses
import itertools
import random
import re

import jax
import jax.numpy as jnp
import pytest

from equiadapt_jax import energies
from equiadapt_jax.evaluation.predictions import adapted_prediction
from equiadapt_jax.training import build, objective, poses, run
from equiadapt_jax.training import config as settings
from equiadapt_jax.training.check import check_training
from equiadapt_jax.training.step import TrainState, make_optimizer, make_step

SHAPE, CLASSES = (8, 8, 1), 3
ORDER = {"cyclic1": 1, "cyclic2": 2, "cyclic4": 4, "cyclic8": 8, "dihedral1": 2, "dihedral4": 8}
ANY_ANGLE = {"so2": "cyclic8", "o2": "dihedral8"}  # with the group whose scores are refined
FREE = tuple(energies.NAMED)
BASELINES = ("vanilla", "augmentation")
CHOICES = {
    "group": [*ORDER, *ANY_ANGLE],
    "canonicalizer": list(build._SCORERS),
    "averaging": ["single", "top2", "top3", "weighted", "mean", "faded2", "sampled2"],
    "prior": ["identity", "mirror", "categorical", "estimated", "von_mises", "uniform"],
    "method": ["straight_through", "gumbel", "soft", "predictions"],
    "mode": ["joint", "frozen", "prior", *BASELINES],
    "mask": ["none", "disk"],
    "dtype": ["float32", "bfloat16"],
    "turn_inputs": ["auto", "yes", "no"],
    "interpolation": ["linear", "cubic"],
}
RESNET = {"stage_sizes": (1,), "block": "basic", "width": 2, "stem": "cifar"}
CONV = {"features": (2,), "kernels": (3,), "strides": (1,), "hidden": 2}
OPTIONS = {
    "group_conv": CONV, "energy": CONV, "features": {"hidden": 2, "grid": 1},
    "energy_resnet": RESNET, "energy_vit": {"patch": 4, "width": 4, "depth": 1, "heads": 1},
}  # fmt: skip


def config_of(
    group, canonicalizer, averaging, prior, method, mode, mask="none", dtype="float32",
    turn_inputs="auto", interpolation="linear",
):  # fmt: skip
    """With terms of the embeddings, where the canonicalizer has any, and its own number else."""
    order, scored = ORDER.get(group, 4), canonicalizer in ("group_conv", *build.ENERGIES)
    weight = 0.1 if canonicalizer in ("energy", "energy_vit") else 0.0
    return settings.Config(
        group=group,
        canonicalizer=canonicalizer,
        averaging=averaging,
        mask=mask,
        dtype=dtype,
        chunk=int(group in ORDER and (mode == "frozen" or method == "soft")),
        prior=settings.Prior(
            name=prior, probabilities=(1 / order,) * order if prior == "categorical" else ()
        ),
        adaptation=settings.Adaptation(
            mode=mode,
            method=method,
            turn_inputs=turn_inputs,
            interpolation=interpolation,
            contrastive_weight=weight,
            artefact_weight=weight,
        ),
        scorer=settings.Scorer(
            options=OPTIONS.get(canonicalizer, {}),
            refine=ANY_ANGLE.get(group, "") if scored else "",
            reference="none" if canonicalizer == "energy_resnet" else "learned",
        ),
        predictor=settings.Predictor(name="resnet", options=RESNET),
        data=settings.Data(size=SHAPE[0]),
    )


def makes_sense(
    group, canonicalizer, averaging, prior, method, mode, mask="none", dtype="float32",
    turn_inputs="auto", interpolation="linear",
):  # fmt: skip
    """Whether a combination is one that the documents describe."""
    baseline, free, finite = mode in BASELINES, canonicalizer in FREE, group in ORDER
    several = int(re.sub(r"\D", "", averaging) or 1)
    if finite:
        fits = canonicalizer != "steerable" and prior != "von_mises"
        fits &= baseline or several <= ORDER[group]
    else:
        fits = canonicalizer not in ("features", *FREE)
        fits &= averaging == "single" and method == "straight_through"
        fits &= prior not in ("categorical", "estimated")
    fits &= (prior, mode) != ("uniform", "prior")  # there is nothing to train by
    fits &= averaging != "mean" or mode not in ("frozen", "prior")  # whatever is trained
    fits &= (mode, turn_inputs) != ("vanilla", "yes")
    if method == "predictions":  # weights of the predictions, the predictor kept
        fits &= mode != "joint" and (baseline or averaging != "single")
    if free:  # the predictor is all that could be trained
        fits &= mode not in ("frozen", "prior") and (baseline or prior != "estimated")
    return fits


def refused(config):
    """The sentence with which a configuration is refused, or None."""
    try:
        poses.estimates_prior(config)
        build.build_model(build.resolve(config), CLASSES)
        check_training(config)
    except ValueError as error:
        return str(error)
    return None


def assert_a_reason(sentence, setting=r"config\.[a-z]+"):
    """One sentence, which names a setting."""
    assert re.search(setting, sentence), sentence
    assert re.fullmatch(r"[^\n]+[^.]\.", sentence), sentence
    assert not re.search(r"\w\. [A-Z]", sentence), sentence


def drawn(number, seed):
    rng = random.Random(seed)
    return [tuple(map(rng.choice, CHOICES.values())) for _ in range(number)]


def test_a_combination_is_refused_where_it_makes_no_sense_with_a_sentence_that_names_a_setting():
    for combination in drawn(4000, seed=0):
        sentence = refused(config_of(*combination))
        assert (sentence is None) == makes_sense(*combination), (combination, sentence)
        if sentence is not None:
            assert_a_reason(sentence)


def covering(combinations):
    """Some of the combinations, in which every pair of choices comes that comes in any."""
    pairs = {c: set(itertools.combinations(enumerate(c), 2)) for c in combinations}
    missing, chosen = set().union(*pairs.values()), []
    while missing:
        some = itertools.islice((c for c in combinations if pairs[c] & missing), 200)
        chosen.append(max(some, key=lambda c: len(pairs[c] & missing)))
        missing -= pairs[chosen[-1]]
    return chosen


TRACED = ("cyclic2", "cyclic8", "dihedral4", *ANY_ANGLE)
SENSIBLE = [c for c in drawn(60_000, seed=1) if c[0] in TRACED and makes_sense(*c)]


def take_first_steps(config):
    """What a run traces before it begins, and in its first steps."""
    config = build.resolve(config)
    model = build.build_model(config, CLASSES)
    run._check_model(config, model, SHAPE)
    key, settings = jax.random.key(0), config.adaptation
    images = jnp.zeros((2, *SHAPE))
    params, state = jax.eval_shape(model.init, key, images)
    batch = {"image": images, "label": jnp.zeros(2, jnp.int32)}

    def step(objective, *trained, batch=batch):
        optimizer = make_optimizer(config.optimizer, dict.fromkeys(trained, 1e-3), 2)
        begun = jax.eval_shape(optimizer.init, {name: params[name] for name in trained})
        begun = TrainState(jnp.int32(0), params, state, begun)
        ended, metrics = jax.eval_shape(make_step(objective, optimizer, trained), begun, batch, key)
        shapes = [jax.tree.map(lambda x: x.shape, tree) for tree in (params, ended.params)]
        assert shapes[0] == shapes[1]
        assert all(value.shape == () for value in metrics.values())

    if settings.mode in BASELINES:
        turned_by = build.group_of(config) if settings.mode == "augmentation" else None
        step(objective.pretraining(model, config.augmentation, turned_by), "predictor")
        return
    step(run._objective(config, model), "scorer", *["predictor"] * (settings.mode == "joint"))
    if model.features is not None and model.freeze_predictor:
        features, predictions = jax.eval_shape(model.orbit_features, params, state, images)
        applied = jnp.zeros(2, jnp.int32)
        kept = {"features": features, "predictions": predictions, "applied": applied, **batch}
        step(run._objective(config, model, kept=True), "scorer", batch=kept)
    if poses.estimates_prior(config):
        turns = build.turns_inputs(config)
        step(poses.aligning(model, config.augmentation, turn_inputs=turns), "scorer")
    logits, *_ = jax.eval_shape(adapted_prediction(model), params, state, images)
    assert logits.shape == (2, CLASSES)


@pytest.mark.parametrize("combination", covering(SENSIBLE), ids="-".join)
def test_what_is_built_takes_its_first_steps(combination):
    """Every pair of choices that may come together does."""
    take_first_steps(config_of(*combination))


NAMES = [
    "group", "evaluation_group", "canonicalizer", "averaging", "mask", "dtype", "scorer.reference",
    "scorer.refine", "predictor.name", "adaptation.mode", "adaptation.method",
    "adaptation.turn_inputs", "adaptation.pad", "adaptation.interpolation",
    "adaptation.temperature_decay", "prior.name",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_does_not_exist_is_refused_with_those_that_do(name):
    plain = "cyclic4", "group_conv", "single", "identity", "straight_through", "joint"
    config = dataclasses.asdict(config_of(*plain))
    section, _, field = name.rpartition(".")
    (config[section] if section else config)[field] = "nobody"
    config = settings.from_dict(config)
    with pytest.raises(ValueError, match="nobody") as error:
        run._check_model(config, build.build_model(build.resolve(config), CLASSES), SHAPE)
    assert_a_reason(str(error.value), rf"config\.{name}\b")
    assert re.search("choose|write|take", str(error.value))


@pytest.mark.parametrize(
    ("prior", "sentence"),
    [
        ({"name": "categorical"}, "config.prior: Prior probabilities .* summing to 1"),
        (
            {"name": "categorical", "probabilities": (0.5, 0.5)},
            "config.prior: .* has 2 prob.* 4 el",
        ),
        ({"probabilities": (1.0, 0.0, 0.0, 0.0)}, "config.prior.probabilities .*identity has none"),
        ({"kl_weight": 1.0}, "config.prior.kl_weight is 1.0, and the prior identity has none"),
        ({"per_sample": True}, "config.prior.per_sample is True, and the prior identity has none"),
        ({"name": "mirror", "probabilities": (1.0, 0.0, 0.0, 0.0)}, "the prior mirror has none"),
        ({"name": "uniform", "kl_weight": 1.0}, "the prior uniform has none"),
        ({"name": "mirror", "kl_weight": -1.0}, "config.prior: .*kl_weight is -1.0: it must be"),
        ({"kappa": 3.0}, "config.prior.kappa is 3.0, and the prior identity .*=von_mises"),
        ({"name": "mirror", "mirror": 0.3}, "config.prior.mirror is 0.3, and the prior mirror has"),
    ],
)
def test_a_prior_is_refused_where_it_is_none_or_does_not_do_as_its_settings_say(prior, sentence):
    group = "dihedral1" if prior.get("name") == "mirror" else "cyclic4"
    config = dataclasses.replace(settings.Config(), group=group, prior=settings.Prior(**prior))
    with pytest.raises(ValueError, match=sentence) as error:
        check_training(config)
    assert_a_reason(str(error.value))


@pytest.mark.parametrize("prior", [{"mirror": 0.5, "kappa": 3.0}, {"name": "mirror", "angle": 1.0}])
def test_over_all_angles_too_a_prior_has_only_its_own_settings(prior):
    config = dataclasses.replace(
        settings.Config(), group="o2", canonicalizer="steerable", prior=settings.Prior(**prior)
    )
    with pytest.raises(ValueError, match="has none: choose config.prior.name=von_mises") as error:
        check_training(config)
    assert_a_reason(str(error.value))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"mode": "foo"}, "config.adaptation.mode is 'foo': choose one of joint"),
        ({"fill": 128.0}, "config.adaptation.fill is 128.0: give a value from 0 to 1"),
        ({"prior_weight": -5.0}, "config.adaptation.prior_weight is -5.0: give 0 or more"),
        ({"variants": 2}, "config.adaptation.variants is 2, .* canonicalizer group_conv sees new"),
        ({"temperature_decay": "exponential"}, "give config.adaptation.temperature_end too"),
        ({"mode": "vanilla", "turn_inputs": "yes"}, "choose config.adaptation.mode=augmentation"),
    ],
)
def test_settings_of_adaptation_that_would_not_do_as_they_say_are_refused(changes, sentence):
    config = dataclasses.replace(settings.Config(), adaptation=settings.Adaptation(**changes))
    with pytest.raises(ValueError, match=sentence) as error:
        check_training(config)
    assert_a_reason(str(error.value))


def test_clipping_every_gradient_to_nothing_is_refused():
    config = dataclasses.replace(settings.Config(), optimizer=settings.Optimizer(clip=0.0))
    with pytest.raises(ValueError, match="config.optimizer.clip is 0.0, .* give more than 0"):
        check_training(config)


@pytest.mark.parametrize(
    ("accumulate", "prior", "sentence"),
    [
        (0, settings.Prior(), "accumulate is 0, and config.adaptation.steps 400: give 1, or"),
        (16, settings.Prior(), "accumulate is 16, and config.pretrain.steps 1000: "),
        (8, settings.Prior(name="estimated", steps=150), "8, and config.prior.steps 150: "),
    ],
)
def test_steps_that_would_be_left_over_are_refused(accumulate, prior, sentence):
    config = dataclasses.replace(
        settings.Config(), optimizer=settings.Optimizer(accumulate=accumulate), prior=prior
    )
    with pytest.raises(ValueError, match=sentence):
        check_training(config)


PRIORS_OF_MIRRORED = [
    ("cyclic4", {}, True),
    ("cyclic4", {"name": "categorical", "probabilities": (0.6, 0.2, 0.0, 0.2)}, True),
    ("cyclic4", {"name": "categorical", "probabilities": (0.6, 0.4, 0.0, 0.0)}, False),
    ("dihedral4", {}, False),
    ("dihedral4", {"name": "mirror"}, True),
    ("dihedral4", {"name": "uniform"}, True),
    ("so2", {}, True),
    ("so2", {"name": "von_mises", "angle": 0.3}, False),
    ("o2", {}, False),
    ("o2", {"name": "mirror"}, True),
    ("o2", {"name": "von_mises", "mirror": 0.3}, False),
]


@pytest.mark.parametrize(("group", "prior", "alike"), PRIORS_OF_MIRRORED)
def test_images_are_mirrored_where_the_prior_says_the_same_of_them(group, prior, alike):
    config = dataclasses.replace(
        settings.Config(), group=group, prior=settings.Prior(**prior),
        canonicalizer="steerable" if group in ANY_ANGLE else "group_conv",
        augmentation=settings.Augmentation(mirror=True),
    )  # fmt: skip
    if alike:
        check_training(config)
        return
    with pytest.raises(ValueError, match="config.augmentation.mirror mirrors half of") as error:
        check_training(config)
    assert_a_reason(str(error.value))
