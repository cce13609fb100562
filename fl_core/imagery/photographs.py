"""Photographs and label images from outside: bounded, upright, refused by name where they are damaged. Needs pillow."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt

from fl_core.contracts.errors import DataError

Pixels = npt.NDArray[np.uint8]
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP")
MAX_FILE_BYTES = 64 * 2**20
MAX_PIXELS = 80_000_000  # of one photograph; a file of a few kB can claim more than a machine's memory


def check_image(path: Path, name: str) -> None:
    """Reads the header alone. Raises DataError naming ``name`` when it is missing, no image, or too large."""
    with opened(path, name):
        pass


@contextmanager
def decoded(path: Path, name: str) -> Iterator[Any]:
    """The open image; whatever a damaged file makes pillow raise inside becomes a DataError naming ``name``."""
    with opened(path, name) as image:
        try:
            yield image
        except DataError:
            raise
        except Exception as error:  # decoders raise errors of many kinds on damaged files
            raise _undecodable(path, name, error) from None


def read_square(path: Path, name: str, side: int) -> Pixels:
    """(side, side, 3) RGB: upright, the largest centred square, resampled. Raises DataError naming ``name``."""
    from PIL import ImageOps

    with decoded(path, name) as image:
        image.draft("RGB", (2 * side, 2 * side))
        rgb = ImageOps.exif_transpose(image).convert("RGB")
        edge = min(rgb.size)
        left, top = (rgb.width - edge) // 2, (rgb.height - edge) // 2
        return resized(rgb.crop((left, top, left + edge, top + edge)), side)


def read_rgb(path: Path, name: str) -> Pixels:
    """(height, width, 3) RGB, upright. Raises DataError naming ``name``."""
    from PIL import ImageOps

    with decoded(path, name) as image:
        return np.array(ImageOps.exif_transpose(image).convert("RGB"), np.uint8)


def read_labels(path: Path, name: str) -> npt.NDArray[np.int32]:
    """(height, width): the values of a label image, palette indices as they are; each colour of an RGB image is a label, black 0.

    Raises DataError naming ``name``.
    """
    with decoded(path, name) as image:
        if image.mode in ("1", "L", "P", "I", "I;16", "I;16B", "I;16L"):
            return np.array(image, np.int32)
        rgb = np.array(image.convert("RGB"), np.int32)
    colours = (rgb[..., 0] << 16) | (rgb[..., 1] << 8) | rgb[..., 2]
    values, found = np.unique(colours, return_inverse=True)
    number = np.arange(len(values), dtype=np.int32) + (0 if values[0] == 0 else 1)
    return number[found].reshape(colours.shape).astype(np.int32)


def resized(square: Any, side: int) -> Pixels:
    """A square RGB image of pillow's -> (side, side, 3)."""
    from PIL import Image

    if square.size != (side, side):
        square = square.resize((side, side), Image.Resampling.LANCZOS, reducing_gap=3.0)
    return np.array(square, np.uint8)


def from_pixels(pixels: Pixels, side: int) -> Pixels:
    """(H, H, 3) RGB -> (side, side, 3)."""
    if len(pixels) == side:
        return pixels
    from PIL import Image

    return resized(Image.fromarray(pixels), side)


def encode_png(pixels: npt.NDArray[Any]) -> bytes:
    """Lossless; the same pixels come back. uint8 (H, W, 3) or (H, W), or uint16 (H, W)."""
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG", compress_level=1)
    return out.getvalue()


def inside(root: Path, where: str, name: str) -> Path:
    """A file of the data set ``root`` that ``where`` names. Raises DataError for one outside its folder, by its name or by a link."""
    pure = PurePosixPath(name)
    if not name or pure.is_absolute() or ".." in pure.parts or "\0" in name:
        raise DataError(
            f"{where}: {name!r} is not a file inside the data set's folder",
            remedy="write paths relative to the data set, without '..'",
        )
    if not (root / name).resolve().is_relative_to(root.resolve()):
        raise DataError(f"{where}: {name!r} links to a file outside the data set's folder")
    return root / name


def opened(path: Path, name: str) -> Any:
    from PIL import Image

    try:
        size = path.stat().st_size if path.is_file() else -1
    except OSError:  # such as a name too long for the file system
        size = -1
    if size < 0:
        raise DataError(f"{path}: no such image", remedy=f"the data set names {name!r}: restore it or drop its row")
    if size > MAX_FILE_BYTES:
        raise DataError(f"{path}: larger than {MAX_FILE_BYTES:,} bytes")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # MAX_PIXELS is the stricter bound
            image = Image.open(path, formats=FORMATS)
    except Exception as error:
        raise _undecodable(path, name, error) from None
    width, height = image.size
    if not 0 < width * height <= MAX_PIXELS:
        image.close()
        raise DataError(f"{path}: {width} x {height} pixels, over the limit of {MAX_PIXELS:,}", remedy="scale it down")
    return image


def _undecodable(path: Path, name: str, error: Exception) -> DataError:
    reason = str(error).replace(str(path), name).splitlines() or [type(error).__name__]
    return DataError(
        f"{path}: the image does not decode: {reason[0][:200]}",
        remedy=f"copy it again, or drop its row from the data set (readable: {', '.join(FORMATS)})",
    )
