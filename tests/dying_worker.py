"""``tests/echo_worker.py`` that kills itself in the middle of writing an answer while the file ``torn`` is there."""

from __future__ import annotations

import io
import os
import signal
import sys
from pathlib import Path
from typing import Any

from fl_clients.training import frames, worker
from tests.echo_worker import handler


def tearing(switches: Path) -> Any:
    real = frames.write_frame

    def write(stream: Any, header: dict[str, object], blobs: list[bytes]) -> None:
        if not (switches / "torn").exists():
            real(stream, header, blobs)
            return
        whole = io.BytesIO()
        real(whole, header, blobs)
        stream.write(whole.getvalue()[: len(whole.getvalue()) // 2])
        stream.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    return write


if __name__ == "__main__":
    outgoing = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    worker.frames.write_frame = tearing(Path(sys.argv[1]))
    worker.serve(handler(Path(sys.argv[1]), sys.argv[2]), sys.stdin.buffer, outgoing)  # type: ignore[arg-type]
