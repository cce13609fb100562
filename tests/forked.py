"""The ranks of a job without their start: forked from one process that has imported torch and the trainer already.

A rank under torchrun imports for seconds what it then computes with for tenths of one. What torchrun itself does (environment,
restarts, signals, exit codes) is tested by the commands that start it.
"""

from __future__ import annotations

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from hpc_trainer.processes import join

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        *("torch", "torch._dynamo", "torch.distributed.fsdp", "torch.distributed.pipelining", "pytorch_optimizer"),
        *("hpc_trainer.trainer", "hpc_trainer.verify_worker", "tests.forked"),
    ]
)


def in_ranks(work: Callable[..., None], world: int, *arguments: Any, timeout: float = 240) -> None:
    """``work(processes, *arguments)`` in each of ``world`` ranks; AssertionError with the traceback of the first that fails."""
    store = TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    running, ends = [], []
    for rank in range(world):
        mine, theirs = CONTEXT.Pipe(duplex=False)
        process = CONTEXT.Process(target=_rank, args=(work, arguments, rank, world, store.port, theirs), daemon=True)
        process.start()
        theirs.close()
        running.append(process)
        ends.append(mine)
    try:
        _await(ends, time.monotonic() + timeout)
    finally:
        for process in running:
            process.kill()
            process.join()
        for end in ends:
            end.close()


def _await(ends: list[Connection], deadline: float) -> None:
    open_ends = list(ends)
    while open_ends:
        ready = wait(open_ends, max(0.0, deadline - time.monotonic()))
        assert ready, f"{len(open_ends)} ranks have not ended in time"
        for end in ready:
            assert isinstance(end, Connection)
            try:
                said = end.recv()
            except EOFError:
                said = "a rank ended without a word"
            assert said is None, said
            open_ends.remove(end)


def _rank(
    work: Callable[..., None], arguments: tuple[Any, ...], rank: int, world: int, port: int, end: Connection
) -> None:
    os.environ.pop("FIELDFLEET_DATA", None)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    try:
        torch.set_num_threads(1)
        processes = join()
        try:
            work(processes, *arguments)
        finally:
            processes.close()
    except BaseException:
        end.send(f"rank {rank} of {world}:\n{traceback.format_exc()}")
    else:
        end.send(None)
