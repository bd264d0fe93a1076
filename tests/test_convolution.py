"""Convolutions as products of matrices, against a plain statement in NumPy."""

import jax
import numpy as np
import pytest

from equiadapt_jax.networks.convolution import convolve


def correlate(x, filters, stride, padding):
    x = np.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(x, filters.shape[:2], axis=(1, 2))
    return np.einsum("zyxcij,ijco->zyxo", windows[:, ::stride, ::stride], filters)


# Size, kernel, stride, padding; the last three stay convolutions.
CASES = [
    (8, 4, 2, 1), (8, 2, 2, 0), (9, 3, 3, 0), (6, 4, 2, 2), (12, 8, 4, 2),
    (9, 4, 2, 1), (9, 3, 2, 1), (8, 3, 1, 1),
]  # fmt: skip


@pytest.mark.parametrize(("size", "kernel", "stride", "padding"), CASES)
def test_values_and_gradients_are_those_of_the_definition(size, kernel, stride, padding):
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        x = rng.normal(size=(2, size, size, 3))
        filters = rng.normal(size=(kernel, kernel, 3, 5))
        expected = correlate(x, filters, stride, padding)
        y, back = jax.vjp(lambda x, w: convolve(x, w, stride, padding), x, filters)
        np.testing.assert_allclose(y, expected, atol=1e-12)
        weights = rng.normal(size=expected.shape)
        to_x, to_filters = back(weights)
        # The map is linear in either argument, so its gradients are told by any direction.
        for gradient, values in ((to_x, x), (to_filters, filters)):
            direction = rng.normal(size=values.shape)
            pair = (direction, filters) if values is x else (x, direction)
            change = (correlate(*pair, stride, padding) * weights).sum()
            np.testing.assert_allclose((gradient * direction).sum(), change, rtol=1e-11, atol=1e-11)
