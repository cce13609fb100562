"""What a client keeps from round to round: control variates of the algorithm, personal layers of the model.

A state belongs to the update that it was made with, and holds only if the server counted that update: it may have been
lost, late, refused, or part of a round that changed nothing. So each is stored beside the one before; the next request
names the update that was counted last, and what was stored with it is the state. A client that was killed, or whose
server was killed and repeats a round, starts from the same state again.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import struct
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fl_core.contracts import arrays as array_format
from fl_core.contracts.arrays import Arrays
from fl_core.contracts.errors import InputError, IntegrityError
from fl_core.storage import atomic

log = logging.getLogger(__name__)
Table = dict[str, npt.NDArray[Any]]
VERSIONS = 3  # the one that was counted, and two whose fate is open (a late reply may still count)
KEEP_RUNS = 4


class ClientStates(ABC):
    """By client. Rounds count from 1; ``counted`` is the round of the update that the server counted last, 0 = none."""

    @abstractmethod
    def read(self, client: str, counted: int) -> Table:
        """The client's state; {} where it has none, or where it was lost (a warning is logged)."""

    @abstractmethod
    def write(self, client: str, round: int, counted: int, state: Arrays) -> None:
        """The state that holds if the update of this round is counted; ``counted`` and the newest ones are kept."""


def superseded(rounds: Collection[int], round: int, counted: int) -> list[int]:
    """Which stored rounds can go once ``round`` is stored: all but the counted one and the two newest."""
    newest = sorted({*rounds, round} - {counted})[-(VERSIONS - 1) :]
    return [r for r in rounds if r not in newest and r != counted]


class FolderStates(ClientStates):
    """On a device: ``root/RUN/CLIENT/ROUND.safetensors``, each written atomically. Older runs' states are dropped."""

    def __init__(self, root: Path, run: str) -> None:
        self._root, self._run = root, run

    def read(self, client: str, counted: int) -> Table:
        if not counted:
            return {}
        file = self._file(client, counted)
        try:
            return dict(array_format.from_bytes(file.read_bytes(), origin=str(file)))
        except (OSError, IntegrityError) as error:
            return lost(client, counted, str(error))

    def write(self, client: str, round: int, counted: int, state: Arrays) -> None:
        file = self._file(client, round)
        if not file.parent.parent.exists():
            self._drop_runs()
        atomic.write_bytes(file, array_format.to_bytes(state), mode=0o600)
        stored = {int(p.stem): p for p in file.parent.glob("*.safetensors") if p.stem.isdigit()}
        for old in superseded(stored, round, counted):
            stored[old].unlink(missing_ok=True)

    def _file(self, client: str, number: int) -> Path:
        return self._root / self._run / client / f"{number}.safetensors"

    def _drop_runs(self) -> None:
        if self._root.is_dir():
            runs = sorted((p for p in self._root.iterdir() if p.is_dir()), key=lambda p: p.stat().st_mtime)
            for old in runs[: -(KEEP_RUNS - 1)]:
                shutil.rmtree(old, ignore_errors=True)


class SlotStates(ClientStates):
    """In a simulation: one sparse file with a slot for each client, of which only the touched ones take space.

    Memory does not grow with the clients; several processes may use the file at once, each for clients of its own. All
    states have the names, shapes and dtypes of the first. A slot is a header (round and checksum of each version) and
    the versions; the header is written last. find(client) -> its number, from 0.
    """

    HEADER, ENTRY, PAGE = 64, struct.Struct("<QL4x"), 4096

    def __init__(self, folder: Path, find: Callable[[str], int]) -> None:
        self._folder, self._find = folder, find
        self._layout: list[tuple[str, str, tuple[int, ...]]] = []
        self._handle: int | None = None
        self._size = 0

    def read(self, client: str, counted: int) -> Table:
        if not counted:
            return {}
        if not self._open():
            return lost(client, counted, f"{self._folder} does not exist")
        for place, (number, checksum) in enumerate(self._header(client)):
            if number == counted:
                data = os.pread(self._file, self._size, self._offset(client, place))
                if zlib.crc32(data) == checksum and len(data) == self._size:
                    return self._unpack(data)
        return lost(client, counted, "it was not stored")

    def write(self, client: str, round: int, counted: int, state: Arrays) -> None:
        self._open(state)
        data = self._pack(client, state)
        header = self._header(client)
        rounds = [number for number, _ in header]
        gone = {0, round, *superseded([n for n in rounds if n], round, counted)}
        place = next(i for i, number in enumerate(rounds) if number in gone)
        os.pwrite(self._file, data, self._offset(client, place))
        header = [(0, 0) if number in gone else (number, checksum) for number, checksum in header]
        header[place] = (round, zlib.crc32(data))
        os.pwrite(self._file, b"".join(self.ENTRY.pack(*entry) for entry in header), self._offset(client, -1))

    def close(self) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def __getstate__(self) -> dict[str, Any]:
        """Another process opens the file for itself."""
        return {**self.__dict__, "_handle": None}

    @property
    def _file(self) -> int:
        assert self._handle is not None
        return self._handle

    def _open(self, state: Arrays | None = None) -> bool:
        if self._handle is not None:
            return True
        layout = self._folder / "layout.json"
        if not layout.is_file():
            if state is None:
                return False
            rows = [[name, str(a.dtype), list(a.shape)] for name, a in sorted(state.items())]
            atomic.write_json(layout, rows)
        self._layout = [(n, d, tuple(s)) for n, d, s in json.loads(layout.read_text(encoding="utf-8"))]
        self._size = sum(np.dtype(d).itemsize * int(np.prod(s)) for _, d, s in self._layout)
        self._handle = os.open(self._folder / "slots", os.O_RDWR | os.O_CREAT, 0o644)
        return True

    def _offset(self, client: str, place: int) -> int:
        slot = -(-(self.HEADER + VERSIONS * self._size) // self.PAGE) * self.PAGE
        start = self._find(client) * slot
        return start if place < 0 else start + self.HEADER + place * self._size

    def _header(self, client: str) -> list[tuple[int, int]]:
        data = os.pread(self._file, VERSIONS * self.ENTRY.size, self._offset(client, -1))
        return [self.ENTRY.unpack_from(data.ljust(self.HEADER, b"\0"), i * self.ENTRY.size) for i in range(VERSIONS)]

    def _pack(self, client: str, state: Arrays) -> bytes:
        found = [(name, str(a.dtype), a.shape) for name, a in sorted(state.items())]
        if found != self._layout:
            raise InputError(f"{client}: its state has other arrays than the states in {self._folder}")
        return b"".join(np.asarray(state[name], order="C").tobytes() for name, _, _ in found)

    def _unpack(self, data: bytes) -> Table:
        found, at = Table(), 0
        for name, dtype, shape in self._layout:
            count = int(np.prod(shape))
            found[name] = np.frombuffer(data, np.dtype(dtype), count, at).reshape(shape).copy()
            at += count * np.dtype(dtype).itemsize
        return found


def lost(client: str, counted: int, reason: str) -> Table:
    log.warning("the state of %s of round %d is lost, it starts afresh: %s", client, counted, reason)
    return {}
