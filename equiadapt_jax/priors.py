"""Distributions over poses, and the loss that pulls a scorer's poses towards them.

A pretrained predictor has seen its data in some poses more than in others; the prior says which,
and keeps canonical inputs there (Mondal et al. 2023, arXiv 2310.01647, section 3.2). The
probability of a pose is p(g|x) = softmax(scores)_g. Losses are means over the batch, scalars in at
least float32.

For SO(2) and O(2) the loss takes the vectors that span the pose in place of scores. With θ the
angle of the frame and M the rotation that is most probable it is −(κ/2) tr(MᵀR) = −κ cos(θ − θ_M),
and for O(2) to that comes the choice of the mirror, like a choice of two elements:
−log Σ_m π(m) p(m|x), p of `canonicalization.mirror_log_odds`. So what is up is pulled to its place
whether mirrored or not, and no mirrored frame is left without a derivative. `Refined` has the
same for scores over a finite group, between whose elements the angle is refined.

Where inputs were turned on purpose, x = a·x₀ with x₀ as the prior has it, the pose to be found is
a times that of x₀: `applied=a` shifts the prior by the same element.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from equiadapt_jax.canonicalization import check_scores, check_vectors, frame, mirror_log_odds
from equiadapt_jax.groups import Group, MatrixGroup, O, finite
from equiadapt_jax.representations import batch_shape


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Identity:
    """All mass at the identity: data whose natural pose is the one it is stored in."""

    def loss(self, group: Group | MatrixGroup, scores: jax.Array, *, applied=None) -> jax.Array:
        """Mean of −log p(e|x), for scores `(..., |G|)` and elements `applied` `(...)` or scalar.

        For SO(2) the mean of 1 − tr(R) / 2 = 1 − cos θ, from 0 at the identity to 2, and for O(2)
        that and −log p(no mirror|x); for vectors as `canonicalization.frame` takes them, and
        `applied` matrices.
        """
        if isinstance(group, MatrixGroup):
            cosine = _cosine(group, scores, applied, 0.0)
            return jnp.mean(1 - cosine + _choice(group, scores, applied, 0.0))
        return -jnp.mean(_log_probabilities(group, scores, applied)[..., 0])

    def modes(self, group: Group | MatrixGroup) -> tuple:
        """The most probable elements of the group: integers, or matrices `(2, 2)`."""
        return _identity(group)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Categorical:
    """Any distribution π over the elements of a finite group.

    Attributes:
      probabilities: π, one number per element, not negative, summing to one.
      kl_weight: weight of KL(π ‖ batch mean of p), which asks the poses of a batch to be
        distributed as π, where the first term only asks each to be likely under π.
      per_sample: the papers' KL(π ‖ p(·|x)) for each input instead of −log Σ_g π(g) p(g|x). Its
        optimum is p = π for every input: a tie, unless π is a point mass.

    Raises:
      ValueError: probabilities that are not a distribution, or a negative kl_weight.
    """

    probabilities: tuple[float, ...]
    kl_weight: float = 0.0
    per_sample: bool = False

    def __post_init__(self):
        object.__setattr__(self, "probabilities", tuple(map(float, self.probabilities)))
        total = sum(self.probabilities)
        if not all(p >= 0 for p in self.probabilities) or not abs(total - 1) < 1e-6:
            raise ValueError(
                f"Prior probabilities {self.probabilities} sum to {total}: give one number of at "
                "least 0 for each element, summing to 1."
            )
        if not self.kl_weight >= 0:
            raise ValueError(f"The prior's kl_weight is {self.kl_weight}: it must be at least 0.")

    def modes(self, group: Group) -> tuple[int, ...]:
        """The most probable elements of the group."""
        self.check(group)
        best = max(self.probabilities)
        return tuple(i for i, p in enumerate(self.probabilities) if p == best)

    def loss(self, group: Group, scores: jax.Array, *, applied=None) -> jax.Array:
        """Mean of −log Σ_g π(g) p(g|x), plus the KL term; arguments as for `Identity`."""
        self.check(group)
        log_p = _log_probabilities(group, scores, applied)
        log_prior = np.log(np.maximum(self.probabilities, np.finfo(np.float32).tiny))
        # An element without mass is left out, not multiplied by zero, so that no 0 · ∞ can arise.
        support = np.flatnonzero(self.probabilities)
        pi = np.asarray(self.probabilities)[support].astype(log_p.dtype)
        log_pi = log_prior[support].astype(log_p.dtype)
        if self.per_sample:
            loss = jnp.mean(jnp.sum(pi * (log_pi - log_p[..., support]), -1))
        else:
            loss = -jnp.mean(jax.nn.logsumexp(log_p[..., support] + log_pi, -1))
        if self.kl_weight:
            batch = log_p.reshape(-1, group.order)[:, support]
            log_mean = jax.nn.logsumexp(batch, 0) - np.log(batch.shape[0]).astype(log_p.dtype)
            loss = loss + self.kl_weight * jnp.sum(pi * (log_pi - log_mean))
        return loss

    def check(self, group: Group | MatrixGroup) -> None:
        """ValueError for a group with another number of elements."""
        finite(group, "A categorical prior")
        if len(self.probabilities) != group.order:
            raise ValueError(
                f"The prior has {len(self.probabilities)} probabilities and {group} "
                f"{group.order} elements: give one for each."
            )


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Uniform:
    """No pose is more likely than another: a loss of zero, for any group."""

    def loss(self, group: Group | MatrixGroup, scores: jax.Array, *, applied=None) -> jax.Array:
        """Zero; arguments as for `Identity`."""
        if isinstance(group, MatrixGroup):  # which refuse what other priors refuse
            _seen_from(group, scores, applied)
        else:
            _log_probabilities(group, scores, applied)
        return jnp.zeros((), jnp.promote_types(scores.dtype, jnp.float32))

    def modes(self, group: Group | MatrixGroup) -> tuple:
        """The identity, against which poses are counted; there is no better one."""
        return _identity(group)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class VonMises:
    """The von Mises distribution over rotations, for SO(2) and O(2).

    The density of the angle θ is proportional to exp(κ cos(θ − angle)) (Mardia and Jupp 2000,
    Directional Statistics, section 3.5.4). For O(2) the left-right mirror acts before the rotation
    with probability `mirror`, whatever the angle: each half has the density above.

    Attributes:
      kappa: κ, the concentration, at least 0 (uniform). The width is 1/√κ radians where κ is large
        (a standard deviation of 5.8° for κ = 100, 18.7° for 10), of both halves and for any mirror.
      angle: the most probable angle, in radians counter-clockwise; of what acts after the mirror.
      mirror: for O(2) the probability of the mirror, in [0, 1]; photographs, which are often their
        own mirror image, ask for 0.5: then both sides are alike and only what is up counts.

    Raises:
      ValueError: a negative kappa, an angle that is not finite, a mirror outside [0, 1].
    """

    kappa: float
    angle: float = 0.0
    mirror: float = 0.0

    def __post_init__(self):
        if not 0 <= self.kappa < np.inf:
            raise ValueError(f"The prior's kappa is {self.kappa}: it must be at least 0.")
        if not np.isfinite(self.angle):
            raise ValueError(f"The prior's angle is {self.angle}: give radians.")
        if not 0 <= self.mirror <= 1:
            raise ValueError(f"The prior's mirror is {self.mirror}: give a share from 0 to 1.")

    def loss(self, group: MatrixGroup, scores: jax.Array, *, applied=None) -> jax.Array:
        """Mean of −log p(R), the density against the uniform one; arguments as for `Identity`."""
        self.check(group)
        cosine = _cosine(group, scores, applied, self.angle)
        kappa = jnp.asarray(self.kappa, cosine.dtype)
        choice = _choice(group, scores, applied, self.mirror)
        if isinstance(group, O):  # a uniform one gives each side a half
            choice -= math.log(2)
        return _log_bessel(kappa) + jnp.mean(choice - kappa * cosine)

    def modes(self, group: MatrixGroup) -> tuple[np.ndarray, ...]:
        """The most probable elements of the group, matrices `(2, 2)`."""
        self.check(group)
        return tuple(matrix for share, matrix in _shares(self) if share >= 0.5)

    def check(self, group: Group | MatrixGroup) -> None:
        """ValueError for a finite group, or SO(2) with a mirror."""
        if not isinstance(group, MatrixGroup):
            raise ValueError(
                f"A von Mises prior is one over SO(2) or O(2), and the group is {group}: take "
                "Categorical for finite groups."
            )
        if self.mirror and not isinstance(group, O):
            raise ValueError(
                f"The prior's mirror is {self.mirror}, and {group} has no mirrors: take O(2), or 0."
            )


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Refined:
    """A prior over SO(2) or O(2) for scores over a finite group, whose poses are refined.

    The loss of a mode M is KL(π ‖ p(·|x)), where π(g) ∝ exp(κ cos(θ_g − θ_M)) over the elements g
    on M's side of the mirror and 1/κ = h² + 1/κ', h the step of the group and κ' the prior's own
    concentration: as narrow as the steps resolve, and of a logarithm that is a parabola near its
    top, which `canonicalization.refine` finds again. Of two modes m with shares π(m) the loss is
    −log Σ_m π(m) exp(−KL_m).

    Attributes:
      group: C_n for SO(2), D_n for O(2), over which the scores are.
      prior: the distribution.

    Raises:
      TypeError: another prior.
    """

    group: Group
    prior: Identity | Uniform | VonMises

    def __post_init__(self):
        if not isinstance(self.prior, Identity | Uniform | VonMises):
            raise TypeError(
                f"The prior is a {type(self.prior).__name__}: give Identity, Uniform or VonMises."
            )

    def loss(self, group: MatrixGroup, scores: jax.Array, *, applied=None) -> jax.Array:
        """Its mean, for scores `(..., |G|)` of the finite group and `applied` matrices."""
        if self.group != group.subgroup(self.group.n):
            raise ValueError(
                f"Scores over {self.group} are none over {group}: take "
                f"{group.subgroup(self.group.n)}."
            )
        log_p = _log_probabilities(self.group, scores, None)
        _check_applied(group, applied, log_p.shape[:-1])
        if isinstance(self.prior, Uniform):
            return jnp.zeros((), log_p.dtype)
        if isinstance(self.prior, VonMises):
            self.prior.check(group)
        losses = []
        for share, mode in _shares(self.prior):
            place = jnp.asarray(mode, log_p.dtype)
            if applied is not None:
                place = group.compose(jnp.asarray(applied, log_p.dtype), place)
            losses.append(self._divergence(group, place, log_p) - math.log(share))
        return -jnp.mean(jax.nn.logsumexp(-jnp.stack(losses, -1), -1))

    def _divergence(self, group, place, log_p):
        """KL(π ‖ p) of π about the matrices `place`, `(...)`."""
        elements = self.group.matrix(np.arange(self.group.order), log_p.dtype)
        cosine = (place[..., None, :, :] * elements).sum((-2, -1)) / 2
        same = group.reflects(place)[..., None] == group.reflects(elements)
        log_pi = jax.nn.log_softmax(jnp.where(same, cosine / self._variance, -jnp.inf), -1)
        return jnp.sum(jnp.exp(log_pi) * jnp.where(same, log_pi - log_p, 0), -1)

    def modes(self, group: MatrixGroup) -> tuple[np.ndarray, ...]:
        """The most probable elements of the group, matrices `(2, 2)`, or the identity."""
        return self.prior.modes(group)

    @property
    def _variance(self) -> float:
        own = 1 / max(self.prior.kappa, 1e-6) if isinstance(self.prior, VonMises) else 0.0
        return (2 * math.pi / self.group.n) ** 2 + own


def _identity(group):
    return (np.eye(2),) if isinstance(group, MatrixGroup) else (0,)


def _seen_from(group, vectors, applied):
    """The vectors seen from the applied elements a, a⁻¹·v."""
    check_vectors(group, vectors)
    vectors = vectors.astype(jnp.promote_types(vectors.dtype, jnp.float32))
    _check_applied(group, applied, vectors.shape[:-2])
    if applied is None:
        return vectors
    back = group.inverse(jnp.asarray(applied, vectors.dtype))[..., None, :, :]
    return back[..., 0] * vectors[..., :1] + back[..., 1] * vectors[..., 1:]


def _cosine(group, vectors, applied, angle):
    """Of the angle between the frame seen from the applied elements and `angle`, `(...)`."""
    up = -frame(group, _seen_from(group, vectors, applied))[..., 1]
    return -(math.sin(angle) * up[..., 0] + math.cos(angle) * up[..., 1])


def _choice(group, vectors, applied, share):
    """−log((1 − share) p(no mirror|x) + share p(mirror|x)), `(...)`; 0 where there are none."""
    if not isinstance(group, O):
        return jnp.zeros((), jnp.promote_types(vectors.dtype, jnp.float32))
    odds = mirror_log_odds(group, _seen_from(group, vectors, applied))
    log_p = jnp.stack([jax.nn.log_sigmoid(odds), jax.nn.log_sigmoid(-odds)], -1)
    chosen = [i for i, part in enumerate((1 - share, share)) if part]
    pi = np.asarray([1 - share, share])[chosen].astype(log_p.dtype)
    return -jax.nn.logsumexp(log_p[..., chosen] + np.log(pi), -1)


def _shares(prior):
    """(probability, most probable matrix) of each side of the mirror that has any."""
    angle, share = getattr(prior, "angle", 0.0), getattr(prior, "mirror", 0.0)
    cos, sin = math.cos(angle), math.sin(angle)
    rotation = np.array([[cos, sin], [-sin, cos]])
    sides = [(1 - share, rotation), (share, rotation * [-1, 1])]
    return [(part, matrix) for part, matrix in sides if part]


def _log_bessel(x):
    """Log I₀(x)."""
    return jnp.log(jax.scipy.special.i0e(x)) + x


def _log_probabilities(group, scores, applied):
    """Log p(a∘g | x) at place g: the log-probabilities seen from the applied element a."""
    check_scores(group, scores)
    _check_applied(group, applied, scores.shape[:-1])
    log_p = jax.nn.log_softmax(scores.astype(jnp.promote_types(scores.dtype, jnp.float32)), -1)
    if applied is None:
        return log_p
    applied = jnp.broadcast_to(jnp.asarray(applied), scores.shape[:-1])
    return jnp.take_along_axis(log_p, group.compose(applied[..., None], group.elements()), -1)


def _check_applied(group, applied, batch):
    """Refuse what are not elements of the group, one for all inputs or one for each."""
    if applied is None:
        return
    shape, matrices = jnp.shape(applied), isinstance(group, MatrixGroup)
    if matrices and shape[-2:] != (2, 2):
        raise ValueError(
            f"applied has shape {shape}, and elements of {group} are matrices: give (..., 2, 2)."
        )
    if not matrices and not jnp.issubdtype(jnp.result_type(applied), jnp.integer):
        raise TypeError(
            f"applied has dtype {jnp.result_type(applied)}, and elements of {group} are integers: "
            "give int32."
        )
    if batch_shape(group, applied) not in ((), batch):
        raise ValueError(
            f"applied holds elements of shape {batch_shape(group, applied)} for scores of inputs "
            f"of shape {batch}: give one for all, or one for each."
        )
