"""How much a pretrained predictor is at home in a pose, with no training at all.

Every energy here is a score, the higher the more at home: a number for each image, made of what the
predictor gives for it. Ranking the poses of an input by it is canonicalization without a scorer:
equizero (Basu et al. 2023, arXiv 2305.09900), FoCal (arXiv 2507.10375), inverse transform search
(arXiv 2405.03730). It costs |G| passes of the predictor and none for the prediction.

    model = ea.adapt(group, ea.energies.Energy(ea.energies.confidence), predictor)

`contrastive` and `artefact` are the terms by which a network is trained to be an energy, see
`orbit_scoring`; `search` finds the best angle of any energy on the whole circle.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from equiadapt_jax.actions import images as image_actions
from equiadapt_jax.interface import Network, from_function


def confidence(logits: jax.Array, maps: Sequence[jax.Array] = ()) -> jax.Array:
    """Logarithm of the odds of the most probable class, `(...)`, for logits `(..., K)`, K ≥ 2.

    Odds, because probabilities themselves are often 1 to the last bit, and would tie.
    """
    logits = _float(logits)
    if logits.shape[-1] < 2:
        raise ValueError(f"Logits of shape {logits.shape} have no odds: two classes are needed.")
    best = jax.nn.one_hot(logits.argmax(-1), logits.shape[-1], dtype=bool)
    others = jax.nn.logsumexp(jnp.where(best, -jnp.inf, logits), -1)
    return logits.max(-1) - others


def entropy(logits: jax.Array, maps: Sequence[jax.Array] = ()) -> jax.Array:
    """Minus the entropy of the prediction, in nats, `(...)`, for logits `(..., K)`; at most 0."""
    log_p = jax.nn.log_softmax(_float(logits), -1)
    return jnp.sum(jnp.exp(log_p) * jnp.where(log_p == -jnp.inf, 0, log_p), -1)


def logit_energy(logits: jax.Array, maps: Sequence[jax.Array] = ()) -> jax.Array:
    """The log Σ exp of logits `(..., K)`, `(...)`: minus the energy of Liu et al. (2010.03759)."""
    return jax.nn.logsumexp(_float(logits), -1)


def feature_norm(logits: jax.Array, maps: Sequence[jax.Array] = ()) -> jax.Array:
    """Norm of the last of the feature maps `(N, H, W, C)`, averaged over its pixels, `(N,)`."""
    if not maps:
        raise ValueError(
            "feature_norm reads feature maps, and the predictor tells none: choose confidence, "
            "entropy or logit_energy, or give a Network(init, apply, features)."
        )
    pooled = _float(maps[-1]).mean(tuple(range(1, maps[-1].ndim - 1)))
    square = jnp.sum(pooled * pooled, -1)
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)


NAMED = {f.__name__: f for f in (confidence, entropy, logit_energy, feature_norm)}


def gate(scores: jax.Array, margin: float) -> jax.Array:
    """Scores `(..., |G|)` by which the identity is kept unless another pose beats it by more.

    An input that looks upright is then left alone, whatever its other poses look like. That gives
    up exact invariance, at every margin above 0: turned by g, the input may be one that is left
    alone as it is.
    """
    return scores.at[..., 0].add(margin)


@dataclasses.dataclass(frozen=True)
class Energy:
    """A scorer without parameters, for `adapt`: an energy of the predictor's outputs, and a gate.

    Each pose is seen in its own frame, so that an exactly turned image has the same scores in
    other places; the gate, if any, is behind that.

    Attributes:
      function: `function(prediction, maps) -> (N,)` in floats, of what the predictor gives for N
        canonical inputs: a function of this module, or any other. `maps` are its feature maps, an
        empty tuple where it tells none.
      margin: of the `gate`, in the units of the energy; 0 for none.
    """

    function: Callable[..., jax.Array]
    margin: float = 0.0

    def __post_init__(self):
        if not callable(self.function) or not self.margin >= 0:
            raise ValueError(
                f"Energy({self.function!r}, margin={self.margin}): give a function of prediction "
                "and maps, and a margin of at least 0."
            )

    def read(self, maps: Sequence[jax.Array], output: jax.Array) -> jax.Array:
        """The energy of each image, `(N, 1)`, at least float32: what `adapt` calls `features`."""
        found = jnp.asarray(self.function(output, tuple(maps)))
        if found.shape != output.shape[:1]:
            raise ValueError(
                f"The energy of {output.shape[0]} images has shape {found.shape}: one number for "
                f"each is needed, {output.shape[:1]}."
            )
        return _float(found)[:, None]

    @property
    def network(self) -> Network:
        """Energies `(B, |G|, 1)` to scores `(B, |G|)`, as a `Network` without parameters."""
        return from_function(lambda params, seen: gate(seen[..., 0], self.margin))


def telling(network: Network) -> Network:
    """The same network, which tells its output and no maps where it has no `features`."""
    if not isinstance(network, Network) or network.features is not None:
        return network

    def features(params, state, x):
        return network.apply(params, state, x)[0], ()

    return dataclasses.replace(network, features=features)


def contrastive(embeddings: jax.Array, temperature: float = 0.5) -> jax.Array:
    """How near the poses' embeddings `(B, |G|, D)` are to each other: a scalar, at most 0.

    Mean over images of temperature · log mean_{g≠h} exp((⟨e_g, e_h⟩ − 1) / temperature), of unit
    vectors e (Panigrahi & Mondal 2024, arXiv 2405.14089, with the uniformity of Wang & Isola 2020,
    arXiv 2005.10242). It is 0 where all poses look alike; on unit vectors shrinking does nothing,
    and the exponential pushes every pair apart, where a mean of cosines would leave some together.
    """
    e, order = unit(embeddings), embeddings.shape[1]
    if order == 1:
        return jnp.zeros((), e.dtype)
    cosines = jnp.einsum("bgd,bhd->bgh", e, e, precision=jax.lax.Precision.HIGHEST)
    pairs = jnp.where(jnp.eye(order, dtype=bool), -jnp.inf, (cosines - 1) / temperature)
    mean = jax.nn.logsumexp(pairs, (1, 2)) - math.log(order * (order - 1))
    return temperature * jnp.mean(mean)


def artefact(upright: jax.Array, resampled: jax.Array) -> jax.Array:
    """Mean of 1 − cosine between embeddings `(..., D)` of images and of the same ones resampled.

    What was turned there and back differs by interpolation only, and should look the same: a pose
    must not be preferred for its sharpness.
    """
    return jnp.mean(1 - jnp.sum(unit(upright) * unit(resampled), -1))


def there_and_back(
    images: jax.Array, angle: jax.Array, *, pad: str = "edge", fill: float = 0.0
) -> jax.Array:
    """Images `(B, S, S, C)` turned by angles `(B,)` in radians and back: resampled, not turned."""
    turned = image_actions.rotate(images, angle, pad=pad, fill=fill)
    return image_actions.rotate(turned, -angle, pad=pad, fill=fill)


def unit(x: jax.Array) -> jax.Array:
    """Vectors `(..., D)` scaled to length 1, in at least float32; those almost 0 as they are."""
    x = _float(x)
    square = jnp.sum(x * x, -1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.where(square > jnp.finfo(x.dtype).tiny ** 0.5, square, 1))


def search(
    energy: Callable[[jax.Array], jax.Array],
    images: jax.Array,
    *,
    angles: int = 32,
    steps: int = 12,
    chunk: int | None = None,
    pad: str = "edge",
    fill: float = 0.0,
    interpolation: str = "linear",
) -> tuple[jax.Array, jax.Array]:
    """(angle, energy), `(B,)` each: how far each image is turned, for the energy's highest value.

    The canonical input is `rotate(images, -angle)`. So many `angles` around the circle are tried
    (inverse transform search, arXiv 2405.03730), then golden-section search narrows the two
    intervals beside the best: each of `steps` adds one pass and leaves 0.618 of the interval, so
    that the defaults end within 0.07°. A peak narrower than an interval may be missed. Pure, works
    under jit; there are no derivatives to speak of, the energy needs none.

    Args:
      energy: images `(N, S, S, C)` to energies `(N,)`, the higher the better.
      images: `(B, S, S, C)` floats.
      angles: on the circle, at least 3.
      steps: of the local search; 0 for none.
      chunk: how many angles share a pass, which sees chunk · B images; it divides `angles`. None
        for all of them.
      pad: what lies outside the image, see `actions.images`.
      fill: its value for `pad="constant"`.
      interpolation: "linear" or "cubic".

    Returns:
      Angles in [0, 2π), counter-clockwise, and the energies there, in at least float32.

    Raises:
      ValueError: too few angles, a chunk that does not divide them, images of another shape.
    """
    chunk = angles if chunk is None else chunk
    if angles < 3 or steps < 0 or chunk < 1 or angles % chunk:
        raise ValueError(
            f"angles={angles}, steps={steps}, chunk={chunk}: give at least 3 angles, steps of at "
            "least 0 and a chunk that divides the angles."
        )
    if images.ndim != 4:
        raise ValueError(f"search takes images (B, S, S, C), got {images.shape}.")
    how = {"pad": pad, "fill": fill, "interpolation": interpolation}
    dtype = jnp.promote_types(images.dtype, jnp.float32)

    def at(theta):  # (k, B) → (k, B)
        turned = jax.vmap(lambda t: image_actions.rotate(images, -t, **how))(theta)
        return _float(energy(turned.reshape(-1, *images.shape[1:]))).reshape(theta.shape)

    width = 2 * jnp.pi / angles
    circle = width * jnp.arange(angles, dtype=dtype)
    circle = jnp.broadcast_to(circle[:, None], (angles, images.shape[0]))
    if chunk == angles:
        found = at(circle)
    else:
        found = jax.lax.map(at, circle.reshape(-1, chunk, images.shape[0])).reshape(circle.shape)
    best = found.argmax(0)
    start = jnp.take_along_axis(circle, best[None], 0)[0]
    angle, value = start, found.max(0)
    if steps:
        angle, value = _golden(lambda t: at(t[None])[0], start, value, width, steps)
    return angle % (2 * jnp.pi), value


def _golden(at, start, value, width, steps):
    """The best of what golden-section search sees within `width` of `start`; `at` is maximised."""
    ratio = (5**0.5 - 1) / 2
    low, high = start - width, start + width
    left, right = high - ratio * (high - low), low + ratio * (high - low)

    def narrow(_, carry):
        low, high, left, right, at_left, at_right, best, best_at = carry
        down = at_left >= at_right  # the peak is below `right`
        low, high = jnp.where(down, low, left), jnp.where(down, right, high)
        new = jnp.where(down, high - ratio * (high - low), low + ratio * (high - low))
        at_new = at(new)
        left, right = jnp.where(down, new, right), jnp.where(down, left, new)
        at_left, at_right = jnp.where(down, at_new, at_right), jnp.where(down, at_left, at_new)
        best, best_at = jnp.where(at_new > best_at, new, best), jnp.maximum(at_new, best_at)
        return low, high, left, right, at_left, at_right, best, best_at

    at_left, at_right = at(left), at(right)
    best, best_at = start, value
    for angle, found in ((left, at_left), (right, at_right)):
        best, best_at = jnp.where(found > best_at, angle, best), jnp.maximum(found, best_at)
    carry = (low, high, left, right, at_left, at_right, best, best_at)
    return jax.lax.fori_loop(0, steps, narrow, carry)[-2:]


def _float(x):
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
