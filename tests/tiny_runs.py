"""What tests of whole runs share."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import chex
import jax
import numpy as np
from absl import flags
from ml_collections import config_flags

from equiadapt_jax import command_line
from equiadapt_jax.training import config as settings

ROOT = Path(__file__).parents[1]


def command(*arguments, **environment):
    """A command as a user would type it; its exit code, output and errors."""
    environment = {name: str(value) for name, value in environment.items()}
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu", **environment}, timeout=300, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def given_flags(monkeypatch, *arguments):
    """The settings of a command line of train.py."""
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values)
    values(sys.argv)
    return settings.from_dict(command_line.settings_of(values["config"]))


SHIPPED = sorted((ROOT / "configs").glob("*.py"))

# The variants in full size of configurations that have several.
VARIANTS = {
    name: ["resnet50", "vit_b16"] for name in ("cifar10", "cifar100", "stl10", "imagenet2012")
} | {"cifar10_resnet20": ["", "group_conv", "light"]}


def shipped(path: Path, variant: str = "") -> settings.Config:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return settings.from_dict(module.get_config(variant).to_dict())


def leaves(tree):
    return {
        jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree.leaves_with_path(tree)
    }


def assert_same(one, other):
    chex.assert_trees_all_equal(one, other)
