"""Charts as inline SVG: text as text, colours of the page's style sheet, nothing from outside.

Every chart is drawn for about 300 pixels, so that its text stays legible on a telephone. What
carries meaning has a class of the page ("vanilla", "adapted", "target"); `<title>` elements give
the numbers where a mouse rests.
"""

import math
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np

from equiadapt_jax.evaluation.measures import Reliability

LEFT, RIGHT, TOP = 40, 14, 10


def polar(series: Sequence[tuple[str, bool, np.ndarray]], label: str) -> str:
    """Accuracies in [0, 1] over the circle, upright at the top, counter-clockwise.

    `series`: (class, dashed, accuracies at equal steps of the angle).
    """
    centre, radius = 180, 138

    def point(share, angle):
        x, y = centre - radius * share * math.sin(angle), centre - radius * share * math.cos(angle)
        return f"{x:.1f},{y:.1f}"

    parts = []
    for share in (0.25, 0.5, 0.75, 1):
        parts.append(f'<circle class="grid" cx="{centre}" cy="{centre}" r="{radius * share:g}"/>')
    for degrees in range(0, 360, 45):
        angle = math.radians(degrees)
        start, end = point(0, 0), point(1, angle)
        parts.append(f'<polyline class="grid" points="{start} {end}"/>')
        x, y = point(1.13, angle).split(",")
        parts.append(_text(x, float(y) + 4, f"{degrees}°", "middle"))
    for name, dashed, values in series:
        angles = 2 * np.pi * np.arange(len(values)) / len(values)
        points = " ".join(point(v, a) for v, a in zip(values, angles, strict=True))
        parts.append(f'<polygon class="{name} line{" dashed" * dashed}" points="{points}"/>')
    for share in (0.25, 0.5, 0.75, 1):  # above the lines, and between two spokes
        x, y = point(share, math.radians(292.5)).split(",")
        parts.append(_text(x, float(y) + 4, f"{100 * share:g} %", "middle", "halo"))
    return _svg(360, 360, label, parts)


def reliability_diagram(found: Reliability, name: str, label: str) -> str:
    """Accuracy in each bin of confidence against the diagonal, above the number of images."""
    bins = len(found.count)
    width, height, foot = 290, 300, 54
    x, y = _scale(0, 1, LEFT, width - RIGHT), _scale(0, 1, height - foot - 64, TOP)
    floor = height - foot
    counts = _scale(0, max(found.count.max(), 1), floor, floor - 34)
    parts = _grid_y(y, (0, 0.25, 0.5, 0.75, 1), width, lambda v: f"{100 * v:g} %")
    for i, (count, accuracy, confidence) in enumerate(
        zip(found.count, found.accuracy, found.confidence, strict=True)
    ):
        if not count:
            continue
        left, size = x(i / bins) + 1, (x(1) - x(0)) / bins - 2
        tip = f"{count} images, confidence {100 * confidence:.1f} %, right {100 * accuracy:.1f} %"
        top = min(y(accuracy), y(0) - 1)
        parts.append(_bar(left, top, size, y(0) - top, f"{name} area", tip))
        parts.append(_bar(left, counts(count), size, floor - counts(count), "counted", tip))
        middle = left + size / 2 + 3
        parts.append(
            f'<text class="small" transform="translate({middle:.1f} {floor + 5}) rotate(-90)" '
            f'text-anchor="end">{count}</text>'
        )
    parts.append(_path([(x(0), y(0)), (x(1), y(1))], "target line dashed"))
    parts.append(_text(x(0) - 6, floor, "images", "end", "small"))
    for tick in (0.2, 0.4, 0.6, 0.8, 1):
        parts.append(_text(x(tick), y(0) + 15, f"{100 * tick:g} %", "middle"))
    parts.append(_text(x(0.5), height - 4, "confidence of the prediction", "middle"))
    return _svg(width, height, label, parts)


def pose_bars(poses: Sequence[str], found: np.ndarray, prior: np.ndarray, label: str) -> str:
    """The share of inputs in every pose as bars, and the prior's as marks; both sum to one."""
    each = max(16, (300 - LEFT - RIGHT) / len(poses))
    upright_labels = len(poses) <= 8 and max(map(len, poses)) <= 4
    width, foot = LEFT + RIGHT + each * len(poses), 24 if upright_labels else 84
    height = 170 + foot
    high = _nice_above(max(found.max(), prior.max()))
    y = _scale(0, high, height - foot, TOP)
    parts = _grid_y(y, np.linspace(0, high, 5), width, lambda v: f"{100 * v:.3g} %")
    for i, (name, share, target) in enumerate(zip(poses, found, prior, strict=True)):
        left = LEFT + each * i
        tip = f"{name}: {100 * share:.1f} % found, prior {100 * target:.1f} %"
        parts.append(_bar(left + each * 0.2, y(share), each * 0.6, y(0) - y(share),
                          "adapted area", tip))  # fmt: skip
        ends = [(left + each * 0.08, y(target)), (left + each * 0.92, y(target))]
        parts.append(_path(ends, "target line thick"))
        middle = left + each / 2
        if upright_labels:
            parts.append(_text(middle, height - foot + 16, name, "middle"))
        else:
            parts.append(
                f'<text class="small" transform="translate({middle + 3:.1f} {height - foot + 6}) '
                f'rotate(-90)" text-anchor="end">{escape(name)}</text>'
            )
    return _svg(width, height, label, parts)


def curves(
    series: Mapping[str, tuple[str, Sequence[tuple[float, float]]]], label: str, *, percent: bool
) -> str:
    """Lines over the steps of training, zero among the values.

    `series` is name → (class, [(step, value)]); a class with "points" in it is drawn so.
    """
    width, height, foot = 290, 200, 36
    last = max(1, *(step for _, points in series.values() for step, _ in points))
    values = [value for _, points in series.values() for _, value in points]
    high = 1.0 if percent else _nice_above(max(values))
    low = 0.0 if percent or min(values) >= 0 else -_nice_above(-min(values))
    x, y = _scale(0, last, LEFT, width - RIGHT - 6), _scale(low, high, height - foot, TOP)
    as_text = (lambda v: f"{100 * v:g} %") if percent else (lambda v: f"{v:.3g}")
    parts = _grid_y(y, np.linspace(low, high, 5), width, as_text)
    for tick in _nice_ticks(last):
        parts.append(_text(x(tick), height - foot + 16, f"{tick:g}", "middle"))
    parts.append(_text((LEFT + width) / 2, height - 4, "step", "middle"))
    for name, (css, points) in series.items():
        places = [(x(step), y(value)) for step, value in points]
        if "points" not in css or len(places) > 1:
            parts.append(_path(places, f"{css} line"))
        if "points" in css:
            parts += [
                f'<circle class="{css}" cx="{a:.1f}" cy="{b:.1f}" r="3.5">'
                f"<title>{escape(name)}, step {step:g}: {as_text(value)}</title></circle>"
                for (a, b), (step, value) in zip(places, points, strict=True)
            ]
    return _svg(width, height, label, parts)


def _svg(width, height, label, parts):
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(label)}" '
        f'style="--width: {width:g}px">{"".join(parts)}</svg>'
    )


def _scale(low, high, start, end):
    return lambda value: start + (end - start) * (value - low) / (high - low)


def _grid_y(y, ticks, width, as_text):
    parts = []
    for tick in ticks:
        parts.append(_path([(LEFT, y(tick)), (width - RIGHT, y(tick))], "grid"))
        parts.append(_text(LEFT - 6, y(tick) + 4, as_text(tick), "end"))
    return parts


def _path(points, css):
    return f'<polyline class="{css}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}"/>'


def _bar(x, y, width, height, css, tip):
    return (
        f'<rect class="{css}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}">'
        f"<title>{escape(tip)}</title></rect>"
    )


def _text(x, y, text, anchor, css=""):
    return (
        f'<text x="{float(x):.1f}" y="{float(y):.1f}" text-anchor="{anchor}" class="{css}">'
        f"{escape(text)}</text>"
    )


def _nice_above(value):
    """The first of 1, 2, 4, 5, 8, 10 times a power of ten that is not below the value."""
    if not value > 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(m * power for m in (1, 2, 4, 5, 8, 10) if m * power >= value * (1 - 1e-9))


def _nice_ticks(high):
    """About five round numbers from zero to `high`."""
    step = _nice_above(max(high, 1) / 5)
    return np.arange(0, high + 1e-9, max(step, 1))
