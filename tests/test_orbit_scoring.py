"""Any network as an energy over the orbit: exact by construction, trained on its embeddings."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import equiadapt_jax as ea
from equiadapt_jax import energies, runs
from equiadapt_jax.actions import images as image_actions
from equiadapt_jax.evaluation import GroupTurns, make_evaluator
from equiadapt_jax.evaluation.predictions import adapted_prediction, draws
from equiadapt_jax.groups import Cyclic, Dihedral
from equiadapt_jax.training import config as settings
from equiadapt_jax.training import objective, run
from equiadapt_jax.training.build import build_model, resolve, with_averaging
from equiadapt_jax.training.check import check_training
from tests.tiny_runs import ROOT, shipped

KEY = jax.random.key(0)
NETWORKS = {
    "conv": ea.networks.ConvNet(5, features=(4, 6), kernels=(3, 3), strides=(1, 2), grid=2),
    "resized": ea.networks.ConvNet(5, (4,), (3,), (2,), size=11, grid=3),
    "resnet": ea.predictors.ResNet(5, stage_sizes=(1, 1), block="basic", width=4, stem="cifar"),
    "vit": ea.predictors.ViT(5, patch=3, width=8, depth=1, heads=2),
}


def noise(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).uniform(size=shape).astype(np.float32))


def moved(params, seed=0):
    """Parameters with noise, so that nothing is zero or a constant."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: x + 0.3 * rng.normal(size=x.shape).astype(x.dtype), params)


def scorer(group, name="conv", **options):
    made = ea.orbit_scorer(group, ea.from_linen(NETWORKS[name]), **options)
    params, state = made.init(KEY, noise(2, 9, 9, 2))
    return made, moved(params), state


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("group", [Cyclic(4), Dihedral(4), Cyclic(8)], ids=str)
def test_exactly_turned_images_have_the_same_bits_in_other_places(name, group):
    made, params, state = scorer(group, name)
    score = jax.jit(lambda x: made.apply(params, state, x)[0])
    x = noise(3, 9, 9, 2)
    scores = score(x)
    assert scores.shape == (3, group.order)
    assert np.ptp(scores, axis=1).min() > 1e-4  # poses are told apart
    for q in group.lattice:
        turned = score(image_actions.act(group, int(q), x))
        np.testing.assert_array_equal(turned[:, group.compose(int(q), group.elements())], scores)


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_exactness_does_not_depend_on_how_a_batch_fills_a_processor(batch):
    group, x = Cyclic(4), noise(batch, 32, 32, 3)
    network = ea.predictors.ResNet.variant("resnet20", 5)
    made = ea.orbit_scorer(group, ea.from_linen(network))
    params, state = jax.jit(made.init)(KEY, x)
    score = jax.jit(lambda x: made.apply(params, state, x)[0])
    scores = score(x)
    for q in range(4):
        turned = score(np.rot90(x, q, (1, 2)).copy())
        np.testing.assert_array_equal(turned[:, group.compose(q, np.arange(4))], scores)


@pytest.mark.parametrize("reference", ["learned", "fixed", "own"])
def test_scores_are_scaled_cosines_of_each_pose(reference):
    group, own = Cyclic(4), noise(5, seed=4) - 0.5
    made, params, state = scorer(group, reference=own if reference == "own" else reference, scale=3)
    x = noise(2, 9, 9, 2)
    vector = {"learned": params.get("reference"), "fixed": np.ones(5), "own": own}[reference]
    scores, _ = made.apply(params, state, x)
    assert ("reference" in params) == (reference == "learned")
    for g in range(4):
        e = NETWORKS["conv"].apply({"params": params["network"]}, np.rot90(x, -g, (1, 2)).copy())
        cosine = e @ vector / np.linalg.norm(e, axis=-1) / np.linalg.norm(vector)
        np.testing.assert_allclose(scores[:, g], 3 * cosine, atol=1e-4)


def test_a_network_may_give_the_score_itself():
    group = Cyclic(4)
    for output in (lambda x: x[:, 0, 1, 0], lambda x: x[:, 0, 1, :1]):
        network = ea.from_function(lambda params, x, output=output: output(x))
        made = ea.orbit_scorer(group, network, reference="none")
        x = noise(3, 5, 5, 1)
        params, state = made.init(KEY, x)
        expected = np.stack([np.rot90(x, -g, (1, 2))[:, 0, 1, 0] for g in range(4)], 1)
        np.testing.assert_array_equal(made.apply(params, state, x)[0], expected)
        assert made.embed is None


def test_what_is_no_scorer_is_refused_with_a_sentence():
    network = ea.from_linen(NETWORKS["conv"])
    with pytest.raises(ValueError, match="Unknown reference 'leanred': choose learned"):
        ea.orbit_scorer(Cyclic(4), network, reference="leanred")
    with pytest.raises(ValueError, match="scale of the cosine is 0"):
        ea.orbit_scorer(Cyclic(4), network, scale=0)
    with pytest.raises(TypeError, match="wrap it with from_linen"):
        ea.orbit_scorer(Cyclic(4), NETWORKS["conv"])
    with pytest.raises(ValueError, match=r"gives \(2, 5\) for 2 images: one number"):
        ea.orbit_scorer(Cyclic(4), network, reference="none").init(KEY, noise(2, 9, 9, 2))
    maps = ea.from_function(lambda params, x: x)
    with pytest.raises(ValueError, match=r"\(2, 9, 9, 2\) for 2 images: embeddings \(N, D\)"):
        ea.orbit_scorer(Cyclic(4), maps).init(KEY, noise(2, 9, 9, 2))


# ---- training ----


def adapted(group=None, **options):
    group = group or Cyclic(4)
    made = ea.orbit_scorer(group, ea.from_linen(NETWORKS["conv"]))
    predictor = ea.from_function(lambda params, x: x[:, :2, 0, 0])
    return ea.adapt(group, made, predictor, freeze_predictor=True, **options)


def loss_of(model, labels=True, **weights):
    return objective.adaptation(
        model, ea.priors.Identity(), prior_weight=0.0, augmentation=settings.Augmentation(),
        turn_inputs=False, labels=labels, **weights,
    )  # fmt: skip


@pytest.mark.parametrize("labels", [True, False])
def test_terms_are_added_with_their_weights(labels):
    model = adapted()
    x = noise(3, 9, 9, 2)
    params, state = model.init(KEY, x)
    batch = {"image": x, "label": jnp.asarray([0, 1, 0])}
    evaluate = lambda **w: loss_of(model, labels, **w)(params, state, batch, KEY)  # noqa: E731
    plain, (_, without) = evaluate()
    total, (_, metrics) = evaluate(contrastive_weight=2.0, artefact_weight=3.0)
    assert "contrastive_loss" not in without
    embeddings, _ = model.scorer.embed(params["scorer"], state["scorer"], x)
    expected = energies.contrastive(embeddings)
    np.testing.assert_allclose(metrics["contrastive_loss"], expected, rtol=1e-5)
    terms = 2 * metrics["contrastive_loss"] + 3 * metrics["artefact_loss"]
    np.testing.assert_allclose(total - plain, terms, rtol=1e-4, atol=1e-5)
    assert metrics["artefact_loss"] > 0
    np.testing.assert_allclose(metrics["loss"], total)


def test_the_terms_do_what_they_are_for():
    """Descending on each alone parts the poses, or makes interpolation matter less."""
    model = adapted()
    x = noise(8, 9, 9, 2)
    params, state = model.init(KEY, x)
    optimizer = optax.adam(1e-2)
    for name, weights in (("contrastive", (1.0, 0.0)), ("artefact", (0.0, 1.0))):

        def loss(params, weights=weights):
            return objective._embedding_terms(model, params, state, x, KEY, weights)[0]

        step = jax.jit(jax.value_and_grad(loss))
        trained, moments, values = params, optimizer.init(params), []
        for _ in range(15):
            value, gradient = step(trained)
            updates, moments = optimizer.update(gradient, moments)
            trained = optax.apply_updates(trained, updates)
            values.append(float(value))
        limit = 0.6 * values[0] if name == "artefact" else values[0] - 0.1
        assert values[-1] < limit, name


def test_predictions_can_be_summed_in_training(x64):
    """λ-equitune: the loss and its gradient are those of the written-out sum of predictions."""
    group, x = Cyclic(4), jnp.asarray(np.random.default_rng(0).uniform(size=(3, 4, 4, 1)))
    network = ea.from_function(
        lambda params, x: (x * params["w"]).sum((1, 2, 3)),
        init=lambda key, x: {"w": jax.random.normal(key, x.shape[1:], x.dtype)},
    )
    weight = np.random.default_rng(1).normal(size=(16, 3))
    answer = lambda x: jnp.tanh(x.reshape(x.shape[0], -1) @ weight)  # noqa: E731
    model = ea.adapt(
        group, ea.orbit_scorer(group, network, reference="none"),
        ea.from_function(lambda params, x: answer(x)), freeze_predictor=True,
        method="predictions", temperature=0.7,
    )  # fmt: skip
    params, state = model.init(KEY, x)

    def ours(params):
        (y, canonical), _ = model.apply(params, state, x, train=True, key=KEY)
        return (y**2).sum(), canonical

    def written_out(params):
        turned = [jnp.rot90(x, -g, (1, 2)) for g in range(4)]
        w = params["scorer"]["network"]["w"]
        scores = jnp.stack([(t * w).sum((1, 2, 3)) for t in turned], 1)
        weights = jax.nn.softmax(scores / 0.7, -1)
        y = sum(weights[:, g, None] * answer(turned[g]) for g in range(4))
        return (y**2).sum(), weights

    (value, canonical), gradient = jax.value_and_grad(ours, has_aux=True)(params)
    (expected, weights), wanted = jax.value_and_grad(written_out, has_aux=True)(params)
    np.testing.assert_allclose(value, expected, rtol=1e-10)
    np.testing.assert_allclose(canonical.weights, weights, rtol=1e-10)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-8), gradient, wanted)
    with pytest.raises(ValueError, match="freeze_predictor=True"):
        ea.adapt(group, model.scorer, model.predictor, method="predictions")


@pytest.mark.parametrize("reads", [False, True])
def test_summed_predictions_are_weighted_in_inference_as_they_were_trained(reads):
    group, x = Cyclic(4), noise(3, 9, 9, 2)
    answer = lambda params, x: x.mean((2, 3))  # noqa: E731
    predictor = ea.from_function(answer, features=lambda p, x: (answer(p, x), (x,)))
    scorer = ea.networks.FeatureScorer(group, hidden=4, dropout=0.0)
    image_scorer = ea.networks.GroupConvNet(group, (3,), (3,), (2,), hidden=4)
    model = ea.adapt(
        group, ea.from_linen(scorer if reads else image_scorer), predictor, method="predictions",
        temperature=0.2, poses=None, freeze_predictor=True, features=scorer.read if reads else None,
    )  # fmt: skip
    params, state = model.init(KEY, x)
    params = moved(params)
    (trained, _), _ = model.apply(params, state, x, train=True, key=KEY)
    (used, _), _ = model.apply(params, state, x)
    np.testing.assert_allclose(used, trained, atol=1e-5)
    other = dataclasses.replace(model, temperature=1.0).apply(params, state, x)[0][0]
    assert float(abs(other - used).max()) > 1e-3


def test_the_best_pose_alone_leaves_the_passes_of_training_to_the_chunk():
    group, x = Cyclic(4), noise(2, 9, 9, 2)
    scorer = ea.from_linen(ea.networks.GroupConvNet(group, (3,), (3,), (2,), hidden=4))
    predictor = ea.from_function(lambda params, x: x.mean((2, 3)))
    how = {"method": "predictions", "freeze_predictor": True}
    whole, parts = (ea.adapt(group, scorer, predictor, chunk=c, **how) for c in (None, 2))
    params, state = whole.init(KEY, x)
    for train in (True, False):
        one, other = (m.apply(params, state, x, train=train, key=KEY)[0][0] for m in (whole, parts))
        np.testing.assert_allclose(one, other, atol=1e-6)


def test_a_reference_of_another_length_is_refused():
    network = ea.from_function(lambda params, x: x.mean(2).reshape(x.shape[0], -1))
    x = noise(2, 3, 3, 2)
    scorer = ea.orbit_scorer(Cyclic(4), network, reference=jnp.ones(3))
    with pytest.raises(ValueError, match=r"shape \(3,\) and the embeddings length 6"):
        scorer.init(KEY, x)
    with pytest.raises(ValueError, match="give a vector of that length"):
        scorer.apply({"network": {}}, {}, x)
    made = ea.orbit_scorer(Cyclic(4), network, reference=jnp.ones(6))
    assert made.apply(*made.init(KEY, x), x)[0].shape == (2, 4)


def test_sampled_poses_need_a_key_and_follow_it():
    model = adapted(poses=2, weighting="sampled")
    x = noise(16, 9, 9, 2)
    params, state = model.init(KEY, x)
    params = moved(params)
    apply = jax.jit(lambda x, key: model.apply(params, state, x, key=key)[0][0])
    np.testing.assert_array_equal(apply(x, KEY), apply(x, KEY))
    assert (apply(x, KEY) != apply(x, jax.random.key(1))).any()
    np.testing.assert_array_equal(apply(jnp.rot90(x, 1, (1, 2)), KEY), apply(x, KEY))
    with pytest.raises(ValueError, match="pass key="):
        model.apply(params, state, x)


@pytest.mark.parametrize("batch", [3, 16])
def test_an_image_is_evaluated_with_the_same_draws_in_any_batch(batch):
    model = adapted(poses=2, weighting="sampled")
    x, group = noise(16, 9, 9, 2), Cyclic(4)
    params, state = model.init(KEY, x)
    params = moved(params)

    def batches(size):
        for start in range(0, 16, size):
            rows = np.minimum(np.arange(start, start + size), 15)
            mask = np.arange(start, start + size) < 16
            yield {"image": x[rows], "label": rows % 2, "name": rows, "mask": mask}

    evaluate = make_evaluator(adapted_prediction(model), GroupTurns(group), group)
    found, whole = (evaluate(params, state, batches(size)) for size in (batch, 8))
    np.testing.assert_array_equal(found.prediction, whole.prediction)
    np.testing.assert_allclose(found.confidence, whole.confidence, atol=1e-5)
    assert found.change.max() == 0  # turned exactly, an image has the same draws
    key = draws(0, 16)
    one = model.apply(params, state, x, key=key)[0][0]
    two = model.apply(params, state, x[::-1], key=key[::-1])[0][0]
    np.testing.assert_allclose(one, two[::-1], atol=1e-5)
    assert float(abs(one - model.apply(params, state, x, key=key[::-1])[0][0]).max()) > 1e-3


# ---- settings ----


def changed(**changes):
    config = shipped(ROOT / "configs" / "digits_vit.py", "tiny")
    for name, fields in changes.items():
        if isinstance(fields, dict):
            fields = dataclasses.replace(getattr(config, name), **fields)
        config = dataclasses.replace(config, **{name: fields})
    return config


ENERGY = {"canonicalizer": "energy"}
REFUSED = {
    "a term without embeddings": (
        {"adaptation": {"contrastive_weight": 1.0}}, "contrastive_weight needs embeddings",
    ),
    "a term for a number": (
        {**ENERGY, "scorer": {"reference": "none"}, "adaptation": {"artefact_weight": 1.0}},
        "artefact_weight needs embeddings of the poses: choose config.canonicalizer of energy",
    ),
    "a reference": (
        {**ENERGY, "scorer": {"reference": "mean"}}, "scorer.reference is 'mean': choose one of",
    ),
    "a margin of a trained scorer": ({"scorer": {"margin": 1.0}}, "only confidence, entropy"),
    "nothing to train": (
        {"canonicalizer": "confidence", "adaptation": {"mode": "frozen"}},
        "has nothing to train .* eval.py --predictor=… --data=… --adapt=confidence",
    ),
    "summed predictions of a trained predictor": (
        {"adaptation": {"method": "predictions"}}, "choose config.adaptation.mode=frozen",
    ),
    "too many poses": ({"averaging": "sampled5"}, "k from 1 to 4, the order of cyclic4"),
    "no averaging": ({"averaging": "median"}, "'median': choose single, weighted, mean, or top<k>"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_settings_that_do_not_go_together_are_refused_with_a_reason(case):
    changes, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        build_model(changed(**changes), 10)


FREE = {"canonicalizer": "confidence"}
UNTRAINABLE = {
    "a reference of another scorer": ({"scorer": {"reference": "fixed"}}, "group_conv has none"),
    "an embedding of another scorer": (
        {**FREE, "scorer": {"embedding": 8}},
        "embedding is 8, and the canonicalizer confidence has none",
    ),
    "a negative term": (
        {**ENERGY, "adaptation": {"contrastive_weight": -1.0}}, "is -1.0: give 0 or more",
    ),
    "weights that are not used": (
        {"adaptation": {"method": "predictions", "mode": "frozen"}},
        "choose config.averaging=weighted",
    ),
    "weights of another temperature": (
        {"averaging": "weighted",
         "adaptation": {"method": "predictions", "mode": "frozen", "temperature_end": 0.1}},
        "leave config.adaptation.temperature_end at 0",
    ),
    "a prior that nothing learns": (
        {**FREE, "prior": {"name": "estimated"}}, "prior.name=estimated is for scorers",
    ),
    "a penalty of nothing": (
        {**FREE, "adaptation": {"confidence_penalty": 0.1}}, "confidence_penalty is for",
    ),
    "a temperature of nothing": (
        {**FREE, "adaptation": {"temperature_end": 0.1}}, "temperature_end is for scorers",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", UNTRAINABLE)
def test_settings_that_would_not_be_trained_are_refused_and_no_model_is(case):
    changes, message = UNTRAINABLE[case]
    config = changed(**changes)
    with pytest.raises(ValueError, match=message):
        check_training(config)
    build_model(config, 10)  # a run that is there is evaluated
    baseline = dataclasses.replace(config.adaptation, mode="vanilla")
    check_training(dataclasses.replace(config, adaptation=baseline))


def test_another_averaging_brings_a_chunk_that_divides_its_poses():
    energy = changed(**ENERGY, averaging="weighted", chunk=4)
    for averaging, chunk in (("top2", 2), ("top3", 1), ("single", 1), ("mean", 4)):
        config = with_averaging(energy, averaging)
        assert (config.averaging, config.chunk) == (averaging, chunk)
        assert build_model(config, 10).chunk == chunk
    reads = changed(**FREE, averaging="weighted", chunk=4)
    assert with_averaging(reads, "top3").chunk == 4  # it sees all poses anyway
    assert with_averaging(changed(averaging="weighted"), "top3").chunk == 0


@pytest.mark.parametrize(
    ("averaging", "expected"),
    {
        "single": (1, "scores"), "top2": (2, "scores"), "weighted": (None, "scores"),
        "mean": (None, "equal"), "faded3": (3, "faded"), "sampled2": (2, "sampled"),
    }.items(),
)  # fmt: skip
def test_averaging_is_chosen_by_its_name(averaging, expected):
    model = build_model(changed(**ENERGY, averaging=averaging), 10)
    assert (model.poses, model.weighting) == expected


@pytest.mark.parametrize("name", ["energy", "energy_resnet", "energy_vit", "confidence"])
def test_every_scorer_is_built_from_settings_that_survive(name):
    options = {
        "energy": changed().scorer.options,  # those of the shipped file serve as they are
        "energy_resnet": {"stage_sizes": (1,), "block": "basic", "width": 4, "stem": "cifar"},
        "energy_vit": {"patch": 6, "width": 8, "depth": 1, "heads": 2},
        "confidence": changed().scorer.options,
    }[name]
    config = resolve(changed(canonicalizer=name, scorer={"options": options}))
    assert resolve(settings.from_dict(dataclasses.asdict(config))) == config
    model = build_model(config, 10)
    params, state = model.init(KEY, noise(2, 24, 24, 1))
    (logits, canonical), _ = model.apply(params, state, noise(2, 24, 24, 1))
    assert logits.shape == (2, 10)
    assert canonical.scores.shape == (2, 4)


@pytest.mark.parametrize(
    ("name", "mode", "changes"),
    [
        ("energy", "frozen", {"contrastive_weight": 1.0, "artefact_weight": 1.0}),
        ("energy", "frozen", {"method": "predictions"}),
        ("confidence", "joint", {}),
    ],
)
def test_a_run_is_trained_and_loaded(name, mode, changes, tiny, tmp_path):
    config = tiny(mode=mode)
    config = dataclasses.replace(
        config,
        canonicalizer=name,
        adaptation=dataclasses.replace(config.adaptation, **changes),
        averaging="sampled2",
    )
    figures = run.train(config, tmp_path / "run")
    assert (figures["scorer/parameters"] == 0) == (name == "confidence")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    logged = [json.loads(line) for line in lines]
    for term in ("contrastive", "artefact"):
        found = any(f"train/{term}_loss" in line for line in logged)
        assert found == bool(changes.get(f"{term}_weight"))
    metrics, _ = runs.evaluate(tmp_path / "run")
    assert metrics["adapted/changed_rate"] == 0  # poses are drawn alike for every turn
    params, state, model = ea.load(tmp_path / "run")
    assert model.weighting == "sampled"
    x = noise(1, 24, 24, 1)
    assert model.apply(params, state, x, key=KEY)[0][0].shape == (1, 10)
