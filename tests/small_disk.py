"""A disk that can be filled: a small tmpfs, mounted by the test, which needs root. Without root it fails and says so."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class SmallDisk:
    def __init__(self, folder: Path) -> None:
        self.folder, self._filler = folder, folder / "filler"

    def fill(self, *, leave: int = 0) -> None:
        """Not a byte more can be written to it, but for ``leave``."""
        with self._filler.open("ab", buffering=0) as file:
            piece = b"x" * (1 << 16)
            while piece:
                try:
                    file.write(piece)
                except OSError:
                    piece = piece[: len(piece) // 2]
        if leave:
            os.truncate(self._filler, max(0, self._filler.stat().st_size - leave))

    def clear(self) -> None:
        self._filler.unlink(missing_ok=True)


@contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[SmallDisk]:
    folder.mkdir(parents=True, exist_ok=True)
    options = ["-t", "tmpfs", "-o", f"size={megabytes}m", "fieldfleet-test", str(folder)]
    done = subprocess.run(["mount", *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"this test mounts a small tmpfs and needs root for it: {done.stderr.strip()}"
    try:
        yield SmallDisk(folder)
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
