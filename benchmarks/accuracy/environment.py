"""A Python environment for the PyTorch package equiadapt, apart from the project's own.

    python -m benchmarks.accuracy.environment [FOLDER]

Made once, found again later; a gigabyte with the CPU build of PyTorch, and a minute or two. Where
the package index offers PyTorch for another accelerator, pip's own variables, such as
PIP_INDEX_URL, lead to the CPU build.
"""

import argparse
import subprocess
import sys
from pathlib import Path

FOLDER = Path("runs/reference-env")
PACKAGES = (
    "torch==2.13.0", "numpy==1.26.4", "scipy==1.17.1", "pillow==13.0.0", "safetensors==0.8.0",
    "omegaconf==2.3.1", "kornia_rs==0.2.0",
)  # fmt: skip
# What they ask for would replace torch, or is not needed here.
WITHOUT_DEPENDENCIES = ("torchvision==0.28.0", "kornia==0.9.0", "e2cnn==0.2.3", "equiadapt==0.1.2")


def ensure(folder: Path = FOLDER) -> Path:
    """Return the environment's Python, after installing what is missing.

    Raises RuntimeError, in one sentence, if that cannot be done; what was half made is made anew
    by the next call.
    """
    # Not resolved: behind its link the interpreter would no longer know of the environment.
    python, finished = folder.absolute() / "bin" / "python", folder / "packages.txt"
    wanted = "\n".join((*PACKAGES, *WITHOUT_DEPENDENCIES)) + "\n"
    if python.exists() and finished.exists() and finished.read_text() == wanted:
        return python
    _run([sys.executable, "-m", "venv", "--clear", "--without-pip", str(folder)], folder)
    pip = [sys.executable, "-m", "pip", "--python", str(python), "--quiet", "--retries", "2",
           "--disable-pip-version-check", "install"]  # fmt: skip
    _run([*pip, *PACKAGES], folder)
    _run([*pip, "--no-deps", *WITHOUT_DEPENDENCIES], folder)
    finished.write_text(wanted)
    return python


def _run(command: list[str], folder: Path) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = ["nothing was said", *(done.stderr or done.stdout).strip().splitlines()][-1]
        raise RuntimeError(
            f"The packages of the reference could not be installed in {folder} ({said}): let pip "
            "reach a package index and call again, or leave the reference out."
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, nargs="?", default=FOLDER)
    try:
        print(ensure(parser.parse_args().folder))
    except RuntimeError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
