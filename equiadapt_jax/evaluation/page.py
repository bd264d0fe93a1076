"""report.html: all that an evaluation found, on one page that needs nothing else."""

import base64
import datetime
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from equiadapt_jax.evaluation import charts
from equiadapt_jax.evaluation.assess import Findings, Pictures
from equiadapt_jax.evaluation.files import whole
from equiadapt_jax.evaluation.measures import BINS, per_class, reliability
from equiadapt_jax.evaluation.orbits import GroupTurns, binned, displayed_turn, pose_labels
from equiadapt_jax.evaluation.wording import degrees, percent, points, turns_in_words, verdict
from equiadapt_jax.groups import Group, MatrixGroup

WORST_CLASSES = 20
LARGEST_PICTURE = 128  # pixels; larger ones are shown smaller, so that the page stays light


def write_report(
    path: Path,
    findings: Findings,
    *,
    name: str,
    facts: Mapping[str, str],
    caveat: str = "",
    evidence: str = "",
    settings: Mapping[str, Any] | None = None,
    group: Group | MatrixGroup | None = None,
    prior: np.ndarray | None = None,
    pictures: Pictures | None = None,
    wrong_poses: Pictures | None = None,
    broken: Pictures | None = None,
    history: Sequence[Mapping[str, float]] = (),
) -> None:
    """Write the page; what is None or empty is left out of it.

    Args:
      path: the file, written whole or not at all.
      findings: of the evaluation.
      name: of the run or the predictor, for the title.
      facts: what was run, in the words of the page.
      caveat: what must be known before the figures are believed, if anything.
      evidence: whether the data have a preferred pose, in words.
      settings: of the run, nested.
      group: whose elements the poses of the adapted model are.
      prior: probabilities of these elements, `(|G|,)`; for SO(2) and O(2) of those that
        `orbits.binned` counts.
      pictures: some images, turned and canonicalized.
      wrong_poses: those with the most probable wrong poses.
      broken: those right upright and most confidently wrong when turned.
      history: lines of metrics.jsonl.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("equiadapt_jax.evaluation", "."),
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {
        "percent": percent, "points": points, "degrees": degrees, "turn": displayed_turn,
    }  # fmt: skip
    text = environment.get_template("report.html.j2").render(
        name=name,
        caveat=caveat,
        verdict=verdict(findings, group),
        group=str(findings.turns.group),
        turns=turns_in_words(findings.turns.group),
        models=list(findings.outcomes),
        metrics=findings.metrics,
        tiles=_tiles(findings),
        facts=facts,
        settings=_flat(settings or {}),
        rows=_rows(findings),
        pose_errors=_pose_errors(findings),
        classes=_classes(findings),
        worst_classes=WORST_CLASSES,
        sweep=_sweep(findings),
        sweep_images=len(next(iter(findings.sweep.values())).label) if findings.sweep else 0,
        pictures=_cards(findings, pictures, group),
        wrong_poses=_cards(findings, wrong_poses, group),
        broken=_cards(findings, broken, group),
        bins=BINS,
        calibration=_calibration(findings),
        evidence=evidence,
        histogram=_histogram(findings, group, prior),
        turned_classes=_turned_classes(findings, group),
        curves=_curves(history),
        date=datetime.date.today().isoformat(),
    )
    with whole(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def _tiles(findings):
    """The figures to be seen first: (class, number, what it is)."""
    group = str(findings.turns.group)
    found = [("vanilla", "accuracy", "vanilla, upright")]
    if len(findings.turns) > 1:
        found.append(("vanilla", "group_accuracy", f"vanilla, mean over {group}"))
        if "adapted" in findings.outcomes:
            found.append(("adapted", "group_accuracy", f"adapted, mean over {group}"))
            found.append(("adapted", "changed_rate", "adapted, predictions changed"))
        else:
            found.append(("vanilla", "changed_rate", "vanilla, predictions changed"))
    return [(model, findings.metrics[f"{model}/{name}"], text) for model, name, text in found]


def _rows(findings):
    """The table of figures: (name, share of vanilla, share of adapted, whether an element)."""
    group = str(findings.turns.group)
    names = [("accuracy upright", "accuracy"), (f"accuracy, mean over {group}", "group_accuracy")]
    turned = [
        (f"turned {displayed_turn(turn)}", f"accuracy/{turn}") for turn in findings.turns.labels[1:]
    ]
    more = [
        ("accuracy at random angles", "random_accuracy"),
        ("predictions changed", "changed_rate"),
        ("change of the logits", "invariance_error"),
        ("pose right, mean", "pose_accuracy"),
        ("pose right, upright", "pose_accuracy/r0"),
        ("calibration error, upright", "calibration_error"),
        (f"calibration error, {group}", "group_calibration_error"),
    ]
    found = []
    for text, name in names + turned + more:
        values = [findings.metrics.get(f"{model}/{name}") for model in findings.outcomes]
        if any(value is not None for value in values):
            found.append({"name": text, "values": values, "element": (text, name) in turned,
                          "bar": "accuracy" in name})  # fmt: skip
    return found


def _pose_errors(findings):
    """(name, degrees) of how far poses are from where they should be."""
    names = {
        "upright": "pose_error/r0",
        f"mean over {findings.turns.group}": "pose_error",
        "median": "median_pose_error",
        "at random angles": "random_pose_error",
    }
    found = {text: findings.metrics.get(f"adapted/{name}") for text, name in names.items()}
    return [(text, value) for text, value in found.items() if value is not None]


def _classes(findings):
    """A line per class that has images, the worst first by the last model's group accuracy."""
    found = {
        model: per_class(outcome, len(findings.classes))
        for model, outcome in findings.outcomes.items()
    }
    last = list(found.values())[-1]
    order = np.lexsort((np.arange(len(last["images"])), last["group_accuracy"]))
    columns = [name for name in ("accuracy", "group_accuracy", "changed_rate") if name in last]
    return [
        {
            "name": findings.classes[i],
            "images": int(last["images"][i]),
            "values": {c: [float(found[m][c][i]) for m in found] for c in columns},
        }
        for i in order
        if last["images"][i]
    ]


def _turned_classes(findings, group):
    """A line per class that has images, the least often left as it is first."""
    outcome = findings.outcomes.get("adapted")
    if outcome is None or outcome.pose_right is None:
        return []
    poses = [displayed_turn(g) for g in GroupTurns(group).labels]
    found = per_class(outcome, len(findings.classes))
    order = np.lexsort((np.arange(len(found["images"])), found["identity_rate"]))
    return [
        {
            "name": findings.classes[i],
            "images": int(found["images"][i]),
            "rate": float(found["identity_rate"][i]),
            "wrongly": _most_wrong(outcome.pose[outcome.label == i, 0], poses),
        }
        for i in order
        if found["images"][i]
    ]


def _most_wrong(found, poses):
    """The pose found most often, other than the identity."""
    others = np.bincount(found[found > 0])
    return poses[others.argmax()] if len(others) else "–"


def _sweep(findings):
    from markupsafe import Markup

    series, means = [], []
    for model, outcome in findings.sweep.items():
        accuracy = outcome.right.mean(0)
        mirrored = np.array([name.endswith("s") for name in outcome.labels])
        for dashed in (False, True):
            if (mirrored == dashed).any():
                series.append((model, dashed, accuracy[mirrored == dashed]))
                mean = accuracy[mirrored == dashed].mean()
                means.append(
                    (model, dashed, float(mean), float(accuracy[mirrored == dashed].min()))
                )
    if not series:
        return None
    label = "Accuracy against the angle of the input"
    return {"chart": Markup(charts.polar(series, label)), "means": means}


def _calibration(findings):
    from markupsafe import Markup

    chosen = [("vanilla", "upright", slice(0, 1))]
    if len(findings.turns) > 1:
        over = f"over {findings.turns.group}"
        chosen += [(model, over, slice(None)) for model in findings.outcomes]
    elif "adapted" in findings.outcomes:
        chosen.append(("adapted", "upright", slice(0, 1)))
    found = []
    for model, where, turns in chosen:
        outcome = findings.outcomes[model]
        measured = reliability(outcome.confidence[:, turns], outcome.right[:, turns])
        label = f"Reliability of the {model} model, {where}"
        chart = Markup(charts.reliability_diagram(measured, model, label))
        found.append({"model": model, "where": where, "error": measured.error, "chart": chart})
    return found


def _histogram(findings, group, prior):
    from markupsafe import Markup

    outcome = findings.outcomes.get("adapted")
    if outcome is None or outcome.pose is None or prior is None:
        return None
    bins, found = binned(group, outcome.pose[:, 0])
    poses = [displayed_turn(g) for g in GroupTurns(bins).labels]
    share = np.bincount(found, minlength=len(poses)) / len(found)
    label = "Poses found of upright inputs, and the prior"
    return Markup(charts.pose_bars(poses, share, np.asarray(prior), label))


def _curves(history):
    """(title, chart) of what metrics.jsonl has."""
    from markupsafe import Markup

    wanted = {
        "training loss": {"loss": "train/loss"},
        "prior loss": {"prior loss": "train/prior_loss"},
        "accuracy": {
            "training batches": "train/accuracy",
            "validation, over the group": "validation/group_accuracy",
        },
        "pose right": {
            "training batches": "train/pose_accuracy",
            "validation": "validation/pose_accuracy",
        },
        "pose error in °": {
            "training batches": "train/pose_error",
            "validation": "validation/pose_error",
        },
    }
    found = []
    for title, names in wanted.items():
        series = {}
        for name, key in names.items():
            css = "adapted points" if key.startswith("validation") else "quiet"
            line = [(entry["step"], entry[key]) for entry in history if key in entry]
            if line:
                series[name] = (css, line)
        if series:
            percent = title in ("accuracy", "pose right")
            chart = charts.curves(series, f"{title} against the step", percent=percent)
            found.append((title, Markup(chart), list(series) if len(names) > 1 else []))
    return found


def _cards(findings, pictures, group):
    """What is shown of each picture."""
    if pictures is None or not len(pictures.image):
        return []
    found = []
    for i, at in enumerate(zip(pictures.image, pictures.turn, strict=True)):
        card = {
            "label": findings.classes[findings.outcomes["vanilla"].label[at[0]]],
            "turn": findings.turns.labels[at[1]],
            "upright": _data_uri(pictures.upright[i]),
            "turned": _data_uri(pictures.turned[i]),
            "upright_said": _said(findings, "vanilla", (at[0], 0)),
            "said": [_said(findings, model, at) for model in findings.outcomes],
        }
        if pictures.canonical is not None:
            outcome = findings.outcomes["adapted"]
            card["canonical"] = _data_uri(pictures.canonical[i])
            card["pose"] = displayed_turn(str(pose_labels(group, outcome.pose[at])))
            if outcome.pose_error is not None:
                card["pose_error"] = float(outcome.pose_error[at])
            else:
                card["pose_right"] = bool(outcome.pose_right[at])
            if outcome.pose_probability is not None:
                card["pose_probability"] = float(outcome.pose_probability[at])
        found.append(card)
    return found


def _said(findings, model, at):
    outcome = findings.outcomes[model]
    return {
        "model": model,
        "class": findings.classes[outcome.prediction[at]],
        "confidence": float(outcome.confidence[at]),
        "right": bool(outcome.right[at]),
    }


def _data_uri(image):
    """A PNG of an image `(S, S, C)` in [0, 1]: three channels as colours, others by their mean."""
    from PIL import Image

    image = np.clip(image if image.shape[-1] == 3 else image.mean(-1), 0, 1)
    picture = Image.fromarray(np.round(255 * image).astype(np.uint8))
    picture.thumbnail((LARGEST_PICTURE, LARGEST_PICTURE))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _flat(tree, prefix=""):
    """Nested settings as (dotted name, text)."""
    found = []
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            found += _flat(value, f"{prefix}{name}.")
        else:
            found.append((prefix + name, _setting(value)))
    return found


def _setting(value):
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "–"
    return "–" if value in ("", {}, None) else str(value)
