"""What was compared: ratios first, times and floors beside them; as JSON, table and plot."""

import dataclasses
import json
import statistics
import textwrap
from collections.abc import Collection
from pathlib import Path
from typing import Any

from benchmarks.speed.timing import quartiles


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Times of one thing in several ways, from the same rounds.

    Attributes:
      part: which part measured it.
      what: the thing, unique among all.
      seconds: of each round, for every way.
      ours: the way whose time is divided.
      against: the way that it is divided by; None for the fastest of the others.
      floor: seconds below which `ours` cannot come, by what the machine was measured to do.
      costs: further figures of a way: compile_seconds, bytes, operations, pose_accuracy.
    """

    part: str
    what: str
    seconds: dict[str, list[float]]
    ours: str = "ours"
    against: str | None = None
    floor: float | None = None
    costs: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)

    @property
    def other(self) -> str | None:
        """The way that ours is divided by; None where there is none."""
        others = {name: statistics.median(s) for name, s in self.seconds.items()}
        others.pop(self.ours)
        if self.against:
            return self.against if self.against in others else None
        return min(others, key=others.__getitem__) if others else None

    @property
    def ratio(self) -> float | None:
        """The median over rounds of ours over the other."""
        if self.other is None:
            return None
        pairs = zip(self.seconds[self.ours], self.seconds[self.other], strict=True)
        return statistics.median(ours / other for ours, other in pairs)


def as_json(comparisons: list[Comparison]) -> list[dict[str, Any]]:
    """Plain numbers, as they are written and checked."""
    return [
        dataclasses.asdict(c) | {"other": c.other, "ratio": c.ratio, "medians": _medians(c)}
        for c in comparisons
    ]


def _medians(comparison):
    return {name: statistics.median(s) for name, s in comparison.seconds.items()}


def table(comparisons: list[Comparison]) -> str:
    """Markdown: one line for each comparison, ratios before milliseconds."""
    lines = [
        "| what | ratio | of | to | floor, ms | milliseconds: median (quartiles) |",
        "|---|---|---|---|---|---|",
    ]
    for c in comparisons:
        ratio = "–" if c.ratio is None else f"{c.ratio:.3g}"
        floor = "–" if c.floor is None else _milliseconds(c.floor)
        times = "; ".join(f"{name} {_times(seconds)}" for name, seconds in c.seconds.items())
        lines.append(f"| {c.what} | {ratio} | {c.ours} | {c.other or '–'} | {floor} | {times} |")
    return "\n".join(lines) + "\n"


def _times(seconds):
    low, middle, high = map(_milliseconds, quartiles(seconds))
    return f"{middle} ({low}–{high})"


def _milliseconds(seconds):
    return f"{float(f'{1e3 * seconds:.3g}'):,g}"  # three digits, and no power of ten


def costs_table(comparisons: list[Comparison]) -> str:
    """Markdown: seconds of compilation, peak memory, poses right, of each way that has them."""
    lines = [
        "| what | way | compilation, s | memory, MB | pose right, % |",
        "|---|---|---|---|---|",
    ]
    for c in comparisons:
        for name, cost in c.costs.items():
            seconds, accuracy = cost.get("compile_seconds"), cost.get("pose_accuracy")
            figures = [
                "–" if seconds is None else f"{seconds:.2f}",
                f"{cost['bytes'] / 1e6:.1f}",
                "–" if accuracy is None else f"{100 * accuracy:.1f}",
            ]
            lines.append(f"| {c.what} | {name} | {' | '.join(figures)} |")
    return "\n".join(lines) + "\n"


def slower(found: list[dict[str, Any]], path: Path, tolerance: float) -> list[str]:
    """A sentence for each ratio that is larger than in a file by more than the tolerance."""
    stored = {c["what"]: c for c in json.loads(path.read_text())["comparisons"]}
    return [
        f"{c['what']}: {c['ours']} took {c['ratio']:.3g} times {c['other']}, and "
        f"{stored[c['what']]['ratio']:.3g} times in {path}."
        for c in found
        if c["ratio"] is not None
        and stored.get(c["what"], {}).get("ratio") is not None
        and stored[c["what"]]["other"] == c["other"]
        and c["ratio"] > tolerance * stored[c["what"]]["ratio"]
    ]


def unmeasured(found: list[dict[str, Any]], path: Path, parts: Collection[str]) -> list[str]:
    """What a file has ratios of, in these parts, that was not measured now."""
    measured = {c["what"] for c in found if c["ratio"] is not None}
    stored = json.loads(path.read_text())["comparisons"]
    known = {c["what"] for c in stored if c["part"] in parts and c["ratio"] is not None}
    return sorted(known - measured)


def plot(comparisons: list[Comparison], path: Path) -> None:
    """Bars of the ratios, logarithmic; left of one, ours is the faster."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [c for c in comparisons if c.ratio is not None][::-1]
    figure, axes = plt.subplots(figsize=(10, 1 + 0.4 * len(shown)), layout="constrained")
    ratios = [c.ratio for c in shown]
    names = [textwrap.fill(f"{c.what} ({c.ours} / {c.other})", 56) for c in shown]
    bars = axes.barh(names, ratios, color="#4477aa")
    axes.bar_label(bars, fmt=" {:.2g}", fontsize=8)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xlim(min(ratios) / 2, 2 * max(ratios))
    axes.tick_params(axis="y", labelsize=8)
    axes.set_xlabel("ratio of times, medians over rounds")
    figure.savefig(path, dpi=120)
    plt.close(figure)
