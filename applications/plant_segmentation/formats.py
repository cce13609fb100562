"""The formats that plant photographs with masks come in, told by what lies in the folder:

* ``images.csv``: the native one (file, mask, client; optional group, crop).
* ``labels.csv`` (file, mask; optional client, site, shape_group): masks of foreground alone, as in soy_rust. Without a client column
  BLOCK consecutive photographs of a site are one client.
* ``*.json``: COCO; polygons, run lengths as numbers or as COCO's text; crowds are not labelled.
* ``*_rgb.png`` beside ``*_label.png``, in the folder or one folder below (each a client): CVPPP leaf segmentation challenge.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from applications.plant_segmentation.pipeline import UNLABELLED
from fl_core.contracts.errors import DataError, InputError
from fl_core.contracts.names import checked_name
from fl_core.imagery import photographs
from fl_core.storage import tables

Array = npt.NDArray[Any]
TABLE_NAME, MASK_TABLE = "images.csv", "labels.csv"
BLOCK = 4  # photographs of a site without clients of its own
MAX_JSON_BYTES = 2**30
RGB, LABEL = "_rgb.png", "_label.png"


@dataclass(frozen=True)
class Annotations:
    """COCO annotations of one photograph, drawn when they are asked for; later ones lie above earlier ones."""

    height: int
    width: int
    shapes: tuple[Mapping[str, Any], ...]
    origin: str

    def labels(self) -> npt.NDArray[np.int32]:
        made = np.zeros((self.height, self.width), np.int32)
        for number, shape in enumerate(self.shapes, start=1):
            value = UNLABELLED if shape.get("iscrowd") else number
            made[drawn(shape.get("segmentation"), self.height, self.width, self.origin)] = value
        return made


@dataclass(frozen=True)
class Picture:
    """name: unique in its data set, a relative path; image: a file or (H, W, 3) uint8; mask: a file, (H, W) numbers or annotations."""

    name: str
    client: str
    group: str
    image: Path | Array
    mask: Path | Array | Annotations
    crop: str = ""

    def pixels(self) -> Array:
        return photographs.read_rgb(self.image, self.name) if isinstance(self.image, Path) else self.image

    def labels(self) -> npt.NDArray[np.int32]:
        """(H, W): 0 = ground, UNLABELLED, else the number of a plant."""
        if isinstance(self.mask, Annotations):
            return self.mask.labels()
        if isinstance(self.mask, Path):
            found = photographs.read_labels(self.mask, self.mask.name)
            if found.min(initial=0) < 0 or found.max(initial=0) > UNLABELLED:
                raise DataError(f"{self.mask}: a label lies outside 0 to {UNLABELLED}")
            return found
        return self.mask.astype(np.int32)


def read(path: Path) -> tuple[Picture, ...]:
    """Raises DataError naming the file, the column or the line."""
    if (path / TABLE_NAME).is_file():
        return from_table(path, TABLE_NAME)
    if (path / MASK_TABLE).is_file():
        return from_table(path, MASK_TABLE)
    documents = sorted([*path.glob("*.json"), *path.glob("annotations/*.json")])
    if documents:
        found = tuple(p for document in documents for p in from_coco(path, document))
    else:
        found = from_challenge(path)
    if not found:
        raise DataError(
            f"{path}: holds no plants in a known format",
            remedy=f"accepted: {TABLE_NAME} (file, mask, client), COCO *.json, or *{RGB} beside *{LABEL}",
        )
    if len({p.name for p in found}) != len(found):
        raise DataError(f"{path}: two files list the same photograph", remedy="keep one annotation file a photograph")
    return found


def named(value: str, kind: str, where: str) -> str:
    try:
        return checked_name(value, kind)
    except InputError as error:
        raise DataError(f"{where}: {error.message}", remedy=error.remedy) from None


def from_table(path: Path, name: str) -> tuple[Picture, ...]:
    table = path / name
    required = ("file", "mask", "client") if name == TABLE_NAME else ("file", "mask")
    rows = tables.read_csv(table, required=required, limit_rows=1_000_000)
    site = next((c for c in ("site", "shape_group") if c in rows[0]), "")
    seen: dict[str, int] = {}
    found, names = [], set[str]()
    for line, row in enumerate(rows, start=2):
        where = f"{table}: line {line}"
        file, mask = (photographs.inside(path, where, row[k].strip()) for k in ("file", "mask"))
        for one in (file, mask):
            photographs.check_image(one, one.name)
        place = row.get(site, "") if site else "photographs"
        seen[place] = seen.get(place, -1) + 1
        client = row["client"].strip() if "client" in row else f"{place or 'none'}-{seen[place] // BLOCK:03d}"
        short = row["file"].strip().removeprefix("images/")
        if short in names:
            raise DataError(f"{where}: {row['file']!r} is listed twice")
        names.add(short)
        group = (row.get("group") or short).strip()
        found.append(Picture(short, named(client, "client", where), group, file, mask, (row.get("crop") or "").strip()))
    return tuple(found)


def from_challenge(path: Path) -> tuple[Picture, ...]:
    """*_rgb.png with *_label.png; each folder is a client."""
    found = []
    for file in sorted([*path.glob(f"*{RGB}"), *path.glob(f"*/*{RGB}")]):
        mask = file.with_name(file.name.removesuffix(RGB) + LABEL)
        name = file.relative_to(path).as_posix()
        photographs.inside(path, str(path), name)
        photographs.check_image(file, name)
        photographs.check_image(mask, mask.name)
        client = file.parent.name if file.parent != path else path.resolve().name
        found.append(Picture(name, named(client, "client", str(path)), name, file, mask))
    return tuple(found)


def from_coco(path: Path, document: Path) -> list[Picture]:
    """A photograph's client: its ``client`` entry, else the folder that it lies in, else the document's name."""
    table = _json(document)
    images = {i["id"]: i for i in _list(table, "images", document)}
    shapes: dict[Any, list[Mapping[str, Any]]] = {key: [] for key in images}
    for shape in _list(table, "annotations", document):
        if shape.get("image_id") not in shapes:
            raise DataError(
                f"{document}: annotation {shape['id']!r} is of image {shape.get('image_id')!r}, which is not listed"
            )
        shapes[shape["image_id"]].append(shape)
    found = []
    for key, image in images.items():
        name, where = str(image.get("file_name", "")), f"{document}: image {key!r}"
        file = next(
            (f for f in (photographs.inside(path, where, n) for n in (name, f"images/{name}")) if f.is_file()),
            path / name,
        )
        photographs.check_image(file, name)
        size: tuple[Any, Any] = image.get("height"), image.get("width")
        if not all(type(n) is int and 0 < n <= 100_000 for n in size) or size[0] * size[1] > photographs.MAX_PIXELS:
            raise DataError(f"{where}: height and width {size} are no size of a photograph")
        folder = Path(name).parent.name
        client = named(str(image.get("client") or folder or document.stem), "client", where)
        notes = Annotations(size[0], size[1], tuple(shapes[key]), f"{where} ({name})")
        found.append(Picture(name, client, str(image.get("group") or name), file, notes, str(image.get("crop", ""))))
    return found


def _json(document: Path) -> Mapping[str, Any]:
    try:
        if document.stat().st_size > MAX_JSON_BYTES:
            raise DataError(f"{document}: larger than {MAX_JSON_BYTES:,} bytes")
        table = json.loads(document.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{document}: not readable as JSON: {error}") from None
    if not isinstance(table, dict):
        raise DataError(f"{document}: is no COCO document", remedy="it needs the lists images and annotations")
    return table


def _list(table: Mapping[str, Any], key: str, document: Path) -> list[Mapping[str, Any]]:
    """Raises DataError for entries without an id of their own."""
    entries = table.get(key)
    if not isinstance(entries, list) or not all(
        isinstance(e, dict) and isinstance(e.get("id"), (int, str)) for e in entries
    ):
        raise DataError(f"{document}: {key!r} is not a list of entries with an id")
    if len({e["id"] for e in entries}) != len(entries):
        raise DataError(f"{document}: two entries of {key!r} have the same id")
    return entries


def drawn(segmentation: Any, height: int, width: int, origin: str) -> npt.NDArray[np.bool_]:
    """(height, width) of a list of polygons or of run lengths. Raises DataError naming ``origin``."""
    if isinstance(segmentation, dict):
        if list(segmentation.get("size", ())) != [height, width]:
            raise DataError(
                f"{origin}: run lengths of size {segmentation.get('size')}, the photograph is {[height, width]}"
            )
        counts = segmentation.get("counts")
        return from_runs(decode_runs(counts, origin) if isinstance(counts, str) else counts, height, width, origin)
    if not isinstance(segmentation, list) or not segmentation:
        raise DataError(f"{origin}: an annotation has no polygons and no run lengths")
    return from_polygons(segmentation, height, width, origin)


def from_polygons(polygons: Sequence[Any], height: int, width: int, origin: str) -> npt.NDArray[np.bool_]:
    """x0, y0, x1, y1, ... of each; a pixel is inside where its centre is."""
    from PIL import Image, ImageDraw

    canvas = Image.new("1", (width, height))
    pen = ImageDraw.Draw(canvas)
    for polygon in polygons:
        try:
            corners = np.asarray(polygon, np.float64)
        except (TypeError, ValueError):
            corners = np.zeros(0)
        if corners.ndim != 1 or len(corners) < 6 or len(corners) % 2 or not (np.abs(corners) < 1e6).all():
            raise DataError(f"{origin}: a polygon is not a list of three or more finite points x, y")
        pen.polygon((corners - 0.5).tolist(), fill=1)  # COCO counts from the corner of a pixel, pillow from its centre
    return np.array(canvas, bool)


def from_runs(counts: Any, height: int, width: int, origin: str) -> npt.NDArray[np.bool_]:
    """Lengths of runs of 0, 1, 0, ... down the columns, one column after the other."""
    try:
        lengths = np.asarray(counts, np.int64)
    except (TypeError, ValueError, OverflowError):
        lengths = np.full(1, -1)
    if lengths.ndim != 1 or (lengths < 0).any() or (lengths > height * width).any() or lengths.sum() != height * width:
        raise DataError(f"{origin}: the run lengths do not fill {height} x {width} pixels")
    values = np.arange(len(lengths)) % 2 == 1
    made: npt.NDArray[np.bool_] = np.repeat(values, lengths).reshape(width, height).T
    return made


def decode_runs(text: str, origin: str) -> list[int]:
    """COCO's text: five bits a character from 48 on, the lowest first, 32 = more follow, 16 of the last = negative; from the third run
    on each is the difference to the run two before."""
    counts: list[int] = []
    value = shift = 0
    for letter in text:
        code = ord(letter) - 48
        if not 0 <= code < 64 or shift > 40:
            raise DataError(f"{origin}: {text[:20]!r} is no run length text")
        value |= (code & 31) << shift
        shift += 5
        if not code & 32:
            if code & 16:
                value -= 1 << shift
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value = shift = 0
    if shift:
        raise DataError(f"{origin}: run length text ends too early")
    return counts


def encode_runs(mask: Array) -> str:
    """The inverse: (H, W) bool -> COCO's text."""
    flat = np.asarray(mask, bool).T.ravel()
    edges = np.flatnonzero(np.diff(flat.astype(np.int8))) + 1
    counts = np.diff(np.concatenate([[0], edges, [len(flat)]])).tolist()
    if len(flat) and flat[0]:
        counts = [0, *counts]
    letters = []
    for i, count in enumerate(counts):
        value = count - counts[i - 2] if i > 2 else count
        while True:
            code, value = value & 31, value >> 5
            more = value != (-1 if code & 16 else 0)
            letters.append(chr(48 + code + (32 if more else 0)))
            if not more:
                break
    return "".join(letters)
