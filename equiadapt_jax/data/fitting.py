"""From a stored image to the square of floats that a network takes."""

import numpy as np

FITS = ("pad", "crop", "stretch", "none")


def to_unit(image: np.ndarray) -> np.ndarray:
    """Return the image as float32 in [0, 1]: uint8 / 255, uint16 / 65535, floats as they are.

    Shapes (H, W) and (H, W, C) both become (H, W, C). TypeError for other types.
    """
    if image.dtype in (np.uint8, np.uint16):
        image = image / np.float32(np.iinfo(image.dtype).max)
    elif image.dtype.kind != "f":
        raise TypeError(
            f"An image of {image.dtype} has no known range; use uint8, uint16 or floats."
        )
    image = image.astype(np.float32, copy=False)
    return image[..., None] if image.ndim == 2 else image


def fit(image: np.ndarray, size: int | None, how: str) -> np.ndarray:
    """Fit a float32 image (H, W, C) in [0, 1] to (size, size, C), also in [0, 1].

    `how`: "pad" continues the edges to a centred square and resizes it, "crop" resizes the largest
    centred square, "stretch" resizes both axes alike or not, "none" returns the image as it is.
    Without a size (0 or None) nothing is resized. Resizing is bicubic with antialiasing, as most
    pretrained vision networks saw it, clipped to [0, 1]; where the size fits, no bit changes.
    """
    if how not in FITS:
        raise ValueError(f"fit={how!r} is unknown; choose one of {', '.join(FITS)}.")
    if how == "pad":
        image = _pad_to_square(image)
    elif how == "crop":
        image = _crop_to_square(image)
    return _resize(image, size) if size and how != "none" else image


def _pad_to_square(image: np.ndarray) -> np.ndarray:
    missing = max(image.shape[:2]) - np.array(image.shape[:2])
    before = missing // 2
    widths = [*zip(before, missing - before, strict=True), (0, 0)]
    return np.pad(image, widths, mode="edge") if missing.any() else image


def _crop_to_square(image: np.ndarray) -> np.ndarray:
    side = min(image.shape[:2])
    top, left = (n // 2 for n in np.array(image.shape[:2]) - side)
    return image[top : top + side, left : left + side]


def _resize(image: np.ndarray, size: int) -> np.ndarray:
    if image.shape[:2] == (size, size):
        return image
    from PIL import Image  # not needed by those who do not resize

    # Pillow resizes floats one channel at a time, and never rounds them to 8 bits.
    planes = [
        np.asarray(Image.fromarray(plane).resize((size, size), Image.Resampling.BICUBIC))
        for plane in np.ascontiguousarray(np.moveaxis(image, -1, 0))
    ]
    return np.clip(np.stack(planes, axis=-1), 0, 1)
