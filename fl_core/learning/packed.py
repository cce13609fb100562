"""Packed examples: what an application's pipeline makes of a data set, once, in shards that are mapped into memory. Torch-free.

    pack.json                              application, [data], arrays, shards with their sizes and sha256; written last
    columns.npz                            example_id, client, group, ...
    shard-00000/inputs.NAME.npy  targets.npy  ...

Whatever the application reads (folders of images, npz, SEG-Y, zarr) is read, windowed and scaled once; training then reads rows of
.npy files, in any order, without decoding. Augmentation happens in training as ever. A packed folder is given as ``--data``.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import shutil
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from fl_core.contracts.config import to_table
from fl_core.contracts.errors import DataError, IntegrityError
from fl_core.contracts.progress import Progress
from fl_core.learning.application import Application
from fl_core.learning.examples import Examples
from fl_core.learning.windows import Sliceable, Windows
from fl_core.storage import archive, atomic

INDEX, COLUMNS = "pack.json", "columns.npz"
FORMAT = 1
SHARD_BYTES = 256 * 2**20
READ_BYTES = 16 * 2**20
TARGETS, INPUTS = "targets", "inputs."
# Of [data]: what is decided when training starts, not when examples are made.
FREE = ("holdout_fraction", "validation_fraction", "in_memory_mb")
Array = npt.NDArray[Any]


def is_packed(folder: Path) -> bool:
    return (folder / INDEX).is_file()


def pack(
    app: Application, config: Any, examples: Examples, origin: str, out: Path, shard_bytes: int = SHARD_BYTES
) -> dict[str, Any]:
    """Writes ``out`` (which must not exist) as a whole or not at all; returns its index."""
    arrays: dict[str, Any] = {**{INPUTS + k: v for k, v in examples.inputs.items()}, TARGETS: examples.targets}
    row = sum(math.prod(a.shape[1:]) * a.dtype.itemsize for a in arrays.values())
    each = max(1, shard_bytes // max(1, row))
    count = len(examples)
    index: dict[str, Any] = {
        "format": FORMAT,
        "application": app.name,
        "data": to_table(config.data),
        "origin": origin,
        "examples": count,
        "arrays": {name: {"dtype": str(a.dtype), "shape": list(a.shape[1:])} for name, a in arrays.items()},
        "shards": [],
        "files": {},
    }
    with atomic.new_folder(out) as folder, Progress(f"pack {app.name}", max(1, count)) as bar:
        columns: Any = {k: np.asarray(v) for k, v in examples.columns.items()}
        np.savez(folder / COLUMNS, **columns)
        for number, first in enumerate(range(0, count, each)):
            last = min(first + each, count)
            name = f"shard-{number:05d}"
            (folder / name).mkdir()
            for kind, array in arrays.items():
                _write_rows(folder / name / f"{kind}.npy", array, first, last)
            index["shards"].append({"folder": name, "examples": last - first})
            bar.update(last, name)
        for path in sorted(folder.rglob("*.np[yz]")):
            index["files"][str(path.relative_to(folder))] = {
                "bytes": path.stat().st_size,
                "sha256": atomic.sha256_file(path),
            }
        atomic.write_json(folder / INDEX, index)
    return index


def _write_rows(path: Path, array: Any, first: int, last: int) -> None:
    """Rows ``first`` to ``last``, some at a time: the array may be larger than memory."""
    shape = array.shape[1:]
    step = max(1, READ_BYTES // max(1, math.prod(shape) * array.dtype.itemsize))
    made = np.lib.format.open_memmap(path, mode="w+", dtype=array.dtype, shape=(last - first, *shape))
    for at in range(first, last, step):
        end = min(at + step, last)
        made[at - first : end - first] = np.asarray(array[at:end])
    made.flush()


def read_index(folder: Path) -> dict[str, Any]:
    """Raises IntegrityError naming the file and what is wrong with it."""
    path = folder / INDEX
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise IntegrityError(f"{path}: not readable: {error}") from None
    kinds = {"application": str, "data": dict, "examples": int, "arrays": dict, "shards": list, "files": dict}
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise IntegrityError(
            f"{path}: not a pack of format {FORMAT}", remedy="make it again with 'fieldfleet data pack'"
        )
    for key, kind in kinds.items():
        if not isinstance(index.get(key), kind):
            raise IntegrityError(f"{path}: {key!r} must be of type {kind.__name__}")
    for name, facts in index["files"].items():
        if Path(name).is_absolute() or ".." in Path(name).parts or not isinstance(facts, dict):
            raise IntegrityError(f"{path}: {name!r} is not a file of this folder")
    return index


def check(folder: Path) -> dict[str, Any]:
    """Hashes every file. Raises IntegrityError naming all that are missing or differ."""
    index = read_index(folder)
    bad = [problem for name, facts in sorted(index["files"].items()) if (problem := _problem(folder, name, facts))]
    if bad:
        raise IntegrityError(f"{folder}: {'; '.join(bad)}", remedy="copy these files again, or pack the data set again")
    PackedData.open(folder)
    return index


def _problem(folder: Path, name: str, facts: Any) -> str:
    path = folder / name
    if not path.is_file():
        return f"{name} is missing"
    if path.stat().st_size != facts.get("bytes"):
        return f"{name} has {path.stat().st_size:,} bytes, not {facts.get('bytes'):,}"
    return "" if atomic.sha256_file(path) == facts.get("sha256") else f"{name}: its sha256 is another"


@dataclass(frozen=True)
class PackedData:
    """A packed folder as a data set of its application. Sizes are checked when it is opened, bytes by ``check``."""

    folder: Path
    index: dict[str, Any]
    packed: Examples

    @classmethod
    def open(cls, folder: Path) -> Self:
        index = read_index(folder)
        for name, facts in index["files"].items():
            path = folder / name
            if not path.is_file() or path.stat().st_size != facts.get("bytes"):
                raise IntegrityError(
                    f"{path}: missing, or not of the size in {INDEX}", remedy="copy it again; fieldfleet data check"
                )
        arrays = {name: _lazy(folder, index, name) for name in index["arrays"]}
        columns = {k: np.array(v) for k, v in archive.read_npz(folder / COLUMNS).items()}
        inputs = {k.removeprefix(INPUTS): v for k, v in arrays.items() if k.startswith(INPUTS)}
        return cls(folder, index, Examples(inputs, arrays[TARGETS], columns))

    def client_ids(self) -> tuple[str, ...]:
        return self.packed.clients()

    def select(self, clients: Collection[str]) -> Self:
        return replace(self, packed=self.packed.of_clients(clients))

    def write(self, folder: Path) -> None:
        raise DataError(
            f"{self.folder}: a packed data set is not in its application's own format", remedy="copy the folder"
        )

    def examples(self, config: Any) -> Examples:
        """Raises DataError where the configuration would have made other examples."""
        packed, now = self.index["data"], to_table(config.data)
        odd = sorted(k for k in {*packed, *now} - set(FREE) if packed.get(k) != now.get(k))
        if odd:
            raise DataError(
                f"{self.folder}: packed with data.{odd[0]} = {packed.get(odd[0])!r}, asked for {now.get(odd[0])!r}",
                remedy="set it as it was, or pack the data set again",
            )
        return self.packed


def _lazy(folder: Path, index: dict[str, Any], name: str) -> Any:
    """Rows of the shards' files; numbers that are one an example are read at once."""
    shape, dtype = tuple(index["arrays"][name]["shape"]), np.dtype(index["arrays"][name]["dtype"])
    sources: list[Sliceable] = []
    rows: list[Array] = []
    for number, shard in enumerate(index["shards"]):
        path = folder / shard["folder"] / f"{name}.npy"
        try:
            mapped = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise IntegrityError(f"{path}: not readable: {error}") from None
        if mapped.shape != (shard["examples"], *shape) or mapped.dtype != dtype:
            raise IntegrityError(f"{path}: is {mapped.dtype}{list(mapped.shape)}, not as {INDEX} says")
        if not shape:
            rows.append(np.array(mapped))
            continue
        sources.append(mapped.reshape(-1, *shape[1:]))
        corners = np.zeros((len(mapped), 1 + len(shape)), np.int64)
        corners[:, 0], corners[:, 1] = number, np.arange(len(mapped)) * shape[0]
        rows.append(corners)
    joined = np.concatenate(rows) if rows else np.zeros((0, 1 + len(shape)), np.int64)
    return Windows(sources, joined, shape, dtype) if shape else joined.astype(dtype)


def stage(folder: Path, scratch: Path) -> Path:
    """A copy of a packed folder on a node's own disk, checked while it is made; made once for all processes of the node.

    Raises IntegrityError for a byte that is another, DataError for a folder that is not packed or does not fit.
    """
    if not is_packed(folder):
        raise DataError(f"{folder}: not packed", remedy="only packed data are staged: fieldfleet data pack")
    scratch.mkdir(parents=True, exist_ok=True)
    name = f"pack-{atomic.sha256_file(folder / INDEX)[:16]}"
    with (scratch / f".{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        target = scratch / name
        if not is_packed(target):
            _copy(folder, target)
    return target


def _copy(folder: Path, target: Path) -> None:
    index = read_index(folder)
    needed, free = sum(f["bytes"] for f in index["files"].values()), shutil.disk_usage(target.parent).free
    if needed > free:
        raise DataError(f"{target.parent}: {free / 1e9:.1f} GB free, {folder} needs {needed / 1e9:.1f} GB")
    with atomic.new_folder(target) as temporary:
        for name, facts in index["files"].items():
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            digest = hashlib.sha256()
            with (temporary / name).open("wb") as file:
                for part in _parts(folder / name):
                    digest.update(part)
                    file.write(part)
            if digest.hexdigest() != facts["sha256"]:
                raise IntegrityError(f"{folder / name}: its sha256 is not the one in {INDEX}", remedy="copy it again")
        shutil.copyfile(folder / INDEX, temporary / INDEX)


def _parts(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while part := file.read(READ_BYTES):
            yield part
