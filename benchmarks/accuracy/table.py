"""One Markdown table of results; see evaluation.py for what a result is."""

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean

from benchmarks.accuracy.evaluation import ELEMENTS, RANDOM, Result


def accuracy(*turns: str) -> Callable[[Result], str]:
    """Mean accuracy over turns, in percent."""
    return lambda result: f"{100 * fmean(result['turns'][t]['accuracy'] for t in turns):.1f}"


def pose_right(result: Result) -> str:
    """Mean pose accuracy over the elements of the method's own group, in percent."""
    found = [result["turns"][turn]["pose_accuracy"] for turn in ELEMENTS]
    found = [value for value in found if value is not None]
    return f"{100 * fmean(found):.1f}" if found else "–"


def number(name: str, style: str) -> Callable[[Result], str]:
    """A number that a result may do without."""
    return lambda result: "–" if result.get(name) is None else format(result[name], style)


COLUMNS: dict[str, Callable[[Result], str]] = {
    "method": lambda result: str(result["method"]),
    "upright": accuracy("0"),
    "over C4": accuracy(*ELEMENTS[::2]),
    "over C8": accuracy(*ELEMENTS),
    "random angles": accuracy(RANDOM),
    "pose right": pose_right,
    "predictor passes per image": number("predictor_passes", "g"),
    "seconds to train": number("train_seconds", ",.0f"),
    "seconds for 1,000 images": number("seconds_per_1000", ".2f"),
    "parameters": number("parameters", ",d"),
}


def table(
    results: Sequence[Result], columns: Mapping[str, Callable[[Result], str]] = COLUMNS
) -> str:
    """Markdown, one row for each result, in their order; accuracies in percent.

    Raises ValueError for results that were measured on different images.
    """
    for result in results:
        if result["evaluation"] != results[0]["evaluation"]:
            raise ValueError(
                f"{result['method']!r} was measured on other images than {results[0]['method']!r}: "
                "measure both on the same file."
            )
    lines = [list(columns), ["---"] * len(columns)]
    lines += [[cell(result) for cell in columns.values()] for result in results]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
