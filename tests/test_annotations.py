"""Annotations stay on what they mark, by loops over corners and by turned images."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from equiadapt_jax.actions import annotations, images
from equiadapt_jax.groups import Cyclic, Dihedral, O

C4, C8, D4 = Cyclic(4), Cyclic(8), Dihedral(4)
G = np.arange(8)


def turned_by_hand(group, g, point, centre):
    """A point about a centre: mirrored, then turned counter-clockwise as displayed."""
    x, y = point[0] - centre[0], point[1] - centre[1]
    if g >= group.n:
        x = -x
    angle = 2 * math.pi * (g % group.n) / group.n
    turn = math.cos(angle), math.sin(angle)
    return turn[0] * x + turn[1] * y + centre[0], -turn[1] * x + turn[0] * y + centre[1]


def test_points_and_boxes_are_those_of_loops_for_elements_of_their_own(x64):
    """Every image of a batch has its element; reflections mirror only what is reflected."""
    group, size = Dihedral(8), (20, 20)
    g = np.arange(16)
    rng = np.random.default_rng(0)
    points = rng.uniform(0, 20, (16, 3, 2))
    for act, centre in (
        (annotations.act_on_keypoints, (9.5, 9.5)),
        (annotations.act_on_polygons, (10, 10)),
    ):
        expected = [[turned_by_hand(group, i, p, centre) for p in points[i]] for i in g]
        np.testing.assert_allclose(act(group, g, points, size), expected, atol=1e-12)
    low, extent = rng.uniform(0, 10, (16, 3, 2)), rng.uniform(1, 10, (16, 3, 2))
    boxes = np.concatenate([low, low + extent], -1)
    expected = np.empty_like(boxes)
    for i, j in np.ndindex(16, 3):
        x0, y0, x1, y1 = boxes[i, j]
        corners = [(x0, y0), (x1, y0), (x0, y1), (x1, y1)]
        turned = np.array([turned_by_hand(group, i, p, (10, 10)) for p in corners])
        expected[i, j] = [*turned.min(0), *turned.max(0)]
    found = annotations.act_on_boxes(group, g, boxes, size)
    np.testing.assert_allclose(found, expected, atol=1e-12)
    one = annotations.act_on_boxes(group, 11, boxes[0], size)
    np.testing.assert_allclose(
        one, annotations.act_on_boxes(group, np.array([11]), boxes[:1], size)[0]
    )


def test_a_square_box_at_45_degrees_is_as_wide_as_its_diagonal():
    box = np.float32([6, 6, 14, 14])
    turned = annotations.act_on_boxes(C8, 1, box, (20, 20))
    half = 4 * math.sqrt(2)
    np.testing.assert_allclose(turned, [10 - half, 10 - half, 10 + half, 10 + half], rtol=1e-6)


def marked(height, width, top, left, bottom, right):
    image = np.zeros((height, width, 1), np.float32)
    image[top:bottom, left:right] = 1
    return image


def test_annotations_stay_on_what_they_mark_in_turned_images():
    """Keypoints on their pixel, boxes on the pixel edges of their rectangle, for all of D4."""
    image = marked(9, 9, 1, 2, 4, 8)
    pixel = marked(9, 9, 1, 2, 2, 3)
    turned = np.asarray(images.act(D4, G, np.repeat(image[None], 8, 0)))
    single = np.asarray(images.act(D4, G, np.repeat(pixel[None], 8, 0)))
    boxes = annotations.act_on_boxes(D4, G, np.tile(np.float32([2, 1, 8, 4]), (8, 1)), (9, 9))
    points = annotations.act_on_keypoints(D4, G, np.tile(np.float32([2, 1]), (8, 1)), (9, 9))
    masks = annotations.act_on_masks(D4, G, np.repeat(image[None, ..., 0] > 0, 8, 0))
    for i in G:
        rows, columns = np.nonzero(turned[i, ..., 0])
        found = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        np.testing.assert_array_equal(boxes[i], found)
        np.testing.assert_array_equal(np.argwhere(single[i, ..., 0])[0], points[i][::-1])
        np.testing.assert_array_equal(masks[i], turned[i, ..., 0] > 0)


def test_quarter_turns_of_oblong_images_swap_height_and_width():
    """As np.rot90 does, which the core refuses to do to a batch."""
    height, width = 6, 10
    boxes = np.tile(np.float32([2, 1, 7, 3]), (8, 1))
    points = np.tile(np.float32([2, 1]), (8, 1))
    sizes = np.asarray(annotations.turned_size(D4, G, (height, width)))
    moved = np.asarray(annotations.act_on_boxes(D4, G, boxes, (height, width)))
    places = np.asarray(annotations.act_on_keypoints(D4, G, points, (height, width)))
    for g in G:
        image = marked(height, width, 1, 2, 3, 7)[..., 0]
        pixel = marked(height, width, 1, 2, 2, 3)[..., 0]
        image, pixel = (np.rot90(a[:, ::-1] if g >= 4 else a, g % 4) for a in (image, pixel))
        assert tuple(sizes[g]) == image.shape
        rows, columns = np.nonzero(image)
        found = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        np.testing.assert_array_equal(moved[g], found)
        np.testing.assert_array_equal(np.argwhere(pixel)[0], places[g][::-1])
    back = annotations.act_on_boxes(D4, D4.inverse(G), moved, sizes)
    np.testing.assert_array_equal(back, boxes)
    back = annotations.act_on_keypoints(D4, D4.inverse(G), places, sizes)
    np.testing.assert_array_equal(back, points)


@pytest.mark.parametrize("group", [D4, O(2)], ids=str)
def test_images_of_several_sizes_take_one_element_or_one_each(group):
    """As each image by itself, for quarter turns of oblong ones too, and under jit."""
    rng = np.random.default_rng(2)
    sizes = np.array([(6, 10), (7, 7), (4, 9)]) if group == D4 else np.array([(6, 6), (9, 9)] * 2)
    low = rng.uniform(0, 3, (len(sizes), 5, 2)).astype(np.float32)
    boxes = np.concatenate([low, low + 1], -1)
    for act, data in (
        (annotations.act_on_keypoints, low),
        (annotations.act_on_polygons, low),
        (annotations.act_on_boxes, boxes),
    ):
        for i in (1, 3, 6):
            g = i if group == D4 else D4.matrix(i)
            expected = [act(group, g, a, tuple(size)) for a, size in zip(data, sizes, strict=True)]
            np.testing.assert_array_equal(act(group, g, data, sizes), expected)
            each = np.stack([np.asarray(g)] * len(sizes))
            np.testing.assert_array_equal(act(group, each, data, sizes), expected)
            traced = jax.jit(act, static_argnums=0)(group, g, data, sizes)
            np.testing.assert_allclose(traced, expected, atol=1e-6)
            turned = annotations.turned_size(group, g, sizes)
            np.testing.assert_array_equal(turned, annotations.turned_size(group, each, sizes))


def test_one_size_serves_elements_of_their_own_and_nested_batches():
    points = np.random.default_rng(4).uniform(0, 6, (2, 3, 4, 2)).astype(np.float32)
    sizes = np.array([[(6, 10), (7, 7), (4, 9)], [(5, 5), (8, 6), (6, 6)]])
    g = np.array([[1, 5, 3], [0, 7, 2]])
    whole = annotations.act_on_keypoints(D4, g, points, sizes)
    by_element = annotations.act_on_keypoints(D4, g, points, (6, 10))
    by_size = annotations.act_on_keypoints(D4, 3, points, sizes)
    for i, j in np.ndindex(2, 3):
        one = lambda g, size: annotations.act_on_keypoints(D4, g, points[i, j], size)  # noqa: E731, B023
        np.testing.assert_array_equal(whole[i, j], one(g[i, j], sizes[i, j]))
        np.testing.assert_array_equal(by_element[i, j], one(g[i, j], (6, 10)))
        np.testing.assert_array_equal(by_size[i, j], one(3, sizes[i, j]))


def test_there_and_back_and_one_after_another(x64):
    rng = np.random.default_rng(3)
    g, h = rng.integers(0, 16, (2, 40))
    group, points = Dihedral(8), rng.uniform(0, 20, (40, 2))
    for act in (annotations.act_on_keypoints, annotations.act_on_polygons):
        there = act(group, g, points, (20, 20))
        np.testing.assert_allclose(act(group, group.inverse(g), there, (20, 20)), points)
        both = act(group, h, there, (20, 20))
        at_once = act(group, group.compose(h, g), points, (20, 20))
        np.testing.assert_allclose(at_once, both, atol=1e-12)


def test_matrix_groups_turn_annotations_as_their_finite_subgroups_do():
    group, subgroup, rng = O(2), Dihedral(8), np.random.default_rng(5)
    g, low = np.arange(16), rng.uniform(0, 9, (16, 2, 2))
    boxes = np.concatenate([low, low + 5], -1).astype(np.float32)
    masks, matrices = rng.integers(0, 3, (16, 2, 9, 9)), subgroup.matrix(g)
    for act, data, size in (
        (annotations.act_on_boxes, boxes, [(14, 14)]),
        (annotations.act_on_keypoints, boxes[..., :2], [(14, 14)]),
        (annotations.act_on_masks, masks, []),
    ):
        found = act(group, matrices, data, *size)
        np.testing.assert_allclose(found, act(subgroup, g, data, *size), atol=1e-5)
        one = act(group, matrices[3], data[3], *size)
        np.testing.assert_allclose(one, found[3], atol=1e-5)
    with pytest.raises(ValueError, match="o2 would change the shape of images of 4×6"):
        annotations.act_on_boxes(group, matrices, boxes, (4, 6))


def test_masks_are_sampled_from_the_nearest_pixel():
    """Labels at 45°, a pixel at a time; and every instance with the element of its image."""
    size, c = 9, 4.0
    labels = np.random.default_rng(0).integers(0, 5, (2, 3, size, size), np.int32)
    g = np.array([1, 6])
    turned = np.asarray(annotations.act_on_masks(C8, g, labels, fill=-1))
    for i, row, column in np.ndindex(2, size, size):
        x, y = turned_by_hand(C8, -g[i] % 8, (column, row), (c, c))
        source = round(y), round(x)
        inside = min(source) >= 0 and max(source) < size
        expected = labels[i, :, source[0], source[1]] if inside else -1
        np.testing.assert_array_equal(turned[i, :, row, column], expected)
    again = annotations.act_on_masks(C4, np.array([3, 1]), labels)
    back = annotations.act_on_masks(C4, np.array([1, 3]), again)
    np.testing.assert_array_equal(back, labels)
    assert back.dtype == labels.dtype


def test_logits_keep_more_of_a_mask_than_the_mask_itself():
    """There and back at 45°, intersection over union with the mask before, 48 pixels."""
    size = 48
    y, x = np.mgrid[:size, :size] - (size - 1) / 2
    shape = 0.6 * size / 2 * (1 + 0.3 * np.cos(3 * np.arctan2(y, x))) - np.hypot(x, y)
    mask = shape > 0
    there_and_back = annotations.act_on_masks(C8, 7, annotations.act_on_masks(C8, 1, mask))
    logits = shape[..., None].astype(np.float32)
    carried = images.act(C8, 7, images.act(C8, 1, logits))[..., 0] > 0

    def overlap(other):
        return (mask & other).sum() / (mask | other).sum()

    assert overlap(np.asarray(carried)) > 0.99
    assert overlap(np.asarray(there_and_back)) < overlap(np.asarray(carried))


def test_points_have_the_gradient_of_a_rotation():
    gradient = jax.grad(lambda p: annotations.act_on_keypoints(C8, 1, p, (8, 8))[0])(jnp.zeros(2))
    np.testing.assert_allclose(gradient, [math.sqrt(0.5), math.sqrt(0.5)], rtol=1e-6)


P, S = np.zeros((3, 2), np.float32), (4, 4)
REFUSED = {
    "other points": (lambda: annotations.act_on_keypoints(C4, 0, P[:, :1], S), ValueError,
                     r"Points have shape \(..., 2\), x and y; got \(3, 1\)"),
    "other boxes": (lambda: annotations.act_on_boxes(C4, 0, P, S), ValueError,
                    r"Boxes have shape \(..., 4\)"),
    "integer coordinates": (lambda: annotations.act_on_polygons(C4, 0, P.astype(int), S),
                            TypeError, "int64 cannot be turned: give floats"),
    "elements for others": (lambda: annotations.act_on_polygons(C4, G[:2], P, S), ValueError,
                            r"shape \(2,\) do not fit annotations of shape \(3, 2\)"),
    "oblong at 45°": (lambda: annotations.act_on_polygons(C8, 0, P, (4, 6)), ValueError,
                      "cyclic8 would change the shape of images of 4×6 pixels: pad or crop"),
    "sizes of others": (lambda: annotations.turned_size(C4, G[:3], np.ones((2, 2))), ValueError,
                        r"size has shape \(2, 2\): give \(H, W\), or one for each element"),
    "sizes for other annotations": (
        lambda: annotations.act_on_keypoints(C4, 1, P, np.ones((2, 2))), ValueError,
        r"Sizes of shape \(2, 2\) do not fit annotations of shape \(3, 2\): give \(H, W\), or one"),
    "sizes for corners": (
        lambda: annotations.act_on_boxes(C4, 1, np.arange(4.0), np.ones((4, 2))), ValueError,
        r"Sizes of shape \(4, 2\) do not fit boxes of shape \(4,\): give"),
    "elements for corners": (
        lambda: annotations.act_on_boxes(C4, np.zeros((2, 4), int), np.ones((2, 4)), S),
        ValueError, r"shape \(2, 4\) do not fit annotations of shape \(2, 4\)"),
    "no size": (lambda: annotations.turned_size(C4, 1, 4), ValueError,
                r"size has shape \(\): give \(H, W\)"),
    "logits": (lambda: annotations.act_on_masks(C4, 0, P), TypeError,
               "float32 are logits or probabilities: carry them with actions.images.act"),
    "oblong masks": (lambda: annotations.act_on_masks(C4, 0, P > 0), ValueError,
                     "cyclic4 would change the shape of masks of 3×2"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_with_a_sentence(case):
    function, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        function()
