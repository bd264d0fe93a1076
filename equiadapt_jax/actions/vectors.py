"""What an element does to vectors that have no place in the image: directions, scores."""

import jax
import jax.numpy as jnp

from equiadapt_jax import representations
from equiadapt_jax.groups import Group, MatrixGroup


def act(
    group: Group | MatrixGroup,
    g,
    vectors: jax.Array,
    *,
    representation: str = "standard",
    axis: int = -1,
) -> jax.Array:
    """ρ(g)·v along one axis of `vectors`.

    Args:
      group: the group.
      g: elements, whose shape is a leading part of that of the vectors, often the batch, or one
        element for all.
      vectors: any shape; the `axis` has the dimension of the representation: 2 for "standard",
        |G| for "regular". Floats, or for "trivial" and "regular", which compute nothing, any dtype.
      representation: see `representations`. "trivial" returns the vectors, of any shape.
      axis: where the components are, behind the axes of g.

    Returns:
      The same shape and dtype, computed in at least float32. Exact elements change no bit but the
      sign of zeros.

    Raises:
      ValueError: a representation that the group has not, shapes that do not fit.
      TypeError: vectors that are not floats.
    """
    dimension = representations.dimension(group, representation)
    if representation == "trivial":
        return vectors
    if not -vectors.ndim <= axis < vectors.ndim or vectors.shape[axis] != dimension:
        raise ValueError(
            f"Vectors of shape {vectors.shape} are not {representation!r} over {group}: axis "
            f"{axis} must have length {dimension}."
        )
    v = jnp.moveaxis(vectors, axis, -1)
    batch = representations.batch_shape(group, g)
    if v.shape[:-1][: len(batch)] != batch:
        raise ValueError(
            f"Elements of shape {batch} do not fit vectors of shape {vectors.shape}: give one for "
            "all, or one for each entry of the leading axes."
        )
    missing = [1] * (v.ndim - 1 - len(batch))
    if representation == "regular":
        places = representations.permutation(group, g).reshape(*batch, *missing, dimension)
        return jnp.moveaxis(jnp.take_along_axis(v, places, -1), -1, axis)
    if not jnp.issubdtype(vectors.dtype, jnp.floating):
        raise TypeError(f"Vectors of dtype {vectors.dtype} cannot be turned: give floats.")
    dtype = jnp.promote_types(vectors.dtype, jnp.float32)
    rho = representations.matrix(group, g, representation, dtype)
    rho = rho.reshape(*batch, *missing, dimension, dimension)
    # Sums that are written out keep all bits on every device; matrix products may not.
    turned = sum(rho[..., j] * v[..., j, None].astype(dtype) for j in range(dimension))
    return jnp.moveaxis(turned, -1, axis).astype(vectors.dtype)
