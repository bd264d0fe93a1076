"""What an element does to feature maps: it moves their places and turns what lies there.

A field of a representation of dimension d is `(..., H, W, d, C)`: C maps, which at every pixel hold
d numbers. Trivial fields are `(..., H, W, C)`, the images of `actions.images`. So a field of image
vectors (a flow) is `(..., H, W, 2, C)`, x to the right before y down, and a regular field, one map
for each element, `(..., H, W, |G|, C)`: (g·f)[h] = g·f[g⁻¹∘h].
"""

import functools

import jax

from equiadapt_jax import representations
from equiadapt_jax.actions import images, vectors
from equiadapt_jax.groups import Group, MatrixGroup


def act(
    group: Group | MatrixGroup,
    g,
    fields: jax.Array,
    *,
    representation: str = "trivial",
    pad: str = "edge",
    fill: float = 0.0,
    interpolation: str = "linear",
) -> jax.Array:
    """g·f, with (g·f)(p) = ρ(g) f(g⁻¹·p) at every place p.

    Exact elements move and negate numbers and compute none: act(g⁻¹, act(g, f)) is f to the bit
    (but the sign of zeros). The others are resampled, once.

    Args:
      group: the group.
      g: elements, of the leading shape `(...)` of the fields, or a scalar.
      fields: `(..., H, W, C)` for "trivial", else `(..., H, W, d, C)`; square unless n is at most
        2.
      representation: see `representations`.
      pad: "edge" or "constant", see `actions.images`.
      fill: the value outside for `pad="constant"`; 0 for all but trivial and regular fields.
      interpolation: "linear" or "cubic".

    Raises:
      ValueError: a representation that the group has not, shapes that do not fit, a fill that is
        not the same in every pose.
      TypeError: fields that would be interpolated or turned and are not floats.
    """
    move = functools.partial(images.act, pad=pad, fill=fill, interpolation=interpolation)
    if representation == "trivial":
        return move(group, g, fields)
    dimension = representations.dimension(group, representation)
    if fields.ndim < 4 or fields.shape[-2] != dimension:
        raise ValueError(
            f"Fields of shape {fields.shape} are not {representation!r} over {group}: give "
            f"(..., H, W, {dimension}, C)."
        )
    if pad == "constant" and representation != "regular" and fill != 0:
        raise ValueError(
            f"fill={fill} around {representation!r} fields would be turned with them: fill with 0."
        )
    moved = move(group, g, fields.reshape(*fields.shape[:-2], -1)).reshape(fields.shape)
    return vectors.act(group, g, moved, representation=representation, axis=-2)
