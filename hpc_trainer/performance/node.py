"""What a node is, as its kernel tells: processors, NUMA, caches, memory, limits, GPUs."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import torch

SYSTEM = Path("/sys/devices/system")
CGROUP = Path("/sys/fs/cgroup")


def facts() -> dict[str, Any]:
    return {
        "host": platform.node(),
        "processor": processor(),
        "memory_bytes": memory(),
        "numa": numa(),
        "gpus": gpus(),
        "torch": torch.__version__,
    }


def processor() -> dict[str, Any]:
    mine = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    cores = {
        (_read(SYSTEM / f"cpu/cpu{c}/topology/physical_package_id"), _read(SYSTEM / f"cpu/cpu{c}/topology/core_id"))
        for c in mine
    }
    known = {key for key in cores if all(key)}
    quota, _, period = _read(CGROUP / "cpu.max").partition(" ")
    return {
        "model": next((v for k, v in _pairs(Path("/proc/cpuinfo")) if k in ("model name", "CPU part")), "unknown"),
        "logical": len(mine),
        "physical": len(known) or len(mine),
        "quota": float(quota) / float(period) if quota.isdigit() and period.isdigit() else None,
        "caches": caches(mine[0]),
    }


def caches(cpu: int) -> dict[str, str]:
    found = {}
    for folder in sorted((SYSTEM / f"cpu/cpu{cpu}/cache").glob("index*")):
        kind = {"Data": "d", "Instruction": "i"}.get(_read(folder / "type"), "")
        found[f"L{_read(folder / 'level')}{kind}"] = _read(folder / "size")
    return found


def memory() -> int:
    """Bytes that this process may use: the machine's, or its control group's where that is less."""
    total = next((int(v.split()[0]) * 1024 for k, v in _pairs(Path("/proc/meminfo")) if k == "MemTotal"), 0)
    limit = _read(CGROUP / "memory.max")
    return min(total, int(limit)) if limit.isdigit() and total else total


def numa() -> list[dict[str, Any]]:
    nodes = []
    for folder in sorted((SYSTEM / "node").glob("node[0-9]*")):
        pairs = dict(_pairs(folder / "meminfo"))
        total = next((int(v.split()[0]) * 1024 for k, v in pairs.items() if k.endswith("MemTotal")), 0)
        nodes.append(
            {
                "node": int(folder.name.removeprefix("node")),
                "cpus": _read(folder / "cpulist"),
                "memory_bytes": total,
                "distances": [int(d) for d in _read(folder / "distance").split()],
            }
        )
    return nodes


def listed(text: str) -> list[int]:
    """Cores as the kernel lists them: 0-3,8."""
    found: list[int] = []
    for part in text.split(",") if text else []:
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return found


def cores_of_nodes() -> dict[int, list[int]]:
    """NUMA node -> its cores that this process may use; one node where the kernel tells of none."""
    mine = os.sched_getaffinity(0)
    found = {entry["node"]: [c for c in listed(entry["cpus"]) if c in mine] for entry in numa()}
    known = {core for cores in found.values() for core in cores}
    found.setdefault(0, []).extend(sorted(mine - known))
    return {node: cores for node, cores in found.items() if cores}


def gpus() -> list[dict[str, Any]]:
    """Each GPU and which others it reaches without the host. Not yet tried on a machine that has one."""
    if not torch.cuda.is_available():
        return []
    count = torch.cuda.device_count()
    found = []
    for index in range(count):
        facts = torch.cuda.get_device_properties(index)
        peers = [p for p in range(count) if p != index and torch.cuda.can_device_access_peer(index, p)]
        found.append({"index": index, "name": facts.name, "memory_bytes": facts.total_memory, "peers": peers})
    return found


def usable_cores() -> int:
    """Processes beyond this number share cores: physical ones, within the control group's quota."""
    found = processor()
    physical = int(found["physical"])
    return max(1, min(physical, int(found["quota"] or physical)))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _pairs(path: Path) -> list[tuple[str, str]]:
    lines = (line.partition(":") for line in _read(path).splitlines())
    return [(name.strip(), value.strip()) for name, _, value in lines]
