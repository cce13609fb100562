"""Requests and replies as Flower records: what was sent is what is read, and nothing hostile gets further."""

from __future__ import annotations

import dataclasses
import io
import json
import struct
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fl_core.contracts import arrays as array_format
from fl_core.contracts.errors import IntegrityError
from fl_core.flower import messages
from fl_core.flower.messages import Reply, Request
from tests.helpers import refusal

names = st.text("abcdefghij._/0123456789", min_size=1, max_size=12)
numbers = hnp.arrays(
    st.sampled_from([np.dtype(d) for d in sorted(messages.DTYPES)]),
    hnp.array_shapes(min_dims=0, max_dims=3, max_side=4),
)
tables = st.dictionaries(names, numbers, max_size=4)
finite = st.floats(allow_nan=False, allow_infinity=False)
config = st.dictionaries(
    names,
    st.recursive(st.integers() | finite | st.booleans() | st.text(max_size=5), lambda s: st.lists(s, max_size=3)),
    max_size=4,
)
signed = st.integers(-(2**63), 2**63 - 1)
REQUEST = Request(
    application="toy", config={"a": 1}, round=1, num_rounds=2, seed=0, arrays={"w": np.ones(3, np.float32)}
)
REPLY = Reply(num_examples=5, metrics={"loss": 0.5}, arrays={"w": np.ones(3, np.float32)})


def equal(found: Any, expected: Any) -> None:
    assert set(found) == set(expected)
    assert array_format.fingerprint(found) == array_format.fingerprint(expected)


@given(arrays=tables, extra=tables, table=config, round_=signed, seed=signed, application=st.text(max_size=10))
def test_request_round_trip(arrays: Any, extra: Any, table: Any, round_: int, seed: int, application: str) -> None:
    sent = Request(
        application=application,
        config=table,
        round=round_,
        num_rounds=9,
        seed=seed,
        arrays=arrays,
        extra=extra,
        defaults=tuple(table),
    )
    found = Request.from_record(sent.to_record(), origin="server")
    equal(found.arrays, arrays)
    equal(found.extra, extra)
    assert dataclasses.replace(found, arrays={}, extra={}) == dataclasses.replace(sent, arrays={}, extra={})


@given(
    arrays=tables,
    extra=tables,
    metrics=st.dictionaries(names, finite, max_size=4),
    count=st.integers(0, 2**63 - 1),
)
def test_reply_round_trip(arrays: Any, extra: Any, metrics: Any, count: int) -> None:
    sent = Reply(num_examples=count, metrics=metrics, arrays=arrays, extra=extra)
    found = Reply.from_record(sent.to_record(), origin="van-1")
    equal(found.arrays, arrays)
    equal(found.extra, extra)
    assert (found.num_examples, found.metrics) == (count, metrics)


def test_layout_is_the_one_of_flowers_strategies() -> None:
    """One ArrayRecord, one ConfigRecord; a reply holds one MetricRecord with ``num-examples``."""
    record = REQUEST.to_record()
    assert (list(record.array_records), list(record.config_records)) == (["arrays"], ["config"])
    assert record.config_records["config"]["server-round"] == 1
    reply = REPLY.to_record()
    assert (list(reply.array_records), list(reply.metric_records)) == (["arrays"], ["metrics"])
    assert reply.metric_records["metrics"]["num-examples"] == 5


def changed_request(**header: Any) -> RecordDict:
    record = REQUEST.to_record()
    values = dict(record.config_records["config"])
    for key, value in header.items():
        name = key.replace("_", "-")
        values.pop(name, None)
        if value is not None:
            values[name] = value
    record["config"] = ConfigRecord(values)
    return record


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ({"protocol": 2}, "protocol 2 is not 1"),
        ({"protocol": None}, "protocol None"),
        ({"application": None}, "'application' is None"),
        ({"application": 3}, "'application' is 3, expected str"),
        ({"server_round": 1.0}, "'server-round' is 1.0, expected int"),
        ({"server_round": True}, "'server-round' is True, expected int"),
        ({"seed": "0"}, "'seed'"),
        ({"config_defaults": [1, 2]}, "'config-defaults' is no list of keys"),
        ({"config_defaults": "a"}, "'config-defaults'"),
        ({"num_rounds": [1]}, "'num-rounds'"),
        ({"config_json": None}, "'config-json'"),
        ({"config_json": "{"}, "not JSON"),
        ({"config_json": "[1]"}, "not a table"),
        ({"config_json": "[" * 200_000}, "not JSON"),
        ({"config_json": '{"a": "' + "x" * messages.CONFIG_LIMIT + '"}'}, "over the limit"),
        ({"config_json": '{"a": ' + "1" * 5000 + "}"}, "not JSON"),
    ],
)
def test_hostile_requests_are_refused_by_field(header: dict[str, Any], words: str) -> None:
    with pytest.raises(IntegrityError) as error:
        Request.from_record(changed_request(**header), origin="request to van-1")
    assert error.value.message.startswith("request to van-1: ")
    assert words in error.value.message
    assert len(error.value.message) < 1000


@pytest.mark.parametrize("name", ["arrays", "config"])
def test_a_missing_record_is_named(name: str) -> None:
    record = REQUEST.to_record()
    del record[name]
    with pytest.raises(IntegrityError, match=f"server: record '{name}' is missing"):
        Request.from_record(record, origin="server")


@pytest.mark.parametrize(
    ("metrics", "words"),
    [
        ({"num-examples": -1}, "num-examples is -1"),
        ({"num-examples": 3.0}, "num-examples is 3.0"),
        ({"num-examples": [3]}, "num-examples"),
        ({}, "num-examples is None"),
        ({"num-examples": 3, "loss": float("nan")}, "'loss' is not finite"),
        ({"num-examples": 3, "loss": float("-inf")}, "'loss' is not finite"),
    ],
)
def test_hostile_metrics_are_refused(metrics: dict[str, Any], words: str) -> None:
    record = REPLY.to_record()
    record["metrics"] = MetricRecord(metrics)
    with pytest.raises(IntegrityError, match="van-1: ") as error:
        Reply.from_record(record, origin="van-1")
    assert words in error.value.message


def test_a_reply_without_metrics_is_refused() -> None:
    with pytest.raises(IntegrityError, match="van-1: record 'metrics' is missing"):
        Reply.from_record(RecordDict(), origin="van-1")


def with_array(data: bytes, stype: str = "numpy.ndarray") -> RecordDict:
    record = REPLY.to_record()
    record["arrays"] = ArrayRecord({"w": Array(dtype="float32", shape=(3,), stype=stype, data=data)})
    return record


def npy(array: np.ndarray[Any, Any], **options: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


def npz() -> bytes:
    file = io.BytesIO()
    np.savez(file, w=np.ones(3, np.float32))
    return file.getvalue()


def header(text: str) -> bytes:
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode()


HUGE = header("{'descr': '<f8', 'fortran_order': False, 'shape': (100000000000000,), }".ljust(117) + "\n")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"nonsense",
        npy(np.ones(3, np.float32))[:-1],
        npy(np.array([{"a": 1}], dtype=object), allow_pickle=True),
        npy(np.array(["text"])),
        npy(np.ones(3, complex)),
        npy(np.ones(3, "datetime64[s]")),
        npy(np.zeros(2, [("a", "<f4")])),
        npz(),
        HUGE,
        header("{'descr': '<f8', 'fortran_order': False, 'shape': (-3,), }\n"),
        header("(" * 500 + "\n"),
        header("{'descr': '<f8', 'fortran_order': False, 'shape': (3\n"),
    ],
    ids=[
        "empty",
        "junk",
        "cut",
        "object",
        "text",
        "complex",
        "time",
        "struct",
        "npz",
        "huge",
        "negative",
        "deep",
        "torn",
    ],
)
def test_hostile_arrays_are_refused_by_name(data: bytes) -> None:
    with pytest.raises(IntegrityError, match="van-1: array 'w'"):
        Reply.from_record(with_array(data), origin="van-1")


def test_other_serialisations_are_refused() -> None:
    with pytest.raises(IntegrityError, match="van-1: array 'w'"):
        Reply.from_record(with_array(npy(np.ones(3, np.float32)), stype="pickle"), origin="van-1")


@given(position=st.integers(0, 10**6), byte=st.integers(0, 255), second=st.integers(0, 127))
def test_damaged_arrays_are_read_or_refused_never_a_crash(position: int, byte: int, second: int) -> None:
    data = bytearray(npy(np.arange(12, dtype=np.float32)))
    data[position % len(data)] = byte
    data[second] ^= 1
    refusal(IntegrityError, lambda: Reply.from_record(with_array(bytes(data)), origin="van-1"))


def test_json_limit_counts_characters_of_the_text() -> None:
    text = json.dumps({"a": "x" * (messages.CONFIG_LIMIT - 10)})
    assert len(text) == messages.CONFIG_LIMIT - 1
    assert messages.json_object(text, "server")["a"].startswith("x")
