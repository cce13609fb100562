"""Pre- and post-processing, torch-free: from an encoded photograph to the uint8 square that the model takes.

The pixels' scaling is inside the model's graph, so that every caller feeds it plain RGB.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from applications.plant_disease.config import Config
from fl_core.contracts.errors import DataError
from fl_core.learning.application import Outputs, TensorSpec

Pixels = npt.NDArray[np.uint8]
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP")
MAX_FILE_BYTES = 64 * 2**20
MAX_PIXELS = 80_000_000  # of one photograph; a file of a few kB can claim more than a machine's memory


def inputs(config: Config) -> tuple[TensorSpec, ...]:
    side = config.data.image_size
    return (TensorSpec(name="image", dtype="uint8", shape=(-1, side, side, 3)),)


def outputs(config: Config) -> tuple[TensorSpec, ...]:
    return (TensorSpec(name="logits", dtype="float32", shape=(-1, len(config.data.classes))),)


def labels(config: Config) -> tuple[str, ...]:
    return config.data.classes


def postprocess(config: Config, outputs: Outputs) -> dict[str, npt.NDArray[Any]]:
    """prediction: the most likely class; score_CLASS: its probability."""
    logits = np.asarray(outputs["logits"], np.float64)
    odds = np.exp(logits - logits.max(axis=1, keepdims=True, initial=-np.inf)) if len(logits) else logits
    score = odds / odds.sum(axis=1, keepdims=True)
    best = np.array(config.data.classes)[score.argmax(axis=1)] if len(score) else np.zeros(0, np.str_)
    return {"prediction": best, **{f"score_{name}": score[:, i] for i, name in enumerate(config.data.classes)}}


def check_image(path: Path, name: str) -> None:
    """Reads the header alone. Raises DataError naming ``name`` when it is missing, no image, or too large."""
    with _opened(path, name):
        pass


def read_image(path: Path, name: str, side: int) -> Pixels:
    """(side, side, 3) RGB: upright, the largest centred square, resampled. Raises DataError naming ``name``."""
    from PIL import ImageOps

    with _opened(path, name) as image:
        try:
            image.draft("RGB", (2 * side, 2 * side))
            rgb = ImageOps.exif_transpose(image).convert("RGB")
            edge = min(rgb.size)
            left, top = (rgb.width - edge) // 2, (rgb.height - edge) // 2
            return resized(rgb.crop((left, top, left + edge, top + edge)), side)
        except Exception as error:  # decoders raise errors of many kinds on damaged files
            raise _undecodable(path, name, error) from None


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


def encode_png(pixels: Pixels) -> bytes:
    """Lossless; the same pixels come back."""
    import io

    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG", compress_level=1)
    return out.getvalue()


def _opened(path: Path, name: str) -> Any:
    from PIL import Image

    try:
        size = path.stat().st_size if path.is_file() else -1
    except OSError:  # such as a name too long for the file system
        size = -1
    if size < 0:
        raise DataError(f"{path}: no such image", remedy=f"labels.csv names {name!r}: restore it or drop its row")
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
        remedy=f"copy it again, or drop its row from labels.csv (readable: {', '.join(FORMATS)})",
    )
