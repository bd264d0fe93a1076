"""A scorer before a predictor."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import equiadapt_jax as ea
from equiadapt_jax import canonicalization
from equiadapt_jax.groups import Cyclic, Dihedral
from tests.test_interface import KEY, Linen, X, assert_same, noise, norm

C4 = Cyclic(4)


def template_scorer(group):
    """⟨t, g⁻¹·x⟩: equivariant, with one template as its parameters."""

    def scores(params, x):
        turned = ea.actions.images.orbit(group, x)
        inverse = group.inverse(np.arange(group.order))
        return (turned[:, inverse] * params["template"]).sum((-3, -2, -1))

    return ea.from_function(
        scores, lambda key, x: {"template": jax.random.normal(key, x.shape[1:])}
    )


def preprocess(x):
    return (x - 0.4) / 0.3


def model_of(group=C4, predictor=None, **options):
    predictor = predictor or ea.from_linen(Linen())
    return ea.adapt(group, template_scorer(group), predictor, preprocess=preprocess, **options)


@functools.cache
def built(group=C4, **options):
    """(model, params, state, jitted apply)."""
    model = model_of(group, **options)
    params, state = jax.jit(model.init)(KEY, X)
    return model, params, state, jax.jit(model.apply, static_argnames="train")


def orbit(group):
    """All exactly turned copies of X, after X itself."""
    mirrored = [X, X[:, :, ::-1]] if group.order > group.n else [X]
    return [np.rot90(x, k, (1, 2)).copy() for x in mirrored for k in range(4)]


@pytest.mark.parametrize("group", [Cyclic(4), Dihedral(4), Cyclic(8)], ids=str)
def test_predictions_do_not_depend_on_exact_transformations(group):
    model, params, state, apply = built(group)
    (logits, canonical), _ = apply(params, state, X)
    assert logits.shape == (4, 3)
    assert isinstance(canonical, ea.canonicalization.Canonical)
    poses = []
    for turned in orbit(group):
        (again, other), _ = apply(params, state, turned)
        assert np.asarray(again).tobytes() == np.asarray(logits).tobytes()
        assert np.asarray(other.inputs).tobytes() == np.asarray(canonical.inputs).tobytes()
        poses.append(np.asarray(other.pose))
    assert len(np.unique(poses)) > 1
    plain = jax.jit(model.predict)
    assert (plain(params, state, orbit(group)[1])[0] != plain(params, state, X)[0]).any()


def test_a_group_convolution_scorer_makes_predictions_invariant_too():
    group = Cyclic(4)
    net = ea.networks.GroupConvNet(group, features=(3,), kernels=(3,), strides=(1,), hidden=4)
    model = ea.adapt(group, ea.from_linen(net), ea.from_linen(Linen()))
    params, state = jax.jit(model.init)(KEY, X)
    apply = jax.jit(model.apply)
    (logits, _), _ = apply(params, state, X)
    for turned in orbit(group)[1:]:
        np.testing.assert_array_equal(apply(params, state, turned)[0][0], logits)


def test_parameters_state_and_the_order_of_things():
    model, params, state, apply = built()
    assert set(params) == set(state) == {"scorer", "predictor"}
    assert type(params) is type(state) is dict
    assert set(params["predictor"]) == {"dense", "norm", "head"}
    assert params["scorer"]["template"].shape == X.shape[1:]
    assert set(state["predictor"]) == {"batch_stats"}
    assert state["scorer"] == {}
    (logits, canonical), after = apply(params, state, X)
    assert_same(after, state)
    # image → scores → pose → canonical input → preprocessing → prediction
    scores, _ = model.scorer.apply(params["scorer"], {}, X)
    np.testing.assert_allclose(canonical.scores, scores, atol=1e-5)
    pose = canonicalization.select_pose(model.group, scores)
    np.testing.assert_array_equal(canonical.pose, pose)
    x0 = canonicalization.canonicalize(model.group, pose, X)
    np.testing.assert_array_equal(canonical.inputs, x0)
    variables = {"params": params["predictor"], **state["predictor"]}
    np.testing.assert_allclose(logits, Linen().apply(variables, preprocess(x0)), atol=1e-5)
    only, _ = jax.jit(model.canonicalize)(params, state, X)
    np.testing.assert_array_equal(only.inputs, canonical.inputs)


def test_a_pretrained_predictor_is_taken_as_it_is():
    def refuse(key, x):
        raise AssertionError("a pretrained predictor is not initialised")

    linen = ea.from_linen(Linen())
    given = linen.init(KEY, X)
    model = model_of(predictor=ea.Network(refuse, linen.apply))
    params, state = model.init(jax.random.key(9), X, predictor=given)
    assert params["predictor"] is given[0]
    assert state["predictor"] is given[1]
    expected, _ = model.scorer.init(jax.random.split(jax.random.key(9))[0], X)
    assert_same(params["scorer"], expected)


def train_loss(model, params, state, key, x=X):
    (logits, canonical), after = model.apply(params, state, x, train=True, key=key)
    return ((logits - 1) ** 2).sum(), (logits, canonical, after)


@functools.cache
def training(**options):
    """Jitted value and gradient of a training step."""
    model = built(**options)[0]
    step = jax.value_and_grad(functools.partial(train_loss, model), has_aux=True)
    return jax.jit(step)


def test_a_frozen_predictor_stays_as_it_is_and_passes_gradients_on():
    _, params, state, apply = built(freeze_predictor=True)
    step = training(freeze_predictor=True)
    (_, (logits, _, after)), gradient = step(params, state, jax.random.key(1))
    assert norm(gradient["predictor"]) == 0.0
    assert norm(gradient["scorer"]) > 1e-3
    assert_same(after, state)
    # No dropout and running averages: as in inference, whatever the key.
    np.testing.assert_allclose(logits, apply(params, state, X)[0][0], atol=1e-5)
    (_, (again, _, _)), _ = step(params, state, jax.random.key(2))
    np.testing.assert_array_equal(again, logits)


def test_a_free_predictor_trains():
    _, params, state, apply = built()
    (_, (logits, _, after)), gradient = training()(params, state, jax.random.key(1))
    for part in ("dense", "norm", "head"):
        assert norm(gradient["predictor"][part]) > 1e-3
    assert norm(gradient["scorer"]) > 1e-3
    assert norm(after["predictor"]["batch_stats"]["norm"]["mean"]) > 1e-3
    assert after["scorer"] == {}
    (_, (again, _, _)), _ = training()(params, state, jax.random.key(2))
    assert (again != logits).any()  # dropout
    for key in (None, jax.random.key(1)):  # and none of this outside training
        (_, _), after = apply(params, state, X, train=False, key=key)
        assert_same(after, state)


def test_the_gradient_of_the_scorer_is_that_of_the_weights():
    """The chain is scores → weights → canonical inputs → frozen predictor, nothing else."""
    model, params, state, _ = built(freeze_predictor=True, temperature=0.5)

    def loss(template):
        scores, _ = model.scorer.apply({"template": template}, {}, X)
        w = jax.nn.softmax(scores / 0.5, -1)
        hard = jax.nn.one_hot(jnp.argmax(scores, -1), 4)
        w = hard + w - jax.lax.stop_gradient(w)
        x0 = sum(
            w[:, g, None, None, None] * ea.actions.images.act(model.group, -g % 4, X)
            for g in range(4)
        )
        logits, _ = model.predict(params, state, x0)
        return ((logits - 1) ** 2).sum()

    step = training(freeze_predictor=True, temperature=0.5)
    gradient = step(params, state, None)[1]["scorer"]["template"]
    expected = jax.jit(jax.grad(loss))(params["scorer"]["template"])
    np.testing.assert_allclose(gradient, expected, atol=1e-5 * np.abs(expected).max())


def test_gumbel_noise_is_drawn_only_while_training():
    model, params, state, apply = built(freeze_predictor=True, method="gumbel", temperature=2.0)
    params = jax.tree.map(lambda a: a / 100, params)  # scores close enough for noise to matter
    (logits, best), _ = apply(params, state, X)
    np.testing.assert_array_equal(best.pose, best.scores.argmax(-1))
    keys = [jax.random.key(k) for k in range(12)]
    for key in keys[:4]:
        (again, canonical), _ = apply(params, state, X, key=key)
        np.testing.assert_array_equal(canonical.pose, best.pose)
        np.testing.assert_array_equal(again, logits)
    train = functools.partial(apply, params, state, X, train=True)
    poses = np.stack([train(key=key)[0][1].pose for key in keys])
    assert (poses != np.asarray(best.pose)).any()
    assert len(np.unique(poses[:, 0])) > 1
    assert any(len(np.unique(row)) > 1 for row in poses.T)
    np.testing.assert_array_equal(train(key=keys[0])[0][1].pose, poses[0])
    with pytest.raises(ValueError, match="pass key="):
        model.apply(params, state, X, train=True)


def test_soft_weights_mix_only_while_training():
    model, params, state, apply = built(freeze_predictor=True, method="soft", temperature=3.0)
    (_, hard), _ = apply(params, state, X)
    assert set(np.ravel(hard.weights)) == {0.0, 1.0}
    (_, soft), _ = apply(params, state, X, train=True)
    np.testing.assert_allclose(soft.weights, jax.nn.softmax(soft.scores / 3.0, -1), rtol=1e-5)
    mixed = canonicalization.mixture(model.group, soft.weights, X)
    np.testing.assert_allclose(soft.inputs, mixed, atol=1e-5)
    np.testing.assert_array_equal(soft.pose, hard.pose)


def test_pad_and_fill_reach_the_images():
    group = Cyclic(8)
    edge, constant = (
        ea.adapt(group, template_scorer(group), ea.from_function(lambda p, x: x), **options)
        for options in ({}, {"pad": "constant", "fill": 0.25})
    )
    params, state = edge.init(KEY, X)
    (y, canonical), _ = jax.jit(constant.apply)(params, state, X)
    assert (canonical.pose % 2 == 1).any()
    expected = canonicalization.canonicalize(group, canonical.pose, X, pad="constant", fill=0.25)
    np.testing.assert_allclose(y, expected, atol=1e-6)
    assert (y != jax.jit(edge.apply)(params, state, X)[0][0]).any()


def test_the_model_under_vmap():
    model, params, state, apply = built(freeze_predictor=True, method="gumbel", temperature=2.0)

    def one(x, key):
        (logits, canonical), _ = model.apply(params, state, x[None], train=True, key=key)
        return logits[0], canonical.pose[0], canonical.inputs[0]

    keys = jax.random.split(jax.random.key(0), len(X))
    logits, poses, inputs = jax.jit(jax.vmap(one))(X, keys)
    for i in range(len(X)):
        expected, pose, x0 = jax.jit(one)(X[i], keys[i])
        np.testing.assert_allclose(logits[i], expected, atol=1e-4)
        assert poses[i] == pose
        np.testing.assert_array_equal(inputs[i], x0)

    over_keys = jax.vmap(lambda k: model.apply(params, state, X, train=True, key=k)[0][1].pose)
    expected = [apply(params, state, X, train=True, key=k)[0][1].pose for k in keys]
    np.testing.assert_array_equal(jax.jit(over_keys)(keys), np.stack(expected))


def test_shapes_without_computing():
    model = built()[0]
    images = jax.ShapeDtypeStruct((16, 6, 6, 2), jnp.float32)
    params, state = jax.eval_shape(model.init, KEY, images)
    (logits, canonical), after = jax.eval_shape(
        functools.partial(model.apply, train=True), params, state, images, key=KEY
    )
    assert logits.shape == (16, 3)
    assert canonical.inputs.shape == images.shape
    assert (canonical.pose.shape, canonical.pose.dtype) == ((16,), jnp.int32)
    assert canonical.scores.shape == canonical.weights.shape == (16, 4)
    assert jax.tree.structure(after) == jax.tree.structure(state)


def test_other_values_do_not_compile_again():
    model, params, state, _ = built()
    apply = jax.jit(lambda *args, **options: model.apply(*args, train=True, **options))
    for seed in range(3):
        _, state = apply(params, state, noise(*X.shape, seed=seed), key=jax.random.key(seed))
        params = jax.tree.map(lambda a: a * 1.1, params)
    assert apply._cache_size() == 1


@pytest.mark.parametrize("train", [False, True])
def test_nnx_predictors_behind_a_scorer(train):
    predictor = ea.from_nnx(lambda rngs: nnx.Linear(72, 3, rngs=rngs))
    flatten = lambda x: x.reshape(len(x), -1)  # noqa: E731
    model = ea.adapt(Cyclic(4), template_scorer(Cyclic(4)), predictor, preprocess=flatten)
    params, state = model.init(KEY, X)
    apply = jax.jit(functools.partial(model.apply, train=train))
    results = [apply(params, state, x, key=KEY)[0][0] for x in orbit(Cyclic(4))]
    assert all(np.asarray(r).tobytes() == np.asarray(results[0]).tobytes() for r in results)


REFUSED = {
    "another output": ({"output": "vector"}, ValueError, "output='vector' is not available"),
    "another method": ({"method": "hard"}, ValueError, "Unknown method 'hard'.*straight_through"),
    "another weighting": (
        {"weighting": "best"}, ValueError, "Unknown weighting 'best': choose one of .*sampled"),
    "no pose": ({"poses": 0}, ValueError, "poses=0: average over 1 to 4 of cyclic4, or None"),
    "no chunk": ({"chunk": 0}, ValueError, "chunk=0 does not divide the 1 poses"),
    "predictions of a predictor that is trained": (
        {"method": "predictions"}, ValueError, "give freeze_predictor=True"),
    "a module as the scorer": ({"scorer": nn.Dense(4)}, TypeError, "scorer is a Dense: wrap it"),
    "a function as the predictor": (
        {"predictor": lambda x: x}, TypeError, "predictor is a function.*from_linen, from_nnx or"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_adapted_is_refused_with_a_sentence(case):
    options, error, sentence = REFUSED[case]
    parts = {"scorer": template_scorer(Cyclic(4)), "predictor": ea.from_linen(Linen()), **options}
    with pytest.raises(error, match=sentence):
        ea.adapt(Cyclic(4), parts.pop("scorer"), parts.pop("predictor"), **parts)


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, bool])
def test_images_of_integers_are_refused(dtype):
    model, params, state, _ = built()
    for function in (model.apply, model.canonicalize):
        with pytest.raises(TypeError, match=r"are not the floats in \[0, 1\] .*: divide 8-bit"):
            function(params, state, X.astype(dtype))


@pytest.mark.parametrize(
    ("shape", "sentence"),
    [
        ((2, 3, 17, 17), r"channels seem to come first: give images.transpose\(0, 2, 3, 1\)"),
        ((2, 1, 64, 48), "channels seem to come first"),
        ((2, 4, 32, 32), "channels seem to come first"),
        ((8, 8, 1), r"got \(8, 8, 1\): give a single one as image\[None\]"),
        ((1, 2, 8, 8, 1), r"got \(1, 2, 8, 8, 1\): give a single one"),
    ],
)
def test_images_with_other_axes_are_refused(shape, sentence):
    model, params, state, _ = built()
    images = jnp.zeros(shape)
    for function in (model.apply, model.canonicalize, model.predict, jax.jit(model.apply)):
        with pytest.raises(ValueError, match=sentence):
            function(params, state, images)
    with pytest.raises(ValueError, match=sentence):
        model.init(jax.random.key(0), images)


@pytest.mark.parametrize("shape", [(2, 4, 40, 16), (2, 4, 16, 40), (2, 5, 17, 17)])
def test_images_of_few_rows_or_many_channels_are_taken(shape):
    half_turn = Cyclic(2)
    scorer = ea.from_function(lambda params, x: jnp.zeros((len(x), 2)))
    model = ea.adapt(half_turn, scorer, ea.from_function(lambda params, x: x.mean((1, 2))))
    params, state = model.init(jax.random.key(0), jnp.zeros(shape))
    assert model.apply(params, state, jnp.zeros(shape))[0][0].shape == (2, shape[-1])


def test_a_predictor_given_without_its_state_is_refused():
    model = ea.adapt(C4, ea.from_function(lambda p, x: x), ea.from_function(lambda p, x: x))
    with pytest.raises(TypeError, match=r"predictor is a dict: give \(params, state\)"):
        model.init(jax.random.key(0), jnp.zeros((1, 4, 4, 1)), predictor={"w": 1})
