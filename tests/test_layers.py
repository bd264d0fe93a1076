"""Who may import whom, and what importing the package needs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import equiadapt_jax

PACKAGE = Path(equiadapt_jax.__file__).parent
PYPROJECT = PACKAGE.parent / "pyproject.toml"
CORE = [
    "groups.py",
    "representations.py",
    "actions",
    "canonicalization.py",
    "outputs.py",
    "averaging.py",
    "priors.py",
    "alignment.py",
]
NOT_NEEDED = [
    "tensorflow",
    "tensorflow_datasets",
    "grain",
    "torch",
    "sklearn",
    "matplotlib",
    "jinja2",
    "markupsafe",
    "tifffile",
    "imagecodecs",
    "PIL",
    "ml_collections",
    "tensorboardX",
    "wandb",
    "safetensors",
    "huggingface_hub",
    "transformers",
]


def run(code):
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )


def test_every_layer_imports_only_from_those_before_it():
    """The contract is in pyproject.toml; every module of the package has a place in it."""
    result = run(
        "import sys; from importlinter.cli import lint_imports\n"
        f"sys.exit(lint_imports(config_filename={str(PYPROJECT)!r}, no_cache=True))"
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "1 kept, 0 broken" in result.stdout


def core_files():
    found = []
    for name in CORE:
        path = PACKAGE / name
        found += sorted(path.rglob("*.py")) if path.is_dir() else [path]
    return found


@pytest.mark.parametrize("path", core_files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_the_core_needs_jax_and_numpy_only(path):
    imported = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write the import out from equiadapt_jax"
            imported.add(node.module.split(".")[0])
    others = imported - {"jax", "numpy", "equiadapt_jax"} - sys.stdlib_module_names
    assert not others
    files = {"os", "io", "pathlib", "json", "pickle", "shutil", "tempfile"}
    assert not imported & files, "the core reads and writes no files"
    assert not any(
        isinstance(node, ast.Name) and node.id == "open"
        for node in ast.walk(ast.parse(path.read_text()))
    )


def test_the_core_files_exist():
    assert {path.name for path in core_files()} >= {"groups.py", "images.py", "priors.py"}


def test_importing_the_package_needs_no_data_plot_or_torch_library():
    block = f"""
import sys
for name in {NOT_NEEDED}:
    sys.modules[name] = None  # importing it raises ImportError
import equiadapt_jax as ea
assert callable(ea.adapt) and ea.groups.Cyclic(4).order == 4
"""
    result = run(block)
    assert result.returncode == 0, result.stderr
    # The block blocks.
    assert "ModuleNotFoundError" in run(block + "import PIL.Image").stderr


def test_importing_the_package_starts_no_device():
    result = run(
        "import equiadapt_jax\n"
        "from jax._src import xla_bridge\n"
        "assert not xla_bridge.backends_are_initialized()"
    )
    assert result.returncode == 0, result.stderr
