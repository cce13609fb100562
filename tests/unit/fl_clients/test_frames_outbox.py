"""Frames between agent and worker, and replies kept on disk."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fl_clients.training import frames
from fl_clients.training.outbox import Outbox, parse_reply
from fl_core.contracts.errors import IntegrityError
from fl_core.flower import wire

HEADERS = st.dictionaries(st.text(max_size=8).filter(lambda k: k != "sizes"), st.integers() | st.text(max_size=20))


@given(HEADERS, st.lists(st.binary(max_size=200), max_size=5))
def test_frames_round_trip(header: dict[str, object], blobs: list[bytes]) -> None:
    stream = io.BytesIO(frames.to_bytes(header, blobs) * 2)
    for _ in range(2):
        assert frames.read_frame(stream, origin="pipe") == (header, blobs)
    assert frames.read_frame(stream, origin="pipe") is None


@given(st.data())
def test_cut_frames_are_refused(data: st.DataObject) -> None:
    whole = frames.to_bytes({"a": 1}, [b"12345", b""])
    cut = data.draw(st.integers(1, len(whole) - 1))
    with pytest.raises(IntegrityError, match="pipe"):
        frames.from_bytes(whole[:cut], origin="pipe")


@given(st.binary(min_size=1, max_size=100))
def test_noise_is_no_frame(noise: bytes) -> None:
    with pytest.raises(IntegrityError, match="pipe"):
        frames.from_bytes(noise, origin="pipe")


@pytest.mark.parametrize("head", [b"[]", b'{"sizes": [-1]}', b'{"sizes": "x"}', b'{"sizes": [1e9]}', b"{", b'{"a": 1}'])
def test_wrong_headers_are_refused(head: bytes) -> None:
    with pytest.raises(IntegrityError, match="header"):
        frames.from_bytes(frames.MAGIC + len(head).to_bytes(4, "big") + head, origin="pipe")


def test_a_frame_that_claims_too_much_is_refused_before_it_is_read() -> None:
    head = b'{"sizes": [%d]}' % (frames.FRAME_LIMIT + 1)
    with pytest.raises(IntegrityError, match="limit"):
        frames.from_bytes(frames.MAGIC + len(head).to_bytes(4, "big") + head, origin="pipe")


def reply(number: int) -> wire.WireReply:
    content = b"object %d" % number
    return wire.WireReply(2**64 - 1, f"{number:064x}", b"envelope", b"tree", {wire.object_id(content): content})


def test_outbox_keeps_replies_in_order_over_a_restart(tmp_path: Path) -> None:
    box = Outbox(tmp_path)
    for number in (3, 1, 2):
        box.put(reply(number))
    box.put(reply(1))
    assert [r.instruction_id[-1] for r in Outbox(tmp_path).waiting()] == ["3", "2", "1"]
    assert next(Outbox(tmp_path).waiting()) == reply(3)
    box.remove(reply(3).instruction_id)
    box.remove(reply(3).instruction_id)
    assert len(list(box.waiting())) == 2


def test_outbox_drops_what_a_crash_left_behind(tmp_path: Path) -> None:
    box = Outbox(tmp_path)
    box.put(reply(1))
    file = next(tmp_path.glob("*.reply"))
    file.write_bytes(file.read_bytes()[:-1])
    (tmp_path / ".half.tmp").write_bytes(b"half")
    assert list(Outbox(tmp_path).waiting()) == []
    assert list(tmp_path.iterdir()) == []


def test_outbox_drops_the_oldest_replies_over_its_limits(tmp_path: Path) -> None:
    box = Outbox(tmp_path)
    for number in range(1, 4):
        box.put(reply(number))
    one = next(tmp_path.glob("*.reply")).stat().st_size
    small = Outbox(tmp_path, max_bytes=2 * one)
    small.put(reply(4))
    assert [r.instruction_id[-1] for r in small.waiting()] == ["3", "4"]
    assert small.dropped == 2
    old = next(tmp_path.glob("*3.reply"))
    os.utime(old, (0, 0))
    Outbox(tmp_path).put(reply(5))
    assert [r.instruction_id[-1] for r in Outbox(tmp_path).waiting()] == ["4", "5"]
    Outbox(tmp_path, max_bytes=0).put(reply(6))
    assert [r.instruction_id[-1] for r in Outbox(tmp_path).waiting()] == ["6"], "the newest always stays"


@pytest.mark.parametrize("name", ["../../../etc/passwd", "", "A" * 64, "é" * 64])
def test_an_id_is_never_a_path(tmp_path: Path, name: str) -> None:
    with pytest.raises(IntegrityError):
        Outbox(tmp_path).remove(name)


def test_an_object_that_does_not_fit_its_id_is_refused() -> None:
    header: dict[str, object] = {"ids": ["0" * 64], "run_id": 1, "instruction_id": "0" * 64}
    with pytest.raises(IntegrityError, match="fit its id"):
        parse_reply(header, [b"", b"", b"other"], origin="worker")
    with pytest.raises(IntegrityError, match="parts"):
        parse_reply(header, [b""], origin="worker")
