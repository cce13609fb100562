"""Each process of a node on cores of its own, those of one NUMA node where that is possible.

A process that wanders over cores loses its caches, one that wanders over NUMA nodes its memory too; memory is placed where it is
first touched, so that binding before the model is made keeps it near. Threads that a process starts later inherit its cores.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fl_core.contracts.errors import InputError

CHOICES = ("none", "cores")


def shares(nodes: Mapping[int, Sequence[int]], processes: int) -> list[list[int]]:
    """Cores of each process: NUMA node -> usable cores. Sizes differ by one at most; neighbouring ranks are neighbours."""
    cores = [core for node in sorted(nodes) for core in sorted(nodes[node])]
    if len(cores) < processes:
        raise InputError(
            f"--bind cores: {processes} processes on {len(cores)} usable cores",
            remedy="start fewer processes on this node, or leave --bind out",
        )
    bounds = [len(cores) * rank // processes for rank in range(processes + 1)]
    return [cores[a:b] for a, b in itertools.pairwise(bounds)]


def shares_near(nodes: Mapping[int, Sequence[int]], near: Sequence[int | None]) -> list[list[int]]:
    """Cores of each process whose GPU sits at the NUMA node ``near``: those of that node, divided among its processes.

    Where a GPU's node is not known, has no usable core or fewer than processes, all are divided as by ``shares``.
    """
    wanted = {node: [rank for rank, own in enumerate(near) if own == node] for node in dict.fromkeys(near)}
    if any(node is None or len(nodes.get(node, ())) < len(ranks) for node, ranks in wanted.items()):
        return shares(nodes, len(near))
    found: dict[int, list[int]] = {}
    for node, ranks in wanted.items():
        found.update(zip(ranks, shares({0: nodes[node]}, len(ranks)), strict=True))  # type: ignore[index]
    return [found[rank] for rank in range(len(near))]


def numa_node(address: str, sysfs: Path = Path("/sys")) -> int | None:
    """Of the PCI device at ``address`` (``0000:3b:00.0``); None where the system does not say."""
    try:
        node = int((sysfs / "bus/pci/devices" / address.lower() / "numa_node").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None
    return node if node >= 0 else None


def nodes_of_gpus(processes: int) -> list[int | None]:
    """NUMA node of the GPU of each local rank; nothing where there are fewer GPUs than processes. Not tried on a GPU yet."""
    import torch

    if not torch.cuda.is_available() or torch.cuda.device_count() < processes:
        return []
    found = []
    for device in range(processes):
        facts: Any = torch.cuda.get_device_properties(device)
        try:
            address = f"{facts.pci_domain_id:04x}:{facts.pci_bus_id:02x}:{facts.pci_device_id:02x}.0"
        except AttributeError:  # a build of torch that does not tell
            return []
        found.append(numa_node(address))
    return found


def bind(local_rank: int, processes: int) -> list[int]:
    """This process to its share of the node's cores, near its GPU where it has one; returns them. Raises InputError where there are too few."""
    from hpc_trainer.performance.node import cores_of_nodes

    gpus = nodes_of_gpus(processes)
    mine = (shares_near(cores_of_nodes(), gpus) if gpus else shares(cores_of_nodes(), processes))[local_rank]
    os.sched_setaffinity(0, mine)
    return mine
