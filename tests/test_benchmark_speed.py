"""The speed benchmark: ratios of interleaved rounds, what is written, what is missing."""

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
        **(made | {"reference": None, "working": (32,), "scorers": {}, "missing": {}} | changes)
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
    cases = {name: lambda name=name: order.append(name) for name in "abc"}
    seconds = timing.interleaved(cases, 4)
    assert "".join(order) == "abc" + "abc" + "bca" + "cab" + "abc"
    assert {name: len(found) for name, found in seconds.items()} == dict.fromkeys("abc", 4)


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


def test_a_plot_is_drawn(tmp_path):
    results.plot([compared(), compared(what="alone", seconds={"ours": [1.0]})], tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 1000


def test_a_reference_that_cannot_start_is_told(capfd):
    reference = Reference(sys.executable)  # where equiadapt is not installed
    with pytest.raises(RuntimeError, match="failed at make: its process ended"):
        reference.case("canonicalization", batch=1)
    reference.close()
    assert "No module named" in capfd.readouterr().err


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
