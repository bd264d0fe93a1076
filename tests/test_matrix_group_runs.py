"""Tiny runs over all angles: what they leave, what is loaded again, what they refuse."""

import csv
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import equiadapt_jax as ea
from equiadapt_jax import robustness, runs
from equiadapt_jax.evaluation.orbits import away, binned, pose_labels
from equiadapt_jax.groups import SO, Cyclic, Dihedral, O
from equiadapt_jax.training import build, objective, run
from equiadapt_jax.training import config as settings
from equiadapt_jax.training.config import Augmentation
from equiadapt_jax.training.workdir import read_config
from tests.test_matrix_groups import MIRROR, exact, noise, sample, turn
from tests.tiny_runs import ROOT, assert_same, command, given_flags


def canonicalizer(name, **scorer):
    return {"canonicalizer": name, "scorer": settings.Scorer(**scorer)}


STEERABLE = canonicalizer(
    "steerable", options={"layers": ((2, 4, 2), (2, 3, 1)), "rings": 2, "hidden": 4}
)
REFINED = canonicalizer(
    "group_conv",
    options={"features": (4, 4), "kernels": (4, 2), "strides": (2, 2), "hidden": 8},
    refine="cyclic8",
)
CASES = {
    "so2": {**STEERABLE, "prior": settings.Prior("von_mises", kappa=3.0, angle=0.1)},
    "o2": {**STEERABLE, "prior": settings.Prior("mirror")},
    "so2, refined": REFINED,
}


@pytest.fixture(scope="module", params=CASES)
def done(request, tiny, tmp_path_factory):
    """(group, workdir, figures of training) of a run of two steps."""
    group = request.param.partition(",")[0]
    workdir = tmp_path_factory.mktemp("any-angle") / "run"
    config = tiny(group=group, **CASES[request.param])
    return group, workdir, run.train(config, workdir)


def test_a_run_leaves_figures_of_angles(done):
    group, workdir, trained = done
    assert trained["scorer/parameters"] > 0
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    logged = {"validation/median_pose_error", "validation/group_accuracy", "validation/pose_error"}
    assert logged | {"train/pose_error", "train/prior_loss"} <= lines[2].keys()
    assert not any("pose_accuracy" in name for name in lines[2])
    metrics, table = runs.evaluate(
        workdir, random_angles=1, sweep=6, sweep_images=30, pictures=workdir / "eval"
    )
    turns = {"so2": "cyclic16", "o2": "dihedral8"}[group]
    assert f"mean over {turns}" in table
    assert "pose error in °: mean" in table
    assert {"adapted/pose_error/r45", "adapted/random_pose_error", "adapted/accuracy/r90",
            "adapted/class/3/pose_error", "adapted/sweep/r60"} <= metrics.keys()  # fmt: skip
    for absent in ("identity_rate", "pose_accuracy"):
        assert not any(absent in name for name in metrics)
    assert 0 < metrics["adapted/pose_error"] < 180
    # Quarter turns, and for O(2) mirrors, move pixels only.
    exactly, _ = runs.evaluate(workdir, group={"so2": "cyclic4", "o2": "dihedral4"}[group])
    assert exactly["adapted/changed_rate"] == 0
    assert exactly["adapted/invariance_error"] == 0


def test_the_report_tells_poses_as_angles(done):
    group, workdir, _ = done
    runs.evaluate(workdir, group="cyclic4", pictures=workdir / "eval-cyclic4")
    page = (workdir / "eval-cyclic4" / "report.html").read_text(encoding="utf-8")
    for text in ("Pose error, how far", "Largest pose errors", "° off", "Poses found"):
        assert text in page, text
    for text in ("Most confidently wrong", "Classes that are turned", "pose right, mean"):
        assert text not in page, text
    with (workdir / "eval-cyclic4" / "per_image.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 360 * 4
    assert "pose_right" not in rows[0]
    *_, model = ea.load(workdir)
    config, _ = read_config(workdir)
    assert model.group == ea.groups.from_name(group)
    upright = [row for row in rows if row["turn"] == "r0"]
    assert all(0 <= float(row["pose_error"]) <= 180 for row in rows)
    if config.prior.name == "identity":
        angles = np.array([float(row["pose"].strip("rs")) for row in upright])
        errors = np.array([float(row["pose_error"]) for row in upright])
        np.testing.assert_allclose(np.minimum(angles, 360 - angles), errors, atol=0.06)


def test_what_is_loaded_predicts_as_it_was_evaluated(done):
    _, workdir, _ = done
    params, state, model = ea.load(workdir)
    again = ea.load(workdir)
    assert_same((params, state), again[:2])
    assert again[2].group == model.group
    x = noise(4, 24, 24, 1)
    apply = jax.jit(lambda p, s, x: model.apply(p, s, x)[0])
    logits, canonical = apply(params, state, x)
    assert canonical.pose.shape == (4, 2, 2)
    for i in range(len(exact(model.group))):
        moved = np.rot90(x[:, :, ::-1] if i >= 4 else x, i % 4, (1, 2)).copy()
        np.testing.assert_array_equal(apply(params, state, moved)[0], logits)
    predictions = runs.adapted_prediction(model)(params, state, jnp.asarray(x))
    np.testing.assert_array_equal(jnp.argmax(predictions[0], -1), jnp.argmax(logits, -1))


def test_commands_run_over_all_angles_by_one_flag(places):
    """Train.py and eval.py, of a configuration that has a finite group and a scorer for it."""
    workdir = places["runs"] / "any-angle"
    code, output, errors = command(
        "train.py", "--config=configs/digits_vit.py:tiny", "--config.group=so2",
        "--config.scorer.options.hidden=4", "--config.adaptation.mode=prior",
        "--config.evaluation_group=cyclic4", f"--workdir={workdir}",
        f"--config.data.data_dir={places['data']}",
        f"--config.pretrain.directory={places['pretrained']}",
    )  # fmt: skip
    assert code == 0, errors
    assert "pose error in °" in output
    config, _ = read_config(workdir)
    assert config.canonicalizer == "steerable"
    assert config.scorer.options["hidden"] == 4
    code, output, errors = command("eval.py", f"--workdir={workdir}", "--sweep=4")
    assert code == 0, errors
    trained, evaluated = (
        json.loads((place / "metrics.json").read_text()) for place in (workdir, workdir / "eval")
    )
    for name in ("adapted/group_accuracy", "adapted/pose_error", "vanilla/accuracy"):
        assert trained[name] == evaluated[name], name
    # The predictor of such a run alone.
    metrics, _, verdict = robustness.evaluate(str(workdir), group="cyclic2")
    assert "vanilla/accuracy" in metrics
    assert verdict


@pytest.mark.parametrize("mode", ["vanilla", "augmentation"])
def test_baselines_are_trained_at_any_angle_and_have_no_poses(mode, tiny, tmp_path):
    run.train(tiny(mode=mode, group="so2", **STEERABLE), tmp_path / "run")
    metrics, table = runs.evaluate(tmp_path / "run")
    assert "mean over cyclic16" in table
    assert not any("pose" in name for name in metrics)


# ---- objective ----


@pytest.mark.parametrize("group", [SO(2), O(2)], ids=str)
def test_inputs_are_turned_by_the_very_element_that_shifts_the_prior(group):
    x = noise(40, 9, 9, 1)
    images, applied = objective.turn(group, jax.random.key(1), x, "constant", 0.2)
    expected = ea.actions.images.act(group, applied, x, pad="constant", fill=0.2)
    np.testing.assert_array_equal(images, expected)
    assert (np.linalg.det(applied) < 0).any() == (group == O(2))
    assert np.ptp(np.asarray(group.angle(applied))) > 5


@pytest.mark.parametrize("group", [SO(2), O(2)], ids=str)
def test_the_loss_is_the_tasks_and_that_of_the_prior_seen_from_the_turn(group):
    x, labels = noise(6, 8, 8, 1), np.arange(6, dtype=np.int32) % 3
    net = ea.from_linen(ea.networks.SteerableNet(group, layers=((2, 4, 2),), rings=2, hidden=4))
    weight = noise(64, 3)
    predictor = ea.from_function(lambda params, x: x.reshape(len(x), -1) @ weight)
    model = ea.adapt(group, net, predictor)
    params, state = model.init(jax.random.key(0), jnp.asarray(x))
    prior = ea.priors.Identity()
    loss = objective.adaptation(
        model, prior, prior_weight=7.0, augmentation=Augmentation(), turn_inputs=True
    )
    key = jax.random.key(5)
    batch = {"image": jnp.asarray(x), "label": jnp.asarray(labels)}
    value, (_, metrics) = jax.jit(loss)(params, state, batch, key)
    images, applied = objective.turn(group, jax.random.split(key, 4)[1], batch["image"], "edge", 0)
    (logits, canonical), _ = jax.jit(model.apply)(params, state, images)
    logits = np.float64(logits)
    task = np.mean(np.log(np.exp(logits).sum(-1)) - logits[np.arange(6), labels])
    expected = task + 7 * prior.loss(group, canonical.scores, applied=applied)
    np.testing.assert_allclose(value, expected, rtol=2e-5)
    assert "pose_entropy" not in metrics
    pose = np.float64(canonical.pose) @ np.linalg.inv(np.float64(applied))
    angle = np.abs(np.rad2deg(np.arctan2(pose[:, 0, 1], pose[:, 1, 1])))
    error = np.where(np.linalg.det(pose) < 0, 180, angle)
    np.testing.assert_allclose(metrics["pose_error"], error.mean(), rtol=1e-4)


# ---- names and errors of poses ----


def test_errors_are_angles_to_the_nearest_mode():
    poses = np.float32([turn(0.2), turn(-3.0), turn(1.0, 1), turn(0.5)])
    turned = np.float32([turn(0.0), turn(3.0), turn(1.0), turn(0.4, 1)])
    found = away(poses, turned, [np.eye(2)])
    np.testing.assert_allclose(found, [np.rad2deg(0.2), 360 - np.rad2deg(6.0), 180, 180], atol=1e-3)
    both = away(poses, turned, [np.eye(2), MIRROR])
    np.testing.assert_allclose(both[2:], [0, np.rad2deg(0.1)], atol=1e-3)


def test_poses_are_named_and_binned_as_turns_are():
    poses = np.float32([turn(np.deg2rad(a), m) for a, m in ((0, 0), (-0.04, 0), (33.26, 1))])
    assert list(pose_labels(O(2), poses)) == ["r0", "r0", "r33.3s"]
    assert pose_labels(O(2), poses[2]) == "r33.3s"
    assert list(pose_labels(Cyclic(4), np.array([3, 0]))) == ["r270", "r0"]
    bins, found = binned(O(2), poses)
    assert bins == Dihedral(24)
    assert list(found) == [0, 0, 24 + 2]
    random = sample(SO(2), 200)
    bins, found = binned(SO(2), random)
    assert float(away(random, bins.matrix(found), [np.eye(2)]).max()) <= 7.5 + 1e-3
    group, same = binned(Cyclic(4), np.array([1, 2]))
    assert (group, list(same)) == (Cyclic(4), [1, 2])


@pytest.mark.parametrize(
    ("prior", "expected"),
    [
        (ea.priors.Identity(), {0: 1.0}),
        (ea.priors.VonMises(1e5, np.pi / 2), {6: 1.0}),
        (ea.priors.VonMises(1e5, 0.0, 0.25), {0: 0.75, 24: 0.25}),
        (ea.priors.Uniform(), dict.fromkeys(range(48), 1 / 48)),
    ],
)
def test_priors_are_binned_for_the_report(prior, expected):
    found = runs._probabilities(prior, O(2))
    np.testing.assert_allclose(found, [expected.get(i, 0) for i in range(48)], atol=1e-6)


# ---- settings ----


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # of ml_collections
def test_a_group_of_all_angles_brings_its_scorer(monkeypatch):
    def given(*changes):
        return given_flags(monkeypatch, f"--config={ROOT / 'configs' / 'digits_vit.py'}", *changes)

    config = given("--config.group=o2")
    assert config.canonicalizer == "steerable"
    assert "features" not in config.scorer.options
    assert build.build_model(config, 10).refine is None
    refined = given("--config.group=so2", "--config.scorer.refine=cyclic12")
    assert refined.canonicalizer == "group_conv"
    assert build.build_model(refined, 10).refine == Cyclic(12)
    assert refined.scorer.options == given().scorer.options
    energy = given(
        "--config.group=so2",
        "--config.canonicalizer=energy",
        "--config.scorer.refine=cyclic12",
    )
    assert energy.canonicalizer == "energy"
    assert given("--config.group=cyclic8").scorer == given().scorer


@pytest.mark.parametrize(
    ("name", "scorer"),
    [
        ("steerable", {}),
        ("energy", {"refine": "dihedral8"}),
        ("energy_vit", {"refine": "dihedral8", "options": {"patch": 8}}),
        ("group_conv", {"refine": "dihedral8"}),
    ],
)
def test_settings_with_every_option_build_the_same(name, scorer, tiny):
    config = tiny(group="o2", **canonicalizer(name, **scorer))
    again = build.resolve(config)
    assert build.resolve(settings.from_dict(json.loads(json.dumps(dataclasses.asdict(again))))) == (
        again
    )
    images = jnp.zeros((1, 24, 24, 1))
    shapes = [
        jax.eval_shape(build.build_model(c, 10).init, jax.random.key(0), images)
        for c in (config, again)
    ]
    assert shapes[0] == shapes[1]


def prior(**changes):
    return {"prior": settings.Prior(**changes)}


def adaptation(**changes):
    return {"adaptation": settings.Adaptation(**changes)}


NEEDS = "needs a finite group, and so2 has infinitely many"
REFUSED = {
    "a group convolution": (canonicalizer("group_conv"), "takes config.canonicalizer=steerable"),
    "features": (canonicalizer("features", refine="cyclic8"), "here are features and 'cyclic8'"),
    "confidence": (canonicalizer("confidence"), "here are confidence and 'none'"),
    "steerable, refined": (
        canonicalizer("steerable", refine="cyclic8"), "here are steerable and 'cyclic8'"),
    "refined on another side": (
        canonicalizer("group_conv", refine="dihedral8"), "is no group to refine poses of so2"),
    "refined over all": (canonicalizer("group_conv", refine="so2"), "scorer.refine needs a finite"),
    "averages": ({"averaging": "weighted"}, f"averaging=weighted, of weights .*{NEEDS}"),
    "mean": ({"averaging": "mean"}, NEEDS),
    "a chunk": ({"chunk": 2}, f"config.chunk=2, of .*{NEEDS}"),
    "soft weights": (adaptation(method="soft"), f"adaptation.method=soft, of .*{NEEDS}"),
    "a temperature": (adaptation(temperature=2.0), f"adaptation.temperature=2.0, of .*{NEEDS}"),
    "a schedule": (adaptation(temperature_end=0.1), f"temperature_end, of .*{NEEDS}"),
    "a confidence penalty": (
        adaptation(confidence_penalty=0.1), "vectors have no probabilities to be sure of"),
    "an estimated prior": (prior(name="estimated"), f"prior.name=estimated {NEEDS}"),
    "a categorical prior": (prior(name="categorical"), f"prior.name=categorical {NEEDS}"),
    "probabilities": (prior(probabilities=(0.5, 0.5)), f"prior.probabilities, .*{NEEDS}"),
    "an unknown prior": (prior(name="normal"), "choose one of identity, mirror, von_mises, unif"),
    "a mirror that is none": (
        prior(name="von_mises", mirror=0.5), "so2 has no mirrors: take O"),
    "no concentration": (prior(name="von_mises", kappa=-1.0), "kappa is -1.0: it must be at least"),
    "evaluation by all": ({"evaluation_group": "so2"}, f"evaluation_group {NEEDS}"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_needs_finite_groups_is_refused_before_anything_is_written(case, tiny, tmp_path):
    change, sentence = REFUSED[case]
    config = dataclasses.replace(tiny(group="so2", **STEERABLE), **change)
    with pytest.raises(ValueError, match=sentence):
        run.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_images_in_poses_of_a_group_need_it_finite(tiny, tmp_path):
    config = tiny(group="so2", **STEERABLE)
    data = dataclasses.replace(config.data, poses=(0.5, 0.5))
    with pytest.raises(ValueError, match=f"config.data.poses {NEEDS}"):
        run.train(dataclasses.replace(config, data=data), tmp_path / "run")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (canonicalizer("steerable"), "gives vectors, poses of so2 or o2, and the group is cyclic4"),
        (
            canonicalizer("group_conv", refine="cyclic8"),
            "refine=cyclic8 finds poses between elements, and cyclic4 has",
        ),
        (
            prior(name="von_mises"),
            "prior.name is 'von_mises': choose one of identity, mirror, unif",
        ),
    ],
)
def test_what_needs_all_angles_is_refused_for_finite_groups(change, sentence, tiny, tmp_path):
    with pytest.raises(ValueError, match=sentence):
        run.train(tiny(**change), tmp_path / "run")
