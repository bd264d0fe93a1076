"""Checkpoints: what is kept, what is believed, and what is said of damage."""

import contextlib
import errno
import hashlib
import json
import os
import resource
import shutil
import warnings
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from equiadapt_jax.training import digests
from equiadapt_jax.training.checkpoints import Checkpoints
from equiadapt_jax.training.digests import DamagedCheckpoint
from equiadapt_jax.training.step import TrainState, create_state

OPTIMIZER = optax.adamw(1e-3)


def a_state(step: int) -> TrainState:
    """A state of its own for every step."""
    rng = np.random.default_rng(step)
    params = {
        "scorer": {"kernel": rng.normal(size=(3, 4)).astype(np.float32), "none": {}},
        "predictor": {
            "half": jnp.asarray(rng.normal(size=5), jnp.bfloat16),
            "scalar": np.int32(step),
        },
    }
    state = create_state(
        jax.tree.map(jnp.asarray, params), {"scorer": {}, "predictor": {}}, OPTIMIZER, ["scorer"]
    )
    return state._replace(step=jax.device_put(np.int32(step), state.step.sharding))


def some_batches():
    return iter(grain.MapDataset.range(1000).seed(0).shuffle().to_iter_dataset())


def model_of(state):
    return state.params, state.state


def leaves(tree):
    return [np.asarray(x) for x in jax.tree.leaves(tree)]


def assert_same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(leaves(one), leaves(other), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def save(directory: Path, figures: dict[int, float | None], fingerprint: str = "mark") -> None:
    """Checkpoints of these steps with these `best_by`; None for one that was not validated."""
    checkpoints = Checkpoints(directory, fingerprint, create=True)
    for step, best_by in figures.items():
        checkpoints.save(
            a_state(step),
            some_batches(),
            {"seconds": 1.0} if best_by is None else {"best_by": best_by},
        )
    checkpoints.close()


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """Steps 0, 10, 20, 30, of which 20 is the best."""
    directory = tmp_path_factory.mktemp("checkpoints") / "whole"
    save(directory, {0: 0.1, 10: 0.2, 20: 0.9, 30: 0.5})
    return directory


def copied(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def test_states_come_back_to_the_bit_with_the_position_in_the_data(tmp_path):
    batches = some_batches()
    checkpoints = Checkpoints(tmp_path, "mark", create=True)
    seen = [next(batches) for _ in range(7)]
    state = a_state(7)
    expected = jax.tree.map(np.array, state)
    checkpoints.save(state, batches, {"best_by": 0.5, "train/loss": 1.25})
    seen += [next(batches) for _ in range(5)]  # goes on while it is being written
    checkpoints.close()
    again = some_batches()
    restored = Checkpoints(tmp_path, "mark").restore(a_state(1), again)
    assert_same(restored, expected)
    assert [next(again) for _ in range(5)] == seen[7:]
    assert Checkpoints(tmp_path, "mark").figures(7) == {"best_by": 0.5, "train/loss": 1.25}


def test_saving_copies_what_the_next_step_overwrites(tmp_path):
    checkpoints = Checkpoints(tmp_path, "mark", create=True)
    state = a_state(3)
    expected = jax.tree.map(np.array, state)
    checkpoints.save(state, some_batches(), {"best_by": 0.0})
    jax.jit(lambda s: jax.tree.map(lambda x: x * 0, s), donate_argnums=0)(state)
    checkpoints.close()
    assert_same(Checkpoints(tmp_path, "mark").restore(a_state(1), some_batches()), expected)


@pytest.mark.parametrize(
    ("figures", "kept"),
    [
        ({0: 0.1}, [0]),
        ({0: 0.1, 1: 0.2, 2: 0.3, 3: 0.4}, [0, 2, 3]),
        ({0: 0.1, 1: 0.9, 2: 0.3, 3: 0.4, 4: 0.4}, [0, 1, 3, 4]),
        ({0: 0.9, 1: 0.1, 2: 0.3, 3: 0.4}, [0, 2, 3]),
        ({0: 0.1, 1: 0.5, 2: 0.5, 3: 0.1, 4: 0.1, 5: 0.1}, [0, 2, 4, 5]),  # the later of equals
        ({0: 0.1, 1: 0.5, 2: None}, [0, 1, 2]),
        ({0: 0.1, 1: 0.5, 2: None, 3: 0.2}, [0, 1, 3]),  # a stop between validations leaves nothing
        ({0: 0.1, 1: 0.5, 2: 0.4, 3: None, 4: None}, [0, 1, 2, 4]),
    ],
)
def test_the_first_the_best_and_the_two_latest_are_kept(figures, kept, tmp_path):
    save(tmp_path, figures)
    assert Checkpoints(tmp_path, "mark").steps() == kept
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(map(str, kept))


def test_a_step_saved_again_replaces_the_first(tmp_path):
    save(tmp_path, {0: 0.1, 5: None})
    save(tmp_path, {5: 0.7})
    checkpoints = Checkpoints(tmp_path, "mark")
    assert checkpoints.figures(5) == {"best_by": 0.7}
    assert checkpoints.best_steps() == [5, 0]


def test_what_was_half_written_is_never_taken_for_a_step(whole, tmp_path):
    directory = copied(whole, tmp_path)
    shutil.copytree(directory / "30", directory / "40.unfinished")
    shutil.copytree(directory / "30", directory / "50.unfinished.orbax-checkpoint-tmp")
    shutil.copytree(directory / "30", directory / "10.removed")
    (directory / "60.unfinished").write_text("a file")
    (directory / "007").mkdir()
    assert Checkpoints(directory, "mark").steps() == [0, 20, 30]
    assert (directory / "40.unfinished").exists()  # reading removes nothing
    assert Checkpoints(directory, "mark", create=True).steps() == [0, 20, 30]
    assert sorted(path.name for path in directory.iterdir()) == ["0", "007", "20", "30"]


def test_a_step_that_was_being_replaced_is_put_back(whole, tmp_path):
    directory = copied(whole, tmp_path)
    (directory / "30").rename(directory / "30.replaced")  # killed before the new one had its name
    shutil.copytree(directory / "20", directory / "20.replaced")  # killed after it had
    checkpoints = Checkpoints(directory, "mark", create=True)
    assert checkpoints.steps() == [0, 20, 30]
    assert sorted(path.name for path in directory.iterdir()) == ["0", "20", "30"]
    assert_same(checkpoints.restore(a_state(1), some_batches()), a_state(30))


def test_a_step_that_cannot_be_removed_does_not_end_the_run(tmp_path, monkeypatch):
    remove = shutil.rmtree

    def stubborn(path, ignore_errors=False, **options):
        if not ignore_errors:
            raise OSError(39, "Directory not empty")
        if Path(path).suffix not in (".removed", ".replaced"):
            remove(path, ignore_errors=True, **options)

    monkeypatch.setattr(shutil, "rmtree", stubborn)
    save(tmp_path, {0: 0.1, 1: 0.2, 2: 0.3, 3: None})
    assert Checkpoints(tmp_path, "mark").steps() == [0, 2, 3]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoints, "_clear", lambda self: None)
        save(tmp_path, {3: 0.4})
    assert Checkpoints(tmp_path, "mark").figures(3) == {"best_by": 0.4}


def test_a_file_that_cannot_be_read_counts_as_damaged(whole, tmp_path):
    directory = copied(whole, tmp_path)
    for name in (digests.RECORD, "data/metadata"):
        path = directory / "30" / name
        path.unlink()
        path.mkdir()  # reading a directory fails like a failing disk does
        with pytest.warns(UserWarning, match=r"cannot be read \(Is a directory\): continuing"):
            restored = Checkpoints(copied(directory, tmp_path / name[:4]), "mark").restore(
                a_state(1), some_batches()
            )
        assert_same(restored, a_state(20))


def test_where_a_file_system_cannot_tell_its_room_saving_goes_on(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    save(tmp_path, {0: 0.1})
    assert Checkpoints(tmp_path, "mark").steps() == [0]


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8 % len(content)] ^= 1 << bit % 8
    path.write_bytes(content)


@settings(max_examples=120)
@given(data=st.data())
def test_every_flipped_bit_is_found(whole, data):
    files = sorted(p for p in (whole / "20").rglob("*") if p.is_file() and p.stat().st_size)
    path = data.draw(st.sampled_from(files))
    bit = data.draw(st.integers(0, 8 * path.stat().st_size - 1))
    good = path.read_bytes()
    flip(path, bit)
    try:
        with pytest.raises(DamagedCheckpoint, match="20"):
            Checkpoints(whole, "mark").restore_model(20, model_of(a_state(0)))
    finally:
        path.write_bytes(good)
    Checkpoints(whole, "mark").restore_model(20, model_of(a_state(0)))


@settings(max_examples=40)
@given(data=st.data())
def test_every_shortened_or_missing_file_is_found(whole, data):
    files = sorted(p for p in (whole / "20").rglob("*") if p.is_file() and p.stat().st_size)
    path = data.draw(st.sampled_from(files))
    length = data.draw(st.integers(-1, path.stat().st_size - 1))
    good = path.read_bytes()
    path.unlink()
    if length >= 0:
        path.write_bytes(good[:length])
    try:
        with pytest.raises(DamagedCheckpoint, match="20"):
            Checkpoints(whole, "mark").restore_model(20, model_of(a_state(0)))
    finally:
        path.write_bytes(good)


def test_swapped_steps_are_found(whole, tmp_path):
    directory = copied(whole, tmp_path)
    (directory / "20").rename(directory / "aside")
    (directory / "30").rename(directory / "20")
    (directory / "aside").rename(directory / "30")
    for step, other in ((20, 30), (30, 20)):
        with pytest.raises(DamagedCheckpoint, match=f"{step} holds the checkpoint of step {other}"):
            Checkpoints(directory, "mark").restore_model(step, model_of(a_state(0)))


def test_leaves_that_orbax_hands_out_changed_are_found(whole, tmp_path):
    """The files are as they were written: the damage came before."""
    directory = copied(whole, tmp_path)
    record = json.loads((directory / "20" / digests.RECORD).read_text())
    del record["digest"]
    path = next(p for p in record["leaves"] if p.endswith("kernel") and p.startswith("model"))
    kind = record["leaves"][path].rpartition(" ")[0]
    record["leaves"][path] = f"{kind} {hashlib.sha256(b'other').hexdigest()}"
    digests.write_record(directory / "20", record)
    with pytest.raises(DamagedCheckpoint, match=rf"{path} in .* is damaged"):
        Checkpoints(directory, "mark").restore_model(20, model_of(a_state(0)))


def test_resuming_falls_back_to_the_step_before_and_says_so(whole, tmp_path):
    directory = copied(whole, tmp_path)
    flip(next((directory / "30" / "optimizer").rglob("_METADATA")), 77)
    with pytest.warns(UserWarning, match=r"_METADATA is damaged: continuing from step 20\."):
        restored = Checkpoints(directory, "mark").restore(a_state(1), some_batches())
    assert_same(restored, a_state(20))
    assert (directory / "30.damaged").is_dir()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Checkpoints(directory, "mark").steps() == [0, 20]


def test_nothing_is_set_aside_where_nothing_can_be_used(whole, tmp_path):
    directory = copied(whole, tmp_path)
    for step in (0, 20, 30):
        (directory / str(step) / digests.RECORD).write_text("{}")
    with pytest.raises(DamagedCheckpoint, match=r"No checkpoint in .* can be used .*: train anew"):
        Checkpoints(directory, "mark").restore(a_state(1), some_batches())
    assert Checkpoints(directory, "mark").steps() == [0, 20, 30]


@pytest.mark.parametrize("name", ["model", digests.RECORD])
def test_loading_falls_back_to_the_next_best_and_says_so(name, whole, tmp_path):
    directory = copied(whole, tmp_path)
    like = model_of(a_state(0))
    step, restored, damaged = Checkpoints(directory, "mark").restore_best(like)
    assert (step, damaged) == (20, "")
    assert_same(restored, model_of(a_state(20)))
    damaged = directory / "20" / name
    flip(damaged if damaged.is_file() else damaged / "_METADATA", 100)
    with pytest.warns(UserWarning, match=r"is damaged.*: step 30 is used instead\."):
        step, restored, damaged = Checkpoints(directory, "mark").restore_best(like)
    assert step == 30
    assert damaged.startswith(str(directory / "20"))
    assert damaged.endswith("step 30 is used instead.")
    assert_same(restored, model_of(a_state(30)))
    shutil.rmtree(directory / "30" / "data")
    with pytest.raises(DamagedCheckpoint, match=r"data/.* is missing, and no other trained step"):
        Checkpoints(directory, "mark").restore_best(like)


def test_a_damaged_step_is_replaced_by_a_trained_one_even_if_step_0_is_better(tmp_path):
    save(tmp_path, {0: 0.9, 1: 0.1, 2: 0.2})
    (tmp_path / "1" / digests.RECORD).write_text("{}")
    with pytest.warns(UserWarning, match=r"checkpoint\.json is damaged.*: step 2 is used instead"):
        step, _, _ = Checkpoints(tmp_path, "mark").restore_best(model_of(a_state(0)))
    assert step == 2
    with pytest.raises(DamagedCheckpoint, match=r"1/checkpoint\.json is damaged"):
        Checkpoints(tmp_path, "mark").best_steps()


def test_a_sealed_record_of_another_version_is_told(whole, tmp_path):
    directory = copied(whole, tmp_path)
    digests.write_record(directory / "20", {"step": 20})
    with pytest.raises(DamagedCheckpoint, match="or is of another version"):
        Checkpoints(directory, "mark").restore_model(20, model_of(a_state(0)))


def test_checkpoints_of_other_settings_or_models_are_refused(whole):
    with pytest.raises(ValueError, match=r"other settings .* the fingerprint mark, not other"):
        Checkpoints(whole, "other").restore_model(20, model_of(a_state(0)))
    params, state = model_of(a_state(0))
    wider = {**params, "scorer": {"kernel": jnp.zeros((3, 5)), "none": {}}}
    with pytest.raises(
        ValueError,
        match=r"1 arrays differ, such as model/params/scorer/kernel, which is float32 \(3, 4\) "
        r"there and float32 \(3, 5\) here",
    ):
        Checkpoints(whole, "mark").restore_model(20, (wider, state))
    fewer = {"predictor": params["predictor"]}
    with pytest.raises(ValueError, match="kernel, which is .* there and missing here"):
        Checkpoints(whole, "mark").restore_model(20, (fewer, state))


@contextlib.contextmanager
def full_disk(size: int):
    """No file can grow beyond so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    ("size", "foreseen"), [(0, True), (50_000, True), (50, False), (500, False)]
)
def test_a_checkpoint_that_cannot_be_written_is_told_and_leaves_the_last(
    size, foreseen, tmp_path, monkeypatch
):
    if not foreseen:  # not every system tells beforehand
        monkeypatch.delattr(os, "posix_fallocate")
    save(tmp_path, {0: 0.1, 1: 0.2})
    checkpoints = Checkpoints(tmp_path, "mark", create=True)
    with full_disk(size):
        checkpoints.save(a_state(2), some_batches(), {"best_by": 0.3})
        with pytest.raises(OSError, match=r"of step 2 could not be .* last good one, step 1 \("):
            checkpoints.wait()
    checkpoints.close()
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.isdecimal()) == ["0", "1"]
    Checkpoints(tmp_path, "mark", create=True)  # the next session clears away what is left
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1"]
    assert_same(Checkpoints(tmp_path, "mark").restore(a_state(0), some_batches()), a_state(1))


def test_the_very_first_checkpoint_that_cannot_be_written_is_told(tmp_path):
    checkpoints = Checkpoints(tmp_path, "mark", create=True)
    with full_disk(0):
        checkpoints.save(a_state(0), some_batches(), {"best_by": 0.3})
        with pytest.raises(OSError, match="from the last good one, there is none \\("):
            checkpoints.wait()
    checkpoints.close()


def test_digests_tell_type_shape_and_content_apart():
    arrays = [
        np.zeros(4, np.float32), np.zeros((2, 2), np.float32), np.zeros(4, np.int32),
        np.array([0, 0, 0, 1], np.float32), np.array([0, 0, 0, -0.0], np.float32),
    ]  # fmt: skip
    assert len({digests.of_leaves({"x": x})["x"] for x in arrays}) == len(arrays)
    one, transposed = np.arange(6).reshape(2, 3), np.arange(6).reshape(3, 2).T
    assert digests.of_leaves({"x": transposed}) == digests.of_leaves({"x": transposed.copy()})
    assert digests.of_leaves({"x": one}) != digests.of_leaves({"x": transposed})
    content = hashlib.sha256(one.tobytes()).hexdigest()
    assert digests.of_leaves({"a": {"b": one}}) == {"a/b": f"int64 (2, 3) {content}"}


def test_no_checkpoints_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="There are no checkpoints in"):
        Checkpoints(tmp_path / "nowhere", "mark")
    empty = Checkpoints(tmp_path / "empty", "mark", create=True)
    with pytest.raises(FileNotFoundError, match="no finished checkpoint"):
        empty.restore_best(model_of(a_state(0)))
