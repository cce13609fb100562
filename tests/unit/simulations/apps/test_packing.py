"""Messages to workers and back: what is sent once, what stays on disk, and what each side may do with it."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from simulations.apps.packing import SHARED, STORED, Broadcast, ReplyReader, ReplyWriter, StoredArray, pack, unpack
from simulations.apps.states import ClientStates


def content(size: int, seed: int = 0) -> RecordDict:
    values = np.random.default_rng(seed).normal(size=size)
    return RecordDict({"arrays": ArrayRecord([values, np.arange(3)])})


def test_a_model_goes_to_a_worker_once_and_each_client_gets_its_own_objects() -> None:
    broadcast, sent = Broadcast(), content(10_000)
    packed, used, size = pack(sent, broadcast)
    assert len(used) == 1
    assert size > 80_000
    assert len(packed) < 5_000
    payloads = broadcast.payloads(used)
    assert pack(sent, broadcast)[1] == used, "the same bytes keep their number"
    first, second = unpack(packed, payloads), unpack(packed, payloads)
    first["arrays"].clear()
    assert second == sent
    assert pack(copy.deepcopy(content(10_000, 1)), broadcast)[1] != used


def test_old_payloads_are_dropped_and_numbers_never_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("simulations.apps.packing.KEPT", 3 * SHARED)
    broadcast, seen = Broadcast(), []
    for i in range(20):
        _, used, size = pack(bytes([i]) * SHARED, broadcast)
        assert not set(used) & set(seen)
        seen += used
        kept = broadcast.kept(size)
        assert used[0] in kept
        assert len(kept) <= 3


def test_large_arrays_of_replies_stay_on_disk_until_they_are_asked_for(tmp_path: Path) -> None:
    writer, reader = ReplyWriter(tmp_path, "w"), ReplyReader(tmp_path)
    sent = [content(STORED // 8, i) for i in range(3)]
    found = [reader.unpack(*writer.pack(c, batch=i // 2)) for i, c in enumerate(sent)]
    assert not list(tmp_path.iterdir()), "files are removed as soon as they are open"
    assert isinstance(found[0]["arrays"]["0"], StoredArray)
    assert type(found[0]["arrays"]["1"]) is Array, "small ones come with the message"
    for reply, original in zip(found, sent, strict=True):
        assert reply == original
        assert original == reply
        assert "_own" not in reply["arrays"]["0"].__dict__
        np.testing.assert_array_equal(reply["arrays"]["0"].numpy(), original["arrays"]["0"].numpy())
    again = pickle.loads(pickle.dumps(found[2]))
    assert type(again["arrays"]["0"]) is Array
    assert copy.deepcopy(found[1]) == sent[1]
    changed = found[0]["arrays"]["0"]
    changed.data = b"other"
    assert changed.data == b"other"
    assert changed != sent[0]["arrays"]["0"]


@given(
    st.lists(st.tuples(st.integers(0, 5), st.binary(max_size=200)), max_size=60),
    st.integers(0, 400),
)
def test_client_states_are_a_dictionary_whatever_fits_into_memory(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[int, bytes]], limit: int
) -> None:
    states, model = ClientStates(tmp_path_factory.mktemp("states"), limit=limit), dict[int, bytes]()
    for node, value in steps:
        states.put(node, value)
        model[node] = value
        assert {n: states.get(n) for n in model} == model
        assert states._bytes == sum(len(v) for v in states._recent.values()) <= max(limit, 0)
    states.close()
