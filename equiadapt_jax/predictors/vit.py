"""Vision transformers (Dosovitskiy et al. 2021, arXiv 2010.11929)."""

import math
from typing import Any, Self

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from equiadapt_jax.predictors.preprocess import at_least_float32, check_images

_POOLS = ("token", "mean", "norm_mean", "token_mean")

# Table 1 of the paper; Ti and S are those of DeiT (Touvron et al. 2021, arXiv 2012.12877).
_SIZES = {
    "Ti": {"width": 192, "depth": 12, "heads": 3},
    "S": {"width": 384, "depth": 12, "heads": 6},
    "B": {"width": 768, "depth": 12, "heads": 12},
    "L": {"width": 1024, "depth": 24, "heads": 16},
    "H": {"width": 1280, "depth": 32, "heads": 16},
}

_init = nn.initializers.truncated_normal(0.02)


class ViT(nn.Module):
    """A pre-norm vision transformer: images to logits, or to features.

    Input (B, H, W, C) floats, any number of channels, H and W multiples of `patch`; output
    (B, num_classes) logits, or the pooled features (B, width), twice as many for
    `pool="token_mean"`, where `num_classes` is None or 0, in at least float32. The number of
    position embeddings follows from the images of `init`.

    `pool` is how tokens become features:
      "token": the class token, after the final LayerNorm.
      "mean": the mean of the patch tokens, then the final LayerNorm (timm's `fc_norm`).
      "norm_mean": the final LayerNorm on every token, then the mean of the patch tokens
        (big_vision's "gap"; timm's average without `fc_norm`).
      "token_mean": after the final LayerNorm, the class token and the mean of the patch tokens
        side by side (the linear head of DINOv2, Oquab et al. 2023, arXiv 2304.07193).
    `class_token=False` leaves the token and its position embedding away. `registers` more tokens
    follow it (Darcet et al. 2023, arXiv 2309.16588): learned, without position embedding, and in
    no pool. `layer_scale` is the initial value of one learned factor for each feature of what
    either half of a block adds (Touvron et al. 2021, arXiv 2103.17239); None means no such factor.
    `mlp_dim` is the inner width of the perceptrons, by default 4 · width. `dropout` acts after the
    embedding, the attention's projection and both layers of each perceptron, in training only and
    then from the key `rngs={"dropout": key}`.

    `remat` keeps only what enters each block for the way back, which computes the rest anew.

    The patch tokens after one, two and three thirds of the blocks are sown into the collection
    "features" as maps, for scorers that read features.

    Parameters are float32. `dtype` is what the layers compute in; None follows the widest of images
    and parameters. Normalization statistics and softmax are in at least float32, GELU is exact.
    Fused `qkv` features are ordered (3, heads, width / heads).

    Raises ValueError for an unknown `pool` or one that lacks its class token, fewer than zero
    `registers`, a `width` that `heads` does not divide, and images of the wrong rank, type, size
    or number of channels.
    """

    num_classes: int | None
    patch: int = 16
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_dim: int | None = None
    pool: str = "token"
    class_token: bool = True
    norm_eps: float = 1e-6
    dropout: float = 0.0
    dtype: DTypeLike | None = None
    registers: int = 0
    layer_scale: float | None = None
    remat: bool = False

    @classmethod
    def variant(cls, name: str, num_classes: int | None, **overrides: Any) -> Self:
        """Return a published size, such as "B/16": one of Ti, S, B, L, H, and the patch.

        `overrides` replace any other field. Raises ValueError for a name of another form.
        """
        size, _, patch = name.partition("/")
        if size not in _SIZES or not patch.isdecimal() or int(patch) == 0:
            raise ValueError(
                f"unknown ViT {name!r}: give one of {', '.join(_SIZES)} and a patch, as in 'B/16'."
            )
        return cls(num_classes, **{"patch": int(patch), **_SIZES[size], **overrides})

    def __post_init__(self):
        if self.pool not in _POOLS:
            raise ValueError(f"unknown pool {self.pool!r}: choose one of {', '.join(_POOLS)}.")
        if "token" in self.pool and not self.class_token:
            raise ValueError(
                f"pool={self.pool!r} needs class_token=True: add it or choose pool='mean'."
            )
        if self.registers < 0:
            raise ValueError(f"registers must be zero or more, got {self.registers}: 0 for none.")
        if self.width % self.heads:
            raise ValueError(
                f"width {self.width} is not a multiple of {self.heads} heads: change either."
            )
        super().__post_init__()

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Return logits (B, num_classes), or features, for images (B, H, W, C)."""
        x = check_images(x, self.get_variable("params", "patch_embed"))
        if train and self.dropout and not (self.has_rng("dropout") or self.is_initializing()):
            raise ValueError(
                f"dropout={self.dropout} needs a key in training: pass rngs={{'dropout': key}}."
            )
        height, width = (side // self.patch for side in x.shape[1:3])
        x = self._embed(x)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        mlp_dim = self.mlp_dim or 4 * self.width
        thirds = {round((k + 1) * self.depth / 3) - 1 for k in range(3)}
        make = nn.remat(_Block, static_argnums=(2,)) if self.remat else _Block
        for i in range(self.depth):
            block = make(
                self.heads,
                mlp_dim,
                self.norm_eps,
                self.dropout,
                self.layer_scale,
                self.dtype,
                name=f"blocks_{i}",
            )
            x = block(x, train)
            if i in thirds and not self.is_initializing():
                self.sow("features", f"patches_{i:02d}", self._as_map(x, height, width))
        x = self._pool(at_least_float32(x))
        if not self.num_classes:
            return x
        dtype = None if self.dtype is None else x.dtype
        return nn.Dense(self.num_classes, dtype=dtype, kernel_init=_init, name="head")(x)

    def _as_map(self, x: jax.Array, height: int, width: int) -> jax.Array:
        """Return the patch tokens of (B, N, width) where they are in the image."""
        patches = x[:, int(self.class_token) + self.registers :]
        return patches.reshape(x.shape[0], height, width, self.width)

    def _pool(self, x: jax.Array) -> jax.Array:
        """Return the features (B, width or twice that) of tokens (B, N, width), normalized."""
        dtype = None if self.dtype is None else x.dtype
        norm = nn.LayerNorm(self.norm_eps, dtype, use_fast_variance=False, name="norm")
        first_patch = int(self.class_token) + self.registers
        if self.pool == "token":
            return norm(x[:, 0])  # token by token, so only the one that is read
        if self.pool == "mean":
            return norm(x[:, first_patch:].mean(axis=1))
        x = norm(x)
        mean = x[:, first_patch:].mean(axis=1)
        return mean if self.pool == "norm_mean" else jnp.concatenate([x[:, 0], mean], axis=-1)

    def _embed(self, x: jax.Array) -> jax.Array:
        """Return the tokens (B, N, width) of images, positions added."""
        height, width = x.shape[1:3]
        if height % self.patch or width % self.patch or not height * width:
            raise ValueError(
                f"images of {height}×{width} are not made of patches of {self.patch}×{self.patch}: "
                "resize or pad them."
            )
        conv = nn.Conv(
            self.width,
            (self.patch, self.patch),
            self.patch,
            padding="VALID",
            dtype=self.dtype,
            name="patch_embed",
        )
        x = conv(x)
        x = x.reshape(x.shape[0], -1, self.width)
        self._check_positions(height, width)
        shape = (1, x.shape[1] + int(self.class_token), self.width)
        position = self.param("pos_embed", _init, shape, jnp.float32)
        if self.class_token:
            start = nn.initializers.normal(1e-6)
            token = self.param("cls_token", start, (1, 1, self.width), jnp.float32)
            x = self._insert(token, x, 0)
        x, position = nn.dtypes.promote_dtype(x, position, dtype=self.dtype)
        x = x + position
        if self.registers:
            start = nn.initializers.normal(1e-6)
            shape = (1, self.registers, self.width)
            register = self.param("reg_token", start, shape, jnp.float32)
            x = self._insert(register, x, int(self.class_token))
        return x

    def _insert(self, token: jax.Array, x: jax.Array, at: int) -> jax.Array:
        """Return `x` (B, N, width) with the tokens (1, M, width) before its token `at`."""
        x, token = nn.dtypes.promote_dtype(x, token, dtype=self.dtype)
        token = jnp.broadcast_to(token, (x.shape[0], *token.shape[1:]))
        return jnp.concatenate([x[:, :at], token, x[:, at:]], axis=1)

    def _check_positions(self, height: int, width: int) -> None:
        held: jax.Array | None = self.get_variable("params", "pos_embed")
        if held is None:
            return
        patches = held.shape[1] - int(self.class_token)
        if patches != (height // self.patch) * (width // self.patch):
            side = math.isqrt(patches) * self.patch
            raise ValueError(
                f"images of {height}×{width} do not have the {patches} patches that pos_embed "
                f"{held.shape} was made for: resize them, for a square grid to {side}×{side}, "
                "or interpolate pos_embed."
            )


class _Block(nn.Module):
    heads: int
    mlp_dim: int
    norm_eps: float
    dropout: float
    layer_scale: float | None
    dtype: DTypeLike | None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        def norm(name):
            return nn.LayerNorm(self.norm_eps, self.dtype, use_fast_variance=False, name=name)

        def scaled(y, name):
            if self.layer_scale is None:
                return y
            return _LayerScale(self.layer_scale, self.dtype, name=name)(y)

        attention = _Attention(self.heads, self.dropout, self.dtype, name="attn")
        mlp = _MLP(self.mlp_dim, self.dropout, self.dtype, name="mlp")
        x = x + scaled(attention(norm("norm1")(x), train), "ls1")
        return x + scaled(mlp(norm("norm2")(x), train), "ls2")


class _LayerScale(nn.Module):
    start: float
    dtype: DTypeLike | None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        start = nn.initializers.constant(self.start)
        gamma = self.param("gamma", start, x.shape[-1:], jnp.float32)
        x, gamma = nn.dtypes.promote_dtype(x, gamma, dtype=self.dtype)
        return x * gamma.reshape(1, 1, -1)


class _Attention(nn.Module):
    heads: int
    dropout: float
    dtype: DTypeLike | None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        width = x.shape[-1]
        qkv = nn.Dense(3 * width, dtype=self.dtype, kernel_init=_init, name="qkv")(x)
        qkv = qkv.reshape(*x.shape[:-1], 3, self.heads, width // self.heads)
        y = _attend(*jnp.moveaxis(qkv, -3, 0)).reshape(x.shape)
        y = nn.Dense(width, dtype=self.dtype, kernel_init=_init, name="proj")(y)
        return nn.Dropout(self.dropout, deterministic=not train)(y)


class _MLP(nn.Module):
    mlp_dim: int
    dropout: float
    dtype: DTypeLike | None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        y = nn.Dense(self.mlp_dim, dtype=self.dtype, kernel_init=_init, name="fc1")(x)
        y = nn.gelu(y, approximate=False)
        y = nn.Dropout(self.dropout, deterministic=not train)(y)
        y = nn.Dense(x.shape[-1], dtype=self.dtype, kernel_init=_init, name="fc2")(y)
        return nn.Dropout(self.dropout, deterministic=not train)(y)


def _attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Softmax attention over tokens, each argument (B, N, heads, head_dim)."""
    # Written out, because jax.nn.dot_product_attention takes its softmax in float32 even of
    # float64 scores.
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=dtype)
    weights = jax.nn.softmax(scores / math.sqrt(q.shape[-1]), axis=-1)
    return jnp.einsum("bhqk,bkhd->bqhd", weights.astype(v.dtype), v)
