"""Predictions that turn with the image: ρ(h(x))·p(h(x)⁻¹·x), against the formula by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import equiadapt_jax as ea
from equiadapt_jax import canonicalization, outputs, representations
from equiadapt_jax.actions import fields, images, squares, vectors
from equiadapt_jax.groups import Cyclic, Dihedral
from tests.test_adaptation import template_scorer

C4, D4 = Cyclic(4), Dihedral(4)
OUTPUTS = [
    "trivial", "sign", "standard", "irrep2_sign", "regular",
    "field:trivial", "field:standard", "field:irrep2", "field:regular",
]  # fmt: skip


def noise(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


X = noise(3, 6, 6, 2)


def predictor_of(group, output):
    """Something that turns with nothing, of the output's shape; maps of half the resolution."""
    d = representations.dimension(group, output.removeprefix("field:"))
    if not output.startswith("field:"):
        weight = noise(6, 6, 2, 3, d, seed=5)
        return lambda params, x: jnp.tanh(jnp.einsum("bhwc,hwckd->bkd", x, weight))
    weight = noise(3, 3, 8, 2 * d, seed=5)

    def maps(params, x):
        blocks = x.reshape(-1, 3, 2, 3, 2, 2).transpose(0, 1, 3, 2, 4, 5).reshape(-1, 3, 3, 8)
        y = jnp.tanh((blocks[..., None] * weight).sum(-2))
        return y if output == "field:trivial" else y.reshape(*y.shape[:-1], d, 2)

    return maps


def by_hand(group, output, g, y):
    """ρ(g)·y for one element, without the module under test."""
    name = output.removeprefix("field:")
    if output.startswith("field:"):
        return fields.act(group, g, y, representation=name)
    return vectors.act(group, g, y, representation=name)


def model_of(group, output, **options):
    scorer = template_scorer(group)
    predictor = ea.from_function(predictor_of(group, output))
    model = ea.adapt(group, scorer, predictor, output=output, **options)
    return model, {"scorer": {"template": noise(6, 6, 2, seed=9)}, "predictor": {}}


STATE = {"scorer": {}, "predictor": {}}


@pytest.mark.parametrize("output", OUTPUTS)
def test_predictions_turn_with_the_image_to_the_bit(output):
    """By every element of D4, whatever the predictor, and for averages over poses too."""
    for options in ({}, {"poses": 3}):
        model, params = model_of(D4, output, **options)
        apply = jax.jit(model.apply)
        (y, canonical), _ = apply(params, STATE, X)
        for g in (1, 3, 4, 6):
            (turned, other), _ = apply(params, STATE, images.act(D4, g, X))
            np.testing.assert_array_equal(other.pose, D4.compose(g, canonical.pose))
            np.testing.assert_array_equal(turned, by_hand(D4, output, g, y))
        assert output == "trivial" or (np.asarray(turned) != y).any()


@pytest.mark.parametrize("output", ["standard", "field:standard", "field:regular"])
def test_predictions_are_the_formula_and_averages_its_loops(output):
    group = Cyclic(8)
    model, params = model_of(group, output)
    (y, canonical), _ = model.apply(params, STATE, X)
    predict = predictor_of(group, output)
    each = [
        [
            by_hand(group, output, g, predict(None, images.act(group, -g % 8, x[None]))[0])
            for g in range(8)
        ]
        for x in X
    ]
    each = np.asarray(each)
    chosen = np.stack([row[g] for row, g in zip(each, np.asarray(canonical.pose), strict=True)])
    np.testing.assert_allclose(y, chosen, atol=1e-5)
    scores = np.asarray(canonical.scores, np.float64)
    for poses, chunk in ((3, None), (4, 2)):
        averaged, _ = model_of(group, output, poses=poses, chunk=chunk)
        (y, _), _ = averaged.apply(params, STATE, X)
        for i, row in enumerate(scores):
            best = np.argsort(-row)[:poses]
            weights = np.exp(row[best] - row[best[0]])
            expected = (weights / weights.sum()) @ each[i][best].reshape(poses, -1)
            np.testing.assert_allclose(np.ravel(y[i]), expected, atol=1e-5)


@pytest.mark.parametrize("output", ["standard", "field:standard"])
def test_a_scorer_of_features_carries_every_known_prediction_back(output):
    predict = predictor_of(C4, output)
    network = ea.from_function(
        predict, features=lambda params, x: (predict(params, x), (x[:, :2, :2],))
    )
    scorer = ea.from_function(lambda params, seen: (seen * params["w"]).sum(-1))
    params = {"scorer": {"w": noise(8, seed=2)}, "predictor": {}}
    read = lambda maps, y: maps[0].reshape(maps[0].shape[0], -1)  # noqa: E731
    parts = (C4, scorer, network)
    for options in ({}, {"poses": 2}, {"poses": None}):
        model = ea.adapt(*parts, output=output, features=read, **options)
        (y, canonical), _ = model.apply(params, STATE, X)
        (turned, other), _ = model.apply(params, STATE, np.rot90(X, 1, (1, 2)))
        np.testing.assert_array_equal(other.pose, (canonical.pose + 1) % 4)
        np.testing.assert_array_equal(turned, by_hand(C4, output, 1, y))
    single = ea.adapt(*parts, output=output, features=read, freeze_predictor=True)
    (y, canonical), _ = single.apply(params, STATE, X)
    plain = np.stack([
        by_hand(C4, output, int(g), predict(None, images.act(C4, -int(g) % 4, x[None]))[0])
        for g, x in zip(canonical.pose, X, strict=True)
    ])  # fmt: skip
    np.testing.assert_allclose(y, plain, atol=1e-5)
    (trained, _), _ = single.apply(params, STATE, X, train=True)
    np.testing.assert_allclose(trained, plain, atol=1e-5)


@pytest.mark.parametrize("method", ["straight_through", "soft"])
@pytest.mark.parametrize("output", ["standard", "field:standard"])
def test_the_gradient_of_the_scorer_passes_both_turns(method, output, x64):
    """That of Σ_g w_g ρ(g) p(Σ_h w_h h⁻¹·x), written out: forward and backward."""
    x, template = X.astype(np.float64), noise(6, 6, 2, seed=9).astype(np.float64)
    model, _ = model_of(C4, output, method=method, temperature=2.0)
    predict = predictor_of(C4, output)

    def loss(template):
        params = {"scorer": {"template": template}, "predictor": {}}
        (y, _), _ = model.apply(params, STATE, x, train=True, key=jax.random.key(0))
        return ((y - 0.3) ** 2).sum()

    def written_out(template):
        scores, _ = model.scorer.apply({"template": template}, {}, x)
        w = jax.nn.softmax(scores / 2.0, -1)
        if method != "soft":
            w = jax.nn.one_hot(jnp.argmax(scores, -1), 4) + w - jax.lax.stop_gradient(w)
        mixed = [w[:, g, None, None, None] * images.act(C4, -g % 4, x) for g in range(4)]
        y0 = predict(None, sum(mixed))
        shape = (-1, *[1] * (y0.ndim - 1))
        y = sum(w[:, g].reshape(shape) * by_hand(C4, output, g, y0) for g in range(4))
        return ((y - 0.3) ** 2).sum()

    found, wanted = jax.value_and_grad(loss)(template), jax.value_and_grad(written_out)(template)
    np.testing.assert_allclose(found[0], wanted[0], rtol=1e-10)
    np.testing.assert_allclose(found[1], wanted[1], atol=1e-9 * np.abs(wanted[1]).max())
    assert np.abs(wanted[1]).max() > 1e-3


def test_a_flow_may_come_without_an_axis_of_channels():
    y, g = noise(4, 5, 5, 2), np.arange(4)
    expected = fields.act(C4, g, y[..., None], representation="standard")[..., 0]
    np.testing.assert_array_equal(outputs.act(C4, g, y, output="field:standard"), expected)


# ---- images that are not square ----


def pixelwise(params, x):
    """Maps at full resolution that see where they are: a shear of neighbours."""
    return jnp.concatenate([x + 2 * jnp.roll(x, 1, 2), x - jnp.roll(x, 1, 1)], -1)


def scores_of(group, size):
    net = template_scorer(group)
    return net, {"scorer": {"template": noise(size, size, 1, seed=4)}, "predictor": {}}


@pytest.mark.parametrize("output", ["field:trivial", "field:standard"])
def test_oblong_images_are_predicted_as_squares_and_cut_again(output):
    scorer, params = scores_of(D4, 6)
    model = ea.adapt(D4, scorer, ea.from_function(pixelwise), output=output)
    x = noise(3, 4, 6, 1)
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)[0]
    assert shapes["scorer"]["template"].shape == (6, 6, 1)
    (y, canonical), _ = model.apply(params, STATE, x)
    assert y.shape == (3, 4, 6, 2)
    assert canonical.inputs.shape == (3, 6, 6, 1)
    whole = squares.from_images(x)
    (square, again), _ = model.apply(params, STATE, whole)
    np.testing.assert_array_equal(canonical.inputs, again.inputs)
    np.testing.assert_array_equal(y, square[:, 1:5])
    # A quarter turn of the oblong image turns its prediction.
    (turned, _), _ = model.apply(params, STATE, np.rot90(x, 1, (1, 2)))
    expected = np.rot90(y, 1, (1, 2))
    if output == "field:standard":
        expected = np.stack([expected[..., 1], -expected[..., 0]], -1)
    np.testing.assert_array_equal(turned, expected)
    # The predictor alone sees the square too, and is cut as well.
    alone, _ = model.predict(params, STATE, x)
    np.testing.assert_array_equal(alone, pixelwise(None, whole)[:, 1:5])


def test_groups_that_need_no_square_leave_the_shape():
    group = Dihedral(2)
    scorer = ea.from_function(lambda p, x: images.orbit(group, x)[..., 0, 0, 0])
    model = ea.adapt(group, scorer, ea.from_function(pixelwise), output="field:trivial")
    x = noise(2, 4, 6, 1)
    (y, canonical), _ = model.apply({"scorer": {}, "predictor": {}}, STATE, x)
    assert canonical.inputs.shape == x.shape
    for i, g in enumerate(np.asarray(canonical.pose)):
        x0 = canonicalization.canonicalize(group, int(g), x[i])
        expected = images.act(group, int(g), pixelwise(None, x0[None])[0])
        np.testing.assert_allclose(y[i], expected, atol=1e-6)


# ---- the disk ----


@pytest.mark.parametrize("poses", [1, 2])
@pytest.mark.parametrize("from_features", [False, True])
def test_in_a_disk_nothing_depends_on_corners(from_features, poses):
    group, size = Cyclic(8), 9
    flat = lambda params, x: x.reshape(len(x), -1) @ noise(size * size, 3, seed=1)  # noqa: E731
    with_features = lambda params, x: (flat(params, x), (x,))  # noqa: E731
    options = {"mask": "disk", "fill": 0.5, "poses": poses}
    scorer, params = scores_of(group, size)
    if from_features:
        scorer = ea.from_function(lambda params, seen: jnp.tanh(seen).sum(-1))
        options["features"] = lambda maps, y: y
    model = ea.adapt(group, scorer, ea.from_function(flat, features=with_features), **options)
    x = noise(2, size, size, 1) + 0.5
    place = np.arange(size) - (size - 1) / 2
    outside = np.hypot(place[:, None], place) >= size / 2
    other = np.where(outside[..., None], noise(2, size, size, 1, seed=7), x)
    assert outside.sum() == 12
    apply = jax.jit(model.apply)
    (y, canonical), _ = apply(params, STATE, x)
    (again, _), _ = apply(params, STATE, other)
    np.testing.assert_array_equal(y, again)
    # What is turned in from outside is fill too.
    far = np.hypot(place[:, None], place) >= size / 2 + 1
    assert far.sum() == 4
    assert (np.asarray(canonical.inputs)[:, far] == 0.5).all()
    alone = functools.partial(model.predict, params, STATE)
    assert (np.asarray(alone(x)[0]) != alone(other)[0]).any()  # as it was, whole images


REFUSED = {
    "another output": (lambda: ea.adapt(*parts(), output="vector"),
                       "output='vector' is not available: Unknown representation 'vector': there"),
    "an order too high": (lambda: ea.adapt(*parts(), output="field:irrep9"),
                          "output='field:irrep9' is not available: 'irrep9' is not irreducible"),
    "another mask": (lambda: ea.adapt(*parts(), mask="circle"), "Unknown mask 'circle'.*'disk'"),
    "logits as a direction": (lambda: outputs.act(C4, 0, noise(8, 10), output="standard"),
                              r"\(8, 10\); for output='standard' over cyclic4 it must be "
                              r"\(B, \.\.\., 2\)"),
    "logits as maps": (lambda: outputs.act(C4, 0, noise(8, 10), output="field:trivial"),
                       r"it must be \(B, T, T, C\)"),
    "maps as a flow": (lambda: outputs.act(C4, 0, noise(8, 5, 5, 3), output="field:standard"),
                       r"it must be \(B, T, T, 2\) or \(B, T, T, 2, C\)"),
}  # fmt: skip


def parts():
    return C4, template_scorer(C4), ea.from_function(lambda params, x: x)


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_with_a_sentence(case):
    function, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        function()
