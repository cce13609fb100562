"""A worker process with a trivial handler instead of torch: adds one to every array. Behaviour by the files in a folder.

crash: die without an answer. hold: wait until the file is gone. fail: raise. vary: add what device and round determine.
hog: take 2 GiB of memory. ``beats`` grows while it holds.
"""

from __future__ import annotations

import os
import sys
import time
import zlib
from pathlib import Path
from typing import Any

from flwr.app import Message

from fl_clients.training.worker import serve
from fl_core.flower.messages import Reply, Request


def handler(switches: Path, device: str) -> object:
    def handle(message: Message) -> Message:
        request = Request.from_record(message.content, origin="request")
        with (switches / "seen").open("a") as file:
            file.write(f"{request.round}\n")
        if (switches / "crash").exists():
            os._exit(7)
        while (switches / "hold").exists():
            time.sleep(0.01)
            with (switches / "beats").open("a") as file:
                file.write(".")
        if (switches / "hog").exists():
            bytearray(2 << 30)
        if (switches / "fail").exists():
            raise ValueError("as the test asked")
        step: Any = 1
        if (switches / "vary").exists():
            step = zlib.crc32(f"{device} {request.round}".encode()) / 2**32
        arrays = {name: (array + step).astype(array.dtype) for name, array in request.arrays.items()}
        return Message(
            Reply(
                num_examples=len(device) + request.round if step != 1 else 3, metrics={"loss": 0.5}, arrays=arrays
            ).to_record(),
            reply_to=message,
        )

    return handle


if __name__ == "__main__":
    outgoing = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    serve(handler(Path(sys.argv[1]), sys.argv[2]), sys.stdin.buffer, outgoing)  # type: ignore[arg-type]
