"""The accuracy benchmark without PyTorch: turned images, figures, table, environment."""

import io
import sys
import tarfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from benchmarks.accuracy import environment, evaluation, images, photos, run
from benchmarks.accuracy.table import table

SIZE = 8
CLASSES = ("bird", "cat", "dog")


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> Path:
    """Six images, each of one colour per quadrant; out of order in the archive."""
    path = tmp_path_factory.mktemp("archive") / "test.tar"
    rng = np.random.default_rng(0)
    with tarfile.open(path, "w") as tar:
        for name in ("dog/1", "bird/0", "cat/1", "bird/1", "dog/0", "cat/0"):
            colours = rng.integers(0, 256, (2, 2, 3), dtype=np.uint8)
            file = io.BytesIO()
            Image.fromarray(np.kron(colours, np.ones((4, 4, 1), np.uint8))).save(file, "PNG")
            member = tarfile.TarInfo(f"test/{name}.png")
            member.size = len(file.getvalue())
            tar.addfile(member, io.BytesIO(file.getvalue()))
    return path


@pytest.fixture(scope="module")
def test(archive) -> evaluation.Evaluation:
    path = archive.with_name("evaluation.npz")
    images.make(archive, path)
    return evaluation.load(path)


def result(**changes):
    """A result with accuracies 1.00, 0.99, …, 0.92 and the poses of C4."""
    turns = {
        turn: {"accuracy": 1 - i / 100, "changed": 0.0, "pose_accuracy": [0.5, None][i % 2]}
        for i, turn in enumerate(evaluation.TURNS)
    }
    return {"method": "ours", "evaluation": "a", "turns": turns} | changes


def test_archive_is_read_in_the_order_of_names(archive):
    files, labels = photos.read(archive)
    assert labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert photos.decode(files).shape == (6, SIZE, SIZE, 3)


def test_archives_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no .*absent\.tar"):
        photos.read(tmp_path / "absent.tar")
    (tmp_path / "torn.tar").write_bytes(b"torn" * 300)
    with pytest.raises(ValueError, match=r"torn\.tar cannot be read"):
        photos.read(tmp_path / "torn.tar")
    tarfile.open(tmp_path / "empty.tar", "w").close()
    with pytest.raises(ValueError, match=r"empty\.tar holds no files"):
        photos.read(tmp_path / "empty.tar")


def test_quarter_turns_are_those_of_numpy(archive, test):
    files, labels = photos.read(archive)
    known = {
        image.tobytes(): label for image, label in zip(photos.decode(files), labels, strict=True)
    }
    with np.load(test.path) as file:
        upright = file["images"]
    assert [known[image.tobytes()] for image in upright] == test.labels.tolist()
    assert len({image.tobytes() for image in upright}) == 6
    for quarter in range(4):
        turned = test.images(str(90 * quarter))
        assert turned.dtype == np.float32
        expected = np.rot90(upright, quarter, (1, 2)).astype(np.float32) / 255
        np.testing.assert_array_equal(turned, expected)


@pytest.mark.parametrize("turn", ["45", "225", "random"])
def test_other_turns_are_those_of_a_loop(test, turn):
    """Bilinear interpolation in float64, the edge continued."""
    upright, centre = test.images("0").astype(np.float64), (SIZE - 1) / 2
    for image, degrees, found in zip(upright, test.degrees(turn), test.images(turn), strict=True):
        cos, sin = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
        for i, j in np.ndindex(SIZE, SIZE):
            y, x = i - centre, j - centre
            row = np.clip(sin * x + cos * y + centre, 0, SIZE - 1)
            column = np.clip(cos * x - sin * y + centre, 0, SIZE - 1)
            top, left = min(int(row), SIZE - 2), min(int(column), SIZE - 2)
            down, across = row - top, column - left
            upper = image[top, left] * (1 - across) + image[top, left + 1] * across
            lower = image[top + 1, left] * (1 - across) + image[top + 1, left + 1] * across
            expected = upper * (1 - down) + lower * down
            np.testing.assert_allclose(found[i, j], expected, atol=2e-6)


def test_images_are_reproducible_and_a_limit_takes_the_first(archive, test, tmp_path):
    images.make(archive, tmp_path / "again.npz")
    assert evaluation.load(tmp_path / "again.npz").digest == test.digest
    images.make(archive, tmp_path / "fewer.npz", limit=2)
    fewer = evaluation.load(tmp_path / "fewer.npz")
    assert fewer.digest != test.digest
    np.testing.assert_array_equal(fewer.images("45"), test.images("45")[:2])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.npz", "fewer.npz"]


def test_figures_of_a_method_that_knows_the_upright_images_only(test):
    """It says 0 for all others, and finds the pose as long as it is a quarter turn."""
    upright = {image.tobytes(): i for i, image in enumerate(test.images("0"))}
    sizes = []

    def predict(batch):
        sizes.append(len(batch))
        turns = [np.rot90(batch, -pose, (1, 2)) for pose in range(4)]
        known = [[np.ascontiguousarray(x).tobytes() in upright for x in turn] for turn in turns]
        places = [upright.get(image.tobytes()) for image in batch]
        classes = [0 if place is None else test.labels[place] for place in places]
        return np.array(classes), np.argmax(known, 0)

    found = evaluation.measure(predict, test, rotations=4, batch=4)
    assert set(sizes) == {4}
    zero, other = np.mean(test.labels == 0), np.mean(test.labels != 0)
    assert found["turns"]["0"] == {"accuracy": 1.0, "changed": 0.0, "pose_accuracy": 1.0}
    assert found["turns"]["270"] == {"accuracy": zero, "changed": other, "pose_accuracy": 1.0}
    assert found["turns"]["45"] == {"accuracy": zero, "changed": other, "pose_accuracy": None}
    nearest = [round(angle / (np.pi / 2)) % 4 == 0 for angle in test.angles]
    assert found["turns"]["random"]["pose_accuracy"] == np.mean(nearest)


def test_the_nearest_element_is_the_right_pose():
    degrees = np.array([0.0, 22.0, 23.0, 338.0, 337.0, 181.0])
    assert evaluation.pose_accuracy(np.array([0, 0, 1, 0, 7, 4]), degrees, 8) == 1
    assert evaluation.pose_accuracy(np.array([0, 0, 0, 0, 0, 0]), degrees, 4) == 5 / 6


def test_training_free_methods_on_a_predictor_that_sees_the_corner(test):
    """Its logits are the colour of the top left pixel, so that all can be told by hand."""
    x = jnp.asarray(test.images("0"))
    corners = np.stack([x[:, 0, 0], x[:, 0, -1], x[:, -1, -1], x[:, -1, 0]])  # of poses 0, 1, 2, 3

    def logits(batch):
        return 9 * batch[:, 0, 0]

    np.testing.assert_array_equal(run.vanilla(logits, x)[0], 9 * corners[0])
    mirrored = 9 * (corners[0] + corners[1]) / 2
    np.testing.assert_allclose(run.mirrored(logits, x)[0], mirrored, rtol=1e-6)
    np.testing.assert_allclose(run.averaged(logits, x)[0], 9 * corners.mean(0), rtol=1e-6)
    odds = np.exp(9 * corners)
    confidence = (odds / odds.sum(-1, keepdims=True)).max(-1)
    found, poses = run.most_confident(logits, x)
    np.testing.assert_array_equal(found, 9 * corners[confidence.argmax(0), np.arange(len(x))])
    # Turning by the inverse of pose p, clockwise, brings to the top left what was p corners back.
    np.testing.assert_array_equal(poses, confidence.argmax(0) * -1 % 4)


def test_confidences_that_are_one_to_the_last_bit_are_told_apart():
    """Four images in one, each surer than the other of a class of its own, beyond float32."""
    sure = jnp.asarray([[40.0, 0, 0], [0, 42, 0], [0, 0, 44], [46, 0, 0]])
    assert np.unique(jax.nn.softmax(sure).max(-1)).tolist() == [1.0]
    x = jnp.zeros((1, 2, 2, 3)).at[0].set(jnp.stack([sure[:2], sure[2:]]))
    found, pose = run.most_confident(lambda batch: batch[:, 0, 0], x)
    assert found.tolist() == [[46.0, 0.0, 0.0]]
    expected = [np.array_equal(np.rot90(x[0], -p)[0, 0], sure[3]) for p in range(4)]
    assert pose.tolist() == [expected.index(True)]


def test_table():
    full = result(
        predictor_passes=4, train_seconds=1234.5, seconds_per_1000=0.126, parameters=23168
    )
    without = result(
        method="other", turns={t: v | {"pose_accuracy": None} for t, v in full["turns"].items()}
    )
    lines = table([full, without]).splitlines()
    assert lines[0].startswith(
        "| method | upright | over C4 | over C8 | random angles | pose right"
    )
    assert lines[2] == "| ours | 100.0 | 97.0 | 96.5 | 92.0 | 50.0 | 4 | 1,234 | 0.13 | 23,168 |"
    assert lines[3] == "| other | 100.0 | 97.0 | 96.5 | 92.0 | – | – | – | – | – |"
    assert len({line.count("|") for line in lines}) == 1


def test_table_refuses_results_on_other_images():
    with pytest.raises(ValueError, match=r"'b' was measured on other images than 'ours'"):
        table([result(), result(method="b", evaluation="b")])


def test_results_are_kept_and_checked(tmp_path, test):
    path = tmp_path / "runs" / "ours.json"
    assert not evaluation.measured_on(path, test)
    evaluation.write(path, result(evaluation=test.digest))
    assert evaluation.read(path) == result(evaluation=test.digest)
    assert evaluation.measured_on(path, test)
    evaluation.write(path, result())
    assert not evaluation.measured_on(path, test)
    incomplete = result()
    del incomplete["turns"]["random"], incomplete["method"]
    evaluation.write(path, incomplete)
    with pytest.raises(
        ValueError, match=r"ours\.json is not a result, it lacks method, turns/rand"
    ):
        evaluation.read(path)
    path.write_text("{")
    with pytest.raises(ValueError, match=r"ours\.json is not a result"):
        evaluation.read(path)


def test_a_finished_environment_is_found_again(tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    packages = (*environment.PACKAGES, *environment.WITHOUT_DEPENDENCIES)
    (tmp_path / "packages.txt").write_text("".join(f"{package}\n" for package in packages))
    monkeypatch.setattr(environment.subprocess, "run", None)  # calling it would fail
    assert environment.ensure(tmp_path) == tmp_path / "bin" / "python"


def test_an_index_out_of_reach_is_told_in_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    with pytest.raises(
        RuntimeError, match=r"could not be installed in .*environment \(.*==.*index"
    ):
        environment.ensure(tmp_path / "environment")
    assert (tmp_path / "environment" / "bin" / "python").exists()
    assert not (tmp_path / "environment" / "packages.txt").exists()  # not taken for finished


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--canonicalizers=e2cnn,e3nn", "Unknown 'e3nn' in --canonicalizers: choose of group_conv"),
        ("--ours=features", "Unknown 'features' in --ours: choose of group_conv-c4"),
        ("--images_seen=100", "--images_seen=100: give a multiple of 60"),
        ("--working=0", "--working=0: give at least one pixel"),
    ],
)
def test_unknown_arguments_are_refused_before_any_work(argument, message, tmp_path, monkeypatch):
    arguments = ["run", str(tmp_path), f"--runs={tmp_path / 'runs'}", argument]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit, match=message):
        run.main()
    assert not (tmp_path / "runs").exists()


def test_equiadapt_is_told_what_it_is_measured_with(tmp_path, monkeypatch):
    monkeypatch.setattr(run.environment, "ensure", lambda folder: folder / "bin" / "python")
    commands = []
    monkeypatch.setattr(run.subprocess, "run", lambda command, **_: commands.append(command))
    monkeypatch.setattr(sys, "argv", ["run", str(tmp_path), "--working=96", "--rotations=8"])
    files = tmp_path / "weights", tmp_path / "turned.npz", tmp_path / "result.json"
    run.measure_reference("e2cnn", run.settings(), *files)
    (command,) = commands
    assert {"--canonicalizer=e2cnn", "--working=96", "--rotations=8"} < set(command)
    assert f"--output={files[-1]}" in command
