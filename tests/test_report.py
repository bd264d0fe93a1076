"""report.html: well-formed, self-contained, escaped, complete, and with the right numbers."""

import base64
import dataclasses
import html
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

import equiadapt_jax as ea
from equiadapt_jax.evaluation import GroupTurns, Outcome, wording
from equiadapt_jax.evaluation.assess import (
    Findings,
    Images,
    broken_images,
    first_images,
    picture,
    wrong_poses,
)
from equiadapt_jax.evaluation.measures import all_figures
from equiadapt_jax.evaluation.page import write_report
from equiadapt_jax.evaluation.report import leave, write_per_image

C4, C8, D4 = ea.groups.Cyclic(4), ea.groups.Cyclic(8), ea.groups.Dihedral(4)
HISTORY = [
    {"step": 20, "train/loss": 60.0, "train/prior_loss": 0.6, "train/accuracy": 0.5},
    {"step": 40, "train/loss": 37.0, "train/prior_loss": 0.4, "train/accuracy": 0.7,
     "validation/group_accuracy": 0.8},
]  # fmt: skip
ALL = ["Figures", "Classes", "Accuracy against angle", "Canonicalized images",
       "Most confidently wrong poses", "Calibration", "Poses found",
       "Is the prior justified?", "Classes that are turned", "Learning curves",
       "What was run"]  # fmt: skip


class Page(HTMLParser):
    """The tags of a page as (name, attributes), its headings and its text; raises if unbalanced."""

    VOID = ("meta", "img", "br")

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.headings, self.text = [], [], [], []
        self.feed(text)
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)
        if "style" not in self.open:
            self.text.append(data)


def outcome(turns, images=12, classes=3, poses=None, seed=0):
    """An outcome of noise: accuracies in between, poses where there is a group for them."""
    rng = np.random.default_rng(seed)
    shape = (images, len(turns))
    label = rng.integers(0, classes, images)
    prediction = np.where(
        rng.uniform(size=shape) < 0.6, label[:, None], rng.integers(0, classes, shape)
    )
    given = {"pose": None, "pose_right": None}
    if poses is not None:
        pose = rng.integers(0, poses.order, shape)
        right = rng.uniform(size=shape) < 0.7
        given = {"pose": pose, "pose_right": right, "pose_probability": rng.uniform(0.3, 1, shape)}
    return Outcome(
        turns.labels, np.arange(images).astype(str), label, prediction,
        rng.uniform(0.2, 1, shape), rng.uniform(0, 1, shape), **given,
    )  # fmt: skip


def findings(group, known=None, images=12, classes=("a", "b", "c"), sweep=True):
    turns = GroupTurns(group)
    models = {"vanilla": None, "adapted": known} if known else {"vanilla": None}
    outcomes = {name: outcome(turns, images, len(classes), poses) for name, poses in models.items()}
    circle = GroupTurns(type(group)(8))
    around = {name: outcome(circle, images, len(classes)) for name in models} if sweep else {}
    metrics = {
        f"{model}/{name}": value
        for model, found in outcomes.items()
        for name, value in all_figures(found, classes).items()
    }
    return Findings(turns, tuple(classes), outcomes, {}, around, metrics)


def source(images, channels, size=8):
    rng = np.random.default_rng(1)
    pixels = rng.integers(0, 256, (images, size, size, channels), dtype=np.uint8)
    return Images([{"image": x, "label": 0} for x in pixels], size, "pad", 4)


def page(path, found, group=None, channels=1, **more):
    """Write the report of these findings with all the pictures there are, and read it."""
    images = source(len(found.outcomes["vanilla"].label), channels)
    if group is None:
        more["broken"] = picture(found, images, broken_images(found, 12), None)
    else:
        more["pictures"] = picture(found, images, first_images(found, 16), group)
        more["wrong_poses"] = picture(found, images, wrong_poses(found, 12, group), group)
        more.setdefault("prior", np.eye(group.order)[0])
        more.setdefault("evidence", "It is.")
    write_report(path, found, name="run", facts={"seed": "0"}, group=group, **more)
    text = path.read_text(encoding="utf-8")
    return Page(text), text


def flat(parsed):
    return " ".join(" ".join(parsed.text).split()).replace("\N{NO-BREAK SPACE}", " ")


@pytest.mark.parametrize(
    ("turned", "known", "images", "channels"),
    [
        (C4, C4, 12, 1),
        (ea.groups.Cyclic(16), C8, 12, 3),
        (D4, C4, 12, 13),
        (ea.groups.Dihedral(16), ea.groups.Dihedral(16), 5, 2),
        (ea.groups.Cyclic(2), ea.groups.Cyclic(2), 1, 1),
        (ea.groups.Dihedral(1), ea.groups.Dihedral(1), 3, 1),
    ],
    ids=str,
)
def test_the_page_has_every_section_and_needs_nothing_else(
    turned, known, images, channels, tmp_path
):
    found = findings(turned, known, images)
    if images == 1:  # its pose is wrong, so that every section has something
        found.outcomes["adapted"].pose_right[:] = False
    parsed, text = page(tmp_path / "report.html", found, known, channels, history=HISTORY)
    one_class = len(set(found.outcomes["vanilla"].label)) == 1
    assert parsed.headings == [h for h in ALL if not (one_class and h.startswith("Classes"))]
    assert not re.search(r"https?:|//|@import|url\(", re.sub(r'src="data:[^"]*"', "", text))
    names = {name for name, _ in parsed.tags}
    assert not names & {"script", "link", "iframe", "object"}
    sources = [given["src"] for name, given in parsed.tags if name == "img"]
    assert len(sources) >= 2
    for uri in sources:
        start, _, data = uri.partition(",")
        assert start == "data:image/png;base64"
        with Image.open(io.BytesIO(base64.b64decode(data))) as shown:
            assert shown.size == (8, 8)
            assert shown.mode == ("RGB" if channels == 3 else "L")
    identifiers = [given["id"] for _, given in parsed.tags if "id" in given]
    assert len(identifiers) == len(set(identifiers))
    assert all(given.get("alt") for name, given in parsed.tags if name == "img")
    assert all(given.get("aria-label") for name, given in parsed.tags if name == "svg")
    assert "nan" not in flat(parsed)


def test_what_there_is_no_data_for_is_left_out(tmp_path):
    found = findings(C4, C4, sweep=False)
    parsed, _ = page(tmp_path / "report.html", found, C4, prior=None, evidence="")
    assert parsed.headings == [
        "Figures", "Classes", "Canonicalized images", "Most confidently wrong poses", "Calibration",
        "Classes that are turned", "What was run",
    ]  # fmt: skip
    parsed, _ = page(tmp_path / "report.html", findings(C4))
    assert parsed.headings == [
        "Figures", "Classes", "Accuracy against angle", "Most confidently broken images",
        "Calibration", "What was run",
    ]  # fmt: skip
    assert "adapted" not in flat(parsed)
    upright, _ = page(tmp_path / "report.html", findings(ea.groups.Cyclic(1), sweep=False))
    assert upright.headings == ["Figures", "Classes", "Calibration", "What was run"]


def test_every_section_says_how_to_read_it(tmp_path):
    parsed, _ = page(tmp_path / "report.html", findings(C4, C4), C4, history=HISTORY)
    explained = [
        given for name, given in parsed.tags if name == "p" and given.get("class") == "how"
    ]
    assert len(explained) == len(parsed.headings) == len(ALL)


def test_the_title_is_the_heading_and_a_caveat_comes_before_the_verdict(tmp_path):
    found = findings(C4, C4)
    _, text = page(tmp_path / "report.html", found, C4, caveat="Not <yet>.")
    assert re.search(r"<title>(.*)</title>", text)[1] == "run under quarter turns"
    assert re.search(r"<h1>(.*)</h1>", text)[1] == "run under quarter turns"
    assert '<p class="verdict"><strong>Not &lt;yet&gt;.</strong> Under quarter turns' in text
    _, text = page(tmp_path / "report.html", found, C4)
    assert '<p class="verdict">Under quarter turns' in text


def test_a_command_breaks_between_its_arguments_only(tmp_path):
    command = "python eval.py --workdir=a-b --data_dir='with space'"
    write_report(tmp_path / "report.html", findings(C4), name="run",
                 facts={"evaluation command": command})  # fmt: skip
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    code = re.search(r"<code>(<span>.*?)</code>", text)[1]
    assert "<span>--workdir=a-b</span> " in code
    assert html.unescape(re.sub(r"<.*?>", "", code)).strip() == command
    assert "dd code span { display: inline-block" in text


def test_names_are_text_and_not_markup(tmp_path):
    classes = ("<script>alert(1)</script>", 'q" onload="x', "日本語 & ñ")
    images, known = source(12, 1), C4
    found = findings(C4, known, classes=classes)
    write_report(
        tmp_path / "report.html", found, name="</title><b>", group=known, prior=np.eye(4)[0],
        pictures=picture(found, images, first_images(found, 16), known),
        facts={"evaluation command": "python <eval> & 'x'"}, settings={"a": {"b": "<i>"}},
    )  # fmt: skip
    parsed = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    names = {name for name, _ in parsed.tags}
    assert not names & {"script", "eval"}
    assert not any("onload" in given for _, given in parsed.tags)
    text = flat(parsed)
    for name in (*classes, "python <eval> & 'x'", "</title><b>", "<i>"):
        assert name in text


def test_of_many_classes_the_worst_come_first_and_the_rest_is_folded(tmp_path):
    classes = tuple(f"class{i}" for i in range(1000))
    found = findings(C4, C4, images=3000, classes=classes, sweep=False)
    _, text = page(tmp_path / "report.html", found, C4)
    table, folded = text.split("<h2>Classes</h2>")[1].split("</section>")[0].split("<details>")
    shown = {part: re.findall(r'scope="row">(class\d+)<', rows) for part, rows in
             (("table", table), ("folded", folded))}  # fmt: skip
    label = found.outcomes["adapted"].label
    accuracy = {
        classes[i]: (found.outcomes["adapted"].prediction[label == i] == i).mean()
        for i in np.unique(label)
    }
    assert len(shown["table"]) == 20
    assert f"The other {len(accuracy) - 20} classes" in folded
    order = [accuracy[name] for name in shown["table"] + shown["folded"]]
    assert order == sorted(accuracy.values())


def test_the_classes_that_are_turned_most_come_first(tmp_path):
    found = findings(C4, C4, images=60)
    _, text = page(tmp_path / "report.html", found, C4)
    table = text.split("<h2>Classes that are turned</h2>")[1].split("</section>")[0]
    shown = re.findall(r'scope="row">(\w)</th><td>(\d+)</td>', table)
    outcome = found.outcomes["adapted"]
    rates, counts, wrong = {}, {}, {}
    for i, name in enumerate("abc"):
        poses = list(outcome.pose[outcome.label == i, 0])
        rates[name], counts[name] = np.mean([p == 0 for p in poses]), str(len(poses))
        wrong[name] = f"{90 * max((1, 2, 3), key=poses.count)}°"
        assert found.metrics[f"adapted/class/{name}/identity_rate"] == pytest.approx(rates[name])
    assert [(name, counts[name]) for name in sorted(rates, key=rates.get)] == shown
    assert re.findall(r"<td>(\d+°)</td>", table) == [wrong[name] for name, _ in shown]


def test_the_table_has_the_figures_of_metrics_json(tmp_path):
    found = findings(C4, C4)
    parsed, _ = page(tmp_path / "report.html", found, C4)
    text, metrics = flat(parsed), found.metrics
    for turn in (90, 180, 270):
        one, other = (metrics[f"{m}/accuracy/r{turn}"] for m in ("vanilla", "adapted"))
        cells = f"{wording.percent(one)} {wording.percent(other)} {wording.points(other - one)}"
        assert f"turned {turn}° {cells}".replace("\N{NO-BREAK SPACE}", " ") in text
    for model in ("vanilla", "adapted"):
        error = f"{100 * metrics[f'{model}/group_calibration_error']:.1f} %"
        assert f"{model} , over cyclic4 calibration error {error}" in text


def test_images_per_bin_stand_in_the_reliability_diagram(tmp_path):
    found = findings(C4)
    _, text = page(tmp_path / "report.html", found)
    diagrams = re.findall(r"<svg[^>]*Reliability.*?</svg>", text, re.S)
    assert len(diagrams) == 2
    for diagram, turns in zip(diagrams, (slice(0, 1), slice(None)), strict=True):
        confidence = found.outcomes["vanilla"].confidence[:, turns]
        counts = np.bincount(np.ceil(confidence * 15).astype(int).ravel())
        written = [int(n) for n in re.findall(r'text-anchor="end">(\d+)</text>', diagram)]
        assert written == [n for n in counts if n]


def test_the_surest_wrong_poses_are_chosen():
    found = findings(D4, C4, images=30)
    adapted = found.outcomes["adapted"]
    candidates = {}
    for i in range(30):
        for g in range(4):  # a group without mirrors can not be right on mirrored images
            if not adapted.pose_right[i, g]:
                probability = adapted.pose_probability[i, g]
                candidates[i] = max(candidates.get(i, (0, 0)), (probability, g))
    best = sorted(candidates, key=lambda i: -candidates[i][0])[:12]
    assert wrong_poses(found, 12, C4) == [(i, candidates[i][1]) for i in best]
    adapted.pose_right[:] = True
    assert wrong_poses(found, 12, C4) == []


def test_broken_images_are_right_upright_and_surely_wrong_when_turned():
    found = findings(C4, images=30)
    vanilla = found.outcomes["vanilla"]
    chosen = broken_images(found, 5)
    assert len(chosen) == len({image for image, _ in chosen}) == 5
    sure = [vanilla.confidence[at] for at in chosen]
    assert sure == sorted(sure, reverse=True)
    for image, turn in chosen:
        assert vanilla.prediction[image, 0] == vanilla.label[image]
        assert vanilla.prediction[image, turn] != vanilla.label[image]
    others = vanilla.right[:, :1] & ~vanilla.right
    others[[image for image, _ in chosen]] = False
    assert sure[-1] >= vanilla.confidence[others].max()


def test_pictures_show_what_was_evaluated():
    found, images = findings(C4, C4), source(12, 3)
    shown = picture(found, images, [(3, 1), (5, 2)], C4)
    for i, (image, turn) in enumerate([(3, 1), (5, 2)]):
        pixels = images.source[image]["image"] / np.float32(255)
        np.testing.assert_array_equal(shown.upright[i], pixels)
        np.testing.assert_array_equal(shown.turned[i], np.rot90(pixels, turn))
        pose = int(found.outcomes["adapted"].pose[image, turn])
        np.testing.assert_array_equal(shown.canonical[i], np.rot90(pixels, turn - pose))
    assert picture(found, images, [], C4) is None


def test_a_report_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    page(path, findings(C4))
    before = path.read_text()
    replace = type(path).replace
    monkeypatch.setattr(type(path), "replace", lambda *paths: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        page(path, findings(C4, C4), C4)
    monkeypatch.setattr(type(path), "replace", replace)
    assert path.read_text() == before
    assert list(tmp_path.iterdir()) == [path]


def test_what_an_earlier_evaluation_left_is_not_mixed_in(tmp_path):
    given = {"name": "run", "facts": {}}
    leave(tmp_path, findings(C4, C4), source(12, 1), group=C4, prior=np.eye(4)[0], **given)
    (tmp_path / "notes.txt").write_text("mine")
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"per_image.csv", "report.html", "accuracy_against_angle.png", "notes.txt",
                     "canonicalization.png", "pose_histogram.png"}  # fmt: skip
    leave(tmp_path, findings(C4, sweep=False), source(12, 1), **given)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"per_image.csv", "report.html", "notes.txt"}


def test_per_image_has_the_probability_of_the_pose(tmp_path):
    found = findings(C4, C4)
    write_per_image(tmp_path / "a.csv", found.outcomes, ("a", "é,", "c"), C4)
    lines = (tmp_path / "a.csv").read_text(encoding="utf-8").splitlines()
    assert lines[0] == ("image,turn,label,vanilla,vanilla_confidence,adapted,adapted_confidence,"
                        "pose,pose_right,pose_probability")  # fmt: skip
    assert len(lines) == 1 + 12 * 4
    adapted = found.outcomes["adapted"]
    probabilities = [float(line.rpartition(",")[2]) for line in lines[1:]]
    np.testing.assert_allclose(probabilities, adapted.pose_probability.ravel(), atol=1e-6)


def with_predictions(found, model, right):
    """The same findings with these `right` (N, E), of images of class 0 among three."""
    old = found.outcomes[model]
    object.__setattr__(old, "label", np.zeros(len(right), int))
    object.__setattr__(old, "prediction", np.where(right, 0, 1))
    metrics = {f"{model}/{k}": v for k, v in all_figures(old, found.classes).items()}
    return Findings(
        found.turns, found.classes, found.outcomes, {}, {}, {**found.metrics, **metrics}
    )


def test_the_verdict_has_the_numbers():
    found = findings(C4, C4, images=10)
    falls = np.zeros((10, 4), bool)
    falls[:9, 0] = falls[:2, 1:] = falls[2, 3] = True
    found = with_predictions(found, "vanilla", falls)
    found = with_predictions(found, "adapted", np.arange(10)[:, None].repeat(4, 1) < 8)
    text = wording.verdict(found, C4).replace("\N{NO-BREAK SPACE}", " ")
    assert text == (
        "Under quarter turns, the vanilla predictor falls from 90.0 % upright to 40.0 % on average "
        "(20.0 % at its worst, turned 90°). The adapted model is right on 80.0 % in every pose of "
        "cyclic4; under an exact element of its group no prediction changes. "
        "Upright, that is 10.0 points less than before adaptation."
    )
    metrics = {"adapted/random_accuracy": 0.5, "vanilla/random_accuracy": 0.25}
    at_random = dataclasses.replace(found, metrics={**found.metrics, **metrics})
    assert wording.verdict(at_random, C4).replace("\N{NO-BREAK SPACE}", " ") == (
        f"{text} At random angles it is right on 50.0 %, the vanilla predictor on 25.0 %."
    )


def test_of_a_checkpoint_is_told_what_must_be_known():
    assert wording.about_the_checkpoint(200, 400, 400) == (
        "step 200 of 400; vanilla is step 0", ""
    )  # fmt: skip
    fact, caveat = wording.about_the_checkpoint(100, 120, 400)
    assert fact == "step 100 of 400, unfinished; vanilla is step 0"
    assert caveat == "This run is unfinished: its latest checkpoint is step 120 of 400."
    _, untrained = wording.about_the_checkpoint(0, 400, 400)
    assert untrained.startswith("Its best checkpoint is step 0, before any training of its own: ")
    fact, both = wording.about_the_checkpoint(0, 120, 400)
    assert fact == "step 0 of 400, unfinished; vanilla is step 0"
    assert both == f"{caveat} {untrained}"


def test_the_verdict_of_a_model_that_is_not_invariant():
    turned = findings(C8, C4, images=10)
    right = np.ones((10, 8), bool)
    right[:3, 1::2] = False  # at odd multiples of 45°, which C4 does not know
    found = with_predictions(turned, "adapted", right)
    text = wording.verdict(found, C4).replace("\N{NO-BREAK SPACE}", " ")
    assert (
        "The adapted model is right on 85.0 % on average, between 70.0 % and 100 % by the pose; "
        "under an exact element of its group no prediction changes, over all turns 17.1 %."
    ) in text
    right[0, 2] = False
    text = wording.verdict(with_predictions(turned, "adapted", right), C4)
    assert "exact element of its group 3.3\N{NO-BREAK SPACE}% of its predictions change" in text


@pytest.mark.parametrize(("right", "warned"), [(36, True), (90, False)])
def test_a_model_that_guesses_is_not_praised(right, warned):
    turned = findings(C4, C4, images=100)
    told = np.zeros((100, 4), bool)
    told[:right] = True
    for model in ("vanilla", "adapted"):
        turned = with_predictions(turned, model, told)
    assert ("hardly better than guessing" in wording.verdict(turned, C4)) == warned


@pytest.mark.parametrize(
    ("upright", "turned", "answer"),
    [
        (90, 40, "If images come turned like this, you need adaptation:"),
        (90, 90, "You do not need adaptation to such turns:"),
        (90, 87, "Adaptation may be worth it if images come turned like this:"),
        (34, 30, "Upright it hardly does better than guessing, so look first"),
    ],
)
def test_the_answer_to_do_i_need_this(upright, turned, answer):
    right = np.zeros((100, 4), bool)
    right[:upright, 0] = right[:turned, 1:] = True
    text = wording.verdict(with_predictions(findings(C4, images=100), "vanilla", right), None)
    assert text.startswith(answer)
    plain = text.replace("\N{NO-BREAK SPACE}", " ")
    mean = (upright + 3 * turned) / 4
    changed = upright - turned
    assert f"right on {upright}.0 % upright and on {mean:.1f} % on average" in plain
    assert f"{f'{changed}.0' if changed else '0'} % of its predictions change" in plain


def test_shares_that_are_not_exact_do_not_look_so():
    shown = [wording.percent(x).replace("\N{NO-BREAK SPACE}", " ")
             for x in (0, 1e-5, 0.0126, 0.99999, 1, 1.25, None, np.nan)]  # fmt: skip
    assert shown == ["0 %", "<0.1 %", "1.3 %", ">99.9 %", "100 %", "125.0 %", "–", "–"]
    assert [wording.points(x) for x in (0.1234, -0.5, 1e-6, -1e-6)] == [
        "+12.3",
        "−50.0",
        "0.0",
        "0.0",
    ]
