"""Times of several functions in one run, taken in turns, and what the machine can do at best."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

BRIEF = 0.2  # seconds

# Does its work once; returns the seconds where another process took them.
Case = Callable[[], float | None]


def interleaved(cases: Mapping[str, Case], rounds: int) -> dict[str, list[float]]:
    """Seconds of each case, once in every round; each round begins with another of them.

    A case that is over in less than BRIEF runs once more before, untimed: for some milliseconds
    PyTorch's threads spin on, which would slow the case after its own.
    """
    names = list(cases)
    for name in names:
        cases[name]()  # what is slow the first time
    brief = {name: _timed(cases[name]) < BRIEF for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for first in range(rounds):
        for k in range(len(names)):
            name = names[(first + k) % len(names)]
            if brief[name]:
                cases[name]()
            seconds[name].append(_timed(cases[name]))
    return seconds


def _timed(case: Case) -> float:
    began = time.perf_counter()
    told = case()
    return time.perf_counter() - began if told is None else told


def compiled(function: Callable, *arguments) -> tuple[Case, dict[str, Any]]:
    """A case of a JAX function, its arguments on the device, and its costs, see `compile_`."""
    arguments = jax.device_put(arguments)
    executable, costs = compile_(function, *arguments)

    def case() -> None:
        jax.block_until_ready(executable(*arguments))

    return case, costs


def compile_(function: Callable, *arguments, **how) -> tuple[Callable, dict[str, Any]]:
    """A compiled function, and its costs: compile_seconds, bytes, operations.

    Bytes are those of XLA's account, temporaries and results; operations what XLA counts. `how` is
    for jax.jit.
    """
    began = time.perf_counter()
    executable = jax.jit(function, **how).lower(*arguments).compile()
    seconds = time.perf_counter() - began
    memory, cost = executable.memory_analysis(), executable.cost_analysis()
    return executable, {
        "compile_seconds": seconds,
        "bytes": memory.temp_size_in_bytes + memory.output_size_in_bytes,
        "operations": float((cost or {}).get("flops", 0)),
    }


@dataclasses.dataclass(frozen=True)
class Floors:
    """What the machine was measured to do: bytes copied, and float32 operations in a product."""

    bytes_per_second: float
    operations_per_second: float

    def moving(self, count: float) -> float:
        """Seconds for so many bytes read and written."""
        return count / self.bytes_per_second

    def computing(self, operations: float) -> float:
        """Seconds for so many additions and multiplications."""
        return operations / self.operations_per_second


def floors(small: bool = False) -> Floors:
    """Measured now, the best of seven; copies within memory that the process has already."""
    count, size = (2**20, 256) if small else (2**26, 2048)
    if jax.default_backend() != "cpu" and not small:
        size = 8192
    numbers, matrix = jnp.zeros(count), jnp.ones((size, size))
    add, _ = compile_(lambda x: x + 1, numbers, donate_argnums=0)

    def copy() -> None:
        nonlocal numbers
        numbers = jax.block_until_ready(add(numbers))

    product, _ = compiled(lambda a: a @ a, matrix)
    best = {
        name: min(seconds)
        for name, seconds in interleaved({"copy": copy, "product": product}, 7).items()
    }
    return Floors(2 * numbers.nbytes / best["copy"], 2 * size**3 / best["product"])


def quartiles(seconds: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile."""
    if len(seconds) < 2:
        return (seconds[0],) * 3
    low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return low, middle, high
