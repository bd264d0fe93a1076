"""Image files of every kind, and folders of them."""

import imagecodecs
import numpy as np
import tifffile
from PIL import Image

RNG = np.random.default_rng(0)


def random_image(shape, dtype=np.uint8):
    if dtype == np.float32:
        return RNG.random(shape, np.float32)
    return RNG.integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)


def write(path, image, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, image)
    elif path.suffix == ".tif":
        defaults = {"planarconfig": "contig"} if image.shape[2:] else {}
        tifffile.imwrite(path, image, **{**defaults, **options})
    elif image.dtype == np.uint16:
        path.write_bytes(imagecodecs.png_encode(image))
    else:
        Image.fromarray(image).save(path, **options)
    return path


def write_folder(root, shape=(6, 5, 3), dtype=np.uint8, suffix=".png"):
    """Four images: cats and dogs to train on, one of each to test on."""
    names = ["train/cat/a", "train/dog/b", "test/dog/c", "test/cat/d"]
    images = {name + suffix: random_image(shape, dtype) for name in names}
    for name, image in images.items():
        write(root / name, image)
    return images
