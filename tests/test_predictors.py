"""The networks against plain NumPy statements of their papers, in float64, and their contracts."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from equiadapt_jax.predictors import Preprocess, ResNet, ViT

KEY = jax.random.key(0, impl="rbg")  # compiles several times faster than the default


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def images(*shape, seed=0):
    return np.random.default_rng(seed).uniform(-1.0, 1.0, shape)


def random_variables(model, x, seed=1):
    """Variables of the model's shapes, float64, all of them away from zero and one."""
    rng = np.random.default_rng(seed)

    def leaf(path, shape):
        name = path[-1].key
        if name in ("scale", "var", "gamma"):
            return rng.uniform(0.5, 1.5, shape.shape)
        fan_in = math.prod(shape.shape[:-1]) if name == "kernel" else 25.0
        return rng.normal(size=shape.shape) / np.sqrt(fan_in)

    return jax.tree_util.tree_map_with_path(leaf, jax.eval_shape(model.init, KEY, jnp.asarray(x)))


def assert_close(actual, expected, tolerance=1e-10):
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * np.abs(expected).max())


def apply(model, variables, x, **options):
    return jax.jit(functools.partial(model.apply, **options))(variables, x)


def count(tree):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


# ---- the papers in NumPy ----


def np_dense(x, p):
    return x @ p["kernel"] + p["bias"]


def np_layer_norm(x, p, eps):
    mean = x.mean(axis=-1, keepdims=True)
    var = ((x - mean) ** 2).mean(axis=-1, keepdims=True)
    return (x - mean) / np.sqrt(var + eps) * p["scale"] + p["bias"]


def np_gelu(x):
    return x * 0.5 * (1.0 + np.vectorize(math.erf)(x / math.sqrt(2.0)))


def np_attention(x, p, heads):
    width = x.shape[-1]
    size = width // heads
    qkv = np_dense(x, p["qkv"])
    y = np.zeros_like(x)
    for b in range(x.shape[0]):
        for h in range(heads):
            part = slice(h * size, (h + 1) * size)
            q, k, v = (qkv[b, :, i * width : (i + 1) * width][:, part] for i in range(3))
            scores = np.exp(q @ k.T / math.sqrt(size))
            y[b, :, part] = scores / scores.sum(axis=1, keepdims=True) @ v
    return np_dense(y, p["proj"])


def np_vit(model, p, x):
    s = model.patch
    batch, height, width, _ = x.shape
    tokens = []
    for i in range(0, height, s):
        for j in range(0, width, s):
            patch = x[:, i : i + s, j : j + s]
            tokens.append(np.einsum("bijc,ijcd->bd", patch, p["patch_embed"]["kernel"]))
    x = np.stack(tokens, axis=1) + p["patch_embed"]["bias"]
    if model.class_token:
        x = np.concatenate([np.repeat(p["cls_token"], batch, axis=0), x], axis=1)
    x = x + p["pos_embed"]
    if model.registers:
        registers = np.repeat(p["reg_token"], batch, axis=0)
        x = np.insert(x, [int(model.class_token)] * model.registers, registers, axis=1)
    for i in range(model.depth):
        block = p[f"blocks_{i}"]
        scales = [block[name]["gamma"] if model.layer_scale else 1.0 for name in ("ls1", "ls2")]
        y = np_layer_norm(x, block["norm1"], model.norm_eps)
        x = x + scales[0] * np_attention(y, block["attn"], model.heads)
        y = np_layer_norm(x, block["norm2"], model.norm_eps)
        y = np_dense(np_gelu(np_dense(y, block["mlp"]["fc1"])), block["mlp"]["fc2"])
        x = x + scales[1] * y
    normalized = np_layer_norm(x, p["norm"], model.norm_eps)
    start = int(model.class_token) + model.registers
    if model.pool == "mean":
        x = np_layer_norm(x[:, start:].mean(1), p["norm"], model.norm_eps)
    else:
        token, mean = normalized[:, 0], normalized[:, start:].mean(1)
        x = {
            "token": token,
            "norm_mean": mean,
            "token_mean": np.concatenate([token, mean], axis=1),
        }[model.pool]
    return np_dense(x, p["head"]) if model.num_classes else x


def np_windows(x, size, stride, fill):
    """The views that each position of a kernel sees, the image padded by size // 2."""
    pad = size // 2
    x = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)), constant_values=fill)
    rows, columns = ((n - size) // stride + 1 for n in x.shape[1:3])
    for i in range(size):
        for j in range(size):
            yield i, j, x[:, i::stride, j::stride][:, :rows, :columns]


def np_conv(x, p, stride):
    kernel = p["kernel"]
    return sum(view @ kernel[i, j] for i, j, view in np_windows(x, len(kernel), stride, 0.0))


class NumpyBatchNorm:
    """Batch normalization that reads, or in training writes, its running statistics."""

    def __init__(self, train, momentum=0.9, eps=1e-5):
        self.train, self.momentum, self.eps = train, momentum, eps

    def __call__(self, x, p, stats):
        mean, var = stats["mean"], stats["var"]
        if self.train:
            mean, var = x.mean(axis=(0, 1, 2)), x.var(axis=(0, 1, 2))
            stats["mean"] = self.momentum * stats["mean"] + (1 - self.momentum) * mean
            unbiased = x.var(axis=(0, 1, 2), ddof=1)
            stats["var"] = self.momentum * stats["var"] + (1 - self.momentum) * unbiased
        return (x - mean) / np.sqrt(var + self.eps) * p["scale"] + p["bias"]


def np_block(model, x, p, stats, norm, stride):
    strides = (stride, 1) if model.block == "basic" else (1, stride, 1)
    y = x
    for i, s in enumerate(strides, start=1):
        y = norm(np_conv(y, p[f"conv{i}"], s), p[f"bn{i}"], stats[f"bn{i}"])
        if i < len(strides):
            y = np.maximum(y, 0)
    if "downsample_conv" in p:
        x = np_conv(x, p["downsample_conv"], stride)
        x = norm(x, p["downsample_bn"], stats["downsample_bn"])
    elif x.shape != y.shape:
        half = x.shape[-1] * (y.shape[-1] // x.shape[-1] - 1) // 2
        zeros = np.zeros((*y.shape[:3], half))
        x = np.concatenate([zeros, x[:, ::stride, ::stride], zeros], axis=-1)
    return np.maximum(y + x, 0)


def np_resnet(model, p, stats, x, train=False):
    """Logits, and the statistics after the pass."""
    stats = jax.tree.map(np.array, stats)
    norm = NumpyBatchNorm(train)
    x = np_conv(x, p["conv1"], 2 if model.stem == "imagenet" else 1)
    x = np.maximum(norm(x, p["bn1"], stats["bn1"]), 0)
    if model.stem == "imagenet":
        x = np.max([view for _, _, view in np_windows(x, 3, 2, -np.inf)], axis=0)
    for stage, size in enumerate(model.stage_sizes):
        for i in range(size):
            name = f"layer{stage + 1}_{i}"
            stride = 2 if stage and not i else 1
            x = np_block(model, x, p[name], stats[name], norm, stride)
    x = x.mean(axis=(1, 2))
    return (np_dense(x, p["fc"]) if model.num_classes else x), stats


# ---- parity ----

SMALL_VIT = {"patch": 4, "width": 12, "depth": 2, "heads": 3}
VITS = {
    "token": {},
    "mean": {"pool": "mean"},
    "mean without class token": {"pool": "mean", "class_token": False},
    "norm_mean": {"pool": "norm_mean"},
    "mean, registers": {"pool": "mean", "class_token": False, "registers": 2},
    "DINOv2": {"pool": "token_mean", "registers": 3, "layer_scale": 1e-5},
    "features": {"num_classes": None},
    "other mlp and eps": {"mlp_dim": 20, "norm_eps": 1e-2},
}
SMALL_RESNET = {"stage_sizes": (1, 2), "width": 4}
RESNETS = {
    "bottleneck": {},
    "wide": {"width_factor": 2},
    "basic": {"block": "basic"},
    "cifar": {"block": "basic", "stem": "cifar", "shortcut": "subsample"},
    "bottleneck subsample": {"shortcut": "subsample", "stem": "cifar"},
    "features": {"num_classes": 0},
}


@pytest.mark.parametrize("fields", VITS.values(), ids=VITS)
def test_vit_computes_the_paper(x64, fields):
    model = ViT(**{"num_classes": 5, **SMALL_VIT, **fields})
    x = images(3, 8, 12, 2)
    variables = random_variables(model, x)
    actual = apply(model, variables, x)
    assert actual.dtype == jnp.float64
    assert_close(actual, np_vit(model, variables["params"], x))


@pytest.mark.parametrize("fields", RESNETS.values(), ids=RESNETS)
@pytest.mark.parametrize("size", [(16, 16), (15, 21)])
def test_resnet_computes_the_paper(x64, fields, size):
    model = ResNet(**{"num_classes": 5, **SMALL_RESNET, **fields})
    x = images(2, *size, 3)
    variables = random_variables(model, x)
    actual = apply(model, variables, x)
    expected, _ = np_resnet(model, variables["params"], variables["batch_stats"], x)
    assert actual.dtype == jnp.float64
    assert_close(actual, expected)


@pytest.mark.parametrize("fields", [RESNETS["bottleneck"], RESNETS["cifar"]])
def test_resnet_trains_on_batch_statistics(x64, fields):
    model = ResNet(num_classes=5, **SMALL_RESNET, **fields)
    x = images(4, 16, 16, 3)
    variables = random_variables(model, x)
    actual, updates = apply(model, variables, x, train=True, mutable=["batch_stats"])
    expected, stats = np_resnet(model, variables["params"], variables["batch_stats"], x, train=True)
    assert_close(actual, expected)
    jax.tree.map(assert_close, updates["batch_stats"], stats)


def test_float64_parameters_give_float64_for_float32_images(x64):
    x = jnp.asarray(images(1, 8, 8, 3), jnp.float32)
    for model in (ViT(3, **SMALL_VIT), ResNet(3, **SMALL_RESNET)):
        assert jax.eval_shape(model.apply, random_variables(model, x), x).dtype == jnp.float64


# ---- sizes and names ----

COUNTS = {
    "Ti/16": 5_717_416,
    "S/16": 22_050_664,
    "B/32": 88_224_232,
    "B/16": 86_567_656,
    "L/16": 304_326_632,
    "H/14": 632_045_800,
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "resnet152": 60_192_808,
    "wide_resnet50_2": 68_883_240,
    "wide_resnet101_2": 126_886_696,
}
CIFAR_COUNTS = {
    "resnet20": 269_722,
    "resnet32": 464_154,
    "resnet44": 658_586,
    "resnet56": 853_018,
    "resnet110": 1_727_962,
}


def shapes(model, size):
    return jax.eval_shape(model.init, KEY, jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32))


@pytest.mark.parametrize("name", COUNTS)
def test_published_parameter_counts(name):
    family = ViT if "/" in name else ResNet
    assert count(shapes(family.variant(name, 1000), 224)["params"]) == COUNTS[name]


@pytest.mark.parametrize(("registers", "expected"), [(0, 22_056_192), (4, 22_057_728)])
def test_published_parameter_counts_dinov2(registers, expected):
    """Those of DINOv2's small network at 518 pixels, without its token for masked patches."""
    model = ViT.variant("S/14", None, registers=registers, layer_scale=1e-5)
    assert count(shapes(model, 518)["params"]) == expected


@pytest.mark.parametrize("name", CIFAR_COUNTS)
def test_published_parameter_counts_cifar(name):
    assert count(shapes(ResNet.variant(name, 10), 32)["params"]) == CIFAR_COUNTS[name]


def test_variants_take_overrides():
    assert ViT.variant("S/8", num_classes=10, depth=3) == ViT(10, 8, 384, 3, 6)
    model = ResNet.variant("resnet18", num_classes=10, stem="cifar")
    assert (model.stem, model.stage_sizes, model.block) == ("cifar", (2, 2, 2, 2), "basic")


def names(tree):
    return {"/".join(k.key for k in path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)}


def test_vit_parameter_names():
    layers = ("norm1", "attn/qkv", "attn/proj", "norm2", "mlp/fc1", "mlp/fc2")
    expected = {"cls_token", "pos_embed"}
    for layer in ("patch_embed", "norm", "head", *(f"blocks_0/{name}" for name in layers)):
        weight = "scale" if "norm" in layer else "kernel"
        expected |= {f"{layer}/{weight}", f"{layer}/bias"}
    params = shapes(ViT(5, 4, 12, 1, 3), 8)["params"]
    assert names(params) == expected
    assert params["pos_embed"].shape == (1, 5, 12)
    assert params["blocks_0"]["attn"]["qkv"]["kernel"].shape == (12, 36)
    params = shapes(ViT(5, 4, 12, 1, 3, pool="mean", class_token=False), 8)["params"]
    assert names(params) == expected - {"cls_token"}
    assert params["pos_embed"].shape == (1, 4, 12)
    params = shapes(ViT(5, 4, 12, 1, 3, registers=2, layer_scale=0.1), 8)["params"]
    assert names(params) == expected | {"reg_token", "blocks_0/ls1/gamma", "blocks_0/ls2/gamma"}
    assert params["pos_embed"].shape == (1, 5, 12)
    assert params["reg_token"].shape == (1, 2, 12)
    assert params["blocks_0"]["ls2"]["gamma"].shape == (12,)


def test_layer_scale_starts_at_its_value():
    x = jnp.zeros((1, 8, 8, 3))
    params = jax.jit(ViT(5, 4, 12, 1, 3, layer_scale=0.25).init)(KEY, x)["params"]
    for name in ("ls1", "ls2"):
        np.testing.assert_array_equal(params["blocks_0"][name]["gamma"], np.full(12, 0.25))


def test_features_have_the_width_or_twice_it():
    for pool, width in (("token", 12), ("mean", 12), ("norm_mean", 12), ("token_mean", 24)):
        variables = shapes(ViT(None, 4, 12, 1, 3, pool=pool), 8)
        x = jnp.zeros((2, 8, 8, 3))
        model = ViT(None, 4, 12, 1, 3, pool=pool)
        assert jax.eval_shape(model.apply, variables, x).shape == (2, width)


def test_resnet_parameter_names():
    variables = shapes(ResNet(5, (1, 1)), 32)
    blocks = {"layer1_0": 3, "layer2_0": 3}
    convs = {f"{b}/conv{i}" for b, n in blocks.items() for i in range(1, n + 1)} | {"conv1"}
    norms = {name.replace("conv", "bn") for name in convs}
    convs |= {f"{block}/downsample_conv" for block in blocks}
    norms |= {f"{block}/downsample_bn" for block in blocks}
    params = {f"{name}/kernel" for name in convs} | {"fc/kernel", "fc/bias"}
    params |= {f"{name}/{leaf}" for name in norms for leaf in ("scale", "bias")}
    assert names(variables["params"]) == params
    assert names(variables["batch_stats"]) == {
        f"{name}/{leaf}" for name in norms for leaf in ("mean", "var")
    }
    variables = shapes(ResNet(5, (1, 1), block="basic", shortcut="subsample"), 32)
    assert not any("downsample" in name for name in names(variables))


def test_parameters_are_float32_whatever_the_compute_dtype(x64):
    for model in (
        ViT(5, **SMALL_VIT, dtype=jnp.bfloat16),
        ResNet(5, **SMALL_RESNET, dtype=jnp.bfloat16),
    ):
        assert {leaf.dtype for leaf in jax.tree.leaves(shapes(model, 16))} == {np.dtype("float32")}


@pytest.mark.parametrize("model", [ViT(5, 4, 12, 1, 3), ResNet(5, (1,), block="basic")])
def test_initial_logits_are_finite_and_differ(model):
    x = jnp.asarray(images(2, 8, 8, 3), jnp.float32)
    logits = apply(model, jax.jit(model.init)(KEY, x), x)
    assert jnp.isfinite(logits).all()
    assert not jnp.allclose(logits[0], logits[1])


# ---- precision, randomness, compilation ----


@pytest.mark.parametrize(
    "family",
    [
        functools.partial(ViT, 5, **SMALL_VIT),
        functools.partial(ViT, 5, **SMALL_VIT, **VITS["DINOv2"]),
        functools.partial(ResNet, 5, **SMALL_RESNET),
        functools.partial(ResNet, 5, **SMALL_RESNET, **RESNETS["cifar"]),
    ],
    ids=["token", "DINOv2", "bottleneck", "cifar"],
)
def test_bfloat16_is_close_and_returns_float32(family):
    x = jnp.asarray(images(2, 16, 16, 3), jnp.float32)
    variables = random_variables(family(), x)
    variables = jax.tree.map(jnp.float32, variables)
    exact = apply(family(), variables, x)
    for dtype, tolerance in ((jnp.float32, 1e-6), (jnp.bfloat16, 0.05)):
        logits = apply(family(dtype=dtype), variables, x)
        assert logits.dtype == jnp.float32
        assert_close(logits, exact, tolerance)
    low = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), variables)
    assert jax.eval_shape(family().apply, low, x.astype(jnp.bfloat16)).dtype == jnp.float32


def test_bfloat16_gradients_of_attention():
    x = jnp.asarray(images(2, 16, 16, 3), jnp.float32)
    variables = jax.tree.map(jnp.float32, random_variables(ViT(5, 4, 12, 1, 3), x))

    @functools.partial(jax.jit, static_argnums=0)
    def gradient(dtype):
        model = ViT(5, 4, 12, 1, 3, dtype=dtype)
        return jax.grad(lambda x: jnp.square(model.apply(variables, x)).sum())(x)

    exact = gradient(jnp.float32)
    assert jnp.linalg.norm(gradient(jnp.bfloat16) - exact) < 0.05 * jnp.linalg.norm(exact)


def test_dropout_needs_a_key_and_follows_it():
    x = jnp.asarray(images(2, 8, 8, 3), jnp.float32)
    model, plain = ViT(5, 4, 12, 1, 3, dropout=0.3), ViT(5, 4, 12, 1, 3)
    keys = [jax.random.key(seed, impl="rbg") for seed in (1, 2)]
    variables = random_variables(model, x)
    train = jax.jit(lambda key: model.apply(variables, x, train=True, rngs={"dropout": key}))
    logits = train(keys[0])
    np.testing.assert_array_equal(logits, train(keys[0]))
    assert not np.allclose(logits, train(keys[1]))
    expected = apply(plain, variables, x)
    np.testing.assert_array_equal(apply(model, variables, x), expected)
    np.testing.assert_array_equal(apply(plain, variables, x, train=True), expected)
    with pytest.raises(ValueError, match=r"dropout=0\.3 needs a key in training: pass rngs="):
        apply(model, variables, x, train=True)
    jax.eval_shape(functools.partial(model.init, train=True), KEY, x)  # needs no second key


@pytest.mark.parametrize(
    "build",
    [lambda: ViT(5, **SMALL_VIT), lambda: ResNet(5, [1, 2], width=4)],
    ids=["vit", "resnet"],
)
def test_jit_compiles_once(build):
    traces = []

    def logits(model, preprocess, variables, x):
        traces.append(x.shape)
        return model.apply(variables, preprocess(x))

    jitted = jax.jit(logits, static_argnums=0)
    x = jnp.asarray(images(2, 16, 16, 3), jnp.float32)
    variables = random_variables(build(), x)
    for _ in range(2):
        actual = jitted(build(), Preprocess([0.5] * 3, [0.25] * 3), variables, x)
    assert len(traces) == 1
    expected = apply(build(), variables, (x - 0.5) / 0.25)
    assert_close(actual, np.asarray(expected), 1e-5)


# ---- what is refused ----


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ViT.variant("B16", 10), "unknown ViT 'B16': give one of Ti, S, B, L, H and"),
        (lambda: ViT.variant("G/14", 10), "unknown ViT 'G/14'"),
        (lambda: ViT.variant("B/0", 10), "unknown ViT 'B/0'"),
        (lambda: ViT(10, pool="max"), "unknown pool 'max': choose one of token, mean"),
        (lambda: ViT(10, class_token=False), "pool='token' needs class_token=True"),
        (lambda: ViT(10, class_token=False, pool="token_mean"), "pool='token_mean' needs"),
        (lambda: ViT(10, registers=-1), "registers must be zero or more, got -1: 0 for none"),
        (lambda: ViT(10, width=100, heads=3), "width 100 is not a multiple of 3 heads"),
        (lambda: ResNet.variant("resnet19", 10), "unknown ResNet 'resnet19': choose one of"),
        (lambda: ResNet(10, (1,), block="wide"), "unknown block 'wide': choose one of basic"),
        (lambda: ResNet(10, (1,), stem="tiny"), "unknown stem 'tiny': choose one of imagenet"),
        (lambda: ResNet(10, (1,), shortcut="none"), "unknown shortcut 'none': choose one of"),
    ],
)
def test_bad_fields_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("model", [ViT(5, **SMALL_VIT), ResNet(5, **SMALL_RESNET)])
def test_bad_images_are_refused(model):
    variables = random_variables(model, jnp.zeros((1, 8, 8, 3)))
    with pytest.raises(ValueError, match=r"must be \(B, H, W, C\), got shape \(8, 8, 3\)"):
        model.apply(variables, jnp.zeros((8, 8, 3)))
    with pytest.raises(ValueError, match="must be floats, got uint8: convert them"):
        model.apply(variables, jnp.zeros((1, 8, 8, 3), jnp.uint8))
    with pytest.raises(ValueError, match="1 channels where the first convolution takes 3"):
        model.apply(variables, jnp.zeros((1, 8, 8, 1)))


def test_vit_refuses_other_sizes():
    model = ViT(5, **SMALL_VIT)
    variables = random_variables(model, jnp.zeros((1, 8, 8, 3)))
    with pytest.raises(ValueError, match="images of 8×10 are not made of patches of 4×4"):
        model.apply(variables, jnp.zeros((1, 8, 10, 3)))
    with pytest.raises(ValueError, match="images of 12×8 do not have the 4 patches .* to 8×8"):
        model.apply(variables, jnp.zeros((1, 12, 8, 3)))
    with pytest.raises(ValueError, match="images of 0×8 are not made of patches"):
        model.init(KEY, jnp.zeros((1, 0, 8, 3)))


# ---- preprocessing ----


def test_preprocess_normalizes(x64):
    mean, std = (0.1, 0.2, 0.3), (0.5, 1.0, 2.0)
    x = images(2, 4, 5, 3)
    expected = np.stack([(x[..., c] - mean[c]) / std[c] for c in range(3)], axis=-1)
    for shape in (x.shape, x[0].shape, (2, 1, 4, 5, 3)):
        part = x[0] if len(shape) == 3 else x.reshape(shape)
        actual = jax.jit(Preprocess(mean, std))(part)
        assert actual.dtype == jnp.float64
        assert_close(actual.reshape(-1, 4, 5, 3), expected[: 1 if len(shape) == 3 else 2], 1e-15)
    actual = Preprocess(0.5, std)(x)
    assert_close(actual, (x - 0.5) / np.array(std), 1e-15)


def test_preprocess_takes_any_channels_for_numbers_and_keeps_float32():
    preprocess = Preprocess(np.float32(0.5), 0.5)
    assert (preprocess.mean, preprocess.std) == (0.5, 0.5)
    for dtype in (jnp.float32, jnp.bfloat16):
        x = jnp.ones((3, 2, 2, 7), dtype)
        assert preprocess(x).dtype == jnp.float32
        np.testing.assert_array_equal(preprocess(x), np.ones(x.shape))


def test_preprocess_is_a_static_value():
    a, b = Preprocess([0.5, 0.4], np.array([1.0, 2.0])), Preprocess((0.5, 0.4), (1.0, 2.0))
    assert a == b
    assert hash(a) == hash(b)
    assert jax.tree.leaves(a) == []


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        (0.5, 0.0, r"std must be above zero, got 0\.0: use 1\.0"),
        (0.5, (1.0, -1.0), r"std must be above zero, got \(1\.0, -1\.0\)"),
        ((0.5, math.nan), 1.0, "mean must be one finite number, or one for each channel"),
        ((), 1.0, "mean must be one finite number"),
        (0.5, math.inf, "std must be one finite number"),
        ((0.5,) * 3, (1.0,) * 2, "differ in length: give one number for each channel"),
    ],
)
def test_preprocess_refuses_bad_numbers(mean, std, message):
    with pytest.raises(ValueError, match=message):
        Preprocess(mean, std)


def test_preprocess_refuses_bad_images():
    preprocess = Preprocess((0.5,) * 3, 1.0)
    for shape in ((2, 4, 4, 1), (4, 3)):
        with pytest.raises(ValueError, match=r"do not end in the 3 channels of mean .* H, W, 3\)"):
            preprocess(jnp.zeros(shape))
    with pytest.raises(ValueError, match=r"got uint8: convert them, bytes as x / 255\.0"):
        preprocess(jnp.zeros((4, 4, 3), jnp.uint8))
