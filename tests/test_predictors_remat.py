"""Blocks that are computed again on the way back: the same gradients from far less that is kept."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from equiadapt_jax.predictors import ResNet, ViT

NETWORKS = {
    "ViT": lambda remat: ViT(3, patch=8, width=16, depth=4, heads=2, dropout=0.1, remat=remat),
    "ResNet": lambda remat: ResNet.variant("resnet20", 3, remat=remat),
}


def loss_of(network, variables, x):
    def loss(params):
        y, updated = network.apply(
            {**variables, "params": params}, x, train=True, mutable=["batch_stats"],
            rngs={"dropout": jax.random.key(1)},
        )  # fmt: skip
        return jnp.square(y).sum(), updated

    return loss


@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_are_the_same_and_less_is_kept(name):
    x = np.random.default_rng(0).uniform(size=(4, 32, 32, 3)).astype(np.float32)
    plain, again = (NETWORKS[name](remat) for remat in (False, True))
    variables = jax.jit(plain.init)(jax.random.key(0), x)
    made = jax.eval_shape(again.init, jax.random.key(0), x)
    assert jax.tree.structure(made) == jax.tree.structure(variables)

    found, kept = [], []
    for network in (plain, again):
        loss = loss_of(network, variables, x)
        found.append(jax.jit(jax.grad(loss, has_aux=True))(variables["params"]))
        back = jax.eval_shape(lambda p, loss=loss: jax.vjp(loss, p)[1], variables["params"])
        kept.append(sum(leaf.size for leaf in jax.tree.leaves(back)))
    for mine, other in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(mine, other, atol=2e-6 * np.abs(other).max())
    assert kept[1] < kept[0] / 3
