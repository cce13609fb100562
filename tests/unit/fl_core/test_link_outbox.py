"""The device's store: order, bounds, jobs, and what a kill -9 leaves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fl_core.contracts.errors import EnvironmentFault
from fl_core.link.backoff import Backoff
from fl_core.link.outbox import DeviceStore


def test_messages_keep_their_order_until_they_are_done(tmp_path: Path) -> None:
    store = DeviceStore(tmp_path / "o.db")
    first, second = store.put("t", b"1"), store.put("t", b"2")
    assert [m.payload for m in store.waiting()] == [b"1", b"2"]
    assert [m.payload for m in store.waiting(after=first)] == [b"2"]
    store.done([first])
    store.close()
    again = DeviceStore(tmp_path / "o.db")
    assert [(m.seq, m.payload) for m in again.waiting()] == [(second, b"2")]
    assert again.put("t", b"3") > second
    again.close()


@settings(max_examples=20)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 40)), max_size=30))
def test_bounds_drop_the_oldest_telemetry_first_and_count_it(
    tmp_path_factory: pytest.TempPathFactory, items: list[tuple[bool, int]]
) -> None:
    """Against a plain list that follows the same rule."""
    store = DeviceStore(tmp_path_factory.mktemp("s") / "o.db", max_messages=5, max_bytes=100)
    model: list[tuple[bool, bytes]] = []
    dropped = 0
    for number, (droppable, size) in enumerate(items):
        payload = bytes([number]) * size
        store.put("t", payload, droppable=droppable)
        model.append((droppable, payload))
        while len(model) > 5 or (sum(len(p) for _, p in model) > 100 and len(model) > 1):
            victim = next((i for i, (d, _) in enumerate(model) if d), 0)
            del model[victim]
            dropped += 1
    assert [m.payload for m in store.waiting()] == [p for _, p in model]
    assert store.depth() == (len(model), dropped)
    store.close()


def test_a_job_ends_together_with_its_reply(tmp_path: Path) -> None:
    rung: list[int] = []
    store = DeviceStore(tmp_path / "o.db", max_jobs=3)
    store.listen(lambda: rung.append(1))
    assert store.reply_of("a") is None
    store.finish("a", "ping", "reply-topic", b"pong")
    assert len(rung) == 1
    found = store.reply_of("a")
    assert found is not None
    assert (found.topic, found.payload) == ("reply-topic", b"pong")
    assert [m.payload for m in store.waiting()] == [b"pong"]
    for name in "bcd":
        store.finish(name, "ping", "reply-topic", b"x")
    assert store.reply_of("a") is None  # only the last three are remembered
    assert store.reply_of("d") is not None
    store.close()


CHILD = """
import sys, pathlib
from fl_core.link.outbox import DeviceStore
store = DeviceStore(pathlib.Path(sys.argv[1]))
number = 0
while True:
    store.finish(f"job-{number}", "ping", "t", b"%d" % number)
    print(number, flush=True)
    number += 1
"""


def test_kill_9_loses_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    file = tmp_path / "o.db"
    with subprocess.Popen([sys.executable, "-c", CHILD, str(file)], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        last = -1
        while last < 20:
            last = int(child.stdout.readline())
        os.kill(child.pid, signal.SIGKILL)
        last = max([last, *(int(line) for line in child.stdout.read().splitlines() if line.strip().isdigit())])
    store = DeviceStore(file)
    waiting = [int(m.payload) for m in store.waiting(limit=10_000)]
    assert waiting == list(range(len(waiting)))
    assert len(waiting) >= last + 1
    assert all(store.reply_of(f"job-{n}") for n in waiting)
    store.close()


def test_a_file_that_is_no_database_is_named(tmp_path: Path) -> None:
    (tmp_path / "o.db").write_bytes(b"not a database" * 100)
    with pytest.raises(EnvironmentFault, match=r"o\.db"):
        DeviceStore(tmp_path / "o.db")


def test_backoff_grows_to_its_limit_with_jitter() -> None:
    backoff = Backoff(first_s=1.0, limit_s=8.0)
    for expected in (1, 2, 4, 8, 8, 8):
        assert expected / 2 <= backoff.next() <= expected
    backoff.reset()
    assert backoff.next() <= 1
