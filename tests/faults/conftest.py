"""Collects the fault matrix: a table at the end of the run, and ``--fault-table FILE`` as JSON (``make faults``)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import fault_table
from tests.fault_table import Fault, Row

ROWS = pytest.StashKey[list[Row]]()
ROW = pytest.StashKey[Row]()
LINKED = {  # tests of the matrix that live beside the code they test
    "test_a_hostile_broker_changes_nothing_and_honest_traffic_recovers": "hostile broker",
    "test_another_key_and_another_name_are_refused": "wrong key",
    "test_a_cut_link_goes_on_where_it_stopped": "broken link",
    "test_a_broker_that_is_killed_and_comes_back_costs_nothing": "kill -9 broker",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fault-table", metavar="FILE", help="write the fault matrix there as JSON, and print it")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = []
    config.pluginmanager.register(Matrix())  # hooks of this file see the tests of this folder only


@pytest.fixture
def fault(request: pytest.FixtureRequest) -> Fault:
    return Fault(_row(request.node))


class Matrix:
    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[Any]:
        report = yield
        if _belongs(item) and (report.when == "call" or report.outcome != "passed"):
            row = _row(item)
            row.outcome = report.outcome
            rows = item.config.stash[ROWS]
            if row not in rows:
                rows.append(row)
        return report


def _belongs(item: pytest.Item) -> bool:
    return "faults" in item.path.parts or getattr(item, "originalname", "") in LINKED


def _row(item: pytest.Item) -> Row:
    if ROW not in item.stash:
        name = getattr(item, "originalname", item.name)
        chosen = item.name.removeprefix(name).strip("[]")
        words = f"{name.removeprefix('test_').replace('_', ' ')}{f' ({chosen})' if chosen else ''}"
        group = LINKED.get(name) or item.path.stem.removeprefix("test_").replace("_", " ")
        item.stash[ROW] = Row(fault=group, phase=chosen or "-", checked=words, test=item.nodeid)
    return item.stash[ROW]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    rows, place = config.stash[ROWS], config.getoption("--fault-table", None)
    if not rows or not place:
        return
    terminalreporter.section("fault matrix")
    for line in fault_table.lines(sorted(rows, key=lambda row: (row.fault, row.test))):
        terminalreporter.write_line(line)
    fault_table.write(Path(place), rows)
    terminalreporter.write_line(f"{len(rows)} rows, also in {place}")
