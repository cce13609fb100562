"""Which edge target this machine is, and how much memory this process holds."""

from __future__ import annotations

import contextlib
import ctypes
import platform
import sys
from pathlib import Path

MACHINES = {"x86_64": "x86", "amd64": "x86", "i686": "x86", "aarch64": "arm64", "arm64": "arm64"}


def local_target() -> str:
    """The edge target of this processor: ``x86`` or ``arm64``; another machine's own name where neither fits."""
    machine = platform.machine().lower()
    return MACHINES.get(machine, machine or "unknown")


def cpu_flags() -> tuple[str, ...]:
    """The processor's vector extensions that decide the speed of int8; empty where they cannot be read."""
    wanted = {"avx2", "avx512f", "avx_vnni", "avx512_vnni", "amx_int8", "asimd", "asimddp", "i8mm", "sve"}
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ()
    for line in text.splitlines():
        name, _, flags = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return tuple(sorted(wanted & set(flags.split())))
    return ()


def cpu_name() -> str:
    """The processor's model as the system names it, else its architecture."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    found = next((line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")), "")
    return found or platform.processor() or platform.machine()


def resident_bytes(kind: str = "VmRSS") -> int:
    """Resident set size of this process in bytes (VmHWM: the highest so far); 0 where the system does not tell."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{kind}:")), 0)


def return_memory_early(*, reused_bytes: int = 64 << 10) -> None:
    """Tell glibc to keep less freed memory: one arena instead of one a thread, large blocks given back at once.

    Blocks below ``reused_bytes`` are kept, twice as much of them free at most: what moves models by the megabyte would
    else have every page of them mapped anew each time, which costs more than all the copying. Saves a device that serves
    gRPC up to 15 MB. Call it early in the process; elsewhere than on glibc it does nothing.
    Numbers: M_TRIM_THRESHOLD, M_MMAP_THRESHOLD and M_ARENA_MAX of malloc.h, see mallopt(3).
    """
    if not sys.platform.startswith("linux"):
        return
    with contextlib.suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        for option, value in ((-1, 2 * reused_bytes), (-3, reused_bytes), (-8, 1)):
            mallopt(option, value)


def return_memory_now() -> None:
    """Give back what is free, after work that was large for this process. Elsewhere than on glibc it does nothing."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def release_library_pages(smaps: Path = Path("/proc/self/smaps")) -> int:
    """Give back the pages of shared libraries that only their loading touched; returns how many bytes those were.

    Loading runs through most of a library once, and a kernel maps the neighbours of each page touched: of onnxruntime
    and grpc some 20 MB stay resident that inference never uses. Only unwritable private mappings without a changed
    page are given up: what is needed comes back from the page cache (madvise(2), MADV_DONTNEED). Elsewhere than on
    Linux it does nothing.
    """
    if not sys.platform.startswith("linux"):
        return 0
    released = 0
    with contextlib.suppress(OSError, AttributeError, ValueError):
        madvise = ctypes.CDLL(None, use_errno=True).madvise
        madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        for start, end, resident in _clean_library_mappings(smaps.read_text(encoding="utf-8", errors="replace")):
            if resident and madvise(start, end - start, 4) == 0:  # MADV_DONTNEED of sys/mman.h
                released += resident
    return released


def _clean_library_mappings(smaps: str) -> list[tuple[int, int, int]]:
    """(start, end, resident bytes) of each mapping of a .so file that is private, unwritable and unchanged (proc(5))."""
    found: list[tuple[int, int, int]] = []
    facts: dict[str, int] = {}
    span: tuple[int, int] | None = None
    for line in [*smaps.splitlines(), "0-0 end"]:
        first, _, rest = line.partition(" ")
        if first.endswith(":"):
            value = rest.split()
            facts[first] = int(value[0]) if value and value[0].isdigit() else 0
            continue
        if span is not None and not facts.get("Anonymous:", 1) and not facts.get("Private_Dirty:", 1):
            found.append((*span, facts.get("Rss:", 0) * 1024))
        fields, facts, span = rest.split(maxsplit=4), {}, None
        if len(fields) == 5 and fields[0] in ("r-xp", "r--p") and ".so" in Path(fields[4]).name:
            low, _, high = first.partition("-")
            span = (int(low, 16), int(high, 16))
    return found
