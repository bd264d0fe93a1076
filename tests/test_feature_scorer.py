"""A scorer on the predictor's features: what it reads, that it is exact, models made with it."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import equiadapt_jax as ea
from equiadapt_jax.groups import Cyclic, Dihedral
from equiadapt_jax.networks import FeatureScorer

KEY = jax.random.key(0, impl="rbg")
ResNet = functools.partial(
    ea.predictors.ResNet, stage_sizes=(1, 1), block="basic", width=4, stem="cifar"
)
ViT = functools.partial(ea.predictors.ViT, patch=4, width=8, depth=3, heads=2)


def noise(*shape, dtype=np.float32, seed=0):
    return np.random.default_rng(seed).uniform(size=shape).astype(dtype)


def model(group, module=ResNet, seed=0, **options):
    """(model, params, state) with a frozen predictor whose head the scorer reads."""
    scorer = FeatureScorer(group, grid=2, hidden=6, dropout=options.pop("dropout", 0.3))
    options = {"freeze_predictor": True, "poses": None, **options}
    made = ea.adapt(
        group, ea.from_linen(scorer), ea.from_linen(module(3)), features=scorer.read, **options
    )
    params, state = made.init(KEY, noise(2, 8, 8, 3))
    rng = np.random.default_rng(seed)
    params = jax.tree.map(lambda x: x + 0.3 * rng.normal(size=x.shape).astype(x.dtype), params)
    return made, params, state


def turned(group, g, x):
    """g·x by NumPy, for the exact groups of quarter turns."""
    x = x[:, :, ::-1] if g // group.n else x
    return np.rot90(x, g % group.n, (1, 2)).copy()


# ---- what is read ----


def average_of_cells(x, grid):
    """Averages over cells that may cut through pixels: every pixel in pieces of a fine raster."""
    fine = np.repeat(np.repeat(x, grid, 1), grid, 2)
    n, height, width, channels = fine.shape
    cells = fine.reshape(n, grid, height // grid, grid, width // grid, channels)
    return cells.mean((2, 4)).reshape(n, -1)


@pytest.mark.parametrize("grid", [1, 2, 3, 4])
def test_maps_of_any_size_are_averaged_over_cells_and_standardized(grid, x64):
    maps = [noise(2, 5, 7, 3, dtype=np.float64), noise(2, 8, 8, 2, dtype=np.float64, seed=1)]
    output = noise(2, 4, dtype=np.float64, seed=2)
    expected = []
    for x in maps:
        cells = average_of_cells(x, grid)
        centred = cells - cells.mean(-1, keepdims=True)
        expected.append(centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6))
    expected.append(output - np.log(np.exp(output).sum(-1, keepdims=True)))
    read = FeatureScorer(Cyclic(4), grid=grid).read(maps, output)
    np.testing.assert_allclose(read, np.concatenate(expected, -1), atol=1e-12)


def test_low_precision_features_are_read_in_float32():
    maps = [jnp.asarray(noise(2, 4, 4, 3), jnp.bfloat16)]
    read = FeatureScorer(Cyclic(4)).read(maps, jnp.zeros((2, 3), jnp.bfloat16))
    assert read.dtype == jnp.float32


def test_what_is_no_map_is_refused():
    with pytest.raises(ValueError, match=r"reads maps \(N, H, W, C\) and logits \(N, K\), got"):
        FeatureScorer(Cyclic(4)).read([noise(2, 4, 3)], noise(2, 3))
    with pytest.raises(ValueError, match="reads feature maps, and the predictor tells none: let"):
        FeatureScorer(Cyclic(4)).read([], noise(2, 3))


def test_features_of_another_group_are_refused():
    with pytest.raises(ValueError, match=r"features \(B, 8, F\).*got \(2, 4, 5\)"):
        FeatureScorer(Cyclic(8)).init(KEY, noise(2, 4, 5))


def test_scores_are_the_written_out_head(x64):
    group, features = Dihedral(3), noise(2, 6, 5, dtype=np.float64)
    scorer = FeatureScorer(group, hidden=4)
    shapes = jax.eval_shape(scorer.init, KEY, features)["params"]
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda x: rng.normal(size=x.shape), shapes)

    def layer(name, x):
        p, norm = params[name], params[f"{name}_norm"]
        x = x @ p["kernel"] + p["bias"]
        x = (x - x.mean()) / np.sqrt(x.var() + 1e-6) * norm["scale"] + norm["bias"]
        return np.asarray(jax.nn.gelu(x))

    expected = np.empty((2, 6))
    for i, image in enumerate(features):
        hidden = [layer("hidden", row) for row in image]
        for g in range(6):
            mixed = np.concatenate([hidden[group.compose(g, j)] for j in range(6)])
            expected[i, g] = (layer("mix", mixed) @ params["score"]["kernel"])[0]
    np.testing.assert_allclose(scorer.apply({"params": params}, features), expected, atol=1e-12)


# ---- features of networks ----


@pytest.mark.parametrize("module", [ResNet, functools.partial(ViT, registers=2)])
def test_features_come_with_the_output_of_inference(module):
    network = ea.from_linen(module(3))
    params, state = network.init(KEY, noise(2, 8, 8, 3))
    assert set(state) <= {"batch_stats"}  # nothing that was sown
    y, maps = network.features(params, state, noise(2, 8, 8, 3))
    np.testing.assert_array_equal(y, network.apply(params, state, noise(2, 8, 8, 3))[0])
    assert all(m.ndim == 4 for m in maps)
    sizes = [(m.shape[1], m.shape[3]) for m in maps]
    assert sizes == ([(8, 4), (4, 8)] if module is ResNet else [(2, 8)] * 3)


def test_patches_are_where_they_are_in_the_image():
    network = ea.from_linen(ViT(3, depth=1))
    params, state = network.init(KEY, noise(1, 8, 12, 3))
    params["blocks_0"] = jax.tree.map(jnp.zeros_like, params["blocks_0"])  # leaves tokens alone
    params["pos_embed"] = jnp.zeros_like(params["pos_embed"])
    image = noise(1, 8, 12, 3)
    (found,) = network.features(params, state, image)[1]
    kernel, bias = params["patch_embed"]["kernel"], params["patch_embed"]["bias"]
    for i in range(2):
        for j in range(3):
            patch = image[0, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4]
            expected = np.einsum("hwc,hwck->k", patch, kernel) + bias
            np.testing.assert_allclose(found[0, i, j], expected, atol=1e-5)


class Silent(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(x.mean((1, 2)))


def test_a_network_that_tells_no_features_is_refused():
    scorer = FeatureScorer(Cyclic(4))
    network = ea.from_function(lambda params, x: x.mean((1, 2)))
    with pytest.raises(ValueError, match="the predictor tells none"):
        ea.adapt(Cyclic(4), ea.from_linen(scorer), network, features=scorer.read)
    made = ea.adapt(Cyclic(4), ea.from_linen(scorer), ea.from_linen(Silent()), features=scorer.read)
    with pytest.raises(
        ValueError, match="FeatureScorer reads feature maps, and the predictor tells none"
    ):
        made.init(KEY, noise(1, 8, 8, 3))


def test_a_plain_function_gives_features():
    network = ea.from_function(
        lambda params, x: x.mean((1, 2)), features=lambda params, x: (x.mean((1, 2)), (x,))
    )
    scorer = FeatureScorer(Cyclic(4))
    made = ea.adapt(Cyclic(4), ea.from_linen(scorer), network, features=scorer.read)
    params, state = made.init(KEY, noise(2, 8, 8, 3))
    (logits, _), _ = made.apply(params, state, noise(2, 8, 8, 3))
    np.testing.assert_allclose(logits, noise(2, 8, 8, 3).mean((1, 2)), atol=1e-6)


# ---- models ----


@pytest.mark.parametrize("group", [Cyclic(4), Dihedral(4)], ids=str)
@pytest.mark.parametrize("module", [ResNet, ViT])
@pytest.mark.parametrize("poses", [1, 2, None])
def test_exact_turns_permute_scores_and_leave_predictions_bit_for_bit(group, module, poses):
    made, params, state = model(group, module, poses=poses)
    x = noise(3, 8, 8, 3)
    apply = jax.jit(made.apply)
    (logits, canonical), _ = apply(params, state, x)
    assert np.ptp(canonical.scores, -1).min() > 1e-3
    for g in range(group.order):
        (other, moved), _ = apply(params, state, turned(group, g, x))
        where = np.asarray(group.compose(g, np.arange(group.order)))
        np.testing.assert_array_equal(moved.scores[:, where], canonical.scores)
        np.testing.assert_array_equal(moved.inputs, canonical.inputs)
        np.testing.assert_array_equal(other, logits)


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_exactness_does_not_depend_on_how_a_batch_fills_a_processor(batch):
    group, x = Dihedral(4), noise(batch, 32, 32, 3)
    predictor = ea.from_linen(ea.predictors.ResNet.variant("resnet20", 3))
    scorer = FeatureScorer(group, grid=2, hidden=6)
    made = ea.adapt(group, ea.from_linen(scorer), predictor, features=scorer.read, poses=None)
    params, state = jax.jit(made.init)(KEY, x)
    apply = jax.jit(lambda x: made.apply(params, state, x)[0])
    logits, canonical = apply(x)
    for g in range(group.order):
        other, moved = apply(turned(group, g, x))
        where = np.asarray(group.compose(g, np.arange(group.order)))
        np.testing.assert_array_equal(moved.scores[:, where], canonical.scores)
        np.testing.assert_array_equal(other, logits)


def test_low_precision_stays_exact():
    group, module = Dihedral(4), functools.partial(ResNet, dtype=jnp.bfloat16)
    made, params, state = model(group, module)
    x = noise(3, 8, 8, 3)
    apply = jax.jit(made.apply)
    (logits, canonical), _ = apply(params, state, x)
    assert canonical.scores.dtype == jnp.float32
    for g in range(group.order):
        (other, moved), _ = apply(params, state, turned(group, g, x))
        where = np.asarray(group.compose(g, np.arange(group.order)))
        np.testing.assert_array_equal(moved.scores[:, where], canonical.scores)
        np.testing.assert_array_equal(other, logits)


@pytest.mark.parametrize("chunk", [None, 1, 2])
def test_predictions_for_every_pose_are_those_of_the_predictor(chunk):
    group = Cyclic(4)
    made, params, state = model(group, chunk=chunk)
    x = noise(3, 8, 8, 3)
    features, predictions = made.orbit_features(params, state, x)
    assert features.shape == (3, 4, 2 * 2 * (4 + 8) + 3)
    for g in range(4):
        expected, _ = made.predict(params, state, np.rot90(x, -g, (1, 2)))
        np.testing.assert_allclose(predictions[:, g], expected, atol=1e-5)


@pytest.mark.parametrize("poses", [1, 3, None])
def test_known_predictions_and_new_passes_average_alike(poses):
    group, x = Cyclic(4), noise(3, 8, 8, 3)
    made, params, state = model(group, poses=poses)
    (logits, canonical), _ = made.apply(params, state, x)
    expected = ea.averaging.weighted(
        group, canonical.scores, x, lambda x: made.predict(params, state, x)[0], poses=poses
    )
    np.testing.assert_allclose(logits, expected, atol=1e-5)


def test_a_scorer_of_images_averages_too():
    group, x = Cyclic(4), noise(2, 8, 8, 3)
    scorer = ea.networks.GroupConvNet(group, features=(3,), kernels=(3,), strides=(1,), hidden=4)
    parts = ea.from_linen(scorer), ea.from_linen(ResNet(3))
    single, averaged = ea.adapt(group, *parts), ea.adapt(group, *parts, poses=2, chunk=1)
    params, state = single.init(KEY, x)
    (one, canonical), _ = single.apply(params, state, x)
    (two, same), _ = averaged.apply(params, state, x)
    np.testing.assert_array_equal(canonical.scores, same.scores)
    chosen = ea.averaging.best(group, canonical.scores, poses=2)
    outputs = [single.predict(params, state, np.rot90(x, -g, (1, 2)))[0] for g in range(4)]
    expected = ea.averaging.combine(*chosen, jnp.stack(outputs, 1))
    np.testing.assert_allclose(two, expected, atol=1e-5)
    (training, _), _ = averaged.apply(params, state, x, train=True, key=KEY)
    assert training.shape == one.shape


def test_training_a_frozen_predictor_weighs_its_predictions(x64):
    """Forward the best pose's prediction, backward the derivative of the softmax's average."""
    made, params, state = model(Cyclic(4), method="straight_through")
    x = noise(3, 8, 8, 3)
    features, predictions = made.orbit_features(params, state, x)

    def through(scorer):
        full = {**params, "scorer": scorer}
        (logits, canonical), _ = made.apply(full, state, x, train=True, key=jax.random.key(1))
        return (logits**2).sum(), (logits, canonical)

    gradient, (logits, canonical) = jax.grad(through, has_aux=True)(params["scorer"])
    rows = np.arange(3)
    np.testing.assert_allclose(logits, predictions[rows, canonical.pose], atol=1e-6)

    def written_out(scorer):
        # The same dropout: the key is split as `apply` splits it.
        dropout = jax.random.split(jax.random.split(jax.random.key(1))[0])[0]
        scores, _ = made.score({"scorer": scorer}, state, features, train=True, key=dropout)
        soft = jnp.einsum("bg,bgk->bk", jax.nn.softmax(scores, -1), predictions)
        return (2 * jax.lax.stop_gradient(logits) * soft).sum()

    expected = jax.grad(written_out)(params["scorer"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), gradient, expected)


def test_a_trained_predictor_gets_its_gradient_from_the_canonical_input_alone():
    made, params, state = model(Cyclic(4), freeze_predictor=False)
    x = noise(3, 8, 8, 3)

    def loss(params, images):
        (logits, canonical), _ = made.apply(params, state, images, train=True, key=KEY)
        return (logits**2).sum(), canonical

    gradient, canonical = jax.grad(loss, has_aux=True)(params, x)

    def alone(predictor):
        full = {**params, "predictor": predictor}
        return (made.predict(full, state, canonical.inputs, train=True, key=KEY)[0] ** 2).sum()

    expected = jax.grad(alone)(params["predictor"])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), gradient["predictor"], expected
    )
    assert sum(float(jnp.abs(x).sum()) for x in jax.tree.leaves(gradient["scorer"])) > 0


def test_options_that_do_not_fit_are_refused():
    scorer = FeatureScorer(Cyclic(4))
    parts = Cyclic(4), ea.from_linen(scorer), ea.from_linen(ResNet(3))
    with pytest.raises(ValueError, match="poses=5: average over 1 to 4 of cyclic4"):
        ea.adapt(*parts, poses=5)
    with pytest.raises(ValueError, match="chunk=3 does not divide the 4 poses"):
        ea.adapt(*parts, features=scorer.read, chunk=3)
    made = ea.adapt(*parts)
    with pytest.raises(ValueError, match="The scorer reads images"):
        made.orbit_features({"predictor": {}}, {"predictor": {}}, noise(1, 8, 8, 3))
