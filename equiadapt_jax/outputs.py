"""How a prediction for the canonical input is carried back to the input: ρ(h(x))·y.

An output is called by its representation (see `representations`): "trivial" stays as it is,
"standard", "sign", "regular", "irrep<k>" are numbers with no place in the image, `(B, ..., d)`, for
instance a direction `(B, 2)`. With "field:" before it the output is shaped like the image: for
"field:trivial" `(B, T, T, C)`, such as the logits of a segmentation; for the others `(B, T, T, d)`
or `(B, T, T, d, C)`, such as a flow, `(B, T, T, 2)`. T may be another resolution than the image's.

Outside of what a field shows its edge continues: the `fill` of images is a colour, no prediction.
"""

import functools

import jax
import jax.numpy as jnp

from equiadapt_jax import representations
from equiadapt_jax.actions import fields, vectors
from equiadapt_jax.groups import Group, MatrixGroup


def is_field(output: str) -> bool:
    """Whether predictions are shaped like the image."""
    return output.startswith("field:")


def check(group: Group | MatrixGroup, output: str) -> None:
    """ValueError for an output that does not exist over the group."""
    representation = output.removeprefix("field:")
    try:
        representations.dimension(group, representation)
    except ValueError as error:
        raise ValueError(
            f"output={output!r} is not available: {error} For image-shaped predictions write "
            "'field:' before it."
        ) from error


def carry(
    group: Group | MatrixGroup, output: str, g, y: jax.Array, *, interpolation: str = "linear"
) -> jax.Array:
    """ρ(g)·y of predictions `(B, ...)` and an element for each, or one for all.

    Args:
      group: the group.
      output: see the module.
      g: elements.
      y: predictions; of any form for "trivial".
      interpolation: of fields, "linear" or "cubic".

    Raises:
      ValueError: predictions that do not have the shape of the output.
    """
    representation = output.removeprefix("field:")
    if output == "trivial":
        return y
    d = representations.dimension(group, representation)
    if not is_field(output):
        if y.ndim < 2 or y.shape[-1] != d:
            raise _misfit(group, output, y, f"(B, ..., {d})")
        return vectors.act(group, g, y, representation=representation)
    trivial = representation == "trivial"
    wanted = "(B, T, T, C)" if trivial else f"(B, T, T, {d}) or (B, T, T, {d}, C)"
    fits = y.ndim == 4 if trivial else y.ndim in (4, 5) and y.shape[3] == d
    if not fits:
        raise _misfit(group, output, y, wanted)
    whole = y if trivial or y.ndim == 5 else y[..., None]
    moved = fields.act(group, g, whole, representation=representation, interpolation=interpolation)
    return moved.reshape(y.shape)


def carry_back(
    group: Group | MatrixGroup,
    output: str,
    pose: jax.Array,
    y: jax.Array,
    weights: jax.Array,
    *,
    mix: bool = False,
    interpolation: str = "linear",
) -> jax.Array:
    """ρ(pose)·y while training: with the derivative that reaches the scores.

    As in `canonicalization.canonicalize` the value is that of the pose, and the derivative with
    respect to the weights that of the mixture Σ_g w_g ρ(g)·y: ⟨∂L/∂y, ρ(g)·y⟩ for each g, one in
    memory at a time. Only reverse mode is defined.

    Args:
      group: the group.
      output: see the module.
      pose: int32 `(B,)`.
      y: predictions `(B, ...)` for the canonical inputs.
      weights: `(B, |G|)`, from `canonicalization.weights`.
      mix: return the mixture, as suits soft weights, whose canonical inputs are one too.
      interpolation: of fields.
    """
    if output == "trivial":
        return y
    how = (group, output, interpolation)
    return _mixture(how, weights, y) if mix else _carry_back(how, pose, weights, y)


def _misfit(group, output, y, wanted):
    return ValueError(
        f"The prediction has shape {y.shape}; for output={output!r} over {group} it must be "
        f"{wanted}."
    )


def _carry(how, g, y):
    group, output, interpolation = how
    return carry(group, output, g, y, interpolation=interpolation)


def _mixture(how, weights, y):
    dtype = jnp.promote_types(y.dtype, jnp.float32)

    @jax.checkpoint
    def add(total, g):
        weight = jnp.take(weights, g, -1).reshape(-1, *[1] * (y.ndim - 1)).astype(dtype)
        return total + weight * _carry(how, g, y).astype(dtype), None

    zero = jnp.zeros(y.shape, dtype)
    return jax.lax.scan(add, zero, how[0].elements())[0].astype(y.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _carry_back(how, pose, weights, y):
    return _carry(how, pose, y)


def _carry_back_forward(how, pose, weights, y):
    return _carry_back(how, pose, weights, y), (pose, weights, y)


def _carry_back_backward(how, residuals, cotangent):
    pose, weights, y = residuals
    _, to_weights = jax.vjp(lambda w: _mixture(how, w, y), weights)
    _, to_y = jax.vjp(lambda y: _carry(how, pose, y), y)
    return None, to_weights(cotangent)[0], to_y(cotangent)[0]


_carry_back.defvjp(_carry_back_forward, _carry_back_backward)
