"""What an element does to predictions, and the way back from the canonical input: ρ(h(x))·y.

An output is called by its representation (see `representations`): "trivial" stays as it is,
"standard", "sign", "regular", "irrep<k>" are numbers with no place in the image, `(B, ..., d)`, for
instance a direction `(B, 2)`. With "field:" before it the output is shaped like the image: for
"field:trivial" `(B, T, T, C)`, such as the logits of a segmentation; for the others `(B, T, T, d)`
or `(B, T, T, d, C)`, such as a flow, `(B, T, T, 2)`. T may be another resolution than the image's.

Outside of what a field shows its edge continues: the `fill` of images is a colour, no prediction.
"""

import jax

from equiadapt_jax import canonicalization, representations
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


def act(
    group: Group | MatrixGroup, g, y: jax.Array, *, output: str, interpolation: str = "linear"
) -> jax.Array:
    """ρ(g)·y of predictions `(B, ...)` and an element for each, or one for all.

    Args:
      group: the group.
      g: elements.
      y: predictions; of any form for "trivial".
      output: see the module.
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


def invert(
    group: Group | MatrixGroup,
    pose: jax.Array,
    y: jax.Array,
    weights: jax.Array | None = None,
    *,
    output: str,
    mix: bool = False,
    interpolation: str = "linear",
) -> jax.Array:
    """ρ(pose)·y: predictions for canonical inputs, brought back to the poses of the inputs.

    With weights, which leave the value as it is, the derivative with respect to them is that of the
    mixture Σ_g w_g ρ(g)·y, as in `canonicalization.canonicalize`.

    Args:
      group: the group.
      pose: int32 `(B,)`, for SO(2) and O(2) matrices `(B, 2, 2)`.
      y: predictions `(B, ...)` for the canonical inputs.
      weights: `(B, |G|)`, from `canonicalization.weights`; needed only for gradients to the scores.
      output: see the module.
      mix: return the mixture, as suits soft weights, whose canonical inputs are one too.
      interpolation: of fields.

    Raises:
      ValueError: predictions that do not have the shape of the output.
    """

    def transform(g, y):
        return act(group, g, y, output=output, interpolation=interpolation)

    if weights is None or output == "trivial":
        return transform(pose, y)
    group = canonicalization.check_scores(group, weights)
    if mix:
        return canonicalization.weighted_sum(group, weights, y, transform)
    return canonicalization.straight_through(group, pose, weights, y, transform)


def _misfit(group, output, y, wanted):
    return ValueError(
        f"The prediction has shape {y.shape}; for output={output!r} over {group} it must be "
        f"{wanted}."
    )
