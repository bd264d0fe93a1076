"""Distributions over poses, and the loss that pulls a scorer's poses towards them.

A pretrained predictor has seen its data in some poses more than in others; the prior says which,
and keeps canonical inputs there (Mondal et al. 2023, arXiv 2310.01647, section 3.2). The
probability of a pose is p(g|x) = softmax(scores)_g. Losses are means over the batch, scalars in at
least float32.

Where inputs were turned on purpose, x = a·x₀ with x₀ as the prior has it, the pose to be found is
a times that of x₀: `applied=a` shifts the prior by the same element.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from equiadapt_jax.groups import Group


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Identity:
    """All mass at the identity: data whose natural pose is the one it is stored in."""

    def loss(self, group: Group, scores: jax.Array, *, applied=None) -> jax.Array:
        """Mean of −log p(e|x), for scores `(..., |G|)` and elements `applied` `(...)` or scalar."""
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
