"""The benchmark of all ways of choosing among poses: figures by hand, a run, the cache."""

import dataclasses
import io
import sys
import tarfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from benchmarks import continuity
from benchmarks.accuracy import choices
from equiadapt_jax.groups import Cyclic
from equiadapt_jax.training import run

SIZE = 24


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Path:
    """What the benchmarks read: ten images of one channel's worth, two classes."""
    root = tmp_path_factory.mktemp("shared")
    (root / "data" / "cifar10_jpeg").mkdir(parents=True)
    rng = np.random.default_rng(0)
    with tarfile.open(root / "data" / "cifar10_jpeg" / "test.tar", "w") as tar:
        for i in range(10):
            file = io.BytesIO()
            pixels = rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(file, "PNG")
            member = tarfile.TarInfo(f"test/{'above' if i % 2 else 'below'}/{i}.png")
            member.size = len(file.getvalue())
            tar.addfile(member, io.BytesIO(file.getvalue()))
    return root


@pytest.fixture(scope="module", params=["group_conv", "features"])
def workdir(request, tiny, tmp_path_factory) -> Path:
    """A tiny run on colour images, whose scorer reads images or features."""
    config = tiny("image_folder", mode="frozen")
    if request.param == "features":
        scorer = dataclasses.replace(config.scorer, options={"hidden": 4})
        config = dataclasses.replace(config, canonicalizer="features", scorer=scorer)
    workdir = tmp_path_factory.mktemp("runs") / request.param
    run.train(config, workdir)
    return workdir


def call(monkeypatch, module, *arguments):
    monkeypatch.setattr(sys, "argv", ["benchmark", *map(str, arguments)])
    module.main()


def test_a_run_is_tabulated_and_what_was_seen_is_kept(
    shared, workdir, tmp_path, monkeypatch, capsys
):
    arguments = (shared, f"--workdir={workdir}", f"--cache={tmp_path}", "--batch=4")
    call(monkeypatch, choices, *arguments)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 13
    rows = {cells[1]: cells[2:-1] for cells in ([c.strip() for c in x.split("|")] for x in lines)}
    order = 4
    reads = workdir.name == "features"
    assert rows["vanilla"][-2:] == ["1", "1"]
    assert rows["group average"][-2:] == ["4", "4"]
    assert rows["top-2"][-2:] == ["4" if reads else "2", "2"]
    exact = ("single pose", "top-2", "weighted frame", "most confident pose", "2 sampled poses")
    for name in exact:  # over C4 as upright, and nothing changed
        assert rows[name][0] == rows[name][1]
        assert rows[name][4] == "0.0"
    kept = sorted(tmp_path.glob("*-random.npz"))
    assert len(kept) == 1
    with np.load(kept[0]) as file:
        assert file["predictions"].shape == (10, order, 2)
        assert file["scores"].shape == (10, order)
    call(monkeypatch, choices, *arguments)
    again = capsys.readouterr()
    assert again.out.splitlines() == lines
    assert "Predicting" not in again.err


def test_choices_are_those_of_loops():
    rng = np.random.default_rng(0)
    scores, y = rng.normal(size=(6, 4)), rng.normal(size=(6, 4, 3))
    group, arrays = Cyclic(4), (jnp.asarray(scores), jnp.asarray(y))
    made = {n: c(group, *arrays) for n, (_, _, c) in choices.choices(4, 0.5).items()}
    p = np.exp(y) / np.exp(y).sum(-1, keepdims=True)
    odds = np.log(p.max(-1) / (1 - p.max(-1)))
    for i in range(6):
        order = np.argsort(-scores[i])
        weights = np.exp(scores[i])
        two = weights[order[:2]] / weights[order[:2]].sum()
        gated = odds[i] + [0.5, 0, 0, 0]
        expected = {
            "vanilla": y[i, 0],
            "group average": y[i].mean(0),
            "most confident pose": y[i, odds[i].argmax()],
            "most confident pose, gate of 0.5": y[i, gated.argmax()],
            "single pose": y[i, order[0]],
            "top-2": two @ y[i, order[:2]],
            "weighted frame": weights / weights.sum() @ y[i],
        }
        for name, value in expected.items():
            np.testing.assert_allclose(made[name][0][i], value, atol=1e-5, err_msg=name)
    np.testing.assert_array_equal(made["single pose"][1], scores.argmax(1))


def test_what_jumps_is_measured_and_plotted(shared, workdir, tmp_path, monkeypatch, capsys):
    picture = tmp_path / "continuity.png"
    call(
        monkeypatch, continuity, shared, f"--workdir={workdir}", "--images=2", "--step=30",
        "--batch=5", f"--output={picture}",
    )  # fmt: skip
    out = capsys.readouterr().out
    assert "| weighted frame | " in out
    with Image.open(picture) as image:
        assert image.size[0] > 100
    assert continuity.largest_step(np.array([0.0, 0.1, 0.5])) == (2, 0.5)  # around the circle
    with pytest.raises(SystemExit, match="--shown=3 is none of the 2 images"):
        call(monkeypatch, continuity, shared, f"--workdir={workdir}", "--images=2", "--shown=3")


def test_a_jump_stays_and_a_slope_goes_when_the_step_is_halved():
    def look(pixels, label, degrees):
        slope = np.cos(np.radians(degrees))
        return {
            "single pose": slope / 10 + ((degrees > 41.3) & (degrees < 200)),
            "weighted frame": slope,
        }

    degrees = np.arange(0, 360, 10.0)
    curves = look(None, 0, degrees)
    left = continuity.narrowed(look, None, 0, degrees, curves)
    assert left["weighted frame"] < 2e-4
    assert left["single pose"] == pytest.approx(1, abs=1e-3)


def test_what_is_missing_is_told(shared, tmp_path, monkeypatch):
    for module in (choices, continuity):
        with pytest.raises(SystemExit, match="absent"):
            call(monkeypatch, module, shared, f"--workdir={tmp_path / 'absent'}")
