"""A worker process: a ClientApp imported once, messages in, replies out.

The first process imports the app, then only forks: the others share its memory and start at once. Where the import left
threads behind, a fork would not be safe: that process becomes a worker itself and the others are started like it.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

FORK, READY, FAILED = b"f", "ready", "failed"


def main(arguments: list[str]) -> int:
    file, folder, reference, spool = int(arguments[0]), Path(arguments[1]), arguments[2], Path(arguments[3])
    control = Connection(file)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal: the command ends, and we with it
    try:
        from fl_core.contracts.errors import FieldfleetError
        from fl_core.flower.adapter import apps as adapter
        from simulations.apps.project import loaded

        app = loaded(adapter.load_client_app, reference, folder)
    except FieldfleetError as error:
        traceback.print_exc()
        control.send((FAILED, error.message, error.remedy))
        return 1
    prepare_torch()
    forks = len(os.listdir("/proc/self/task")) == 1 if sys.platform == "linux" else False
    control.send((READY, forks, ""))
    if not forks:
        serve(control, app, spool)
        return 0
    return fork_on_demand(control, app, spool)


def prepare_torch() -> None:
    """One thread; and what torch imports with the first optimiser (1 to 2 s), once for all workers."""
    if (torch := sys.modules.get("torch")) is not None:
        torch.set_num_threads(1)
        torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)


def fork_on_demand(control: Connection, app: Any, spool: Path) -> int:
    channel = socket.socket(fileno=os.dup(control.fileno()))
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # children are reaped by the kernel
    while True:
        try:
            asked, files, _, _ = socket.recv_fds(channel, 1, 1)
        except OSError:
            return 0
        if not asked:
            return 0
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            channel.close()
            control.close()
            try:
                serve(Connection(files[0]), app, spool)
            finally:
                os._exit(0)
        os.close(files[0])


def serve(connection: Connection, app: Any, spool: Path) -> None:
    """One message after the other, until the other end closes."""
    from simulations.apps.client import answer
    from simulations.apps.packing import ReplyWriter, unpack

    payloads: dict[int, bytes] = {}
    writer = ReplyWriter(spool, f"worker-{os.getpid()}")
    connection.send(os.getpid())
    while True:
        try:
            packed, fresh, dropped, client, state, batch = connection.recv()
        except (EOFError, OSError):
            return
        payloads.update(fresh)
        for number in dropped:
            payloads.pop(number, None)
        reply, state = answer(app, unpack(packed, payloads), client, state)
        connection.send((*writer.pack(reply, batch), state))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
