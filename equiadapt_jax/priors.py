"""Distributions over poses, and the loss that pulls a scorer's poses towards them.

A pretrained predictor has seen its data in some poses more than in others; the prior says which,
and keeps canonical inputs there (Mondal et al. 2023, arXiv 2310.01647, section 3.2). The
probability of a pose is p(g|x) = softmax(scores)_g. Losses are means over the batch, scalars in at
least float32.

For SO(2) and O(2) the loss takes the vectors that span the pose in place of scores, and is linear
in the frame R of `canonicalization.expected_frame`: −(κ/2) E tr(MᵀR), M being distributed as the
prior has it. For rotations tr(MᵀR) / 2 is the cosine of the angle between M and R.

Where inputs were turned on purpose, x = a·x₀ with x₀ as the prior has it, the pose to be found is
a times that of x₀: `applied=a` shifts the prior by the same element.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from equiadapt_jax.canonicalization import expected_frame
from equiadapt_jax.groups import Group, MatrixGroup, O, finite


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Identity:
    """All mass at the identity: data whose natural pose is the one it is stored in."""

    def loss(self, group: Group | MatrixGroup, scores: jax.Array, *, applied=None) -> jax.Array:
        """Mean of −log p(e|x), for scores `(..., |G|)` and elements `applied` `(...)` or scalar.

        For SO(2) and O(2) the mean of 1 − tr(R) / 2, which is 1 − cos θ for rotations: from 0 at
        the identity to 2; for vectors as `canonicalization.frame` takes them, and `applied`
        matrices.
        """
        if isinstance(group, MatrixGroup):
            return 1 - jnp.mean(_half_trace(group, scores, applied, np.eye(2)))
        return -jnp.mean(_log_probabilities(group, scores, applied)[..., 0])

    @property
    def modes(self) -> tuple[int, ...]:
        """The most probable elements."""
        return (0,)


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

    @property
    def modes(self) -> tuple[int, ...]:
        """The most probable elements."""
        best = max(self.probabilities)
        return tuple(i for i, p in enumerate(self.probabilities) if p == best)

    def loss(self, group: Group, scores: jax.Array, *, applied=None) -> jax.Array:
        """Mean of −log Σ_g π(g) p(g|x), plus the KL term; arguments as for `Identity`."""
        finite(group, "A categorical prior")
        if len(self.probabilities) != group.order:
            raise ValueError(
                f"The prior has {len(self.probabilities)} probabilities and {group} "
                f"{group.order} elements: give one for each."
            )
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


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Uniform:
    """No pose is more likely than another: a loss of zero, for any group."""

    def loss(self, group: Group | MatrixGroup, scores: jax.Array, *, applied=None) -> jax.Array:
        """Zero; arguments as for `Identity`."""
        return jnp.zeros((), jnp.promote_types(scores.dtype, jnp.float32))

    @property
    def modes(self) -> tuple[int, ...]:
        """The identity, against which poses are counted; there is no better one."""
        return (0,)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class VonMises:
    """The von Mises distribution over rotations, for SO(2) and O(2).

    Its density is proportional to exp((κ/2) tr(E[M]ᵀR)), where M turns by `angle`, and for O(2) has
    the left-right mirror before it with probability `mirror`. On rotations and with no mirror that
    is exp(κ cos(θ − angle)) (Mardia and Jupp 2000, Directional Statistics, section 3.5.4).

    Attributes:
      kappa: κ, the concentration, at least 0 (uniform); where it is large, and without a mirror,
        the width is 1/√κ radians.
      angle: the most probable angle, in radians counter-clockwise.
      mirror: for O(2), how much of E[M] is mirrored, in [0, 1]; photographs, which are often their
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
        """Mean of −log p(R), the density against the uniform one; arguments as for `Identity`.

        ValueError for a finite group, or SO(2) with a mirror.
        """
        self._check(group)
        rotation, mirrored = self._means()
        mean = (1 - self.mirror) * rotation + self.mirror * mirrored
        linear = jnp.mean(_half_trace(group, scores, applied, mean))
        kappa = jnp.asarray(self.kappa, linear.dtype)
        normaliser = _log_bessel(kappa * (1 - self.mirror))
        if isinstance(group, O):  # the mean over both halves
            both = jnp.logaddexp(normaliser, _log_bessel(kappa * self.mirror))
            normaliser = both - np.log(2).astype(linear.dtype)
        return normaliser - kappa * linear

    @property
    def modes(self) -> tuple[np.ndarray, ...]:
        """The most probable elements, matrices `(2, 2)`."""
        rotation, mirrored = self._means()
        chosen = [(1 - self.mirror, rotation), (self.mirror, mirrored)]
        return tuple(matrix for share, matrix in chosen if share >= 0.5)

    def _check(self, group):
        if not isinstance(group, MatrixGroup):
            raise ValueError(
                f"A von Mises prior is one over SO(2) or O(2), and the group is {group}: take "
                "Categorical for finite groups."
            )
        if self.mirror and not isinstance(group, O):
            raise ValueError(
                f"The prior's mirror is {self.mirror}, and {group} has no mirrors: take O(2), or 0."
            )

    def _means(self):
        cos, sin = np.cos(self.angle), np.sin(self.angle)
        rotation = np.array([[cos, sin], [-sin, cos]])
        return rotation, rotation * [-1, 1]


def modes_of(prior, group: Group | MatrixGroup) -> tuple:
    """The most probable elements under a prior, as the group has them: integers or matrices."""
    if not isinstance(group, MatrixGroup):
        return prior.modes
    return tuple(np.eye(2) if np.ndim(mode) == 0 else mode for mode in prior.modes)


def _half_trace(group, vectors, applied, mean):
    """Tr(Mᵀ a⁻¹∘R) / 2 of the expected frames R seen from the applied elements a, `(...)`."""
    pose = expected_frame(group, vectors)
    if applied is not None:
        pose = group.compose(group.inverse(jnp.asarray(applied, pose.dtype)), pose)
    return jnp.sum(pose * mean.astype(pose.dtype), (-2, -1)) / 2


def _log_bessel(x):
    """Log I₀(x)."""
    return jnp.log(jax.scipy.special.i0e(x)) + x


def _log_probabilities(group, scores, applied):
    """Log p(a∘g | x) at place g: the log-probabilities seen from the applied element a."""
    if scores.ndim < 1 or scores.shape[-1] != group.order:
        raise ValueError(
            f"Scores of shape {scores.shape} do not fit {group}: the last axis holds one for each "
            f"of its {group.order} elements."
        )
    log_p = jax.nn.log_softmax(scores.astype(jnp.promote_types(scores.dtype, jnp.float32)), -1)
    if applied is None:
        return log_p
    applied = jnp.broadcast_to(jnp.asarray(applied), scores.shape[:-1])
    return jnp.take_along_axis(log_p, group.compose(applied[..., None], group.elements()), -1)
