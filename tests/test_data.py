"""The data layer on real files: what is written comes back bit for bit, or is refused by name."""

import io
import json
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image, ImageOps
from sklearn.datasets import load_digits

from equiadapt_jax import data
from equiadapt_jax.data.decoding import decode
from tests.image_files import random_image, write, write_folder


def contents(dataset):
    """What a dataset holds: (split, name) → (image, class)."""
    return {
        (split, example["name"].decode()): (example["image"], dataset.classes[example["label"]])
        for split in dataset.sizes
        for example in dataset.source(split)
    }


def pack(path, root, prefix="", mode="w"):
    with tarfile.open(path, mode) as archive:
        archive.add(root, prefix or ".")
    return path


# Digits


def test_digits_are_those_of_scikit_learn(digits):
    assert digits.sizes == {"train": 1237, "validation": 200, "test": 360}
    assert digits.classes == tuple("0123456789")
    assert digits.channels == 1
    found = sorted(
        (example["image"].tobytes(), int(example["label"]))
        for split in digits.sizes
        for example in digits.source(split)
    )
    reference = load_digits()
    pixels = np.round(reference.images * 255 / 16).astype(np.uint8)
    expected = sorted((p.tobytes(), int(t)) for p, t in zip(pixels, reference.target, strict=True))
    assert found == expected  # so the splits are disjoint, and nothing is missing


def test_digits_splits_are_frozen(digits):
    labels = [int(digits.source("test")[i]["label"]) for i in range(12)]
    assert labels == [0, 2, 2, 4, 6, 7, 0, 7, 7, 7, 0, 7]


def test_split_slices_and_unknown_splits(digits):
    assert len(digits.source("train[:90%]")) == 1113
    with pytest.raises(ValueError, match="digits has no split 'dev'; there are train, validation"):
        digits.source("dev")


# Decoding


@pytest.mark.parametrize(
    ("suffix", "shape", "dtype"),
    [
        (".png", (6, 5), np.uint8),
        (".png", (6, 5, 3), np.uint8),
        (".png", (6, 5, 4), np.uint8),
        (".png", (6, 5), np.uint16),
        (".png", (6, 5, 3), np.uint16),
        (".tif", (6, 5), np.uint16),
        (".tif", (6, 5), np.float32),
        (".npy", (6, 5), np.float32),
        (".npy", (6, 5, 13), np.uint16),
    ],
)
def test_every_bit_survives_decoding(tmp_path, suffix, shape, dtype):
    image = random_image(shape, dtype)
    decoded = decode(write(tmp_path / f"x{suffix}", image).read_bytes(), f"x{suffix}")
    assert decoded.dtype == dtype
    np.testing.assert_array_equal(decoded, image.reshape(6, 5, -1))


@pytest.mark.parametrize("planar", ["contig", "separate", "pages"])
def test_tiff_bands_are_found_wherever_they_are_stored(tmp_path, planar):
    image = random_image((20, 17, 13), np.uint16)
    first = np.ascontiguousarray(np.moveaxis(image, -1, 0))
    options = {"planarconfig": None if planar == "pages" else planar}
    stored = image if planar == "contig" else first
    path = write(tmp_path / "x.tif", stored, photometric="minisblack", **options)
    np.testing.assert_array_equal(decode(path.read_bytes(), "x.tif"), image)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["x.jpg", "x.png", "deep.png", "x.tif"])
def test_orientation_tags_are_obeyed(tmp_path, orientation, name):
    image = random_image((6, 5), np.uint16 if name == "deep.png" else np.uint8)
    exif = Image.Exif()
    exif[274] = orientation
    if name == "x.tif":
        write(tmp_path / name, image, extratags=[(274, "H", 1, orientation)])
        write(tmp_path / "x.png", image, exif=exif)
    else:
        Image.fromarray(image).save(tmp_path / name, exif=exif)
    # Pillow itself scrambles sideways TIFF files, so it is asked about the same image as PNG.
    with Image.open(tmp_path / name.replace("tif", "png")) as file:
        expected = np.asarray(ImageOps.exif_transpose(file))
    decoded = decode((tmp_path / name).read_bytes(), name)
    np.testing.assert_array_equal(decoded[..., 0], expected)


def test_orientation_six_is_a_quarter_turn_clockwise(tmp_path):
    image = random_image((6, 5, 3))
    exif = Image.Exif()
    exif[274] = 6
    turned = write(tmp_path / "turned.jpg", image, exif=exif).read_bytes()
    plain = write(tmp_path / "plain.jpg", image).read_bytes()
    np.testing.assert_array_equal(decode(turned, "a.jpg"), np.rot90(decode(plain, "b.jpg"), -1))


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_palettes_become_colours_and_bits_become_gray(tmp_path, suffix):
    colours = Image.fromarray(random_image((6, 5, 3))).quantize(8)
    colours.save(tmp_path / f"p{suffix}")
    decoded = decode((tmp_path / f"p{suffix}").read_bytes(), f"p{suffix}")
    np.testing.assert_array_equal(decoded, np.asarray(colours.convert("RGB")))
    bits = Image.fromarray(random_image((6, 5))).convert("1")
    bits.save(tmp_path / f"b{suffix}")
    decoded = decode((tmp_path / f"b{suffix}").read_bytes(), f"b{suffix}")
    np.testing.assert_array_equal(decoded[..., 0], np.asarray(bits) * 255)


def test_tiff_where_zero_is_white(tmp_path):
    image = random_image((6, 5))
    path = write(tmp_path / "x.tif", image, photometric="miniswhite")
    np.testing.assert_array_equal(decode(path.read_bytes(), "x.tif")[..., 0], 255 - image)


def test_contents_must_be_what_the_extension_says(tmp_path):
    contents = write(tmp_path / "x.tif", random_image((6, 5))).read_bytes()
    with pytest.raises(ValueError, match=r"x\.jpg cannot .*: it is neither a PNG nor a JPEG file"):
        decode(contents, "x.jpg")


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.full((4, 4), 1.5), "x.npy holds floats from 1.5 to 1.5; scale them"),
        (np.full((4, 4), np.nan), "x.npy holds floats from nan"),
        (np.zeros((4, 4), np.int32), "x.npy holds int32 values"),
        (np.zeros((13, 64, 64), np.uint8), r"x.npy has shape \(13, 64, 64\); expected"),
        (np.zeros((1, 4), np.uint8), "x.npy has shape .* at least 2×2 pixels"),
        (np.array([None, "code"]), "x.npy cannot be read .*allow_pickle"),
    ],
)
def test_values_that_have_no_meaning_are_refused(array, message):
    file = io.BytesIO()
    np.save(file, array)
    with pytest.raises(ValueError, match=message):
        decode(file.getvalue(), "x.npy")


@pytest.mark.parametrize(
    ("suffix", "dtype"),
    [
        (".png", np.uint8),
        (".png", np.uint16),
        (".jpg", np.uint8),
        (".tif", np.uint8),
        (".npy", np.uint8),
    ],
)
def test_truncated_files_are_named(tmp_path, suffix, dtype):
    contents = write(tmp_path / f"x{suffix}", random_image((40, 40, 3), dtype)).read_bytes()
    for part in (contents[: len(contents) // 2], contents[:20], b""):
        with pytest.raises(ValueError, match=f"some/x{suffix} cannot be read as an image: "):
            decode(part, f"some/x{suffix}")


# Image folders


@pytest.mark.parametrize(
    ("shape", "dtype", "suffix"),
    [((6, 5, 3), np.uint8, ".png"), ((6, 5, 13), np.uint16, ".tif"), ((6, 5), np.float32, ".npy")],
)
def test_folder_comes_back_bit_for_bit(tmp_path, shape, dtype, suffix):
    images = write_folder(tmp_path / "images", shape, dtype, suffix)
    dataset = data.open_dataset("image_folder", root=tmp_path / "images", data_dir=tmp_path / "d")
    assert dataset.classes == ("cat", "dog")
    assert dataset.sizes == {"train": 2, "test": 2}
    assert dataset.channels == (shape[2] if len(shape) == 3 else 1)
    found = contents(dataset)
    assert {name for _, name in found} == set(images)
    for (split, name), (image, label) in found.items():
        assert name.split("/")[:2] == [split, label]
        assert image.dtype == dtype
        np.testing.assert_array_equal(image, images[name].reshape(6, 5, -1))


@pytest.mark.parametrize(("prefix", "mode"), [("", "w"), ("", "w:gz"), ("pets", "w")])
def test_archive_equals_folder(tmp_path, prefix, mode):
    write_folder(tmp_path / "images")
    archive = pack(tmp_path / "x.tar", tmp_path / "images", prefix, mode)
    folder = data.open_dataset("image_folder", root=tmp_path / "images", data_dir=tmp_path / "d")
    packed = data.open_dataset("image_folder", root=archive, data_dir=tmp_path / "d")
    assert (packed.classes, packed.sizes) == (folder.classes, folder.sizes)
    expected = contents(folder)
    for (split, name), (image, label) in contents(packed).items():
        reference, reference_label = expected[split, name.removeprefix(prefix).lstrip("/")]
        np.testing.assert_array_equal(image, reference)
        assert label == reference_label
    assert not list(tmp_path.glob("d/**/*.png"))  # nothing was unpacked


@pytest.mark.parametrize("named", [True, False])
def test_a_folder_of_archives_equals_a_folder(tmp_path, named):
    """An archive for each split, whether the split is named in it or not."""
    write_folder(tmp_path / "images")
    archives = tmp_path / "archives"
    archives.mkdir()
    for split in ("train", "test"):
        pack(archives / f"{split}.tar", tmp_path / "images" / split, split if named else "")
    (archives / "readme.txt").write_text("text")
    folder, packed = (
        data.open_dataset("image_folder", root=root, data_dir=tmp_path / "d")
        for root in (tmp_path / "images", archives)
    )
    assert (packed.classes, packed.sizes) == (folder.classes, folder.sizes)
    expected, found = contents(folder), contents(packed)
    assert expected.keys() == found.keys()
    for key, (image, label) in found.items():
        np.testing.assert_array_equal(image, expected[key][0])
        assert label == expected[key][1]
    # Other content is another copy; what is packed with folders beside it is left alone.
    pack(archives / "train.tar", tmp_path / "images" / "test", "train")
    changed = data.open_dataset("image_folder", root=archives, data_dir=tmp_path / "d")
    assert changed.version != packed.version
    pack(tmp_path / "images" / "backup.tar", tmp_path / "images" / "test")
    again = data.open_dataset("image_folder", root=tmp_path / "images", data_dir=tmp_path / "d")
    assert again.version == folder.version
    (tmp_path / "elsewhere").mkdir()
    archives = archives.rename(tmp_path / "elsewhere" / "archives")
    moved = data.open_dataset("image_folder", root=archives, data_dir=tmp_path / "d")
    assert moved.version == changed.version
    (archives / "test.tar").write_bytes((archives / "test.tar").read_bytes()[:700])
    with pytest.raises(ValueError, match=r"test\.tar cannot be read as a tar archive"):
        data.open_dataset("image_folder", root=archives, data_dir=tmp_path / "d")


@pytest.mark.parametrize(
    ("member", "message"),
    [
        ({"name": "../evil.png"}, "holds '../evil.png', an absolute or upward path"),
        ({"name": "/etc/evil.png"}, "holds '/etc/evil.png', an absolute or upward path"),
        (
            {"name": "train/cat/l.png", "type": tarfile.SYMTYPE, "linkname": "/etc/passwd"},
            "a link or",
        ),
        (
            {"name": "train/cat/h.png", "type": tarfile.LNKTYPE, "linkname": "train/cat/a.png"},
            "a link",
        ),
        ({"name": "train/cat/d.png", "type": tarfile.CHRTYPE}, "a link or special file"),
        ({"name": "train/cat/f.png", "type": tarfile.FIFOTYPE}, "a link or special file"),
    ],
)
def test_malicious_archives_are_refused(tmp_path, member, message):
    write_folder(tmp_path / "images")
    archive = pack(tmp_path / "x.tar", tmp_path / "images")
    evil = tarfile.TarInfo()
    for key, value in member.items():
        setattr(evil, key, value)
    with tarfile.open(archive, "a") as tar:
        tar.addfile(evil)
    with pytest.raises(ValueError, match=message):
        data.open_dataset("image_folder", root=archive, data_dir=tmp_path / "d")


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_damaged_archives_are_named(tmp_path, mode):
    write_folder(tmp_path / "images", shape=(64, 64, 3))
    archive = pack(tmp_path / "x.tar", tmp_path / "images", mode=mode)
    archive.write_bytes(archive.read_bytes()[:20000])
    with pytest.raises(ValueError, match=r"x\.tar cannot be read as a tar archive"):
        data.open_dataset("image_folder", root=archive, data_dir=tmp_path / "d")


def test_changed_data_is_prepared_anew(tmp_path):
    root = tmp_path / "images"
    write_folder(root)

    def find():
        dataset = data.open_dataset("image_folder", root=root, data_dir=tmp_path / "d")
        return dataset.builder.data_dir, contents(dataset)

    before, _ = find()
    assert find()[0] == before
    image = random_image((6, 5, 3))
    write(root / "train/cat/a.png", image)
    after, found = find()
    assert after != before
    np.testing.assert_array_equal(found["train", "train/cat/a.png"][0], image)
    (root / "train/dog/b.png").rename(root / "train/dog/renamed.png")
    assert find()[0] not in (before, after)


def test_failed_preparation_leaves_nothing(tmp_path):
    root = tmp_path / "images"
    write_folder(root)
    (root / "test/cat/d.png").write_bytes(b"no image")
    for _ in range(2):  # the second attempt must not trust what the first one left
        with pytest.raises(ValueError, match=r"test/cat/d\.png cannot be read as an image"):
            data.open_dataset("image_folder", root=root, data_dir=tmp_path / "d")
    assert not list((tmp_path / "d").glob("**/dataset_info.json"))


def test_hidden_files_and_other_types_are_ignored(tmp_path):
    root = tmp_path / "images"
    write_folder(root)
    for name in ("train/.DS_Store", "train/cat/._a.png", "train/.cache/x/y.png", "readme.txt"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"?")
    for source in (root, pack(tmp_path / "x.tar", root)):
        dataset = data.open_dataset("image_folder", root=source, data_dir=tmp_path / "d")
        assert dataset.sizes == {"train": 2, "test": 2}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("test/dog/z.png", random_image((6, 5)), "3 channels of uint8 but .*z.png has 1 channels"),
        ("test/dog/z.png", random_image((6, 5, 3), np.uint16), "3 channels of uint16"),
        ("train/z.png", random_image((6, 5, 3)), "'train/z.png' in .* is out of place; expected"),
        (
            "train/cat/sub/z.png",
            random_image((6, 5, 3)),
            "'train/cat/sub/z.png' in .* out of place",
        ),
        ("train/eel/notes.txt", None, "There is no image in 'train/eel' in "),
    ],
)
def test_folders_that_do_not_fit_are_refused(tmp_path, name, array, message, packed):
    root = tmp_path / "images"
    write_folder(root)
    if array is None:
        (root / name).parent.mkdir()
        (root / name).write_text("text")
    else:
        write(root / name, array)
    root = pack(tmp_path / "x.tar", root) if packed else root
    with pytest.raises(ValueError, match=message):
        data.open_dataset("image_folder", root=root, data_dir=tmp_path / "d")


def test_missing_and_empty_roots(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no .*nowhere; .*<split>/<class>/<image>"):
        data.open_dataset("image_folder", root=tmp_path / "nowhere", data_dir=tmp_path / "d")
    with pytest.raises(ValueError, match=r"There is no image in .*; expected <split>/<class>"):
        data.open_dataset("image_folder", root=tmp_path, data_dir=tmp_path / "d")
    with pytest.raises(ValueError, match="needs root="):
        data.open_dataset("image_folder", data_dir=tmp_path / "d")


# Datasets of TFDS


def test_unprepared_dataset_says_at_once_what_to_run(tmp_path):
    start = time.perf_counter()
    command = f"python -m equiadapt_jax.data.prepare cifar10 --data_dir={tmp_path} "
    with pytest.raises(FileNotFoundError, match=command) as error:
        data.open_dataset("cifar10", data_dir=tmp_path)
    assert "pip install 'equiadapt-jax[prepare]'" in str(error.value)
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize("name", ["cifar11", "huggingface:mnist", "no such/name"])
def test_unknown_names_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match=f"no dataset '{name}'; did you mean "):
        data.open_dataset(name, data_dir=tmp_path)


class Unlabelled(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A dataset without labels, as TFDS has many."""

    VERSION = tfds.core.Version("1.0.0")
    name = "unlabelled"

    def _info(self):
        image = tfds.features.Tensor(shape=(2, 2, 1), dtype=np.uint8)
        features = tfds.features.FeaturesDict({"image": image})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        yield 0, {"image": np.zeros((2, 2, 1), np.uint8)}


def test_prepared_datasets_are_found_by_their_files_and_checked(tmp_path):
    Unlabelled(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    with pytest.raises(ValueError, match="unlabelled has the features image, but image and label"):
        data.open_dataset("unlabelled", data_dir=tmp_path)


def test_other_file_formats_are_refused(tmp_path):
    builder = Unlabelled(data_dir=tmp_path, file_format="array_record")
    builder.download_and_prepare()
    info = Path(builder.data_dir) / "dataset_info.json"
    info.write_text(json.dumps(json.loads(info.read_text()) | {"fileFormat": "tfrecord"}))
    with pytest.raises(ValueError, match="is prepared in .* as tfrecord, which has no random"):
        data.open_dataset("unlabelled", data_dir=tmp_path)


def prepare(*arguments):
    command = [sys.executable, "-m", "equiadapt_jax.data.prepare", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_prepare_command(tmp_path):
    done = prepare("digits", f"--data_dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert "train 1237, validation 200, test 360" in done.stdout.replace("\n", " ")
    failed = prepare("cifar11", f"--data_dir={tmp_path}")
    assert failed.returncode == 1
    assert "did you mean cifar10" in failed.stderr


# Fitting


def test_to_unit():
    for dtype in (np.uint8, np.uint16):
        unit = data.to_unit(np.array([[0, np.iinfo(dtype).max]], dtype))
        np.testing.assert_array_equal(unit, np.float32([[[0], [1]]]))
        assert unit.dtype == np.float32
    with pytest.raises(TypeError, match="int64 has no known range"):
        data.to_unit(np.zeros((2, 2), np.int64))


def test_fit():
    image = random_image((4, 7, 2), np.float32)
    padded = data.fit(image, 0, "pad")
    np.testing.assert_array_equal(padded, np.pad(image, [(1, 2), (0, 0), (0, 0)], mode="edge"))
    np.testing.assert_array_equal(data.fit(image, None, "crop"), image[:, 1:5])
    assert data.fit(image, 4, "none") is image
    for how in ("pad", "crop", "stretch"):
        assert data.fit(image, 9, how).shape == (9, 9, 2)
    square = random_image((5, 5, 3), np.float32)
    for how in ("pad", "crop", "stretch"):
        np.testing.assert_array_equal(data.fit(square, 5, how), square)
    with pytest.raises(ValueError, match="fit='squeeze' is unknown; choose one of pad, crop"):
        data.fit(image, 4, "squeeze")


def test_resizing_stays_in_range_and_does_not_alias():
    board = np.indices((32, 32)).sum(0)[..., None] % 2 * np.ones(3, np.float32)
    small = data.fit(board.astype(np.float32), 8, "pad")
    np.testing.assert_allclose(small, 0.5, atol=0.02)
    large = data.fit(board[:8, :8].astype(np.float32), 32, "pad")
    assert large.dtype == np.float32
    assert large.min() == 0
    assert large.max() == 1


def test_import_needs_no_data_library():
    blocked = ("tensorflow_datasets", "grain", "sklearn", "tifffile", "imagecodecs", "PIL")
    code = f"import sys; sys.modules.update(dict.fromkeys({blocked})); import equiadapt_jax.data"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
