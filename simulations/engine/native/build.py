"""Compiles the kernels with the machine's own C compiler, once, into the user's cache folder; without one there are none.

``FIELDFLEET_KERNELS=off`` does without them. The file's name holds the hash of source, compiler and processor, so that a
cache folder on a file system that several machines share holds one for each.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from fl_core.runtime.machine import cpu_name
from simulations.engine.cache import cache_folder

log = logging.getLogger(__name__)
SOURCES = ("kernels.c", "kernels.h", "images.h")
COMPILERS = ("cc", "gcc", "clang")
FLAGS = ("-O2", "-ftree-vectorize", "-std=gnu11", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
TARGETS = {"x86_64": ("-march=native",), "AMD64": ("-march=native",), "aarch64": ("-mcpu=native",)}
SECONDS = 120.0
SWITCH = "FIELDFLEET_KERNELS"


@functools.cache
def library() -> ctypes.CDLL | None:
    """None where they are switched off, or cannot be built or loaded; the reason is in the log."""
    if switched_off():
        return None
    found = compiler()
    if found is None:
        log.info("no C compiler (%s): models train by torch operations alone", ", ".join(COMPILERS))
        return None
    try:
        return ctypes.CDLL(str(built(found, cache_folder())))
    except (OSError, subprocess.SubprocessError) as error:
        log.warning("the compiled kernels are not used: %s", said(error))
        return None


def switched_off() -> bool:
    return os.environ.get(SWITCH, "").lower() in ("off", "0", "no")


def compiler() -> str | None:
    """The path of the machine's C compiler."""
    return next((path for name in COMPILERS if (path := shutil.which(name))), None)


def built(compiler: str, cache: Path) -> Path:
    """The shared object's path. Raises OSError or SubprocessError."""
    folder = Path(__file__).parent
    flags = [*FLAGS, *TARGETS.get(platform.machine(), ())]
    target = cache / f"kernels-{signature(folder, compiler, flags)}.so"
    if target.is_file():
        return target
    cache.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=cache) as temporary:
        made = Path(temporary) / target.name
        command = [compiler, *flags, "-o", str(made), str(folder / SOURCES[0]), "-lm"]
        subprocess.run(command, check=True, capture_output=True, timeout=SECONDS)
        os.replace(made, target)
    return target


def signature(folder: Path, compiler: str, flags: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for name in SOURCES:
        digest.update((folder / name).read_bytes())
    program = os.stat(compiler)
    facts = [
        os.path.realpath(compiler),
        program.st_size,
        program.st_mtime_ns,
        list(flags),
        cpu_name(),
        processor(),
        platform.machine(),
    ]
    digest.update(repr(facts).encode())
    return digest.hexdigest()[:24]


def processor() -> str:
    """Its instruction sets, in the system's own words; "" where they cannot be read."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def said(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        return f"{error}: {error.stderr.decode(errors='replace')[-500:]}"
    return str(error)


def version() -> str:
    """Of the kernels that are in use; "" without any. Results of two versions differ in their last bits."""
    found = library()
    return "" if found is None else Path(found._name).stem.removeprefix("kernels-")
