"""Representations: what an element of a group does to numbers that have a direction.

A representation ρ gives every element a matrix, with ρ(g∘h) = ρ(g) ρ(h). They are called

- `trivial`: 1. Numbers that no element changes: logits, temperatures.
- `sign`: −1 for reflections, else 1. Pseudo-scalars: curls, handedness.
- `standard`: the 2×2 matrix of `group.matrix`. Image vectors, x to the right and y down.
- `regular`: one number for each element, permuted: (ρ(g) v)[h] = v[g⁻¹∘h]. Scores.
- `irrep<k>`: the irreducible one of order k ≥ 1, rotation by k times the angle: with R the rotation
  by θ in image vectors and S = diag(−1, 1), r ↦ Rᵏ and s ↦ S. Order 1 is the standard one, order 2
  belongs to line directions. `irrep0` is trivial. Where n is even the one of order n/2 has
  dimension 1: r ↦ −1, s ↦ 1.
- `irrep<k>_sign`: the same with −1 before every reflection; `irrep0_sign` is `sign`.

These are all real irreducible representations of C_n and D_n, k from 0 to n/2 (Serre, Linear
Representations of Finite Groups, 5.1 and 5.3), and of SO(2) and O(2), any k, which have no regular
one. Exact elements have matrices of 0 and ±1.
"""

import functools
import re

import jax
import jax.numpy as jnp

from equiadapt_jax.groups import Group, MatrixGroup, finite

NAMES = "trivial, sign, standard, regular, irrep<k> and irrep<k>_sign"


def dimension(group: Group | MatrixGroup, representation: str) -> int:
    """How many numbers the representation acts on; ValueError for one that the group has not."""
    if representation == "standard":
        return 2
    if representation == "regular":
        return finite(group, "A regular representation").order
    order, _ = _irreducible(group, representation)
    return 1 if order == 0 or (isinstance(group, Group) and 2 * order == group.n) else 2


def matrix(group: Group | MatrixGroup, g, representation: str, dtype=jnp.float32) -> jax.Array:
    """ρ(g), `(..., d, d)` for elements g of shape `(...)`, where d is the `dimension`.

    ValueError for a representation that the group has not.
    """
    if representation == "standard":
        return group.matrix(g, dtype)
    if representation == "regular":
        return (permutation(group, g)[..., None] == group.elements()).astype(dtype)
    order, sign = _irreducible(group, representation)
    mirrored = jnp.asarray(group.reflects(g))
    if order == 0:
        rho = jnp.ones((*batch_shape(group, g), 1, 1), dtype)
    elif isinstance(group, MatrixGroup):
        rho = _power(group, g, order, dtype)
    elif 2 * order == group.n:
        rho = (1 - 2 * jnp.asarray(group.steps(g) % 2))[..., None, None].astype(dtype)
    else:
        rho = group.matrix(order * group.steps(g) % group.n + group.n * group.reflects(g), dtype)
    return rho * (1 - 2 * mirrored * sign)[..., None, None].astype(dtype)


def batch_shape(group: Group | MatrixGroup, g) -> tuple[int, ...]:
    """The shape of elements, without the last two axes where these are matrices."""
    return jnp.shape(g)[:-2] if isinstance(group, MatrixGroup) else jnp.shape(g)


def permutation(group: Group | MatrixGroup, g) -> jax.Array:
    """g⁻¹∘h for every h, int32 `(..., |G|)`: where the regular representation reads entry h."""
    group = finite(group, "A regular representation")
    return group.compose(group.inverse(jnp.asarray(g, jnp.int32))[..., None], group.elements())


def _power(group, g, order, dtype):
    """Matrices that turn `order` times as far as g, after the same mirror."""
    mirrored = group.reflects(g)
    columns = jnp.stack([1 - 2 * mirrored, jnp.ones_like(mirrored)], -1)[..., None, :]
    rotation = group.matrix(g, dtype) * columns.astype(dtype)
    return functools.reduce(group.compose, [rotation] * order) * columns.astype(dtype)


def _irreducible(group, representation):
    """(order, sign) of a name."""
    whole = {"trivial": "irrep0", "sign": "irrep0_sign"}.get(representation, representation)
    match = re.fullmatch(r"irrep(0|[1-9][0-9]*)(_sign)?", whole)
    if match is None:
        raise ValueError(f"Unknown representation {representation!r}: there are {NAMES}.")
    if isinstance(group, Group) and 2 * int(match[1]) > group.n:
        raise ValueError(
            f"{representation!r} is not irreducible over {group}: orders go from 0 to "
            f"{group.n // 2}."
        )
    return int(match[1]), match[2] is not None
