"""The speed benchmark: ratios of interleaved rounds, what is written, what is missing."""

import functools
import json
import sys

import jax
import numpy as np
import pytest

from benchmarks.speed import canonicalization, results, timing, warp
from benchmarks.speed import run as speed
from benchmarks.speed.reference import Reference
from benchmarks.speed.results import Comparison
from benchmarks.speed.settings import Settings
from equiadapt_jax.groups import Cyclic
from equiadapt_jax.training.config import Config
from tests.tiny_runs import ROOT, shipped

FLOORS = timing.Floors(bytes_per_second=1e9, operations_per_second=1e10)


def compared(**changes):
    seconds = {"ours": [1.0, 2.0, 9.0], "fast": [2.0, 4.0, 3.0], "slow": [8.0, 8.0, 8.0]}
    return Comparison(**({"part": "warp", "what": "turns", "seconds": seconds} | changes))


def settings(**changes):
    made = {"rounds": 2, "small": True, "batch": 2, "dtype": "float32", "floors": FLOORS}
    return Settings(
        **(made | {"reference": None, "working": None, "scorers": {}, "missing": {}} | changes)
    )


def test_the_ratio_is_the_median_over_rounds_to_the_fastest_other():
    assert compared().other == "fast"
    assert compared().ratio == 0.5  # of 0.5, 0.5 and 3
    assert compared(against="slow").ratio == 0.25
    assert compared(ours="slow", against="ours").ratio == 4.0
    alone = compared(seconds={"ours": [1.0]})
    assert alone.other is None
    assert alone.ratio is None
    assert compared(against="absent").ratio is None


def test_cases_take_turns_and_each_begins():
    order = []

    def case(name, seconds):
        order.append(name)
        return seconds

    told = {"a": 0.0, "b": 0.1, "c": 1.0}  # a and b are brief and run once more, untimed
    cases = {name: functools.partial(case, name, told[name]) for name in told}
    seconds = timing.interleaved(cases, 4)
    assert "".join(order) == "abc" + "abc" + "aabbc" + "bbcaa" + "caabb" + "aabbc"
    assert seconds == {name: [told[name]] * 4 for name in told}


def test_seconds_that_are_told_are_taken():
    assert timing.interleaved({"there": lambda: 0.25}, 3) == {"there": [0.25] * 3}


def test_floors_are_what_is_moved_and_computed_at_the_measured_rates():
    assert FLOORS.moving(5e8) == 0.5
    assert FLOORS.computing(5e9) == 0.5
    measured = timing.floors(small=True)
    assert measured.bytes_per_second > 0
    assert measured.operations_per_second > 0


def test_the_table_puts_ratios_first():
    told = results.table([compared(floor=0.5), compared(what="other", seconds={"ours": [1.0]})])
    assert "| turns | 0.5 | ours | fast | 500 | ours 2,000 (1,500–5,500); fast" in told
    assert "| other | – | ours | – | – | ours 1,000" in told
    costs = results.costs_table([compared(costs={"ours": {"compile_seconds": 1.5, "bytes": 2e6}})])
    assert "| turns | ours | 1.50 | 2.0 | – |" in costs
    trained = {"bytes": 2e6, "pose_accuracy": 0.614}
    costs = results.costs_table([compared(costs={"ours": trained})])
    assert "| turns | ours | – | 2.0 | 61.4 |" in costs


def test_only_ratios_that_grew_are_named(tmp_path):
    stored = tmp_path / "speed.json"
    faster_machine = {name: [s / 10 for s in v] for name, v in compared().seconds.items()}
    stored.write_text(
        json.dumps({"comparisons": results.as_json([compared(seconds=faster_machine)])})
    )
    assert results.slower(results.as_json([compared()]), stored, 1.25) == []
    seconds = {**compared().seconds, "ours": [1.4, 2.8, 9.0]}
    (sentence,) = results.slower(results.as_json([compared(seconds=seconds)]), stored, 1.25)
    assert sentence.startswith("turns: ours took 0.7 times fast, and 0.5 times in")
    assert results.slower(results.as_json([compared(what="new")]), stored, 1.25) == []
    assert results.slower(results.as_json([compared(seconds=seconds)]), stored, 1.5) == []


def test_what_a_check_does_not_hold_is_told(tmp_path):
    stored = tmp_path / "speed.json"
    others = [compared(what="more"), compared(what="none", seconds={"ours": [1.0]})]
    elsewhere = compared(part="training", what="a step")
    comparisons = results.as_json([compared(), *others, elsewhere])
    stored.write_text(json.dumps({"comparisons": comparisons}))
    assert results.unmeasured(results.as_json([compared()]), stored, ["warp"]) == ["more"]
    assert results.unmeasured(comparisons, stored, ["warp", "training"]) == []


def test_a_plot_is_drawn(tmp_path):
    results.plot([compared(), compared(what="alone", seconds={"ours": [1.0]})], tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 1000


def test_a_reference_that_cannot_start_is_told(capfd):
    reference = Reference(sys.executable)  # where equiadapt is not installed
    with pytest.raises(RuntimeError, match="failed at make: its process ended"):
        reference.case("canonicalization", batch=1)
    reference.close()
    assert "No module named" in capfd.readouterr().err


class Fake:
    """A reference that takes as many seconds as it resizes to pixels, and fails with 7."""

    def __init__(self):
        self.forgotten = 0

    def case(self, what, *, working, **_):
        if working == 7:
            raise RuntimeError("7 is too small")
        return lambda: float(working), {"bytes": working}

    def forget(self):
        self.forgotten += 1


def test_ours_is_timed_once_beside_equiadapt_at_every_size(monkeypatch):
    monkeypatch.setattr(canonicalization, "GROUPS", {"C4": canonicalization.GROUPS["C4"]})
    made = settings(reference=Fake(), working=(32, 7, 96))
    alone, at_32, at_96, _ = canonicalization.measure(made)
    assert at_96.what == ("canonicalization, C4, 2 images of 32 pixels, ours sees 56, equiadapt 96")
    assert at_96.seconds["equiadapt"] == [96.0, 96.0]
    assert at_32.seconds["equiadapt"] == [32.0, 32.0]
    assert at_32.seconds["ours"] == at_96.seconds["ours"] == alone.seconds["ours"]
    assert at_96.costs == {"equiadapt": {"bytes": 96}}
    assert alone.other is None
    assert made.missing == {"equiadapt for C4 at 7 pixels": "7 is too small"}
    assert made.reference.forgotten == 1
    (alone, _) = canonicalization.measure(settings(working=(32,)))
    assert alone.what == "canonicalization, C4, 2 images of 32 pixels, ours sees 56"


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--working", "32"], "give its --reference as well"),
        (["--reference=python", "--working", "32", "32"], "give different sizes"),
        (["--reference=python", "--working", "0"], "of at least one pixel"),
    ],
)
def test_sizes_that_mean_nothing_are_refused(flags, sentence, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["run", *flags])
    with pytest.raises(SystemExit):
        speed.arguments()
    assert sentence in capsys.readouterr().err


def test_peers_must_turn_as_ours_does():
    x = np.random.default_rng(0).uniform(size=(2, 16, 16, 3)).astype(np.float32)
    quarters = np.array([1, 3], np.int32)
    turned = np.stack([np.rot90(x[0]), np.rot90(x[1], 3)])
    warp.agree(turned, x, quarters)
    with pytest.raises(RuntimeError, match="turns the images otherwise"):
        warp.agree(turned[:, ::-1], x, quarters)


def test_every_group_of_ours_is_compiled_at_small_sizes():
    for group, _ in canonicalization.GROUPS.values():
        function, params, _, accuracy = canonicalization.canonicalize(settings(), group)
        assert accuracy is None
        x = np.zeros((1, 32, 32, 3), np.float32)
        inputs, _ = jax.eval_shape(function, params, x)
        assert inputs.shape == x.shape


def test_the_scorer_is_that_of_a_configuration_that_trains_it():
    config = shipped(ROOT / "configs" / "cifar10_resnet20.py", "light")
    assert dict(config.scorer.options) == canonicalization.SCORER


@pytest.mark.parametrize("canonicalizer", ["features", "group_conv"])
def test_runs_of_other_scorers_are_refused(canonicalizer, monkeypatch):
    config = Config(group="cyclic8", canonicalizer=canonicalizer)
    monkeypatch.setattr(speed, "read_config", lambda _: (config, None))
    if canonicalizer == "group_conv":
        assert speed.trained_for("run") == str(Cyclic(8))
    else:
        with pytest.raises(SystemExit, match="The scorer of run is features: give --scorers"):
            speed.trained_for("run")


def test_what_is_missing_is_noted():
    made = settings()
    assert not made.installed("no_such_package")
    assert made.missing == {"no_such_package": "not installed"}
