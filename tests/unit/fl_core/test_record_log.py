"""A device's records: numbers, bounds, batches, what hostile bytes meet, and what a kill -9 leaves."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fl_core.contracts.errors import EnvironmentFault, IntegrityError
from fl_core.link import batch as batches
from fl_core.link.batch import Batch, Record, from_text, pack, taken_of, to_text, unpack
from fl_core.link.record_log import RecordLog
from tests.helpers import ROOT

STORE = "0123456789abcdef" * 2
BODIES = st.dictionaries(
    st.text(max_size=8), st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=20), max_size=4
)


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(1, 5), BODIES), min_size=1, max_size=20), st.floats(-1e9, 1e12))
def test_a_batch_comes_back_as_it_was_packed(steps: list[tuple[int, dict[str, Any]]], moment: float) -> None:
    seq, records = 0, []
    for step, body in steps:
        seq += step
        records.append(Record(seq=seq, kind="telemetry", time=round(moment, 3), body=body))
    batch = Batch(store=STORE, records=tuple(records))
    assert unpack(from_text(to_text(pack(batch)), origin="test"), origin="test") == batch


@given(st.binary(max_size=300))
def test_any_other_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(IntegrityError):
        unpack(data, origin="van-1")
    with pytest.raises(IntegrityError):
        unpack(zlib.compress(data), origin="van-1")


def packed(table: Any) -> bytes:
    return zlib.compress(json.dumps(table).encode())


@pytest.mark.parametrize(
    "table",
    [
        [],
        {"store": STORE, "records": []},
        {"store": "x", "records": [[1, "a", 0, {}]]},
        {"store": STORE, "records": [[1, "a", 0, {}], [1, "a", 0, {}]]},
        {"store": STORE, "records": [[2, "a", 0, {}], [1, "a", 0, {}]]},
        {"store": STORE, "records": [[0, "a", 0, {}]]},
        {"store": STORE, "records": [[True, "a", 0, {}]]},
        {"store": STORE, "records": [[2**60, "a", 0, {}]]},
        {"store": STORE, "records": [[1, "A b", 0, {}]]},
        {"store": STORE, "records": [[1, "a", float("nan"), {}]]},
        {"store": STORE, "records": [[1, "a", 0, {"x": float("inf")}]]},
        {"store": STORE, "records": [[1, "a", 0, {"x": "y" * batches.RECORD_LIMIT}]]},
        {"store": STORE, "records": [[n, "a", 0, {}] for n in range(1, batches.BATCH_RECORDS + 2)]},
    ],
)
def test_a_batch_that_is_not_right_is_refused(table: Any) -> None:
    with pytest.raises(IntegrityError, match=r"van-1|record"):
        unpack(packed(table), origin="van-1")


def test_a_small_batch_that_unpacks_to_much_is_refused() -> None:
    with pytest.raises(IntegrityError, match="unpacks to over"):
        unpack(zlib.compress(b" " * (batches.UNPACKED_LIMIT + 1), 9), origin="van-1")
    with pytest.raises(IntegrityError):
        taken_of({"store": STORE, "upto": "7"}, origin="server")


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["keep", "drop", "take", "again"]), st.integers(0, 30)), max_size=40))
def test_bounds_against_a_plain_list(tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, int]]) -> None:
    file = tmp_path_factory.mktemp("log") / "outbox.db"
    log = RecordLog(file, max_records=6, max_bytes=200)
    waiting: list[tuple[int, bool, int]] = []
    dropped = last = 0
    for kind, size in steps:
        if kind == "again":
            log.close()
            log = RecordLog(file, max_records=6, max_bytes=200)
        elif kind == "take" and waiting:
            upto = waiting[min(size, len(waiting) - 1)][0]
            assert log.taken(log.store, upto)
            waiting = [entry for entry in waiting if entry[0] > upto]
        elif kind in ("keep", "drop"):
            last += 1
            body = {"x": "y" * size}
            assert log.append("telemetry", body, droppable=kind == "drop") == last, "numbers never repeat"
            waiting.append((last, kind == "drop", len(json.dumps(body, separators=(",", ":")))))
            while len(waiting) > 6 or (sum(s for *_, s in waiting) > 200 and len(waiting) > 1):
                del waiting[next((i for i, (_, droppable, _) in enumerate(waiting) if droppable), 0)]
                dropped += 1
        found = log.batch()
        assert [r.seq for r in (found[0].records if found else ())] == [entry[0] for entry in waiting]
        assert log.depth() == (len(waiting), dropped)
    log.close()


def test_old_records_go_and_telemetry_waits_for_company(tmp_path: Path) -> None:
    now = [1000.0]
    log = RecordLog(tmp_path / "o.db", max_age_s=100, hold_s=30, clock=lambda: now[0])
    assert log.due_in() is None
    log.append("telemetry", {}, droppable=True)
    assert log.due_in() == 30
    now[0] += 20
    assert log.due_in() == 10
    now[0] -= 10_000  # the clock was set back: it waits no longer than it would have
    assert log.due_in() == 30
    now[0] = 1020
    log.append("inference", {})
    assert log.due_in() == 0
    now[0] += 90
    found = log.batch()
    assert found is not None
    assert [r.kind for r in found[0].records] == ["inference"]
    assert log.depth() == (1, 1)
    log.close()


def test_an_older_copy_of_the_file_gets_a_new_name(tmp_path: Path) -> None:
    log = RecordLog(tmp_path / "o.db")
    before = log.store
    log.append("telemetry", {})
    assert not log.taken("f" * 32, 1)
    assert not log.taken(before, 900), "the server knows numbers that this file never gave out"
    assert log.store != before
    assert log.depth() == (1, 0)
    log.close()
    again = RecordLog(tmp_path / "o.db")
    assert again.store == log.store
    again.close()


def test_a_batch_is_bounded_and_small(tmp_path: Path) -> None:
    log = RecordLog(tmp_path / "o.db")
    for n in range(60):
        log.append("telemetry", {"noise": random.Random(n).randbytes(1500).hex()})
    found = log.batch()
    assert found is not None
    batch, data = found
    assert 1 <= len(batch.records) < 60
    assert len(data) <= batches.PACKED_LIMIT
    with pytest.raises(IntegrityError, match="over the limit"):
        log.append("telemetry", {"x": "y" * batches.RECORD_LIMIT})
    with pytest.raises(IntegrityError, match="not JSON"):
        log.append("telemetry", {"x": float("nan")})
    log.close()


def test_a_file_that_is_no_database_is_named(tmp_path: Path) -> None:
    (tmp_path / "o.db").write_bytes(b"not a database" * 100)
    with pytest.raises(EnvironmentFault, match=r"o\.db"):
        RecordLog(tmp_path / "o.db")


CHILD = """
import sys, pathlib
from fl_core.link.record_log import RecordLog
log = RecordLog(pathlib.Path(sys.argv[1]))
while True:
    print(log.append("telemetry", {}), flush=True)
"""


def test_kill_9_loses_no_record_that_was_appended(tmp_path: Path) -> None:
    file = tmp_path / "o.db"
    with subprocess.Popen(
        [sys.executable, "-c", CHILD, str(file)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as child:
        assert child.stdout is not None
        while int(last := child.stdout.readline()) < 20:
            pass
        child.send_signal(signal.SIGKILL)
        lines = [last, *(line for line in child.stdout.read().splitlines(keepends=True) if line.endswith("\n"))]
    log = RecordLog(file)
    found = log.batch()
    assert found is not None
    numbers = [r.seq for r in found[0].records]
    assert numbers == list(range(1, len(numbers) + 1))
    assert len(numbers) >= min(int(lines[-1]), batches.BATCH_RECORDS)
    log.close()
