"""Laws of the groups: what the elements are and how they compose, nothing about data.

A group is a frozen, hashable description, static under `jax.jit`; its elements are int32 arrays.
Element i of D_n is r^(i mod n) · s^(i div n): the reflection s acts first, then i mod n steps of
the rotation r by 2π/n, counter-clockwise as displayed. C_n is the first half of D_n. Every method
works on Python integers, NumPy arrays and traced arrays of any shape, element by element.
"""

import dataclasses
import functools
import math
import re
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class _Planar:
    """What C_n and D_n share: n rotations, and for D_n as many reflections behind them."""

    n: int
    _copies: ClassVar[int]  # of the rotations: themselves, and after a mirror

    def __post_init__(self):
        if not isinstance(self.n, int) or isinstance(self.n, bool) or self.n < 1:
            raise ValueError(
                f"{type(self).__name__}(n={self.n!r}): n must be an integer of at least 1."
            )

    @property
    def order(self) -> int:
        """Number of elements."""
        return self.n * self._copies

    def identity(self) -> jax.Array:
        """The identity, an int32 scalar."""
        return jnp.zeros((), jnp.int32)

    def elements(self) -> jax.Array:
        """All elements, int32 `(order,)`."""
        return jnp.arange(self.order, dtype=jnp.int32)

    def random(self, key: jax.Array, shape: tuple[int, ...] = ()) -> jax.Array:
        """Uniformly distributed elements, int32 of the given shape."""
        return jax.random.randint(key, shape, 0, self.order, jnp.int32)

    def compose(self, g, h):
        """g∘h, the element that acts as h first and then as g."""
        turns = (g % self.n + (1 - 2 * (g // self.n)) * (h % self.n)) % self.n
        return turns + self.n * ((g // self.n + h // self.n) % 2)

    def inverse(self, g):
        """The element that undoes g; a reflection undoes itself."""
        mirrored = g // self.n
        return (2 * mirrored - 1) * (g % self.n) % self.n + self.n * mirrored

    def steps(self, g):
        """Number of rotation steps of 2π/n in g, in [0, n)."""
        return g % self.n

    def reflects(self, g):
        """1 where g contains the reflection, else 0."""
        return g // self.n

    def matrix(self, g, dtype=jnp.float32) -> jax.Array:
        """The standard representation on image vectors (x to the right, y down), `(..., 2, 2)`.

        A counter-clockwise θ maps (x, y) to (cos θ x + sin θ y, −sin θ x + cos θ y); the reflection
        maps (x, y) to (−x, y). Quarter turns and mirrors are exact.
        """
        return jnp.asarray(self._matrices, dtype)[g]

    @functools.cached_property
    def _matrices(self) -> np.ndarray:
        return np.stack([_matrix(g % self.n, self.n, g // self.n) for g in range(self.order)])

    @property
    def lattice(self) -> np.ndarray:
        """Elements that map the pixel grid of a square onto itself, a subgroup, ascending.

        Quarter turns where 4 divides n, half turns where 2 does, and D_n's mirrors with them.
        """
        turns = np.arange(math.gcd(self.n, 4), dtype=np.int32) * (self.n // math.gcd(self.n, 4))
        mirrors = np.arange(self.order // self.n, dtype=np.int32)[:, None] * self.n
        return (mirrors + turns).reshape(-1)

    def split(self, g):
        """(r, q) with r∘q = g, q in the lattice subgroup and r one rotation of its left coset.

        r is the same for all of g∘lattice, which makes the action of g∘q equal that of g after q
        to the bit; it turns by at most 45° where 4 divides n.
        """
        step = self.n // math.gcd(self.n, 4)
        below = (step - 1) // 2
        remainder = (g % self.n + below) % step - below
        return remainder % self.n, (g % self.n - remainder) % self.n + self.n * (g // self.n)

    def __str__(self) -> str:
        return f"{type(self).__name__.lower()}{self.n}"


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Cyclic(_Planar):
    """C_n: the n rotations of the plane by multiples of 2π/n."""

    _copies = 1


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Dihedral(_Planar):
    """D_n: the n rotations by multiples of 2π/n, and each of them after a left-right mirror."""

    _copies = 2


Group = Cyclic | Dihedral


def from_name(name: str) -> Group:
    """The group called `cyclic4`, `dihedral8` and so on; ValueError for any other name."""
    match = re.fullmatch(r"(cyclic|dihedral)([1-9][0-9]*)", name)
    if match is None:
        raise ValueError(
            f"Unknown group {name!r}: write cyclic or dihedral and the number of rotations, "
            "for example cyclic4, cyclic8 or dihedral4."
        )
    return Cyclic(int(match[2])) if match[1] == "cyclic" else Dihedral(int(match[2]))


def _matrix(steps: int, n: int, mirrored: int) -> np.ndarray:
    """Rotation by steps·2π/n after an optional mirror, float64, exact at multiples of π/2."""
    quarters, rest = divmod(4 * steps, n)
    cos, sin = math.cos(math.pi / 2 * rest / n), math.sin(math.pi / 2 * rest / n)
    for _ in range(quarters):
        cos, sin = -sin, cos
    return np.array([[cos, sin], [-sin, cos]]) @ np.diag([1.0 - 2.0 * mirrored, 1.0])
