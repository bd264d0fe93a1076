"""The steerable scorer: its filters in closed form, and vectors that turn with the image."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from equiadapt_jax import canonicalization
from equiadapt_jax.groups import SO, Cyclic, O
from equiadapt_jax.networks import SteerableNet, steerable
from tests.test_matrix_groups import exact, noise

Net = functools.partial(SteerableNet, layers=((3, 6, 2), (2, 5, 1)), rings=3, hidden=5)
GROUPS = [SO(2), O(2)]


def parameters(net, x, dtype=np.float32, seed=1):
    """Random parameters of the network's shapes, every one of them away from zero."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(net.init, jax.random.key(0), x)["params"]
    return jax.tree.map(lambda s: (rng.normal(size=s.shape) / 3).astype(dtype), shapes)


def jitted(net, params):
    return jax.jit(lambda x: net.apply({"params": params}, x))


def waves(size, angles, shortest, count=10, seed=0):
    """A sum of plane waves, each of the given length or longer, turned by each of the angles."""
    rng = np.random.default_rng(seed)
    frequency = 2 * np.pi / shortest * np.sqrt(rng.uniform(size=count))
    direction, phase = rng.uniform(0, 2 * np.pi, (2, count))
    middle = np.arange(size) - (size - 1) / 2
    found = []
    for angle in angles:
        c, s = np.cos(angle), np.sin(angle)
        x = c * middle[None, :] - s * middle[:, None]
        y = s * middle[None, :] + c * middle[:, None]
        along = np.multiply.outer(x, np.cos(direction)) + np.multiply.outer(y, np.sin(direction))
        found.append(np.cos(frequency * along + phase).sum(-1))
    return 0.5 + 0.1 * np.stack(found)[..., None]


# ---- filters ----


@pytest.mark.parametrize("order", [-1, 0, 1, 2, 4])
def test_a_harmonic_is_a_bessel_function_of_the_radius(order):
    """The mean over the ring, in closed form: exp(−(r² + ρ²) / 2σ²) I_k(rρ / σ²) e^{ikα}."""
    size, radius, sigma = 8, 2.1, 1.3
    found = steerable.circular_harmonics(size, radius, sigma, order)
    beta = 2 * np.pi * np.arange(2000) / 2000
    for i in range(size):
        for j in range(size):
            left, up = (size - 1) / 2 - j, (size - 1) / 2 - i
            r, alpha = np.hypot(left, up), np.arctan2(left, up)  # counter-clockwise from up
            z = r * radius / sigma**2
            bessel = np.mean(np.exp(z * np.cos(beta)) * np.cos(order * beta))
            expected = np.exp(-(r**2 + radius**2) / (2 * sigma**2)) * bessel
            np.testing.assert_allclose(
                found[i, j], expected * np.exp(1j * order * alpha), atol=1e-12
            )


@pytest.mark.parametrize("phases", [False, True])
@pytest.mark.parametrize("kernel", [5, 6])
@pytest.mark.parametrize("image", [False, True])
def test_linear_maps_commute_with_quarter_turns_and_mirrors(kernel, phases, image):
    """κ(q·d) = ρ_out(q) κ(d) ρ_in(q)⁻¹ for every filter: the constraint on steerable kernels."""
    basis = steerable._basis(kernel, phases, image=image)
    turn = lambda m: np.linalg.matrix_power(np.array([[0, -1], [1, 0]]), m)  # noqa: E731  i^m
    conjugate, mirrors = np.diag([1, -1]), []
    for one in basis:
        (read,), (made,) = (
            np.nonzero(abs(one).max((0, 1, 3, 4, 5))),
            np.nonzero(abs(one).max((0, 1, 2, 3, 5))),
        )
        kappa = np.swapaxes(one[:, :, read[0], :, made[0]], -1, -2)  # (y, x, out, in)
        if image:  # whose imaginary part is none
            kappa = np.concatenate([kappa, np.zeros_like(kappa)], -1)
        turned = turn(made[0]) @ kappa @ np.linalg.inv(turn(read[0]))
        np.testing.assert_allclose(np.rot90(kappa, -1), turned, atol=1e-14)
        mirrors.append(np.allclose(kappa[:, ::-1], conjugate @ kappa @ conjugate, atol=1e-14))
    assert np.mean(mirrors) == (0.5 if phases else 1)  # the others know left from right
    flat = basis.reshape(len(basis), -1)
    assert np.linalg.matrix_rank(flat) == len(basis)


@pytest.mark.parametrize("kernel", [6, 7])
def test_filters_answer_long_waves_by_their_own_order_alone(kernel):
    """Waves as long as two kernels, in every direction: the answer turns by e^{ikα}."""
    direction = np.linspace(0, 2 * np.pi, 72, endpoint=False)
    offset = np.arange(kernel) - (kernel - 1) / 2
    along = (
        -np.sin(direction)[:, None, None] * offset
        - np.cos(direction)[:, None, None] * (offset[:, None])
    )
    plane = np.exp(2j * np.pi / (2 * kernel) * along)
    for order in range(-2, 3):
        for w in steerable._rings_of_pixels(kernel, order, phases=False):
            answers = (plane * w).sum((1, 2)) * np.exp(-1j * order * direction)
            assert np.abs(answers - answers.mean()).max() < 4e-3 * np.abs(answers.mean())


# ---- vectors ----

CASES = {
    "so2": (Net(SO(2)), 12, 2),
    "so2, made smaller": (Net(SO(2), size=8), 13, 1),
    "so2, odd": (Net(SO(2), layers=((3, 5, 2), (2, 3, 1))), 9, 3),
    "so2, bfloat16": (Net(SO(2), dtype=jnp.bfloat16), 12, 2),
    "so2, as large as by default": (SteerableNet(SO(2)), 64, 1),
    "so2, five": (Net(SO(2)), 12, 5),
    "so2, as many as in training": (SteerableNet(SO(2)), 24, 64),
    "o2": (Net(O(2)), 12, 2),
    "o2, seven": (Net(O(2), layers=((3, 5, 2), (2, 3, 1))), 15, 7),
    "o2, halved": (Net(O(2), size=8), 16, 2),
    "o2, made smaller": (Net(O(2), size=8), 11, 2),
}


@pytest.mark.parametrize("case", CASES)
def test_vectors_of_an_exactly_turned_image_are_exactly_turned(case):
    net, size, batch = CASES[case]
    x = noise(batch, size, size, 2)
    apply = jitted(net, parameters(net, x))
    vectors = np.asarray(apply(x))
    assert vectors.shape == (batch, 1 if net.group == SO(2) else 2, 2)
    assert vectors.dtype == np.float32
    assert (np.abs(vectors) > 1e-6).all()
    for i, q in enumerate(np.float32(exact(net.group))):
        turned = np.rot90(x[:, :, ::-1] if i >= 4 else x, i % 4, axes=(1, 2))
        np.testing.assert_array_equal(apply(turned.copy()), vectors @ q.T)


ANGLES = np.deg2rad([0, 11, 30, 45, 71, 200])


@pytest.mark.parametrize("group", GROUPS, ids=str)
def test_the_default_network_as_initialised_finds_any_angle(group):
    """Pose error of band-limited images of 64 pixels, for twenty seeds: at most 0.5°."""
    net, x = SteerableNet(group), waves(64, ANGLES, shortest=16).astype(np.float32)
    init, apply = jax.jit(net.init), jax.jit(net.apply)
    errors = []
    for seed in range(20):
        vectors = np.asarray(apply(init(jax.random.key(seed), x[:1]), x))
        pose = np.asarray(canonicalization.frame(group, vectors))
        between = pose @ np.linalg.inv(pose[0])
        found = np.asarray(group.angle(between))
        errors.append(np.abs((found - ANGLES + np.pi) % (2 * np.pi) - np.pi).max())
        assert not np.asarray(group.reflects(between)).any()
    assert np.rad2deg(np.max(errors)) <= 0.5
    assert np.rad2deg(np.median(errors)) < 0.1


@pytest.mark.parametrize("group", GROUPS, ids=str)
def test_vectors_keep_their_length_when_a_smooth_image_turns(group, x64):
    net = SteerableNet(group, layers=((3, 7, 1), (3, 10, 2)), hidden=6)
    x = waves(64, ANGLES, shortest=16)
    vectors = np.asarray(jitted(net, parameters(net, x, np.float64))(x))
    pose = np.asarray(canonicalization.frame(group, vectors))
    found = np.asarray(group.angle(pose @ np.linalg.inv(pose[0])))
    error = np.abs((found - ANGLES + np.pi) % (2 * np.pi) - np.pi)
    assert np.rad2deg(error.max()) < 0.5
    size = np.linalg.norm(vectors, axis=-1)
    np.testing.assert_allclose(size, np.broadcast_to(size[0], size.shape), rtol=0.02)


@pytest.mark.parametrize("group", GROUPS, ids=str)
@pytest.mark.parametrize("size", [12, 32])
def test_what_is_found_of_an_image_does_not_depend_on_the_others(group, size, x64):
    """Alone, among others, in another place and in batches of any size."""
    x = noise(9, size, size, 2).astype(np.float64)
    net = Net(group)
    params = parameters(net, x, np.float64)
    apply = jitted(net, params)
    whole = np.asarray(apply(x))
    close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-12 * np.abs(whole).max())
    close(apply(x[::-1].copy())[::-1], whole)
    for rows in (slice(0, 1), slice(4, 5), slice(1, 3), slice(2, 9), slice(0, 8)):
        close(apply(x[rows]), whole[rows])


def test_real_filters_keep_mirror_images_apart_from_turns():
    """For O(2) v₁ of the mirror image is the mirrored v₁; for SO(2) nothing ties them."""
    x = noise(1, 12, 12, 1)
    mirrored = x[:, :, ::-1].copy()
    for group, tied in ((O(2), True), (SO(2), False)):
        net = Net(group)
        apply = jitted(net, parameters(net, x))
        distance = np.abs(np.asarray(apply(mirrored)) - np.asarray(apply(x)) * [-1, 1]).max()
        assert (distance == 0) == tied


@pytest.mark.parametrize("group", GROUPS, ids=str)
def test_gradients_flow_to_all_parameters(group):
    x = noise(2, 12, 12, 2)
    net = Net(group)
    params = parameters(net, x)
    loss = lambda p, x: (net.apply({"params": p}, x) * jnp.arange(1.0, 3.0)).sum()  # noqa: E731
    for leaf in jax.tree.leaves(jax.jit(jax.grad(loss, (0, 1)))(params, x)):
        assert leaf.dtype == jnp.float32
        assert np.isfinite(leaf).all()
        assert (leaf != 0).mean() > 0.5


def test_an_image_without_content_has_no_direction():
    net, x = Net(SO(2)), np.full((1, 12, 12, 1), 0.5, np.float32)
    params = parameters(net, x)
    vectors, slope = jax.jit(
        jax.value_and_grad(lambda p: jnp.abs(net.apply({"params": p}, x)).sum())
    )(params)
    assert vectors == 0  # its turned copies are alike, and their vectors cancel
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(slope))


@pytest.mark.parametrize(
    ("net", "shape", "sentence"),
    [
        (Net(Cyclic(4)), (1, 12, 12, 1), "the group is cyclic4: take GroupConvNet"),
        (Net(SO(2)), (12, 12, 1), r"takes images \(B, S, S, C\), got \(12, 12, 1\)"),
        (Net(SO(2)), (1, 12, 10, 1), r"got \(1, 12, 10, 1\)"),
        (Net(SO(2)), (1, 13, 13, 1), "Layer 0 of SteerableNet strides by 2 over 13 pixels"),
        (Net(SO(2), layers=()), (1, 12, 12, 1), "has no layers"),
    ],
)
def test_what_cannot_be_steered_is_refused(net, shape, sentence):
    with pytest.raises(ValueError, match=sentence):
        jax.eval_shape(net.init, jax.random.key(0), jnp.zeros(shape))
