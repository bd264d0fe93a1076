"""Laws of the groups: what the elements are and how they compose, nothing about data.

A group is a frozen, hashable description, static under `jax.jit`. Elements of C_n and D_n are int32
arrays, those of SO(2) and O(2) are matrices `(..., 2, 2)`: the standard representation on image
vectors (x to the right, y down).

Element i of D_n is r^(i mod n) · s^(i div n): the reflection s acts first, then i mod n steps of
the rotation r by 2π/n, counter-clockwise as displayed. C_n is the first half of D_n. Their
methods work on Python integers, NumPy arrays and traced arrays of any shape, element by element,
and take integers beyond the order as what they are modulo it.
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
        if not isinstance(self.n, int | np.integer) or isinstance(self.n, bool) or self.n < 1:
            raise ValueError(
                f"{type(self).__name__}(n={self.n!r}): n must be an integer of at least 1."
            )
        object.__setattr__(self, "n", int(self.n))

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
        turns = (g % self.n + (1 - 2 * self.reflects(g)) * (h % self.n)) % self.n
        return turns + self.n * ((self.reflects(g) + self.reflects(h)) % 2)

    def inverse(self, g):
        """The element that undoes g; a reflection undoes itself."""
        mirrored = self.reflects(g)
        return (2 * mirrored - 1) * (g % self.n) % self.n + self.n * mirrored

    def steps(self, g):
        """Number of rotation steps of 2π/n in g, in [0, n)."""
        return g % self.n

    def reflects(self, g):
        """1 where g contains the reflection, else 0."""
        return g // self.n % self._copies

    def matrix(self, g, dtype=jnp.float32) -> jax.Array:
        """The standard representation on image vectors (x to the right, y down), `(..., 2, 2)`.

        A counter-clockwise θ maps (x, y) to (cos θ x + sin θ y, −sin θ x + cos θ y); the reflection
        maps (x, y) to (−x, y). Quarter turns and mirrors are exact.
        """
        return jnp.asarray(self._matrices, dtype)[g % self.order]

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
        return remainder % self.n, (g % self.n - remainder) % self.n + self.n * self.reflects(g)

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


@dataclasses.dataclass(frozen=True)
class _Orthogonal:
    """What SO(2) and O(2) share: matrices of rotations, and for O(2) of reflections.

    The matrix of a rotation is [[c, s], [−s, c]] for a counter-clockwise angle with cosine c and
    sine s; a reflection is such a rotation after the left-right mirror diag(−1, 1). Matrices are
    taken to be of the group: nothing is checked or projected.
    """

    d: int
    _circle: ClassVar[type]  # the kind of its finite subgroups

    def __post_init__(self):
        if self.d != 2 or not isinstance(self.d, int):
            raise ValueError(
                f"{type(self).__name__}(d={self.d!r}): images are planes, so take "
                f"{type(self).__name__}(2)."
            )

    @property
    def order(self) -> None:
        """None: there are infinitely many elements."""
        return None

    def subgroup(self, n: int) -> "Group":
        """C_n in SO(2), D_n in O(2); that of n = 4 moves pixels onto pixels."""
        return self._circle(n)

    def elements(self) -> jax.Array:
        """Raises ValueError: infinitely many elements cannot be listed."""
        raise ValueError(_not_finite(self, "A list of all elements"))

    def identity(self) -> jax.Array:
        """The identity, float32 `(2, 2)`."""
        return jnp.eye(2, dtype=jnp.float32)

    def compose(self, g, h):
        """g∘h, the element that acts as h first and then as g; exact where one of them is."""
        g, h = jnp.asarray(g), jnp.asarray(h)
        return g[..., :, :1] * h[..., :1, :] + g[..., :, 1:] * h[..., 1:, :]

    def inverse(self, g):
        """The element that undoes g: the transpose."""
        return jnp.swapaxes(jnp.asarray(g), -1, -2)

    def matrix(self, g, dtype=jnp.float32) -> jax.Array:
        """The standard representation on image vectors, `(..., 2, 2)`: g itself."""
        return jnp.asarray(g, dtype)

    def rotation(self, angle) -> jax.Array:
        """The rotation by `angle` radians counter-clockwise, `(..., 2, 2)`, differentiable.

        In at least float32. Quarter turns, to within rounding of the angle there, are exact.
        """
        angle = jnp.asarray(angle)
        angle = angle.astype(jnp.promote_types(angle.dtype, jnp.float32))
        quarter, rest = quarter_turns(angle)
        return self._turned(jnp.cos(rest), jnp.sin(rest), quarter)

    def angle(self, g) -> jax.Array:
        """The angle of g's rotation, which acts after the mirror if there is one, in [−π, π]."""
        cos, sin = self._cos_sin(g)
        return jnp.arctan2(sin, cos)

    def split(self, g) -> tuple[jax.Array, jax.Array]:
        """(r, q) with r∘q = g: r a rotation by at most 45°, `(..., 2, 2)`, and q exact.

        q is an element of D_4, int32: a mirror where q ≥ 4, then q mod 4 quarter turns. It follows
        from comparisons of the entries, so r is the same to the bit for g and g∘q', q' exact.
        """
        cos, sin = self._cos_sin(g)
        quarter = jnp.select(
            [(sin > cos) & (sin >= -cos), (sin >= cos) & (sin < -cos), (sin < cos) & (sin <= -cos)],
            [1, 2, 3],
        ).astype(jnp.int32)
        return self._turned(cos, sin, -quarter % 4), quarter + 4 * self.reflects(g)

    def reflects(self, g) -> jax.Array:
        """1 where g contains the reflection, else 0; int32."""
        raise NotImplementedError

    def _cos_sin(self, g):
        """Cosine and sine of g's rotation, from both columns: the same if they are exchanged."""
        g = jnp.asarray(g)
        sign = (1 - 2 * self.reflects(g)).astype(g.dtype)
        cos = (g[..., 1, 1] + sign * g[..., 0, 0]) / 2
        return cos, (g[..., 0, 1] - sign * g[..., 1, 0]) / 2

    def _turned(self, cos, sin, quarter):
        """The rotation of this cosine and sine, and `quarter` quarter turns more."""
        cases = [quarter == k for k in range(4)]
        cos, sin = (
            jnp.select(cases, [cos, -sin, -cos, sin]),
            jnp.select(cases, [sin, cos, -sin, -cos]),
        )
        return jnp.stack([jnp.stack([cos, sin], -1), jnp.stack([-sin, cos], -1)], -2)

    def __str__(self) -> str:
        return f"{type(self).__name__.lower()}{self.d}"


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class SO(_Orthogonal):
    """All rotations of the plane, SO(2)."""

    _circle = Cyclic

    def random(self, key: jax.Array, shape: tuple[int, ...] = ()) -> jax.Array:
        """Uniformly distributed elements, float32 `(*shape, 2, 2)`."""
        return self.rotation(jax.random.uniform(key, shape, maxval=2 * np.pi))

    def reflects(self, g) -> jax.Array:
        """0 for every element, int32 `(...)`."""
        return jnp.zeros(jnp.shape(g)[:-2], jnp.int32)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class O(_Orthogonal):  # noqa: E742, the group's name
    """All rotations of the plane, and each of them after a left-right mirror: O(2)."""

    _circle = Dihedral

    def random(self, key: jax.Array, shape: tuple[int, ...] = ()) -> jax.Array:
        """Uniformly distributed elements, float32 `(*shape, 2, 2)`."""
        angle_key, mirror_key = jax.random.split(key)
        rotation = self.rotation(jax.random.uniform(angle_key, shape, maxval=2 * np.pi))
        return self.mirrored(rotation, jax.random.bernoulli(mirror_key, shape=shape))

    def reflects(self, g) -> jax.Array:
        """1 where the determinant is negative: g contains the mirror. Else 0; int32 `(...)`."""
        g = jnp.asarray(g)
        return (g[..., 0, 0] * g[..., 1, 1] < g[..., 0, 1] * g[..., 1, 0]).astype(jnp.int32)

    def mirrored(self, g, where=True) -> jax.Array:
        """The element that mirrors left to right, where `where` is true, and then acts as g."""
        sign = jnp.where(jnp.asarray(where, bool), -1, 1).astype(jnp.asarray(g).dtype)
        return g * jnp.stack([sign, jnp.ones_like(sign)], -1)[..., None, :]


def quarter_turns(angle: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(quarter turns in 0 to 3, int32; the rest in radians, at most π/4) of angles `(...)`.

    An exact quarter turn, to within rounding of the angle, has a rest of 0, whose derivative is
    still that of the angle. Angles are floats, of float32 or wider.
    """
    quarter = jnp.round(angle / (np.pi / 2))
    rest = angle - quarter * (np.pi / 2)
    rounding = 4 * jnp.finfo(angle.dtype).eps * jnp.maximum(jnp.abs(angle), 1)
    rest = rest - jax.lax.stop_gradient(jnp.where(jnp.abs(rest) <= rounding, rest, 0))
    return quarter.astype(jnp.int32) % 4, rest


Group = Cyclic | Dihedral
MatrixGroup = SO | O


def finite(group: Group | MatrixGroup, what: str) -> Group:
    """The group itself; ValueError, which says that `what` needs it finite, for SO(2) and O(2)."""
    if isinstance(group, MatrixGroup):
        raise ValueError(_not_finite(group, what))
    return group


def _not_finite(group, what):
    return (
        f"{what} needs a finite group, and {group} has infinitely many elements: take one such as "
        f"{group.subgroup(16)}."
    )


def from_name(name: str) -> Group | MatrixGroup:
    """The group called `cyclic4`, `dihedral8`, `so2`, `o2`; ValueError for any other name."""
    continuous = {str(group): group for group in (SO(2), O(2))}
    if name in continuous:
        return continuous[name]
    match = re.fullmatch(r"(cyclic|dihedral)([1-9][0-9]*)", name)
    if match is None:
        raise ValueError(
            f"Unknown group {name!r}: write cyclic or dihedral and the number of rotations, "
            "for example cyclic4, cyclic8 or dihedral4, or so2 or o2 for all angles."
        )
    return Cyclic(int(match[2])) if match[1] == "cyclic" else Dihedral(int(match[2]))


def _matrix(steps: int, n: int, mirrored: int) -> np.ndarray:
    """Rotation by steps·2π/n after an optional mirror, float64, exact at multiples of π/2."""
    quarters, rest = divmod(4 * steps, n)
    cos, sin = math.cos(math.pi / 2 * rest / n), math.sin(math.pi / 2 * rest / n)
    for _ in range(quarters):
        cos, sin = -sin, cos
    return np.array([[cos, sin], [-sin, cos]]) @ np.diag([1.0 - 2.0 * mirrored, 1.0])
