"""The PyTorch package equiadapt, in an environment and a process of its own: worker.py.

One line of JSON for each question and each answer, so that its times are taken in turns with ours.
"""

import contextlib
import json
import os
import subprocess
from pathlib import Path
from typing import Any

from benchmarks.speed.timing import Case

ROOT = Path(__file__).parents[2]


class Reference:
    """The worker's process."""

    def __init__(self, python: Path, threads: int | None = None):
        own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        self._process = subprocess.Popen(
            [str(python), "-m", "benchmarks.speed.worker"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=own,
        )  # fmt: skip
        if threads:
            self.ask(do="threads", count=threads)

    def close(self) -> None:
        """End it."""
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def ask(self, **question: Any) -> dict[str, Any]:
        """The answer to a question; RuntimeError with what went wrong over there."""
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
            answer = json.loads(self._process.stdout.readline())
        except (OSError, ValueError):
            answer = {"error": "its process ended, what it said stands above"}
        if "error" in answer:
            raise RuntimeError(f"The reference failed at {question['do']}: {answer['error']}.")
        return answer

    def case(self, what: str, **settings: Any) -> tuple[Case, dict[str, Any]]:
        """A case that runs over there, and the memory that it took there."""
        name = json.dumps([what, settings])
        cost = self.ask(do="make", name=name, what=what, settings=settings)
        return lambda: self.ask(do="run", name=name)["seconds"], cost

    def forget(self) -> None:
        """Free what was made."""
        self.ask(do="forget")
