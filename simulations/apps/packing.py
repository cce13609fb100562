"""Flower messages between this process and its workers: the model once for each worker, large replies through files.

Everything is pickled, as in Flower's own simulation: both ends are processes of one job. A client gets objects of its own,
so that what it changes is seen by nobody else.
"""

from __future__ import annotations

import io
import os
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

from flwr.app import Array

SHARED = 1 << 12  # bytes: a payload of at least this is sent to each worker once and then named
STORED = 1 << 16  # bytes: an array of a reply of at least this stays in a file until it is asked for
KEPT = 64 << 20  # bytes of payloads that are kept for the next message, at least


class Broadcast:
    """Payloads by number. The same bytes object keeps its number while it is kept: the newest ``KEPT`` bytes are."""

    def __init__(self) -> None:
        self._numbers: OrderedDict[int, tuple[int, bytes]] = (
            OrderedDict()
        )  # id -> (number, payload): keeps the id valid
        self._count, self._bytes = 0, 0

    def number(self, payload: bytes) -> int:
        found = self._numbers.get(id(payload))
        if found is None:
            self._count += 1
            found = self._numbers[id(payload)] = (self._count, payload)
            self._bytes += len(payload)
        self._numbers.move_to_end(id(payload))
        return found[0]

    def payloads(self, numbers: list[int]) -> dict[int, bytes]:
        wanted = set(numbers)
        return {number: payload for number, payload in self._numbers.values() if number in wanted}

    def kept(self, in_use: int) -> set[int]:
        """Drop the oldest beyond the limit (twice what the newest message uses); the numbers that remain."""
        limit = max(KEPT, 2 * in_use)
        while self._bytes > limit and len(self._numbers) > 1:
            _, (_, payload) = self._numbers.popitem(last=False)
            self._bytes -= len(payload)
        return {number for number, _ in self._numbers.values()}


class _Sender(pickle.Pickler):
    def __init__(self, stream: io.BytesIO, broadcast: Broadcast) -> None:
        super().__init__(stream, pickle.HIGHEST_PROTOCOL)
        self._broadcast, self.used, self.bytes = broadcast, [], 0  # type: ignore[var-annotated]

    def persistent_id(self, obj: Any) -> Any:
        if type(obj) is bytes and len(obj) >= SHARED:
            self.used.append(self._broadcast.number(obj))
            self.bytes += len(obj)
            return self.used[-1]
        return None


class _Receiver(pickle.Unpickler):
    def __init__(self, stream: io.BytesIO, payloads: dict[int, bytes]) -> None:
        super().__init__(stream)
        self._payloads = payloads

    def persistent_load(self, pid: Any) -> bytes:
        return self._payloads[pid]


def pack(value: Any, broadcast: Broadcast) -> tuple[bytes, list[int], int]:
    """(pickle, numbers of the payloads it names, their bytes)."""
    stream = io.BytesIO()
    sender = _Sender(stream, broadcast)
    sender.dump(value)
    return stream.getvalue(), sender.used, sender.bytes


def unpack(packed: bytes, payloads: dict[int, bytes]) -> Any:
    return _Receiver(io.BytesIO(packed), payloads).load()


# Replies


class Spool:
    """A file of array bytes that a worker wrote. It is removed at once and lives as long as an array points into it."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDONLY)
        path.unlink()

    def read(self, offset: int, length: int) -> bytes:
        found = os.pread(self._file, length, offset)
        while len(found) < length:  # a single read stops at 2 GiB
            part = os.pread(self._file, length - len(found), offset + len(found))
            if not part:
                raise OSError(f"a reply's file ended at {offset + len(found)} bytes")
            found += part
        return found

    def __del__(self) -> None:
        os.close(self._file)


class StoredArray(Array):
    """An Array whose bytes stay on disk; each use reads them. A strategy that adds up replies holds one at a time."""

    def __init__(self, dtype: str, shape: tuple[int, ...], stype: str, place: tuple[Spool, int, int]) -> None:
        self.__dict__.update(dtype=dtype, shape=shape, stype=stype, _place=place)

    @property
    def data(self) -> bytes:
        own: bytes | None = self.__dict__.get("_own")
        if own is not None:
            return own
        spool, offset, length = self.__dict__["_place"]
        return spool.read(offset, length)  # type: ignore[no-any-return]

    @data.setter
    def data(self, value: bytes) -> None:
        self.__dict__["_own"] = value

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Array):
            return NotImplemented
        return _fields(self) == _fields(other)

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> tuple[Any, ...]:
        return Array, _fields(self)


def _fields(array: Array) -> tuple[Any, ...]:
    return array.dtype, array.shape, array.stype, array.data


class ReplyWriter:
    """The worker's side: pickles replies, large arrays into a file that begins anew with each batch."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder, self._name = folder, name
        self._batch, self._file, self._path, self._end = -1, -1, Path(), 0

    def pack(self, value: Any, batch: int) -> tuple[bytes, str]:
        """(pickle, the name of its file, "" for none)."""
        stream, writer = io.BytesIO(), self
        used = ""

        class Sender(pickle.Pickler):
            def persistent_id(self, obj: Any) -> Any:
                nonlocal used
                if type(obj) is not Array or len(obj.data) < STORED:
                    return None
                offset = writer._write(obj.data, batch)
                used = writer._path.name
                return obj.dtype, obj.shape, obj.stype, offset, len(obj.data)

        Sender(stream, pickle.HIGHEST_PROTOCOL).dump(value)
        return stream.getvalue(), used

    def _write(self, data: bytes, batch: int) -> int:
        if batch != self._batch:
            self.close()
            self._batch, self._end = batch, 0
            self._path = self._folder / f"{self._name}-{batch}"
            self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        offset, view = self._end, memoryview(data)
        while view:
            view = view[os.write(self._file, view) :]
        self._end += len(data)
        return offset

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


class ReplyReader:
    """The other side, for one worker: the file that it writes now is open; earlier ones live on in their arrays."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._name = folder, ""
        self._spool: Spool | None = None

    def unpack(self, packed: bytes, file: str) -> Any:
        if file and file != self._name:
            self._spool, self._name = Spool(self._folder / file), file
        spool = self._spool

        class Receiver(pickle.Unpickler):
            def persistent_load(self, pid: Any) -> Array:
                dtype, shape, stype, offset, length = pid
                assert spool is not None
                return StoredArray(dtype, shape, stype, (spool, offset, length))

        return Receiver(io.BytesIO(packed)).load()
