"""The networks against plain PyTorch statements of their architectures, in float64.

Weights are random and copied parameter by parameter; outputs, gradients and, in training, updated
statistics are compared to 1e-10 of their scale.
"""

import functools
from contextlib import nullcontext

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from equiadapt_jax.predictors import ResNet, ViT
from equiadapt_jax.predictors.batch_norm import BatchNorm

torch = pytest.importorskip("torch")
F = torch.nn.functional

TOLERANCE = 1e-10

# ---- the architectures in PyTorch ----


class TorchAttention(torch.nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = torch.nn.Linear(width, 3 * width)
        self.proj = torch.nn.Linear(width, width)

    def forward(self, x):
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(x).chunk(3, dim=-1)
        )
        y = F.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).flatten(2))


class TorchBlock(torch.nn.Module):
    def __init__(self, width, heads, mlp_dim, eps, layer_scale):
        super().__init__()
        self.norm1, self.norm2 = (torch.nn.LayerNorm(width, eps) for _ in range(2))
        self.attn = TorchAttention(width, heads)
        self.mlp = torch.nn.Sequential()
        self.mlp.add_module("fc1", torch.nn.Linear(width, mlp_dim))
        self.mlp.add_module("act", torch.nn.GELU())
        self.mlp.add_module("fc2", torch.nn.Linear(mlp_dim, width))
        self.scales = layer_scale
        if layer_scale:
            self.ls1 = torch.nn.Parameter(torch.empty(width))
            self.ls2 = torch.nn.Parameter(torch.empty(width))

    def forward(self, x):
        y = self.attn(self.norm1(x))
        x = x + (y * self.ls1 if self.scales else y)
        y = self.mlp(self.norm2(x))
        return x + (y * self.ls2 if self.scales else y)


class TorchViT(torch.nn.Module):
    def __init__(self, model, channels, patches):
        super().__init__()
        width, prefix = model.width, int(model.class_token)
        self.pool, self.class_token, self.registers = model.pool, prefix, model.registers
        self.patch_embed = torch.nn.Conv2d(channels, width, model.patch, model.patch)
        if self.class_token:
            self.cls_token = torch.nn.Parameter(torch.empty(1, 1, width))
        if self.registers:
            self.reg_token = torch.nn.Parameter(torch.empty(1, self.registers, width))
        self.pos_embed = torch.nn.Parameter(torch.empty(1, prefix + patches, width))
        self.blocks = torch.nn.Sequential(
            *(
                TorchBlock(
                    width,
                    model.heads,
                    model.mlp_dim or 4 * width,
                    model.norm_eps,
                    model.layer_scale is not None,
                )
                for _ in range(model.depth)
            )
        )
        self.norm = torch.nn.LayerNorm(width, model.norm_eps)
        features = 2 * width if model.pool == "token_mean" else width
        self.head = torch.nn.Linear(features, model.num_classes) if model.num_classes else None

    def forward(self, x):
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        tokens = [x + self.pos_embed[:, self.class_token :]]
        if self.registers:
            tokens.insert(0, self.reg_token.expand(len(x), -1, -1))
        if self.class_token:
            first = self.cls_token + self.pos_embed[:, :1]
            tokens.insert(0, first.expand(len(x), -1, -1))
        x = self.pooled(self.blocks(torch.cat(tokens, dim=1)))
        return x if self.head is None else self.head(x)

    def pooled(self, x):
        start = self.class_token + self.registers
        if self.pool == "mean":
            return self.norm(x[:, start:].mean(1))
        x = self.norm(x)
        mean = x[:, start:].mean(1)
        return {
            "token": x[:, 0],
            "norm_mean": mean,
            "token_mean": torch.cat([x[:, 0], mean], dim=-1),
        }[self.pool]


def conv(inputs, outputs, size, stride):
    return torch.nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)


class TorchResidual(torch.nn.Module):
    """The branch is given as (channels, kernel, stride) of each convolution."""

    def __init__(self, inputs, branch, shortcut):
        super().__init__()
        self.inputs, self.outputs = inputs, branch[-1][0]
        self.stride = max(stride for _, _, stride in branch)
        self.count = len(branch)
        channels = inputs
        for i, (outputs, size, stride) in enumerate(branch, start=1):
            self.add_module(f"conv{i}", conv(channels, outputs, size, stride))
            self.add_module(f"bn{i}", torch.nn.BatchNorm2d(outputs))
            channels = outputs
        self.changes = self.stride != 1 or inputs != channels
        self.projects = self.changes and shortcut == "projection"
        if self.projects:
            self.downsample_conv = conv(inputs, channels, 1, self.stride)
            self.downsample_bn = torch.nn.BatchNorm2d(channels)

    def forward(self, x):
        y = x
        for i in range(1, self.count + 1):
            y = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(y))
            if i < self.count:
                y = F.relu(y)
        if self.projects:
            x = self.downsample_bn(self.downsample_conv(x))
        elif self.changes:
            extra = self.outputs - self.inputs
            x = x[:, :, :: self.stride, :: self.stride]
            x = F.pad(x, (0, 0, 0, 0, extra // 2, extra - extra // 2))
        return F.relu(x + y)


class TorchResNet(torch.nn.Module):
    def __init__(self, model, channels):
        super().__init__()
        imagenet = model.stem == "imagenet"
        self.conv1 = conv(channels, model.width, 7 if imagenet else 3, 2 if imagenet else 1)
        self.bn1 = torch.nn.BatchNorm2d(model.width)
        self.maxpool = torch.nn.MaxPool2d(3, 2, 1) if imagenet else torch.nn.Identity()
        self.names, inputs = [], model.width
        for stage, size in enumerate(model.stage_sizes):
            width = model.width * 2**stage
            for i in range(size):
                stride = 2 if stage > 0 and i == 0 else 1
                if model.block == "basic":
                    branch = [(width, 3, stride), (width, 3, 1)]
                else:
                    inner = width * model.width_factor
                    branch = [(inner, 1, 1), (inner, 3, stride), (4 * width, 1, 1)]
                self.names.append(f"layer{stage + 1}_{i}")
                self.add_module(self.names[-1], TorchResidual(inputs, branch, model.shortcut))
                inputs = branch[-1][0]
        self.fc = torch.nn.Linear(inputs, model.num_classes) if model.num_classes else None

    def forward(self, x):
        x = self.maxpool(F.relu(self.bn1(self.conv1(x))))
        for name in self.names:
            x = getattr(self, name)(x)
        x = x.mean((2, 3))
        return x if self.fc is None else self.fc(x)


# ---- from PyTorch to Flax ----


def randomize(module, seed):
    """Random weights, scales and variances near one; returns the module in float64."""
    generator = torch.Generator().manual_seed(seed)
    module.double()
    for name, value in (*module.named_parameters(), *module.named_buffers()):
        if name.endswith("num_batches_tracked"):
            continue
        positive = name.endswith("running_var") or (value.ndim == 1 and name.endswith("weight"))
        if positive or ".ls" in name:
            value.data.uniform_(0.5, 1.5, generator=generator)
        else:
            fan_in = value[0].numel() if name.endswith("weight") else 25
            value.data.normal_(0.0, fan_in**-0.5, generator=generator)
    return module


def flax_path(name):
    """Where the PyTorch tensor `name` lies in our trees, as path."""
    path = name.replace("blocks.", "blocks_").split(".")
    if path[-1] in ("ls1", "ls2"):
        path.append("gamma")
    return path


def flax_leaf(name, value):
    """(name, array) of a tensor as Flax calls it and lays it out."""
    array = value.detach().numpy().copy()
    if name == "weight":
        layouts = {1: ("scale", (0,)), 2: ("kernel", (1, 0)), 4: ("kernel", (2, 3, 1, 0))}
        name, axes = layouts[array.ndim]
        return name, array.transpose(axes)
    return name.removeprefix("running_"), array


def nested(named):
    tree = {}
    for name, value in named:
        *path, last = flax_path(name)
        node = tree
        for key in path:
            node = node.setdefault(key, {})
        last, array = flax_leaf(last, value)
        assert last not in node
        node[last] = array
    return tree


def flax_params(module):
    return nested(module.named_parameters())


def flax_gradients(module):
    return nested((name, value.grad) for name, value in module.named_parameters())


def flax_state(module):
    stats = nested(
        (name, value)
        for name, value in module.named_buffers()
        if not name.endswith("num_batches_tracked")
    )
    return {"batch_stats": stats} if stats else {}


# ---- comparison ----


def assert_close(actual, expected, what="", least=0.0):
    """Close to TOLERANCE of the scale of `expected`, which is not taken below `least`."""
    assert actual.shape == expected.shape, what
    scale = max(np.abs(expected).max(), least)
    assert scale > 1e-6, f"{what} is zero: nothing is compared"
    np.testing.assert_allclose(actual, expected, rtol=0, atol=TOLERANCE * scale, err_msg=what)


def assert_trees_close(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    # Some gradients are zero by the architecture: a bias that the next batch statistics remove.
    least = 1e-3 * max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected))
    jax.tree_util.tree_map_with_path(
        lambda path, a, b: assert_close(a, b, jax.tree_util.keystr(path), least), actual, expected
    )


def images(*shape, seed=0):
    return np.random.default_rng(seed).uniform(-1.0, 1.0, shape)


def to_torch(x):
    return torch.from_numpy(np.moveaxis(x, -1, 1).copy()).requires_grad_()


def torch_step(module, x, weights):
    """Output and input gradient of Σ weights · output; the parameters keep theirs in .grad."""
    x = to_torch(x)
    module.zero_grad()
    y = module(x)
    (y * torch.from_numpy(weights)).sum().backward()
    return y.detach().numpy(), np.moveaxis(x.grad.numpy(), 1, -1)


def flax_step(model, train=False):
    """Jitted: (output, state after), and the gradients by parameters and images."""

    def loss(params, x, state, weights):
        variables = {"params": params, **state}
        if train:
            y, state = model.apply(variables, x, train=True, mutable=["batch_stats"])
        else:
            y = model.apply(variables, x)
        return (y * weights).sum(), (y, state)

    return quick_jit(jax.grad(loss, argnums=(0, 1), has_aux=True))


def quick_jit(function):
    # Compiling takes the time here, not computing.
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def random_weights(module, x, seed=5):
    """One for each output; evaluated in inference, which moves no statistics."""
    was_training = module.training
    shape = module.eval()(to_torch(x)).shape
    module.train(was_training)
    return np.random.default_rng(seed).normal(size=shape)


def compare(model, module, x):
    """Output and gradients in inference."""
    weights = random_weights(module, x)
    expected, expected_x = torch_step(module, x, weights)
    (by_params, by_x), (actual, _) = flax_step(model)(
        flax_params(module), jnp.asarray(x), flax_state(module), weights
    )
    assert actual.dtype == jnp.float64
    assert_close(actual, expected, "output")
    assert_close(by_x, expected_x, "gradient by images")
    assert_trees_close(by_params, flax_gradients(module))


SMALL_VIT = {"num_classes": 5, "patch": 4, "width": 12, "depth": 2, "heads": 3}
NO_TOKEN = {"class_token": False}
VITS = {
    "token": {},
    "mean": {"pool": "mean"},
    "mean, no class token": {"pool": "mean", **NO_TOKEN},
    "norm_mean": {"pool": "norm_mean"},
    "norm_mean, no class token, registers": {"pool": "norm_mean", "registers": 2, **NO_TOKEN},
    "token_mean, layer scale": {"pool": "token_mean", "layer_scale": 1e-5},
    "token_mean, registers, features": {"pool": "token_mean", "registers": 1, "num_classes": None},
    "token, registers, layer scale": {"registers": 3, "layer_scale": 1.0},
    "mean, registers": {"pool": "mean", "registers": 2},
    "other mlp and eps": {"mlp_dim": 20, "norm_eps": 1e-2, "num_classes": 0},
}


@pytest.mark.parametrize("fields", VITS.values(), ids=VITS)
def test_vit_computes_what_pytorch_does(x64, fields):
    model = ViT(**{**SMALL_VIT, **fields})
    x = images(3, 8, 12, 2)
    compare(model, randomize(TorchViT(model, 2, 6), seed=1), x)


SMALL_RESNET = {"num_classes": 5, "stage_sizes": (1, 2), "width": 4}
RESNETS = {
    f"{block}, {stem}, {shortcut}": {"block": block, "stem": stem, "shortcut": shortcut}
    for block in ("basic", "bottleneck")
    for stem in ("imagenet", "cifar")
    for shortcut in ("projection", "subsample")
}
RESNETS |= {"wide": {"width_factor": 2}, "features": {"num_classes": None}}


@pytest.mark.parametrize("fields", RESNETS.values(), ids=RESNETS)
def test_resnet_computes_what_pytorch_does(x64, fields):
    model = ResNet(**{**SMALL_RESNET, **fields})
    module = randomize(TorchResNet(model, 3), seed=2).eval()
    compare(model, module, images(2, 15, 22, 3))


# Every block, stem and shortcut; what a batch changes is the same in all their combinations.
TRAINED = [
    "basic, imagenet, projection",
    "basic, cifar, subsample",
    "bottleneck, imagenet, projection",
    "bottleneck, cifar, subsample",
    "wide",
]


@pytest.mark.parametrize("fields", [RESNETS[name] for name in TRAINED], ids=TRAINED)
def test_resnet_trains_as_pytorch_does(x64, fields):
    """Two steps of gradient descent; in each, outputs, gradients and statistics are compared."""
    model = ResNet(**{**SMALL_RESNET, **fields})
    module = randomize(TorchResNet(model, 3), seed=3).train()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
    params, state = flax_params(module), flax_state(module)
    step = flax_step(model, train=True)
    for seed in (1, 2):
        x = images(3, 16, 20, 3, seed=seed)
        weights = random_weights(module, x)
        expected, expected_x = torch_step(module, x, weights)
        (by_params, by_x), (actual, state) = step(params, jnp.asarray(x), state, weights)
        assert_close(actual, expected, "output")
        assert_close(by_x, expected_x, "gradient by images")
        assert_trees_close(by_params, flax_gradients(module))
        assert_trees_close(state, flax_state(module))
        params = jax.tree.map(lambda p, g: p - 0.05 * g, params, by_params)
        optimizer.step()
    assert_trees_close(params, flax_params(module))


@pytest.mark.parametrize(("shape", "refused"), [((1, 1, 1, 3), True), ((2, 1, 1, 3), False)])
def test_batch_statistics_of_one_value_are_refused_by_both(shape, refused):
    x, norm = images(*shape), BatchNorm()
    held = norm.init(jax.random.key(0, impl="rbg"), jnp.asarray(x), False)
    calls = (
        lambda: torch.nn.BatchNorm2d(3).double().train()(to_torch(x)),
        lambda: norm.apply(held, jnp.asarray(x), True, mutable=["batch_stats"]),
    )
    for call in calls:
        with pytest.raises(ValueError, match="value") if refused else nullcontext():
            call()


def test_momentum_is_the_share_that_stays(x64):
    model = ResNet(5, (1,), "basic", width=4, bn_momentum=0.99, bn_eps=1e-3)
    module = randomize(TorchResNet(model, 3), seed=3).train()
    for norm in module.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            norm.momentum, norm.eps = 0.01, 1e-3
    x, variables = images(2, 9, 9, 3), {"params": flax_params(module), **flax_state(module)}
    train = quick_jit(functools.partial(model.apply, train=True, mutable=["batch_stats"]))
    actual, state = train(variables, x)
    assert_close(actual, module(to_torch(x)).detach().numpy(), "output")
    assert_trees_close(state, flax_state(module))
