"""Cores are dealt out whole, evenly and NUMA node by NUMA node; a bound process runs there."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fl_core.contracts.errors import InputError
from hpc_trainer.binding import numa_node, shares, shares_near
from hpc_trainer.performance.node import cores_of_nodes, listed
from tests.helpers import run_python


@given(st.lists(st.integers(1, 16), min_size=1, max_size=4), st.integers(1, 16))
def test_every_core_has_one_process_and_nodes_are_not_mixed_without_need(sizes: list[int], processes: int) -> None:
    nodes, first = {}, 0
    for number, size in enumerate(sizes):
        nodes[number] = list(range(first, first + size))
        first += size
    if first < processes:
        with pytest.raises(InputError, match="usable cores"):
            shares(nodes, processes)
        return
    found = shares(nodes, processes)
    assert sorted(core for share in found for core in share) == list(range(first))
    assert max(map(len, found)) - min(map(len, found)) <= 1
    if len(set(sizes)) == 1 and processes % len(sizes) == 0:  # alike nodes, as many processes on each
        assert all(len({core // sizes[0] for core in share}) == 1 for share in found)


@pytest.mark.parametrize(("text", "cores"), [("", []), ("3", [3]), ("0-2,5,8-9", [0, 1, 2, 5, 8, 9])])
def test_lists_of_cores_as_the_kernel_writes_them(text: str, cores: list[int]) -> None:
    assert listed(text) == cores


def test_the_cores_of_all_nodes_are_those_that_this_process_may_use() -> None:
    found = [core for cores in cores_of_nodes().values() for core in cores]
    assert sorted(found) == sorted(os.sched_getaffinity(0))


def test_a_bound_process_runs_on_its_cores() -> None:
    script = (
        "import json, os; from hpc_trainer.binding import bind; "
        "mine = bind(0, 1); print(json.dumps([mine, sorted(os.sched_getaffinity(0))]))"
    )
    done = run_python(["-c", script])
    assert done.returncode == 0, done.stderr
    mine, allowed = json.loads(done.stdout)
    assert sorted(mine) == allowed


def test_processes_lie_near_their_gpus_where_that_is_known() -> None:
    nodes = {0: [0, 1, 2, 3], 1: [4, 5, 6, 7]}
    assert shares_near(nodes, [1, 1, 0, 0]) == [[4, 5], [6, 7], [0, 1], [2, 3]]
    assert shares_near(nodes, [1]) == [[4, 5, 6, 7]]
    assert shares_near(nodes, [0, None]) == shares(nodes, 2), "of one GPU nothing is known"
    assert shares_near(nodes, [0, 3]) == shares(nodes, 2), "no usable core there"
    assert shares_near(nodes, [0] * 5) == shares(nodes, 5), "too few cores there"


def test_the_node_of_a_pci_device_is_read_from_the_system(tmp_path: Path) -> None:
    device = tmp_path / "bus" / "pci" / "devices" / "0000:3b:00.0"
    device.mkdir(parents=True)
    assert numa_node("0000:3B:00.0", tmp_path) is None
    for said, node in (("1\n", 1), ("-1\n", None), ("?", None)):
        (device / "numa_node").write_text(said)
        assert numa_node("0000:3B:00.0", tmp_path) == node
