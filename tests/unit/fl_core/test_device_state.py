"""DeviceState: what is read is what was written, and nothing that is wrong gets in."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fl_core.contracts.device_state import NETWORKS, READERS, SIZE_LIMIT, DataState, DeviceState, from_table
from fl_core.contracts.errors import IntegrityError

names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", fullmatch=True)
counts = st.integers(0, 2**53)
words = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=30)
ages = st.floats(0, 1e9)


def maybe(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.none() | values


states = st.builds(
    DeviceState,
    battery_level=maybe(st.floats(0, 1)),
    charging=maybe(st.booleans()),
    network=maybe(st.sampled_from(NETWORKS)),
    metered=maybe(st.booleans()),
    temperature_c=maybe(st.floats(-100, 300)),
    free_storage_bytes=maybe(counts),
    free_memory_bytes=maybe(counts),
    num_examples=maybe(counts),
    data_age_s=maybe(ages),
    data=st.dictionaries(names, st.builds(DataState, num_examples=maybe(counts), age_s=maybe(ages)), max_size=3),
    applications=maybe(st.dictionaries(names, words, max_size=3)),
    version=maybe(words),
    trains=maybe(st.booleans()),
    group=maybe(names),
    tags=maybe(st.lists(names, max_size=4).map(tuple)),
    waiting=maybe(words),
    clock_skew_s=maybe(st.floats(-1e6, 1e6)),
    seen_at=maybe(ages),
    extra=st.dictionaries(st.text("xyz", min_size=1, max_size=5), st.integers(0, 9), max_size=3),
)
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(states)
def test_what_is_read_is_what_was_written(state: DeviceState) -> None:
    assert from_table(json.loads(json.dumps(state.to_table())), origin="test") == state


@given(st.dictionaries(st.sampled_from(sorted(READERS)) | st.text(max_size=5), anything, max_size=6))
def test_whatever_arrives_is_read_or_refused(table: dict[str, Any]) -> None:
    try:
        state = from_table(table, origin="test")
    except IntegrityError:
        return
    assert from_table(json.loads(json.dumps(state.to_table())), origin="test") == state
    assert state.battery_level is None or 0 <= state.battery_level <= 1
    assert state.network is None or state.network in NETWORKS


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("battery_level", 1.2),
        ("battery_level", True),
        ("battery_level", math.nan),
        ("charging", 1),
        ("network", "pigeon"),
        ("temperature_c", "hot"),
        ("num_examples", -1),
        ("num_examples", 2**60),
        ("group", "../etc"),
        ("tags", ["a"] * 65),
        ("waiting", "x" * 301),
        ("data", {"toy": {"num_examples": -1}}),
        ("applications", {"toy": 3}),
        ("more", "x" * SIZE_LIMIT),
    ],
)
def test_what_is_wrong_is_refused(key: str, value: Any) -> None:
    with pytest.raises(IntegrityError):
        from_table({key: value}, origin="test")


def test_data_of_one_application_comes_before_that_of_the_device() -> None:
    state = DeviceState(num_examples=9, data_age_s=5.0, data={"toy": DataState(num_examples=2)})
    assert state.of("toy") == DataState(num_examples=2)
    assert state.of("other") == DataState(num_examples=9, age_s=5.0)
