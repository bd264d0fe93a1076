"""Scorer + predictor → one pure model that canonicalizes its input.

`adapt` puts a scorer before a predictor, both given as a `Network`: image → scores → pose →
canonical input → the predictor's own preprocessing → prediction → brought back to the pose of the
image. A scorer may also read what the predictor makes of every pose. For SO(2) and O(2) it gives
vectors that turn with the image, or scores over a finite group between whose elements the angle is
refined; poses are then matrices, through which gradients pass as they are.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from equiadapt_jax import averaging, canonicalization, energies, outputs
from equiadapt_jax.actions import squares
from equiadapt_jax.canonicalization import Canonical
from equiadapt_jax.groups import Group, MatrixGroup, finite
from equiadapt_jax.interface import Network, from_function, from_linen, from_nnx, pose_by_pose

__all__ = ["Adapted", "Network", "adapt", "from_function", "from_linen", "from_nnx"]

METHODS = (*canonicalization.METHODS, "predictions")
MASKS = (None, "disk")


@dataclasses.dataclass(frozen=True)
class Adapted:
    """A predictor behind a canonicalizer, as pure functions; made by `adapt`.

    `params` and `state` are `{"scorer": …, "predictor": …}`.
    """

    group: Group | MatrixGroup
    scorer: Network
    predictor: Network
    preprocess: Callable[[jax.Array], jax.Array] | None
    output: str
    freeze_predictor: bool
    method: str
    temperature: float
    pad: str
    fill: float
    interpolation: str = "linear"
    features: Callable[..., jax.Array] | None = None
    poses: int | None = 1
    chunk: int | None = None
    weighting: str = "scores"
    mask: str | None = None
    refine: Group | None = None

    def init(
        self,
        key: jax.Array,
        images: jax.Array,
        predictor: tuple[Any, Any] | None = None,
    ) -> tuple[dict, dict]:
        """(params, state) for images `(B, H, W, C)`; the predictor's are those given, if any."""
        if predictor is not None and not (isinstance(predictor, tuple) and len(predictor) == 2):
            raise TypeError(
                f"predictor is a {type(predictor).__name__}: give (params, state), where state "
                "may be empty."
            )
        scorer_key, predictor_key = jax.random.split(key)
        predictor = predictor or self.predictor.init(predictor_key, self.prepare(images))
        seen = self._view(images)
        if self.features is not None:
            whole = {"predictor": predictor[0]}, {"predictor": predictor[1]}
            like = jax.eval_shape(self.orbit_features, *whole, images)[0]
            seen = jnp.zeros(like.shape, like.dtype)
        scorer = self.scorer.init(scorer_key, seen)
        params, state = zip(scorer, predictor, strict=True)
        names = ("scorer", "predictor")
        return dict(zip(names, params, strict=True)), dict(zip(names, state, strict=True))

    def orbit_features(
        self, params: Mapping, state: Mapping, images: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """(features `(B, |G|, F)`, predictions `(B, |G|, …)`) of the predictor for every g⁻¹·x.

        |G| passes of the predictor, as in inference, one after the other. The predictor's
        parameters get no gradient, the images do.
        """
        if self.features is None:
            raise ValueError("The scorer reads images: give `features` to adapt.")
        images = self._view(images)
        network, read = self.predictor.features, self.features
        predictor = jax.lax.stop_gradient((params["predictor"], state["predictor"]))

        def one(turned):
            y, maps = network(*predictor, self.prepare(turned))
            return read(maps, y), y

        def some(elements):
            turned = jnp.stack([self._turned_back(g, images) for g in elements])
            return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), pose_by_pose(one, turned))

        group = finite(self.group, "A scorer that reads features")
        chunk = self.chunk or group.order
        if chunk == group.order:
            return some(range(chunk))  # known elements, so that exact ones are only moves
        seen = jax.lax.map(some, group.elements().reshape(-1, chunk))
        join = lambda x: jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:])  # noqa: E731
        return jax.tree.map(join, seen)

    def score(
        self,
        params: Mapping,
        state: Mapping,
        seen: jax.Array,
        *,
        train: bool = False,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, dict]:
        """Scores `(B, |G|)` of what the scorer sees: images, or features of `orbit_features`.

        For SO(2) and O(2) vectors, or scores over the group that is refined.
        """
        scores, scorer_state = self.scorer.apply(
            params["scorer"], state["scorer"], seen, train=train, key=key if train else None
        )
        return scores, {**state, "scorer": scorer_state}

    def combine(
        self,
        scores: jax.Array,
        predictions: jax.Array,
        weights: jax.Array | None = None,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """The prediction from those for every pose, `(B, |G|, …)`, without another pass.

        Each is brought back to the input's own pose, as `output` says, and then averaged: over
        `poses` with the model's weighting, whose draws need a key; with weights `(B, |G|)`, those
        of training, the sum with these, whose derivative reaches the scores.
        """
        group = finite(self.group, "An average over poses")
        if weights is None:
            chosen = averaging.best(group, scores, **self._averaging(key))
            return averaging.combine(*chosen, predictions, act=self._act)
        poses = jnp.broadcast_to(group.elements(), scores.shape)
        return averaging.combine(poses, weights, predictions, act=self._act)

    def canonicalize(
        self,
        params: Mapping,
        state: Mapping,
        images: jax.Array,
        *,
        train: bool = False,
        key: jax.Array | None = None,
    ) -> tuple[Canonical, dict]:
        """Canonical inputs and the updated state; see `apply`.

        No predictor pass, unless the scorer reads its features.
        """
        seen = viewed = self._view(images)
        if self.features is not None:
            seen, _ = self.orbit_features(params, state, images)
        return self._canonicalize(params, state, viewed, seen, train, key)

    def predict(
        self,
        params: Mapping,
        state: Mapping,
        images: jax.Array,
        *,
        train: bool = False,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, dict]:
        """The predictor alone, with its preprocessing: no canonicalization, nor a mask.

        A frozen predictor runs as in inference; its parameters get no gradient, its input does.
        """
        train = train and not self.freeze_predictor
        predictor_params = params["predictor"]
        if self.freeze_predictor:
            predictor_params = jax.lax.stop_gradient(predictor_params)
        y, predictor_state = self.predictor.apply(
            predictor_params,
            state["predictor"],
            self.prepare(images),
            train=train,
            key=key if train else None,
        )
        return self._cut(y, images), {**state, "predictor": predictor_state}

    def apply(
        self,
        params: Mapping,
        state: Mapping,
        images: jax.Array,
        *,
        train: bool = False,
        key: jax.Array | None = None,
    ) -> tuple[tuple[jax.Array, Canonical], dict]:
        """((prediction, canonical), state) for images `(B, H, W, C)` in [0, 1].

        Image-shaped predictions have the height and width of the images; canonical inputs are the
        squares that the predictor sees.

        Outside training the pose is the best one, the prediction that for it or the average over
        the best `poses` (`canonical` is then still of the best one), and nothing is random but
        poses that are sampled. One key serves the batch: dropout, Gumbel noise and sampled poses
        are drawn from it. Outside training there may be one for each image, `(B,)`, so that the
        poses drawn for it do not depend on the batch. Derivatives are of reverse mode, `jax.grad`:
        choosing one of finitely many poses has a derivative of its own.

        Predictions that the scorer's features came with are used again; with a frozen predictor
        also in training, where `canonical.weights` sum them: one-hot for hard weights, and for soft
        ones a mixture of predictions where other scorers mix images.

        Raises ValueError for images of another shape or with channels first, TypeError for those
        that are not floats; so do `init`, `canonicalize` and `predict`.
        """
        scorer_key, predictor_key = _two(key)
        seen = viewed = self._view(images)
        known = None
        if self.features is not None:
            seen, known = self.orbit_features(params, state, images)
        canonical, state = self._canonicalize(params, state, viewed, seen, train, scorer_key)
        if known is not None and (self.freeze_predictor or not train):
            weights = canonical.weights if train else None
            y = self.combine(canonical.scores, known, weights, predictor_key)
        elif train and self.method == "predictions":
            how = {"poses": None, "temperature": self.temperature}
            y = self._average(params, state, viewed, canonical.scores, how)
        elif train or (self.poses == 1 and self.weighting != "sampled"):
            y, state = self.predict(params, state, canonical.inputs, train=train, key=predictor_key)
            y = self._invert(canonical, y, train)
        else:
            how = self._averaging(predictor_key)
            y = self._average(params, state, viewed, canonical.scores, how)
        return (self._cut(y, images), canonical), state

    def prepare(self, images: jax.Array) -> jax.Array:
        """What the predictor sees of images in [0, 1]: squares where the group needs them."""
        images = self._squares(images)
        return images if self.preprocess is None else self.preprocess(images)

    @property
    def _sampling(self) -> dict[str, Any]:
        pad = self.pad if self.mask is None else "constant"  # beyond the disk all is `fill`
        return {"pad": pad, "fill": self.fill, "interpolation": self.interpolation}

    def _view(self, images):
        """What of the images is used: squares, and inside their disk if so chosen."""
        images = self._squares(images)
        return images if self.mask is None else squares.disk(images, fill=self.fill)

    def _squares(self, images):
        """Images in the centre of squares, where they are not and the group or mask asks for it.

        What is given to `init`, `apply`, `canonicalize` and `predict` comes by here.
        """
        _check_images(images)
        if self._any_shape:
            return images
        return squares.from_images(images, pad=self.pad, fill=self.fill)

    def _cut(self, y, images):
        """Image-shaped predictions for squares, cut to the images."""
        height, width = images.shape[-3:-1]
        if height == width or self._any_shape or not outputs.is_field(self.output):
            return y
        return squares.to_images(y, height, width, axis=1)

    @property
    def _any_shape(self) -> bool:
        return isinstance(self.group, Group) and self.group.n <= 2 and self.mask is None

    def _act(self, g, y):
        """ρ(g)·y."""
        how = {"output": self.output, "interpolation": self.interpolation}
        return outputs.act(self.group, g, y, **how)

    def _invert(self, canonical, y, train):
        """From p(h(x)⁻¹·x) to f(x) = ρ(h(x))·p(h(x)⁻¹·x); training reaches the scores."""
        return outputs.invert(
            self.group, canonical.pose, y, canonical.weights if train else None,
            output=self.output, mix=self.method == "soft", interpolation=self.interpolation,
        )  # fmt: skip

    def _averaging(self, key) -> dict[str, Any]:
        learned = self.method == "predictions"  # the very weights that were trained
        return {
            "poses": self.poses, "weighting": self.weighting, "key": key,
            "temperature": self.temperature if learned else 1.0,
        }  # fmt: skip

    def _average(self, params, state, images, scores, how):
        """The predictor's outputs for several poses, averaged; as in inference."""
        predict = lambda x: self.predict(params, state, x)[0]  # noqa: E731
        how = {**how, **self._sampling, "chunk": self.chunk, "act": self._act}
        return averaging.weighted(self.group, scores, images, predict, **how)

    def _turned_back(self, g, images):
        return canonicalization.canonicalize(self.group, g, images, **self._sampling)

    def _canonicalize(self, params, state, images, seen, train, key) -> tuple[Canonical, dict]:
        dropout, noise = _two(key if train else None)
        scores, state = self.score(params, state, seen, train=train, key=dropout)
        if isinstance(self.group, MatrixGroup):
            if self.refine is None:
                found = canonicalization.from_vectors(self.group, scores, images, **self._sampling)
            else:
                found = canonicalization.from_refined(self.refine, scores, images, **self._sampling)
            return found, state
        mixes = train and self.method == "predictions"
        hard = mixes or not train
        canonical = canonicalization.from_scores(
            self.group,
            scores,
            images,
            method="straight_through" if hard else self.method,
            temperature=self.temperature,
            key=noise,
            **self._sampling,
        )
        if mixes:  # predictions are summed; the canonical input stays that of the best pose
            soft = canonicalization.weights(scores, method="soft", temperature=self.temperature)
            canonical = canonical._replace(weights=soft)
        return canonical, state


def _check_images(images):
    """ValueError for other axes than `(B, H, W, C)`, TypeError for numbers that are not floats.

    Channels come first if there would be four rows at most, and more than sixteen channels and
    columns: no image looks like that.
    """
    if images.ndim != 4:
        raise ValueError(
            f"Images must have shape (B, H, W, C), got {images.shape}: give a single one as "
            "image[None], and take jax.vmap for further axes."
        )
    _, rows, columns, channels = images.shape
    if rows <= 4 and columns > 16 and channels > 16:
        raise ValueError(
            f"Images must have shape (B, H, W, C), got {images.shape}, where channels seem to come "
            "first: give images.transpose(0, 2, 3, 1)."
        )
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise TypeError(
            f"Images of dtype {images.dtype} are not the floats in [0, 1] that this takes: divide "
            "8-bit ones by 255."
        )


def _two(key):
    """Two keys from one, or for each input from its own."""
    if key is None:
        return None, None
    if averaging.is_batch(key):
        pairs = jax.vmap(jax.random.split)(key)
        return pairs[:, 0], pairs[:, 1]
    return jax.random.split(key)


def adapt(
    group: Group | MatrixGroup,
    scorer: Network | energies.Energy,
    predictor: Network,
    *,
    preprocess: Callable[[jax.Array], jax.Array] | None = None,
    output: str = "trivial",
    freeze_predictor: bool = False,
    method: str = "straight_through",
    temperature: float = 1.0,
    pad: str = "edge",
    fill: float = 0.0,
    interpolation: str = "linear",
    features: Callable[..., jax.Array] | None = None,
    poses: int | None = 1,
    chunk: int | None = None,
    weighting: str = "scores",
    mask: str | None = None,
    refine: Group | None = None,
) -> Adapted:
    """Put a canonicalizer before a predictor: f(x) = ρ(h(x))·p(h(x)⁻¹·x).

    Images that are not square, `(B, H, W, C)`, are put in the centre of squares, continued as `pad`
    says, before anything else: scorer and predictor see squares, of the longer side, and image-
    shaped predictions are cut to the image again. Groups of half turns and mirrors leave any shape.

    Args:
      group: with whose elements the prediction shall turn, or on which it shall not depend.
      scorer: images `(B, S, S, C)` in [0, 1] to scores `(B, |G|)`; or an `energies.Energy` of the
        predictor's outputs, which needs no training and brings its own `features`. For SO(2) to
        vectors `(B, 1, 2)`, for O(2) `(B, 2, 2)`, such as `networks.SteerableNet` gives.
      predictor: preprocessed canonical images to predictions.
      preprocess: the predictor's own preprocessing, applied after canonicalization.
      output: ρ, how the group acts on predictions. "trivial", not at all, gives an invariant model.
        "standard" for image vectors `(B, ..., 2)`, x to the right and y down, "sign", "irrep<k>"
        and "regular" for others, see `representations`. Image-shaped predictions are
        "field:trivial" for `(B, T, T, C)`, such as the logits of a segmentation, or
        "field:standard" for a flow `(B, T, T, 2)` and so on, see `outputs`.
      freeze_predictor: keep the predictor's parameters and statistics as they are.
      method: weights while training, see `canonicalization.weights`; or "predictions", soft weights
        that sum the predictions for all poses, |G| passes, where "soft" sums images (λ-equitune,
        Basu et al. 2023, arXiv 2305.09900). It sums outputs, not inner features, which for a
        network that ends in a linear layer is the same and asks nothing of its inside.
      temperature: of these weights; for "predictions" also of those in inference, so that what is
        trained is what is used.
      pad: what lies outside the image, see `actions.images`.
      fill: its value for `pad="constant"`.
      interpolation: "linear" or "cubic", see `actions.images`.
      features: `features(maps, prediction) -> (N, F)`, for a scorer that does not see images but
        the predictor's features in every pose, `(B, |G|, F)`: `FeatureScorer(…).read`. The scorer
        then costs |G| passes of the predictor, and the prediction none.
      poses: how many of the best poses the prediction is averaged over in inference, weighted by
        their scores (`averaging.weighted`, as many passes); None for all of the group.
      chunk: how many poses share a pass of the predictor, where it sees several, and how many
        turned copies there are at a time: fewer take less memory. None for all of them. A scorer
        that reads features sees one pose in each pass anyway.
      weighting: how `poses` are chosen and weighted in inference, see `averaging`: "scores",
        "faded", "equal", or "sampled", for which `apply` needs a key.
      mask: "disk" makes all that lies outside the inscribed disk `fill`, for scorer and predictor
        alike, see `actions.squares.disk`: then nothing depends on corners, which a turn takes out
        of the image or must invent. `predict`, the predictor alone, still sees whole images.
      refine: for SO(2) a group C_n, for O(2) D_n, whose elements the scorer scores, `(B, |G|)`; the
        pose is refined between them, see `canonicalization.refine`. None: the scorer gives vectors.

    Raises:
      ValueError: an output, method or weighting that does not exist, poses out of range, features
        of a predictor that tells none, "predictions" with a predictor that is trained; for SO(2)
        and O(2) what needs the elements counted: features, energies, weights, several poses.
      TypeError: a scorer or predictor that is not a `Network`.
    """
    outputs.check(group, output)
    if mask not in MASKS:
        raise ValueError(f"Unknown mask {mask!r}: choose 'disk', or None for whole images.")
    if method not in METHODS:
        raise ValueError(f"Unknown method {method!r}: choose one of {METHODS}.")
    if method == "predictions" and not freeze_predictor:
        raise ValueError(
            "method='predictions' runs the predictor as in inference: give freeze_predictor=True."
        )
    if weighting not in averaging.WEIGHTINGS:
        raise ValueError(f"Unknown weighting {weighting!r}: choose one of {averaging.WEIGHTINGS}.")
    reads = features is not None or isinstance(scorer, energies.Energy)
    if isinstance(group, MatrixGroup):
        needs_counting = {
            "A scorer that reads what the predictor makes of every pose": reads,
            f"method={method!r}, of weights over poses,": method != "straight_through",
            f"temperature={temperature}, of weights over poses,": temperature != 1,
            f"poses={poses}, an average,": poses != 1,
            f"weighting={weighting!r}, of poses,": weighting != "scores",
            f"chunk={chunk}, of poses,": chunk is not None,
        }
        for what, given in needs_counting.items():
            if given:
                finite(group, what)
    else:
        _check_poses(group, reads, method, poses, weighting, chunk)
    _check_refine(group, refine)
    if isinstance(scorer, energies.Energy):
        if features is not None:
            raise ValueError("An Energy reads what it needs itself: leave `features` out.")
        features, predictor = scorer.read, energies.telling(predictor)
        scorer = scorer.network
    for name, network in (("scorer", scorer), ("predictor", predictor)):
        if not isinstance(network, Network):
            raise TypeError(
                f"The {name} is a {type(network).__name__}: wrap it with from_linen, from_nnx or "
                "from_function."
            )
    if features is not None and predictor.features is None:
        raise ValueError(
            "The scorer reads the predictor's features, and the predictor tells none: from_linen "
            "takes what the module sows, elsewhere give Network(init, apply, features)."
        )
    return Adapted(
        group=group,
        scorer=scorer,
        predictor=predictor,
        preprocess=preprocess,
        output=output,
        freeze_predictor=freeze_predictor,
        method=method,
        temperature=temperature,
        pad=pad,
        fill=fill,
        interpolation=interpolation,
        features=features,
        poses=poses,
        chunk=chunk,
        weighting=weighting,
        mask=mask,
        refine=refine,
    )


def seen_poses(group: Group, poses: int | None, weighting: str, *, method: str, reads: bool) -> int:
    """How many poses of an image the predictor sees, of which a chunk must be a divisor.

    Where training sees more of them than inference, what divides both. Arguments as for `adapt`;
    `reads` where the scorer reads what the predictor makes of every pose.
    """
    seen = group.order if reads or poses is None else poses
    if method == "predictions":  # all of them in training; the best one alone needs no chunk
        alone = seen == 1 and weighting != "sampled"
        return group.order if alone else math.gcd(seen, group.order)
    return seen


def _check_poses(group, reads, method, poses, weighting, chunk):
    """Refuse more poses than there are, and a chunk that does not divide those that are seen."""
    if poses is not None and not 1 <= poses <= group.order:
        raise ValueError(f"poses={poses}: average over 1 to {group.order} of {group}, or None.")
    seen = seen_poses(group, poses, weighting, method=method, reads=reads)
    if chunk is not None and not (chunk >= 1 and seen % chunk == 0):
        raise ValueError(f"chunk={chunk} does not divide the {seen} poses: choose a divisor.")


def _check_refine(group, refine):
    """Refuse a group between whose elements there are no poses of the other."""
    if refine is None:
        return
    if not isinstance(group, MatrixGroup):
        raise ValueError(
            f"refine={refine} finds poses between elements, and {group} has none there: take SO(2) "
            "or O(2), or leave it out."
        )
    if refine != group.subgroup(getattr(refine, "n", 1)) or refine.n < 3:
        raise ValueError(
            f"refine={refine} is no group to refine poses of {group} between: take one such as "
            f"{group.subgroup(16)}, of 3 rotations or more."
        )
