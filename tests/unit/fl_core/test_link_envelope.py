"""Envelope and topics: everything that parses is what was sent; nothing hostile gets through."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fl_core.contracts.errors import InputError, IntegrityError
from fl_core.contracts.names import NAME_PATTERN
from fl_core.link import topics
from fl_core.link.envelope import COUNTER_LIMIT, FIELDS, ID_PATTERN, SIZE_LIMIT, TYPE_PATTERN, Envelope, decode, encode

plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
counters = st.integers(0, COUNTER_LIMIT - 1)
tables = st.dictionaries(st.text(max_size=10), plain, max_size=4)
envelopes = st.builds(
    Envelope,
    type=st.from_regex(TYPE_PATTERN, fullmatch=True),
    id=st.from_regex(ID_PATTERN, fullmatch=True),
    time=st.floats(-1e12, 1e12),
    boot=counters,
    connection=counters,
    body=tables,
    unknown=tables.map(lambda t: {k: v for k, v in t.items() if k not in FIELDS}),
)


@given(envelopes)
def test_round_trip_keeps_everything_and_unknown_fields(envelope: Envelope) -> None:
    data = encode(envelope)
    again = decode(data, origin="t")
    assert again == envelope
    assert encode(again) == data


@given(st.binary(max_size=300) | plain.map(lambda v: json.dumps(v).encode()))
def test_any_bytes_parse_or_are_refused_with_the_origin(data: bytes) -> None:
    message = ""
    try:
        envelope = decode(data, origin="some/topic")
        assert decode(encode(envelope), origin="again").body == envelope.body
    except IntegrityError as error:
        message = error.message
    assert not message or "some/topic" in message


@given(envelopes, st.sampled_from(FIELDS), plain)
def test_a_field_of_any_other_value_is_refused_or_kept(envelope: Envelope, name: str, value: Any) -> None:
    table = {**json.loads(encode(envelope)), name: value}
    try:
        found = decode(json.dumps(table).encode(), origin="t")
    except IntegrityError:
        return
    assert getattr(found, name) == value


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (b"[]", "object"),
        (b"{", "not a JSON"),
        (b'{"schema":1,"type":"a","type":"b","id":"x"}', "twice"),
        (b'{"schema":1,"type":"a","id":"x","body":{"v":NaN}}', "finite"),
        (b'{"schema":1,"type":"a","id":"x","body":{"v":1e999}}', "finite"),
        (b'{"schema":2,"type":"a","id":"x"}', "schema 2 is newer"),
        (b'{"schema":1,"type":"a","id":"../x"}', "'id'"),
        (b'{"schema":1,"type":"A","id":"x"}', "'type'"),
        (b'{"schema":1,"type":"a","id":"x","boot":-1}', "'boot'"),
        (b'{"schema":1,"type":"a","id":"x","boot":true}', "'boot'"),
        (b'{"schema":1,"type":"a","id":"x","body":[]}', "'body'"),
        (b'{"schema":1,"type":"a","id":"x","body":{"a":' + b"[" * 40 + b"]" * 40 + b"}}", "nested"),
        (b"[" * 30_000, "not a JSON"),
        (b" " * (SIZE_LIMIT + 1), "over the limit"),
    ],
)
def test_each_refusal_says_what_is_wrong(data: bytes, word: str) -> None:
    with pytest.raises(IntegrityError, match=word):
        decode(data, origin="t")


def test_too_large_or_not_json_is_refused_before_it_is_sent() -> None:
    with pytest.raises(IntegrityError, match="over the limit"):
        encode(Envelope(type="a", body={"x": "y" * SIZE_LIMIT}))
    with pytest.raises(IntegrityError, match="not JSON"):
        encode(Envelope(type="a", body={"x": float("nan")}))


names = st.from_regex(NAME_PATTERN, fullmatch=True)


@given(names, names, st.sampled_from(topics.KINDS))
def test_topics_parse_back(fleet: str, device: str, kind: str) -> None:
    assert topics.parse(topics.topic(fleet, device, kind)) == topics.DeviceTopic(fleet, device, kind)


@given(st.text(max_size=80))
def test_a_foreign_topic_is_none_of_ours(name: str) -> None:
    found = topics.parse(name)
    assert found is None or topics.topic(found.fleet, found.device, found.kind) == name


@given(names, names, st.sampled_from(topics.KINDS), st.sampled_from(["publish", "subscribe", "receive"]))
def test_a_device_may_use_its_own_topics_in_one_direction(device: str, other: str, kind: str, action: Any) -> None:
    own, foreign = topics.topic("f", device, kind), topics.topic("f", other, kind)
    right = kind in (topics.FROM_DEVICE if action == "publish" else topics.TO_DEVICE)
    assert topics.may(device, "f", action, own) is right
    if other != device:
        assert not topics.may(device, "f", action, foreign)
    assert not topics.may(device, "g", action, own)
    assert not topics.may(device, "f", action, topics.every_device("f", kind))


def test_service_accounts_use_all_devices_and_nothing_else() -> None:
    for account in topics.SERVICE_ACCOUNTS:
        assert topics.may(account, "f", "subscribe", topics.every_device("f", topics.STATE))
        assert topics.may(account, "f", "publish", topics.topic("f", "van", topics.COMMAND))
        assert not topics.may(account, "f", "publish", topics.topic("f", "van", topics.STATE))
        assert not topics.may(account, "f", "subscribe", "#")
        with pytest.raises(InputError):
            topics.topic("f", account, topics.STATE)
