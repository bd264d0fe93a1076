"""Models adapted to SO(2) and O(2), with a scorer whose vectors are known in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import equiadapt_jax as ea
from equiadapt_jax import canonicalization, representations
from equiadapt_jax.actions import annotations, fields, images, vectors
from equiadapt_jax.groups import SO, Cyclic, Dihedral, O
from tests.test_matrix_groups import exact, noise, sample

GROUPS = [SO(2), O(2)]
SIZE = 48
SMALL = ea.networks.SteerableNet


def grid(size):
    """Places (x to the right, y down) from the centre, `(size, size, 2)`."""
    middle = np.arange(size) - (size - 1) / 2
    return np.stack(np.meshgrid(middle, middle), -1)


def smooth(places, shortest, seed, count=8):
    """A sum of plane waves of at least this length at places `(..., 2)`."""
    rng = np.random.default_rng(seed)
    frequency = 2 * np.pi / shortest * np.sqrt(rng.uniform(size=count))
    direction, phase = rng.uniform(0, 2 * np.pi, (2, count))
    waves = np.stack([np.cos(direction), np.sin(direction)]) * frequency
    return np.cos(places @ waves + phase).mean(-1)


def window(size):
    """1 at the centre, smoothly to 0 at the edge of the disk."""
    return np.clip(1 - (np.linalg.norm(grid(size), axis=-1) / (size / 2)) ** 2, 0, None) ** 2


def turned(elements, seed=0, size=SIZE):
    """A smooth image under every element: (g·x)(p) = x(g⁻¹p), without any interpolation."""
    return np.stack([0.5 + smooth(grid(size) @ g, 24, seed) for g in elements])[..., None]


def moments(group, size=SIZE):
    """Vectors Σ_p f(|p|) x(p) p, which turn with the image; parameters weigh the rings of f."""
    rows, radius = (2 if group == O(2) else 1), np.linalg.norm(grid(size), axis=-1) / (size / 2)
    rings = window(size) * np.stack([np.cos(2 * np.pi * k * radius**2) for k in range(4)])

    def init(key, x):
        return {"w": jax.random.normal(key, (rows, 4), x.dtype)}

    def apply(params, x):
        weights = jnp.asarray(rings[..., None] * grid(size), x.dtype) / size
        return jnp.einsum("kr,rijd,bijc->bkd", params["w"], weights, x)

    return ea.from_function(apply, init)


def readout(outputs=3, size=SIZE):
    """A smooth predictor: the image in a window, read by smooth weights."""
    weights = np.stack([smooth(grid(size), 20, seed=50 + k) for k in range(outputs)], -1)
    weights = weights * window(size)[..., None] / size

    def apply(params, x):
        return jnp.tanh(params["a"] * jnp.einsum("bijc,ijk->bk", x, jnp.asarray(weights, x.dtype)))

    return ea.from_function(apply, lambda key, x: {"a": jnp.ones((), x.dtype)})


def built(group, predictor=None, scorer=None, images=None, **options):
    model = ea.adapt(group, scorer or moments(group), predictor or readout(), **options)
    images = noise(1, SIZE, SIZE, 1, dtype=np.float64) if images is None else images
    params, state = model.init(jax.random.key(3), jnp.asarray(images))
    return model, params, state, jax.jit(model.apply, static_argnames="train")


def bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


# ---- what it computes ----


@pytest.mark.parametrize("group", GROUPS, ids=str)
def test_poses_and_predictions_of_turned_images(group, x64):
    """h(g·x) = g·h(x) by any angle, and f(g·x) = f(x) to within the interpolation."""
    elements = np.concatenate([np.eye(2)[None], sample(group, 12, np.float64)])
    model, params, state, apply = built(group, interpolation="cubic")
    for seed in range(3):
        (y, canonical), after = apply(params, state, turned(elements, seed))
        pose = np.asarray(canonical.pose)
        np.testing.assert_allclose(pose, elements @ pose[0], atol=1e-4)
        np.testing.assert_allclose(y, np.broadcast_to(y[0], y.shape), atol=2e-3)
        assert np.abs(y).max() > 0.05
        assert after == {"scorer": {}, "predictor": {}}
        assert canonical.weights is None
        found = model.scorer.apply(params["scorer"], {}, turned(elements, seed))[0]
        np.testing.assert_allclose(canonical.scores, found, atol=1e-12)


@pytest.mark.parametrize("group", GROUPS, ids=str)
def test_the_prediction_is_the_formula_by_hand(group, x64):
    x = turned(sample(group, 4, np.float64))
    model, params, state, apply = built(
        group, preprocess=lambda x: 2 * x - 1, pad="constant", fill=0.3
    )
    (y, canonical), _ = apply(params, state, x)
    v = model.scorer.apply(params["scorer"], {}, x)[0]
    pose = canonicalization.frame(group, v)
    x0 = images.act(group, group.inverse(pose), x, pad="constant", fill=0.3)
    np.testing.assert_allclose(canonical.inputs, x0, atol=1e-12)
    expected = model.predictor.apply(params["predictor"], {}, 2 * x0 - 1)[0]
    np.testing.assert_allclose(y, expected, atol=1e-12)
    only, _ = model.canonicalize(params, state, x)
    np.testing.assert_allclose(only.pose, pose, atol=1e-12)


@pytest.mark.parametrize("group", GROUPS, ids=str)
def test_training_and_inference_see_the_same_bits(group):
    x = turned(sample(group, 3)).astype(np.float32)
    _, params, state, apply = built(group, images=x)
    trained = apply(params, state, x, train=True, key=jax.random.key(0))
    assert bits(trained) == bits(apply(params, state, x))


def small(group):
    return ea.from_linen(SMALL(group, layers=((2, 4, 2),), rings=2, hidden=4))


FIELDS = {
    "field:trivial": lambda x: x[:, ::2, ::2] ** 2,
    "field:standard": lambda x: x[:, ::2, ::2, :, None] * jnp.ones(2),
    "field:irrep2": lambda x: jnp.sin(x[:, :4, 1:5]),
}


def by_hand(group, output, g, y):
    """ρ(g)·y for one element, without the module under test."""
    name = output.removeprefix("field:")
    if output not in FIELDS:
        return vectors.act(group, g, y, representation=name)
    whole = y if name == "trivial" or y.ndim == 5 else y[..., None]
    return fields.act(group, g, whole, representation=name).reshape(y.shape)


@pytest.mark.parametrize("group", GROUPS, ids=str)
@pytest.mark.parametrize("output", ["trivial", "standard", "irrep2", "sign", *FIELDS])
def test_predictions_turn_by_exact_elements(group, output):
    """By quarter turns and for O(2) mirrors: inputs, poses and vectors to the bit."""
    x = noise(3, 8, 8, 2)
    dimension = representations.dimension(group, output.removeprefix("field:"))
    weight = noise(8, 8, 2, 3, dimension, seed=5) - 0.5
    read = lambda x: jnp.einsum("bijc,ijckd->bkd", x, weight)  # noqa: E731
    predictor = ea.from_function(lambda params, x: FIELDS.get(output, read)(x))
    _, params, state, apply = built(group, predictor, small(group), x, output=output)
    (y, canonical), _ = apply(params, state, x)
    tolerance = 0 if output in ("trivial", "standard", "sign") else 1e-5
    for i, q in enumerate(np.float32(exact(group))):
        moved = np.rot90(x[:, :, ::-1] if i >= 4 else x, i % 4, (1, 2)).copy()
        (other, found), _ = apply(params, state, moved)
        np.testing.assert_array_equal(found.inputs, canonical.inputs)
        np.testing.assert_array_equal(found.pose, q @ np.asarray(canonical.pose))
        expected = by_hand(group, output, q, y)
        np.testing.assert_allclose(other, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("group", GROUPS, ids=str)
def test_directions_turn_by_any_angle(group, x64):
    """F(g·x) = ρ(g)·f(x) for a predictor of directions."""
    elements = np.concatenate([np.eye(2)[None], sample(group, 8, np.float64)])
    _, params, state, apply = built(group, readout(2), output="standard", interpolation="cubic")
    (y, _), _ = apply(params, state, turned(elements))
    np.testing.assert_allclose(y, elements @ np.asarray(y[0]), atol=2e-3)


@pytest.mark.parametrize("group", GROUPS, ids=str)
def test_annotations_are_carried_by_the_pose(group, x64):
    """A keypoint of the canonical input, carried to the input, is where the input shows it."""
    elements = np.concatenate([np.eye(2)[None], sample(group, 6, np.float64)])
    _, params, state, apply = built(group)
    (_, canonical), _ = apply(params, state, turned(elements))
    point = np.broadcast_to([17.0, 30.0], (len(elements), 2))
    found = annotations.act_on_keypoints(group, canonical.pose, point, (SIZE, SIZE)) - 23.5
    np.testing.assert_allclose(found, elements @ np.asarray(found[0]), atol=1e-2)


@pytest.mark.parametrize("group", GROUPS, ids=str)
def test_under_vmap_and_without_computing(group):
    x = turned(sample(group, 3)).astype(np.float32)
    model, params, state, apply = built(group, images=x)
    (y, canonical), _ = apply(params, state, x)
    one = jax.jit(jax.vmap(lambda x: model.apply(params, state, x[None])[0]))
    each, found = one(x)
    np.testing.assert_allclose(each[:, 0], y, atol=1e-5)
    np.testing.assert_allclose(found.pose[:, 0], canonical.pose, atol=1e-5)
    shapes = jax.eval_shape(model.apply, params, state, x)[0][1]
    assert shapes.pose.shape == (3, 2, 2)
    assert shapes.scores.shape == (3, 2 if group == O(2) else 1, 2)


def test_images_that_are_not_square_are_predicted_as_squares():
    x = noise(2, 8, 6, 1)
    _, params, state, apply = built(
        SO(2), ea.from_function(lambda params, x: x), small(SO(2)), x, output="field:trivial"
    )
    (y, canonical), _ = apply(params, state, x)
    assert y.shape == x.shape
    assert canonical.inputs.shape == (2, 8, 8, 1)


# ---- gradients ----


@pytest.mark.parametrize("output", ["trivial", "standard"])
@pytest.mark.parametrize("group", GROUPS, ids=str)
def test_gradients_are_finite_differences(group, output, x64):
    """Of task and prior, to scorer, predictor and image, through matrix and sampling."""
    x, applied = turned(sample(group, 2, np.float64)), sample(group, 2, np.float64, seed=4)
    model, params, state, _ = built(group, readout(2), output=output)
    target = noise(2, 2, dtype=np.float64)
    prior = ea.priors.Identity()

    @jax.jit
    def loss(params, x):
        (y, canonical), _ = model.apply(params, state, x, train=True)
        return ((y - target) ** 2).sum() + prior.loss(group, canonical.scores, applied=applied)

    check_grads(loss, (params, x), 1, ("rev",), atol=1e-5, rtol=1e-5, eps=1e-7)


def test_a_frozen_predictor_gets_no_gradient_and_the_scorer_one():
    group, x = SO(2), turned(sample(SO(2), 2)).astype(np.float32)
    model, params, state, _ = built(group, images=x, freeze_predictor=True)
    slope = jax.jit(jax.grad(lambda p: model.apply(p, state, x, train=True)[0][0].sum()))(params)
    assert slope["predictor"]["a"] == 0
    assert (slope["scorer"]["w"] != 0).all()


# ---- scores that are refined ----


def bump(group, refined, size=SIZE):
    """Scores κ cos(θ_g − θ) about the frame of the moments, on its side of the mirror."""
    inner = moments(group, size)

    def apply(params, x):
        pose = canonicalization.frame(group, inner.apply(params, {}, x)[0])
        elements = refined.matrix(jnp.arange(refined.order), pose.dtype)
        cosine = (pose[:, None] * elements).sum((-2, -1)) / 2
        same = group.reflects(pose)[:, None] == group.reflects(elements)
        return jnp.where(same, 20 * cosine, -20)

    return ea.from_function(apply, lambda key, x: inner.init(key, x)[0])


@pytest.mark.parametrize(("group", "refined"), [(SO(2), Cyclic(16)), (O(2), Dihedral(12))], ids=str)
def test_refined_scores_find_any_angle(group, refined, x64):
    elements = np.concatenate([np.eye(2)[None], sample(group, 12, np.float64)])
    _, params, state, apply = built(group, scorer=bump(group, refined), refine=refined)
    (y, canonical), _ = apply(params, state, turned(elements))
    assert canonical.scores.shape == (13, refined.order)
    assert canonical.weights is None
    between = np.asarray(canonical.pose) @ np.linalg.inv(elements @ np.asarray(canonical.pose[0]))
    assert np.rad2deg(np.abs(SO(2).angle(between))).max() < 0.3  # steps are 22.5° and 30°
    np.testing.assert_allclose(np.linalg.det(between), 1, atol=1e-9)
    np.testing.assert_allclose(y, np.broadcast_to(y[0], y.shape), atol=2e-2)
    trained = apply(params, state, turned(elements), train=True)
    assert bits(trained) == bits(apply(params, state, turned(elements)))


@pytest.mark.parametrize(("group", "refined"), [(SO(2), Cyclic(8)), (O(2), Dihedral(8))], ids=str)
def test_refined_poses_turn_to_the_bit_by_exact_elements(group, refined):
    x = noise(3, 8, 8, 2)
    net = ea.networks.GroupConvNet(
        refined, features=(3, 3), kernels=(3, 3), strides=(1, 1), hidden=4
    )
    flat = ea.from_function(lambda params, x: x.reshape(len(x), -1))
    _, params, state, apply = built(group, flat, ea.from_linen(net), x, refine=refined)
    (y, canonical), _ = apply(params, state, x)
    for i, q in enumerate(np.float32(exact(group))):
        moved = np.rot90(x[:, :, ::-1] if i >= 4 else x, i % 4, (1, 2)).copy()
        (other, found), _ = apply(params, state, moved)
        np.testing.assert_array_equal(other, y)
        np.testing.assert_array_equal(found.pose, q @ np.asarray(canonical.pose))


# ---- refusals ----

COUNTED = {
    "an energy": {"scorer": ea.energies.Energy(ea.energies.confidence)},
    "features": {"features": lambda maps, y: y},
    "soft weights": {"method": "soft"},
    "a temperature": {"temperature": 2.0},
    "several poses": {"poses": 2},
    "all poses": {"poses": None},
    "sampled poses": {"weighting": "sampled"},
    "a chunk": {"chunk": 1},
    "a regular output": {"output": "regular"},
    "a regular field": {"output": "field:regular"},
}


@pytest.mark.parametrize("case", COUNTED)
@pytest.mark.parametrize("group", GROUPS, ids=str)
def test_what_needs_the_elements_counted_is_refused(group, case):
    options = dict(COUNTED[case])
    scorer = options.pop("scorer", moments(group))
    with pytest.raises(ValueError, match=f"needs a finite group, and {group} has infinitely many"):
        ea.adapt(group, scorer, readout(), **options)


@pytest.mark.parametrize(
    ("group", "refined", "sentence"),
    [
        (SO(2), Dihedral(8), "dihedral8 is no group to refine poses of so2 .* such as cyclic16"),
        (O(2), Cyclic(8), "cyclic8 is no group to refine poses of o2 .* such as dihedral16"),
        (SO(2), Cyclic(2), "of 3 rotations or more"),
        (SO(2), SO(2), "refine=so2 is no group"),
        (Cyclic(4), Cyclic(8), "refine=cyclic8 finds poses between elements, and cyclic4 has none"),
    ],
)
def test_groups_that_cannot_be_refined_are_refused(group, refined, sentence):
    with pytest.raises(ValueError, match=sentence):
        ea.adapt(group, moments(SO(2)), readout(), refine=refined)


def test_scorers_that_give_something_else_are_refused():
    x = noise(1, SIZE, SIZE, 1)
    scores = ea.from_function(lambda params, x: jnp.zeros((len(x), 16)))
    for group, options, sentence in (
        (SO(2), {}, r"Vectors of shape \(1, 16\) do not span a frame of so2"),
        (O(2), {}, r"do not span a frame of o2: give \(\.\.\., 2, 2\)"),
        (SO(2), {"refine": Cyclic(12)}, r"shape \(1, 16\) do not fit cyclic12"),
    ):
        model = ea.adapt(group, scores, readout(), **options)
        params, state = model.init(jax.random.key(0), x)
        with pytest.raises(ValueError, match=sentence):
            model.apply(params, state, x)


def test_a_single_image_without_a_direction_is_left_as_it_is():
    """Of a constant image the moments vanish: the pose is the identity, gradients are finite."""
    x = np.full((1, SIZE, SIZE, 1), 0.5, np.float32)
    model, params, state, apply = built(SO(2), images=x)
    (_, canonical), _ = apply(params, state, x)
    np.testing.assert_array_equal(canonical.inputs, x)
    slope = jax.grad(lambda x: model.apply(params, state, x)[0][0].sum())(x)
    assert np.isfinite(slope).all()
