"""Each process of a node on cores of its own, those of one NUMA node where that is possible.

A process that wanders over cores loses its caches, one that wanders over NUMA nodes its memory too; memory is placed where it is
first touched, so that binding before the model is made keeps it near. Threads that a process starts later inherit its cores.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence

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


def bind(local_rank: int, processes: int) -> list[int]:
    """This process to its share of the node's cores; returns them. Raises InputError where there are too few."""
    from hpc_trainer.performance.node import cores_of_nodes

    mine = shares(cores_of_nodes(), processes)[local_rank]
    os.sched_setaffinity(0, mine)
    return mine
