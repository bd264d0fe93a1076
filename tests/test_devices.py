"""Several devices share the rows of a batch, in evaluation and where features are made."""

import subprocess
import sys

PROGRAM = """
import jax, jax.numpy as jnp, numpy as np
import equiadapt_jax as ea
from equiadapt_jax import devices
from equiadapt_jax.evaluation.orbits import GroupTurns, make_evaluator
from equiadapt_jax.training import cache

assert jax.device_count() == 4
images = np.random.default_rng(0).uniform(size=(16, 6, 6, 3)).astype(np.float32)
batch = {
    "image": images, "label": np.arange(16, dtype=np.int32), "mask": np.arange(16) < 14,
    "name": np.array([str(i) for i in range(16)]),
}
seen = []

def predict(params, state, x):
    jax.debug.inspect_array_sharding(x, callback=seen.append)
    return jnp.einsum("bhwc,hwk->bk", x, params), None

weights = np.random.default_rng(1).normal(size=(6, 6, 16)).astype(np.float32)
outcome = make_evaluator(predict, GroupTurns(ea.groups.Cyclic(4)))(
    jax.device_put(weights, jax.devices()[3]), {}, [batch]
)
assert seen and not any(sharding.is_fully_replicated for sharding in seen), seen
expected = [np.einsum("bhwc,hwk->bk", np.rot90(images, k, (1, 2)), weights) for k in range(4)]
assert (outcome.prediction == np.stack(expected, 1).argmax(-1)[:14]).all()

# Rows that the devices cannot share equally lie on each.
assert devices.spread(images[:6]).sharding.is_fully_replicated
assert [part.data.shape[0] for part in devices.spread(images).addressable_shards] == [4] * 4

scorer = ea.networks.FeatureScorer(ea.groups.Cyclic(4), grid=1, hidden=4)
network = ea.from_linen(ea.predictors.ResNet.variant("resnet20", 5))
model = ea.adapt(
    ea.groups.Cyclic(4), ea.from_linen(scorer), network, features=scorer.read,
    freeze_predictor=True,
)
params, state = model.init(jax.random.key(0), jnp.asarray(images))
kept = cache.make(model, params, state, [batch], 14, key=jax.random.key(0))
features, predictions = model.orbit_features(params, state, jnp.asarray(images[:14]))
np.testing.assert_allclose(kept["predictions"], predictions, rtol=1e-4, atol=1e-4)
print("well")
"""


def test_evaluation_and_features_are_shared_by_all_devices():
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False,
        env={"JAX_NUM_CPU_DEVICES": "4", "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert result.stdout == "well\n", result.stderr
