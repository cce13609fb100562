"""Frames of one camera with their times: a folder of images, an image file of many pictures, a video file, or an array."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fl_core.contracts.errors import DataError

Frames = npt.NDArray[np.uint8]
Times = npt.NDArray[np.float64]
IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
MANY = (".gif", ".webp", ".png", ".tif", ".tiff")  # may hold many pictures; pillow reads them
VIDEOS = (".mp4", ".avi", ".mkv", ".mov", ".webm", ".mpg", ".m4v")
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
MAX_PIXELS = 40_000_000  # of one frame; a file of a few kB can claim more than a machine's memory
MAX_FRAMES = 2_000_000


@dataclass(frozen=True)
class Stream:
    """times: (n,) s, ascending; source: where the n frames are; several paths: an image each."""

    times: Times
    source: Path | tuple[Path, ...] | Frames

    def frames(self, wanted: npt.NDArray[np.int64], height: int, width: int) -> Frames:
        """(len(wanted), height, width) grey, of the frames with these numbers (ascending, each once)."""
        if isinstance(self.source, np.ndarray):
            return np.stack([fitted(self.source[i], height, width) for i in wanted]) if len(wanted) else empty(height, width)  # fmt: skip
        found = {
            i: fitted(pixels, height, width) for i, pixels in zip(wanted.tolist(), opened(self.source, wanted), strict=True)
        }  # fmt: skip
        return np.stack([found[i] for i in wanted.tolist()]) if len(wanted) else empty(height, width)


def empty(height: int, width: int) -> Frames:
    return np.zeros((0, height, width), np.uint8)


def fitted(pixels: Frames, height: int, width: int) -> Frames:
    """(H, W) or (H, W, 3) -> (height, width) grey: the largest centred part of that shape, resampled."""
    if pixels.shape == (height, width):
        return np.asarray(pixels)
    from PIL import Image

    image = Image.fromarray(np.asarray(pixels)).convert("L")
    wide = min(image.width, round(image.height * width / height))
    high = min(image.height, round(image.width * height / width))
    left, top = (image.width - wide) // 2, (image.height - high) // 2
    cut = image.crop((left, top, left + max(1, wide), top + max(1, high)))
    return np.array(cut.resize((width, height), Image.Resampling.BOX), np.uint8)


def count(source: Path) -> int | None:
    """How many frames there are; None where only reading them would tell. Raises DataError naming the file."""
    if source.is_dir():
        return len(listed(source))
    if source.suffix.lower() == ".npy":
        return len(array(source))
    if source.suffix.lower() in MANY:
        with picture(source) as image:
            return int(getattr(image, "n_frames", 1))
    if source.suffix.lower() in VIDEOS:
        video_reader(source)
        return None
    raise DataError(
        f"{source}: no frames are read from this kind of file",
        remedy=f"a folder of images, or one of: .npy {' '.join(MANY)} {' '.join(VIDEOS)}",
    )


def opened(source: Path | tuple[Path, ...], wanted: npt.NDArray[np.int64]) -> Iterator[Frames]:
    """The frames with these numbers, in their order (ascending)."""
    if isinstance(source, tuple) or source.is_dir():
        files = source if isinstance(source, tuple) else listed(source)
        for i in wanted.tolist():
            with picture(files[i]) as image:
                yield decoded(image, files[i])
    elif source.suffix.lower() == ".npy":
        values = array(source)
        for i in wanted.tolist():
            yield np.array(values[i])
    elif source.suffix.lower() in VIDEOS:
        yield from video(source, wanted)
    else:
        with picture(source) as image:
            for i in wanted.tolist():
                image.seek(i)
                yield decoded(image, source)


def listed(folder: Path) -> list[Path]:
    """The images of a folder, by name."""
    found = sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGES and p.is_file())
    if not found:
        raise DataError(f"{folder}: holds no images", remedy=f"read are: {' '.join(IMAGES)}")
    return found


def array(source: Path) -> Frames:
    """(n, H, W) or (n, H, W, 3) uint8, not read yet."""
    try:
        values = np.load(source, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # numpy parses headers as Python text: SyntaxError, MemoryError and more
        raise DataError(f"{source}: not a readable npy file: {error}") from None
    fits = isinstance(values, np.ndarray) and values.dtype == np.uint8
    if not fits or not (values.ndim == 3 or (values.ndim == 4 and values.shape[3] == 3)):
        raise DataError(f"{source}: is {values.dtype}{values.shape}, expected uint8 of shape (n, H, W) or (n, H, W, 3)")
    found: Frames = values
    return found


def picture(source: Path) -> Any:
    """An open pillow image. Raises DataError."""
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # MAX_PIXELS is the stricter bound
            image = Image.open(source, formats=FORMATS)
    except FileNotFoundError:
        raise DataError(f"{source}: no such file") from None
    except Exception as error:
        raise DataError(f"{source}: the image does not decode: {str(error)[:200]}") from None
    if not 0 < image.width * image.height <= MAX_PIXELS:
        image.close()
        raise DataError(f"{source}: {image.width} x {image.height} pixels, over the limit of {MAX_PIXELS:,}")
    return image


def decoded(image: Any, source: Path) -> Frames:
    try:
        return np.array(image.convert("L"), np.uint8)
    except Exception as error:  # decoders raise errors of many kinds on damaged files
        raise DataError(
            f"{source}: the image does not decode: {str(error)[:200]}", remedy="copy it again, or drop its row"
        ) from None


def video_reader(source: Path) -> Any:
    """PyAV, where it is installed. Raises DataError with what to do instead."""
    try:
        import av
    except ImportError:
        raise DataError(
            f"{source}: reading videos needs the package 'av'",
            remedy="pip install 'fieldfleet[video]', or take the frames out: ffmpeg -i VIDEO -vf fps=5 FOLDER/%06d.png, and name the folder",
        ) from None
    return av


def video(source: Path, wanted: npt.NDArray[np.int64]) -> Iterator[Frames]:
    reader, left = video_reader(source), wanted.tolist()
    try:
        with reader.open(str(source)) as container:
            for i, frame in enumerate(container.decode(video=0)):
                if left and i == left[0]:
                    yield np.asarray(frame.to_ndarray(format="gray"), np.uint8)
                    left.pop(0)
                if not left:
                    break
    except (OSError, ValueError, IndexError) as error:
        raise DataError(f"{source}: the video does not decode: {str(error)[:200]}") from None
    if left:
        raise DataError(f"{source}: ends before frame {left[0]}", remedy="its timestamps tell of more frames")
