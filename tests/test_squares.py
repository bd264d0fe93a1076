"""Squares around images, and the disk inside squares, pixel by pixel."""

import jax
import numpy as np
import pytest

from equiadapt_jax.actions import images, squares
from equiadapt_jax.groups import Dihedral


def noise(*shape, seed=0):
    return np.random.default_rng(seed).uniform(size=shape).astype(np.float32)


@pytest.mark.parametrize("shape", [(4, 6), (7, 4), (5, 5), (1, 4)])
def test_images_lie_in_the_centre_and_come_back(shape):
    height, width = shape
    x = noise(2, *shape, 3)
    size = max(shape)
    top, left = (size - height) // 2, (size - width) // 2
    edge = np.asarray(squares.from_images(x))
    constant = np.asarray(squares.from_images(x, pad="constant", fill=0.3))
    valid = squares.validity(*shape)
    assert edge.shape == constant.shape == (2, size, size, 3)
    assert valid.shape == (size, size, 1)
    for i, j in np.ndindex(size, size):
        row, column = i - top, j - left
        inside = 0 <= row < height and 0 <= column < width
        nearest = x[:, min(max(row, 0), height - 1), min(max(column, 0), width - 1)]
        np.testing.assert_array_equal(edge[:, i, j], nearest)
        np.testing.assert_array_equal(constant[:, i, j], nearest if inside else np.float32(0.3))
        assert valid[i, j] == inside
    np.testing.assert_array_equal(squares.to_images(edge, *shape), x)
    np.testing.assert_array_equal(squares.to_images(edge[0], *shape), x[0])
    coarse = np.repeat(np.repeat(edge, 2, 1), 2, 2)  # and any other resolution
    np.testing.assert_array_equal(
        squares.to_images(coarse, *shape, axis=1), np.repeat(np.repeat(x, 2, 1), 2, 2)
    )


def test_a_quarter_turn_of_the_image_is_one_of_the_square():
    x = noise(4, 8, 1)
    turned = squares.from_images(np.rot90(x))
    np.testing.assert_array_equal(turned, np.rot90(squares.from_images(x)))


def test_outside_the_disk_all_is_fill_and_well_inside_nothing_changes():
    for size in (8, 9):
        x, c = noise(2, size, size, 2), (size - 1) / 2
        cut = np.asarray(squares.disk(x, fill=0.25))
        for i, j in np.ndindex(size, size):
            share = min(max(size / 2 - np.hypot(i - c, j - c), 0), 1)
            expected = share * x[:, i, j] + (1 - share) * 0.25
            np.testing.assert_allclose(cut[:, i, j], expected, atol=1e-6)
            if share in (0, 1):
                np.testing.assert_array_equal(cut[:, i, j], x[:, i, j] if share else 0.25)
        assert (cut[:, 0, 0] == 0.25).all()


def test_the_disk_commutes_with_exact_elements_and_hides_corners_from_gradients():
    group, x = Dihedral(4), noise(8, 9, 9, 1)
    g = np.arange(8)
    one = squares.disk(images.act(group, g, x))
    np.testing.assert_array_equal(one, images.act(group, g, squares.disk(x)))
    gradient = jax.grad(lambda x: squares.disk(x).sum())(x)
    assert (gradient[:, 0, 0] == 0).all()
    assert (gradient[:, 4, 4] == 1).all()


X = noise(1, 4, 6, 1)
REFUSED = {
    "no image": (lambda: squares.from_images(X[0, 0]), ValueError, r"shape \(\.\.\., H, W, C\)"),
    "another pad": (lambda: squares.from_images(X, pad="wrap"), ValueError, "Unknown pad 'wrap'"),
    "maps that are oblong": (lambda: squares.to_images(X, 4, 6), ValueError,
                             "are not square on axes -3, -2"),
    "coarse maps": (lambda: squares.to_images(X[:, :3, :3], 4, 6), ValueError,
                    "Maps of 3×3 pixels for squares of 6×6 cannot be cut to an image of 4×6"),
    "a disk in an oblong": (lambda: squares.disk(X), ValueError, "inscribed in squares"),
    "a disk of integers": (lambda: squares.disk(np.zeros((4, 4, 1), int)), TypeError,
                           "int64 have no soft edge"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_with_a_sentence(case):
    function, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        function()
