"""What all tests share: reproducible property tests, stricter modes of jax, and tiny runs."""

import dataclasses
import os
import tempfile
from pathlib import Path

# Compiled once for all tests, their processes and commands, which would compile the same anew.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", tempfile.mkdtemp(prefix="equiadapt_jax_tests_"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")

import hypothesis
import jax
import numpy as np
import pytest
from PIL import Image

from equiadapt_jax import data
from equiadapt_jax.training import run
from tests.tiny_runs import ROOT, shipped

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


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """An image folder: two classes of noise, bright above or below."""
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for split, count in (("train", 20), ("test", 5)):
        for name, rows in (("above", slice(0, 10)), ("below", slice(10, 20))):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 100, (20, 20, 3), dtype=np.uint8)
                pixels[rows] += 100
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    return root


@pytest.fixture(scope="session")
def places(tmp_path_factory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("runs")
    return {"pretrained": base / "pretrained", "data": base / "data", "runs": base}


@pytest.fixture(scope="session")
def tiny(places, folder):
    """`tiny("digits_vit", seed=1)`: the tiny variant of a configuration, in temporary places."""

    def make(name="digits_vit", mode="joint", **changes):
        config = shipped(ROOT / "configs" / f"{name}.py", "tiny")
        data = dataclasses.replace(config.data, data_dir=str(places["data"]), size=24)
        if data.name not in ("digits", "image_folder"):  # in place of data that must be downloaded
            data = dataclasses.replace(
                data, name="image_folder", train="train[:75%]", validation="train[75%:]",
                test="test",
            )  # fmt: skip
        if data.name == "image_folder":
            data = dataclasses.replace(data, root=str(folder))
        return dataclasses.replace(
            config,
            data=data,
            pretrain=dataclasses.replace(config.pretrain, directory=str(places["pretrained"])),
            adaptation=dataclasses.replace(config.adaptation, mode=mode),
            **changes,
        )

    return make


@pytest.fixture(scope="session")
def finished(tiny, places) -> Path:
    """The workdir of a tiny run on digits, two steps of joint adaptation."""
    workdir = places["runs"] / "finished"
    run.train(tiny(), workdir)
    return workdir


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """The digits, prepared in a directory of their own."""
    return data.open_dataset("digits", data_dir=tmp_path_factory.mktemp("digits"))
