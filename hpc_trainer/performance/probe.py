"""The rates of a node: memory, matrix products, file system, and all-reduce between processes."""

from __future__ import annotations

import mmap
import os
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fl_core.contracts.errors import EnvironmentFault
from hpc_trainer.performance import fits, node
from hpc_trainer.processes import Processes

VERSION = 1
MESSAGE_SIZES = tuple(1 << k for k in range(10, 29, 2))  # 1 kB to 256 MB
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
BLOCK, SMALL_BLOCK = 4 << 20, 4096


def repeated(work: Callable[[], object], *, least: int = 3, seconds: float = 0.5, sync: bool = False) -> list[float]:
    """Times of ``work`` after one warm-up: at least ``least`` of them, and ``seconds`` in all."""
    work()
    found: list[float] = []
    while len(found) < least or sum(found) < seconds:
        if sync:
            torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        if sync:
            torch.cuda.synchronize()
        found.append(time.perf_counter() - began)
    return found


def memory_bandwidth(size: int, device: torch.device, seconds: float) -> dict[str, Any]:
    """Bytes a second of a copy (2 bytes moved for 1) and STREAM's triad a = b + s c (3 for 1; McCalpin 1995)."""
    count = size // 4
    a, b, c = (torch.ones(count, device=device) for _ in range(3))
    cuda = device.type == "cuda"
    copy = fits.median_interval(repeated(lambda: a.copy_(b), seconds=seconds, sync=cuda))
    triad = fits.median_interval(repeated(lambda: torch.add(b, c, alpha=3.0, out=a), seconds=seconds, sync=cuda))
    return {"array_bytes": size, "copy": rate(2 * size, copy), "triad": rate(3 * size, triad)}


def rate(amount: float, seconds: fits.Value) -> dict[str, float]:
    """Amount a second, with the interval turned over."""
    return fits.Value(amount / seconds.value, amount / seconds.high, amount / seconds.low).document()


def matrix_peak(size: int, device: torch.device, seconds: float) -> dict[str, Any]:
    """Operations a second of a square product; the highest that training can hope for."""
    found: dict[str, Any] = {"size": size, "threads": torch.get_num_threads()}
    for name, dtype in DTYPES.items():
        a = torch.randn(size, size, device=device).to(dtype)
        out = torch.empty_like(a)
        times = repeated(lambda a=a, out=out: torch.mm(a, a, out=out), seconds=seconds, sync=device.type == "cuda")  # type: ignore[misc]
        found[name] = rate(2.0 * size**3, fits.median_interval(times))
    return found


def file_system(folder: Path, size: int) -> dict[str, Any]:
    """Read rates of a file of ``size`` bytes that this writes there: cold (pages dropped, or O_DIRECT) and warm.

    Sequential in blocks of 4 MB, random in blocks of 4 kB. Raises EnvironmentFault where the folder cannot be written.
    """
    path = folder / f".fieldfleet-probe-{os.getpid()}"
    try:
        try:
            _write(path, size)
        except OSError as error:
            raise EnvironmentFault(f"{folder}: {error.strerror}", remedy="name another folder with --path") from None
        direct, way = _cold_reader(path)
        try:
            sequential = [_timed(lambda o=o: direct(o, BLOCK)) for o in range(0, size, BLOCK)]  # type: ignore[misc]
            places = random.Random(0).sample(range(size // SMALL_BLOCK), min(256, size // SMALL_BLOCK))
            _drop(path)
            scattered = [_timed(lambda p=p: direct(p * SMALL_BLOCK, SMALL_BLOCK)) for p in places]  # type: ignore[misc]
        finally:
            direct(-1, 0)
        with path.open("rb", buffering=0) as file:
            _through(file, size)
            warm = _timed(lambda: _through(file, size))
        return {
            "folder": str(folder),
            "bytes": size,
            "cold_by": way,
            "sequential_cold": {"bytes_per_second": size / sum(sequential)},
            "random_cold": {
                "bytes_per_second": SMALL_BLOCK * len(places) / sum(scattered),
                "latency_seconds": statistics.median(scattered),
            },
            "sequential_warm": {"bytes_per_second": size / warm},
        }
    finally:
        path.unlink(missing_ok=True)


def _write(path: Path, size: int) -> None:
    block = os.urandom(BLOCK)  # a file system that compresses must not win by it
    with path.open("wb") as file:
        for _ in range(0, size, BLOCK):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    _drop(path)


def _drop(path: Path) -> None:
    """Asks the kernel to forget the file's pages."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def _cold_reader(path: Path) -> tuple[Callable[[int, int], None], str]:
    """read(offset, length), closed by a negative offset; past the page cache where the file system allows it."""
    buffer = mmap.mmap(-1, BLOCK)  # aligned to pages, as O_DIRECT asks
    for flags, way in ((os.O_DIRECT, "O_DIRECT"), (0, "posix_fadvise")):
        try:
            descriptor = os.open(path, os.O_RDONLY | flags)
        except OSError:
            continue

        def read(offset: int, length: int, descriptor: int = descriptor) -> None:
            if offset < 0:
                os.close(descriptor)
                buffer.close()
                return
            view = memoryview(buffer)[:length]
            try:
                os.preadv(descriptor, [view], offset)
            finally:
                view.release()

        try:
            read(0, SMALL_BLOCK)
            return read, way
        except OSError:
            os.close(descriptor)
    raise EnvironmentFault(f"{path.parent}: a file just written cannot be read")


def _through(file: Any, size: int) -> None:
    file.seek(0)
    for _ in range(0, size, BLOCK):
        file.read(BLOCK)


def _timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def all_reduce(processes: Processes, largest: int, seconds: float) -> dict[str, Any]:
    """Seconds of an all-reduce by size, the slowest process's; alpha (latency) and beta (seconds a byte) fitted.

    All processes call it. The bus bandwidth 2 (p - 1) / p / beta is what a ring moves over each link.
    """
    sizes = [s for s in MESSAGE_SIZES if s <= largest]
    rows: list[dict[str, Any]] = []
    for size in sizes:
        tensor = torch.ones(size // 4, device=processes.device)
        count = max(3, min(50, int(seconds / 10 / (1e-4 + size / 1e9))))
        times = [_collective(processes, tensor) for _ in range(count + 1)][1:]
        spread = fits.median_interval(times)
        rows.append({"bytes": size, "repeats": count, "seconds": spread.document()})
    fitted = fits.line([r["bytes"] for r in rows], [r["seconds"]["value"] for r in rows])
    document: dict[str, Any] = {"processes": processes.world, "backend": dist.get_backend(), "sizes": rows}
    if fitted:
        alpha, beta = fitted
        share = 2 * (processes.world - 1) / processes.world
        document |= {"alpha_seconds": alpha.document(), "beta_seconds_per_byte": beta.document()}
        document["bus_bytes_per_second"] = share / beta.value
    return document


def _collective(processes: Processes, tensor: torch.Tensor) -> float:
    """One all-reduce as the slowest process saw it, begun together."""
    processes.barrier()
    began = time.perf_counter()
    dist.all_reduce(tensor)
    if tensor.is_cuda:
        torch.cuda.synchronize()
    taken = torch.tensor([time.perf_counter() - began], dtype=torch.float64, device=tensor.device)
    dist.all_reduce(taken, op=dist.ReduceOp.MAX)
    return float(taken)


def measure(folder: Path, *, quick: bool) -> dict[str, Any]:
    """Everything of this node but the network, which needs several processes."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    seconds = 0.1 if quick else 1.0
    return {
        "format": VERSION,
        "node": node.facts(),
        "device": device.type,
        "memory": memory_bandwidth(16 << 20 if quick else 256 << 20, device, seconds),
        "matrix_product": matrix_peak(256 if quick else 2048, device, seconds),
        "file_system": file_system(folder, (16 << 20) if quick else (512 << 20)),
    }
