"""Rounds that survive people: over-selection, replies a round late, stopping in mid-round, partial sums."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Message, MessageType
from hypothesis import given, settings
from hypothesis import strategies as st

from fl_core.contracts.arrays import fingerprint
from fl_core.contracts.errors import Interrupted
from fl_core.flower.messages import Reply, Request
from fl_server import exchange as exchanges
from tests.scripted_grid import INITIAL, NAMES, NEVER, Answer, ScriptedGrid, Start, final, honest, start

__all__ = ["start"]


class LateGrid(ScriptedGrid):
    """``late`` devices answer round 1 only when round 2 has begun."""

    def __init__(self, late: Iterable[str], *, busy: bool = False) -> None:
        super().__init__(self._answer)
        self.late, self.busy = frozenset(late), busy
        self.held: list[Message] = []

    def _answer(self, name: str, kind: str, request: Request) -> Answer:
        if name in self.late and kind == MessageType.TRAIN and request.round <= 1 + self.busy:
            return NEVER
        return honest(name, kind, request)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        sent = list(messages)
        request = Request.from_record(sent[0].content, origin="test")
        if request.round == 2 and sent[0].metadata.message_type == MessageType.TRAIN:
            for message in self.held:
                name = self.nodes[message.metadata.dst_node_id]
                asked = Request.from_record(message.content, origin="test")
                reply = honest(name, MessageType.TRAIN, asked)
                assert isinstance(reply, Reply)
                self.ready[message.metadata.message_id] = Message(reply.to_record(), reply_to=message)
        ids = super().push_messages(sent)
        if request.round == 1 and sent[0].metadata.message_type == MessageType.TRAIN:
            self.held = [m for m in sent if self.nodes[m.metadata.dst_node_id] in self.late]
        return ids


def test_a_late_reply_counts_in_the_next_round_where_its_device_has_none(tmp_path: Path, start: Start) -> None:
    grid = LateGrid(["van-1"], busy=True)
    engine = start(tmp_path, grid, "algorithm.late=next", "algorithm.late_weight=0.25", rounds=3)
    final(engine)
    first, second, third = engine.history.records
    assert (first.late, first.late_counted) == (["van-1"], {})
    assert (second.late_counted, second.late) == ({"van-1": 1}, ["van-1"])
    assert sorted(third.clients) == sorted(NAMES)
    assert third.late_counted == {}
    # by hand: round 2 from the replies of the others and a quarter of van-1's weight
    model = {"w": INITIAL["w"], "n": INITIAL["n"]}
    sums = []
    for number, late in ((1, False), (2, True)):
        request = Request(application="", config={}, round=number, num_rounds=3, seed=0, arrays=model)
        replies = [(honest(n, MessageType.TRAIN, request), 1.0) for n in NAMES if n != "van-1"]
        if late:
            old = Request(application="", config={}, round=1, num_rounds=3, seed=0, arrays=INITIAL)
            replies.append((honest("van-1", MessageType.TRAIN, old), 0.25))
        weights = [r.num_examples * f for r, f in replies if isinstance(r, Reply)]
        values = [r.arrays["w"] for r, _ in replies if isinstance(r, Reply)]
        model = {"w": np.average(values, axis=0, weights=weights), "n": INITIAL["n"] + number}
        sums.append(model["w"])
    again = start(
        tmp_path / "two", LateGrid(["van-1"], busy=True), "algorithm.late=next", "algorithm.late_weight=0.25", rounds=2
    )
    np.testing.assert_allclose(final(again)["w"], sums[1], rtol=1e-12)


def test_a_late_reply_is_dropped_where_its_device_answered_anew(tmp_path: Path, start: Start) -> None:
    grid = LateGrid(["van-1"])
    engine = start(tmp_path, grid, "algorithm.late=next", rounds=2)
    final(engine)
    second = engine.history.records[1]
    assert sorted(second.clients) == sorted(NAMES)
    assert second.late_counted == {}


def test_late_replies_are_dropped_by_default(tmp_path: Path, start: Start) -> None:
    grid = LateGrid(["van-1"], busy=True)
    engine = start(tmp_path, grid, rounds=2)
    final(engine)
    assert [r.late_counted for r in engine.history.records] == [{}, {}]
    assert {m.metadata.message_id for m in grid.held} <= grid.forgotten


def test_over_selection_ends_with_enough_usable_replies(tmp_path: Path, start: Start) -> None:
    def answer(name: str, kind: str, request: Request) -> Answer:
        return "out of memory" if name == "van-3" and kind == MessageType.TRAIN else honest(name, kind, request)

    grid = ScriptedGrid(answer, arrival=lambda names: sorted(names, reverse=True))
    engine = start(tmp_path, grid, "algorithm.clients_per_round=2", "algorithm.over_select=1.5", rounds=1)
    final(engine)
    (record,) = engine.history.records
    assert sorted(record.clients) == ["van-2", "van-4"], "the first two usable ones to arrive"
    assert list(record.refused) == ["van-3"]
    assert record.late == ["van-0", "van-1"]
    assert grid.clock == 0, "nobody waited for the others"


def test_over_selection_with_too_few_replies_ends_at_the_deadline(tmp_path: Path, start: Start) -> None:
    def answer(name: str, kind: str, request: Request) -> Answer:
        return honest(name, kind, request) if name == "van-0" else NEVER

    grid = ScriptedGrid(answer)
    engine = start(tmp_path, grid, "algorithm.clients_per_round=3", "algorithm.over_select=0.5", rounds=1)
    final(engine)
    (record,) = engine.history.records
    assert (list(record.clients), record.applied) == (["van-0"], True)
    assert grid.clock == pytest.approx(30)


def test_a_round_that_all_devices_fail_keeps_the_model_and_says_why(tmp_path: Path, start: Start) -> None:
    engine = start(tmp_path, ScriptedGrid(lambda *_: "no disk space left"), rounds=2)
    assert fingerprint(final(engine)) == fingerprint(INITIAL)
    assert [r.failed for r in engine.history.records] == ["0 usable replies, 1 are needed"] * 2


def test_a_revoked_device_does_not_count(tmp_path: Path, start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    grid = ScriptedGrid()
    monkeypatch.setattr(grid, "knows", lambda name: name != "van-2")
    engine = start(tmp_path, grid)
    final(engine)
    (record,) = engine.history.records
    assert record.refused == {"van-2": "van-2: revoked, or registered no longer"}
    assert sorted(record.clients) == [n for n in NAMES if n != "van-2"]


@settings(max_examples=20, deadline=None)
@given(stops=st.lists(st.tuples(st.integers(1, 3), st.integers(0, 5)), max_size=4), small=st.booleans())
def test_stopped_anywhere_it_goes_on_over_the_same_grid(
    tmp_path_factory: pytest.TempPathFactory, stops: list[tuple[int, int]], small: bool
) -> None:
    """Told to stop after any number of replies, several times: the weights are those of an undisturbed run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exchanges, "PARTIAL_BYTES", 1 if small else 1 << 28)
        folder = tmp_path_factory.mktemp("stop")
        build = start.__wrapped__()  # type: ignore[attr-defined]
        calm = final(build(folder / "calm", ScriptedGrid(), "algorithm.name=fedadam", rounds=3))
        stop = threading.Event()
        pending = list(stops)

        def answer(name: str, kind: str, request: Request) -> Answer:
            if pending and request.round >= pending[0][0] and int(name[-1]) >= pending[0][1]:
                pending.pop(0)
                stop.set()
            return honest(name, kind, request)

        grid = ScriptedGrid(answer)
        while True:
            try:
                found = final(build(folder / "out", grid, "algorithm.name=fedadam", rounds=3, stop=stop))
                break
            except Interrupted:
                stop.clear()
        assert fingerprint(found) == fingerprint(calm)
        asked = [a for a in grid.asked if a[1] == MessageType.TRAIN]
        assert len(asked) == len(set(asked)), "nobody is asked twice for one round"
