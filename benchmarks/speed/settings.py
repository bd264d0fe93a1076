"""What all parts are told, and what they found missing."""

import dataclasses
import importlib.util
from collections.abc import Sequence
from pathlib import Path

from benchmarks.speed.reference import Reference
from benchmarks.speed.timing import Floors


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to measure.

    Attributes:
      rounds: of every comparison.
      small: tiny sizes, to see that all runs; the times mean nothing.
      batch: images at a time in inference.
      dtype: of images and predictors in inference.
      floors: of this machine.
      reference: the other process, if there is one.
      working: pixels to which equiadapt resizes in canonicalization; None for those of that part.
      scorers: runs whose scorers are measured, by the name of their group.
      missing: what is not here and why, which grows.
    """

    rounds: int
    small: bool
    batch: int
    dtype: str
    floors: Floors
    reference: Reference | None
    working: Sequence[int] | None
    scorers: dict[str, Path]
    missing: dict[str, str]

    def installed(self, name: str) -> bool:
        """Whether a package can be imported here; else it is among the missing."""
        found = importlib.util.find_spec(name) is not None
        if not found:
            self.missing[name] = "not installed"
        return found

    def refuse(self, what: str, error: Exception) -> None:
        """Note what could not be measured."""
        self.missing[what] = str(error)
