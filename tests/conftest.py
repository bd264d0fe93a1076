"""What all tests share: reproducible property tests, and the stricter modes of jax."""

import hypothesis
import jax
import pytest

# Examples are the same on every run, and compiling makes the first one slow.
hypothesis.settings.register_profile(
    "reproducible", derandomize=True, deadline=None, max_examples=60, database=None
)
hypothesis.settings.load_profile("reproducible")


@pytest.fixture
def x64():
    """Sixty-four bits: where gradients and oracles are compared."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def strict():
    """No implicit promotion of dtypes or ranks."""
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield
