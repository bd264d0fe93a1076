"""The recipes of docs/own_predictor.md, run as they stand."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.tiny_runs import ROOT

PAGE = ROOT / "docs" / "own_predictor.md"


@pytest.fixture(scope="module")
def left():
    """The names that the blocks leave, one after another."""
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    assert len(blocks) == 5
    names = {"__name__": "own_predictor"}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    return names


def test_the_nnx_module_is_adapted(left):
    np.testing.assert_array_equal(left["logits"], left["turned_logits"])
    assert left["logits"].shape == (397, 10)
    own = jax.tree.leaves(left["params"]["predictor"])
    assert [x.shape for x in own] == [(32,), (64, 32), (10,), (32, 10)]


def test_the_plain_function_sees_the_canonical_input(left):
    np.testing.assert_array_equal(left["frozen_params"]["predictor"]["kernel"], 1)
    expected = np.asarray(left["canonical"].inputs).reshape(397, -1).sum(-1)
    np.testing.assert_allclose(left["answer"], np.repeat(expected[:, None], 10, 1), rtol=1e-5)


def test_the_black_box_becomes_invariant(left):
    """Its answers do not depend on the pose; upright they are almost as good as alone."""
    test = left["images"][left["test"]]
    turned = [jnp.rot90(test, k, (1, 2)) for k in range(4)]
    answers = [left["black_box"](np.asarray(left["to_canonical"](x))) for x in turned]
    for answer in answers[1:]:
        np.testing.assert_array_equal(answer, answers[0])
    alone = [left["accuracy"](x, False) for x in turned]
    adapted = left["accuracy"](turned[1], True)
    assert alone[0] > 0.95
    assert np.mean(alone) < 0.5
    assert adapted > 0.85
