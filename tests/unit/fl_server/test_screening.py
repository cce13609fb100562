"""Screening, selection and history, one by one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Error, Message, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from fl_core.contracts.errors import IntegrityError
from fl_core.flower import adapter
from fl_core.flower.messages import Reply
from fl_server.history import History, RoundRecord, read_history, weighted_mean
from fl_server.screening import MAX_EXAMPLES, read_reply, screen_update, update_norm
from fl_server.selection import select

REFERENCE = {"w": np.zeros((2, 2), np.float32), "n": np.array(3, np.int64)}
GOOD: dict[str, Any] = {"w": np.full((2, 2), 2.0, np.float32), "n": np.array(4, np.int64)}


def reply(**change: Any) -> Reply:
    arrays = {k: v for k, v in {**GOOD, **change}.items() if v is not None}
    return Reply(num_examples=8, metrics={}, arrays=arrays)


def message(content: RecordDict | Error) -> Message:
    adapter.assume_identity(run_id=1, task_id=1, node_id=1)
    asked = Message(RecordDict(), 5, "train")
    adapter.set_message_id(asked, "m1")
    return Message(content, reply_to=asked)


def test_a_good_update_passes_and_its_norm_is_over_floats_alone() -> None:
    screen_update(reply(), REFERENCE, "van-1", max_norm=4.0)
    assert update_norm(GOOD, REFERENCE) == 4.0


@pytest.mark.parametrize(
    ("sent", "words"),
    [
        (reply(w=np.full((2, 2), np.nan, np.float32)), "array 'w' holds values that are not finite"),
        (reply(w=np.full((2, 2), np.inf, np.float32)), "array 'w' holds values that are not finite"),
        (reply(w=np.zeros(4, np.float32)), r"array 'w' is float32\(4,\), expected float32\(2, 2\)"),
        (reply(w=np.zeros((2, 2), ">f4")), "array 'w' is"),
        (reply(n=None), "array 'n' is missing"),
        (reply(more=np.zeros(1)), "array 'more' is unexpected"),
        (reply(w=np.full((2, 2), 2.1, np.float32)), r"update norm 4\.2 is over algorithm\.max_update_norm = 4"),
        (reply(w=np.full((2, 2), 3e38, np.float32)), r"update norm 6e\+38"),
        (Reply(num_examples=0, metrics={}, arrays=GOOD), "trained on no examples"),
    ],
)
def test_each_bad_update_is_named(sent: Reply, words: str) -> None:
    with pytest.raises(IntegrityError, match=f"^van-1: {words}"):
        screen_update(sent, REFERENCE, "van-1", max_norm=4.0)


def test_replies_are_read_or_refused() -> None:
    assert read_reply(message(reply().to_record()), "van-1").num_examples == 8
    with pytest.raises(IntegrityError, match="disk full"):
        read_reply(message(Error(3, "disk full")), "van-1")
    with pytest.raises(IntegrityError, match="van-1: error 3"):
        read_reply(message(Error(3, "")), "van-1")
    with pytest.raises(IntegrityError, match="van-1: claims 1,099,511,627,777 examples"):
        read_reply(message(Reply(num_examples=MAX_EXAMPLES + 1, metrics={}).to_record()), "van-1")
    with pytest.raises(IntegrityError, match="van-1: record 'metrics' is missing"):
        read_reply(message(RecordDict()), "van-1")


@given(
    names=st.lists(st.text("abc123", min_size=1), unique=True, max_size=12),
    count=st.integers(0, 15),
    seed=st.integers(0, 5),
    round_=st.integers(1, 50),
)
def test_selection_depends_on_names_seed_and_round_alone(names: list[str], count: int, seed: int, round_: int) -> None:
    chosen = select(names, count, seed=seed, round=round_)
    assert chosen == select(names[::-1], count, seed=seed, round=round_)
    assert list(chosen) == sorted(set(chosen))
    assert set(chosen) <= set(names)
    assert len(chosen) == (min(count, len(names)) if count else len(names))


def test_selection_is_even() -> None:
    names = [f"n{i}" for i in range(8)]
    counts = dict.fromkeys(names, 0)
    for round_ in range(1, 2001):
        for name in select(names, 3, seed=0, round=round_):
            counts[name] += 1
    assert all(abs(c - 750) < 4 * (2000 * 3 / 8 * 5 / 8) ** 0.5 for c in counts.values())


def test_weighted_mean_is_over_those_who_report() -> None:
    values = {"a": {"loss": 1.0, "auc": 0.5}, "b": {"loss": 4.0}, "c": {"loss": 100.0}, "d": {"other": 1.0}}
    assert weighted_mean(values, {"a": 3, "b": 1, "c": 0}) == {"auc": 0.5, "loss": 1.75}
    assert weighted_mean({}, {}) == {}


def test_history_supersedes_and_survives_the_future(tmp_path: Path) -> None:
    one = History(tmp_path)
    for number in (1, 2, 3):
        one.append(RoundRecord(round=number, loss=float(number), clients={"a": {"loss": 1.0}}))
    one.close()
    two = History(tmp_path, resumed_round=1)
    assert [r.round for r in two.records] == [1]
    two.append(RoundRecord(round=2, loss=20.0))
    two.close()
    with (tmp_path / "history.jsonl").open("ab") as file:
        file.write(b'{"round": 4, "loss": 4.0, "from_the_future": 1}\n{"torn": \n{"other": 1}\n')
    found = read_history(tmp_path)
    assert [(r.round, r.loss) for r in found] == [(1, 1.0), (2, 20.0), (3, 3.0), (4, 4.0)]
    assert found[0].clients == {"a": {"loss": 1.0}}
