"""Image files → arrays, with nothing lost on the way: every band and every bit is kept."""

import io
from pathlib import PurePosixPath

import imagecodecs
import numpy as np
import tifffile
from PIL import Image, UnidentifiedImageError

EXTENSIONS = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".npy")
MAX_CHANNELS = 13
ORIENTATION = 274  # the number of the tag, the same in EXIF and in TIFF


def decode(data: bytes, path: str) -> np.ndarray:
    """Decode the bytes of one image file, turned upright as its orientation tag says.

    Returns (H, W, C) of uint8, uint16 or float32 in [0, 1], C from 1 to 13. Palettes become RGB,
    1-bit images gray; the pages of a TIFF of equal size are its bands. ValueError, naming `path`,
    for a damaged file and for values, shapes or types other than these.
    """
    suffix = PurePosixPath(path).suffix.lower()
    try:
        if suffix == ".npy":
            image = np.load(io.BytesIO(data), allow_pickle=False)
        elif suffix in (".tif", ".tiff"):
            image = _decode_tiff(data)
        else:
            image = _decode_pillow(data)
    except Exception as error:  # decoders raise whatever they please on damaged bytes
        raise ValueError(f"{path} cannot be read as an image: {error}") from error
    return _check_shape(_check_values(image, path), path)


def _decode_pillow(data: bytes) -> np.ndarray:
    try:
        file = Image.open(io.BytesIO(data), formats=("PNG", "JPEG"))
    except UnidentifiedImageError:
        raise ValueError("it is neither a PNG nor a JPEG file") from None
    with file:
        # Pillow silently reduces 16-bit colours to 8; byte 24 of a PNG file is its bit depth.
        deep = file.format == "PNG" and data[24] == 16
        image = imagecodecs.png_decode(data) if deep else np.asarray(_plain(file))
        return _upright(image, file.getexif().get(ORIENTATION, 1))


def _plain(file: Image.Image) -> Image.Image:
    if file.mode in ("L", "LA", "RGB", "RGBA"):
        return file
    return file.convert("L" if file.mode == "1" else "RGB")


def _decode_tiff(data: bytes) -> np.ndarray:
    # Not with Pillow: it knows no 13 bands, and 13.0 scrambles files tagged as lying sideways.
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        page = file.pages.first
        if page.bitspersample not in (1, 8, 16, 32, 64):
            raise ValueError(f"it has {page.bitspersample} bits per sample, not 1, 8, 16, 32 or 64")
        # The file says itself whether its bands come last (YXS), first (SYX) or as pages.
        image, axes = file.series[0].asarray(), file.series[0].axes
        if len(axes) > 3 or not {"Y", "X"} <= set(axes):
            raise ValueError(f"its axes are {axes}, not one image of bands, rows and columns")
        image = np.moveaxis(image, (axes.index("Y"), axes.index("X")), (0, 1))
        if page.photometric == tifffile.PHOTOMETRIC.PALETTE:
            image = (np.asarray(page.colormap).T >> 8).astype(np.uint8)[image]
        if page.photometric == tifffile.PHOTOMETRIC.MINISWHITE:
            image = ~image
        return _upright(image, page.tags.valueof(ORIENTATION, default=1))


def _upright(image: np.ndarray, orientation: int) -> np.ndarray:
    # The eight values of the tag are the elements of D_4: a transposition, then two mirrors.
    if orientation in (5, 6, 7, 8):
        image = image.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        image = image[::-1]
    if orientation in (2, 3, 6, 7):
        image = image[:, ::-1]
    return image


def _check_values(image: np.ndarray, path: str) -> np.ndarray:
    if image.dtype == np.bool_:
        return image.astype(np.uint8) * np.uint8(255)
    if image.dtype.kind == "u" and image.dtype.itemsize <= 2:
        return image.astype(image.dtype.newbyteorder("="))
    if image.dtype.kind != "f":
        raise ValueError(
            f"{path} holds {image.dtype} values; save uint8, uint16 or floats in [0, 1]."
        )
    if not ((image >= 0) & (image <= 1)).all():  # false for NaN as well
        raise ValueError(
            f"{path} holds floats from {image.min():g} to {image.max():g}; scale them to [0, 1]."
        )
    return image.astype(np.float32)


def _check_shape(image: np.ndarray, path: str) -> np.ndarray:
    image = image[..., None] if image.ndim == 2 else image
    if image.ndim != 3 or not 1 <= image.shape[2] <= MAX_CHANNELS or min(image.shape[:2]) < 2:
        raise ValueError(
            f"{path} has shape {image.shape}; expected (H, W) or (H, W, C) of at least 2×2 pixels "
            f"and at most {MAX_CHANNELS} channels."
        )
    return np.ascontiguousarray(image)
