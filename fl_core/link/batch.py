"""Batches of records from a device, and the server's word that it keeps them: one form for MQTT and HTTPS.

A record is numbered by its device's store, so that the server counts each one once however often it is sent:
(device, store, number) is its name. A batch is bounded JSON, deflated: many records of one device look alike.
"""

from __future__ import annotations

import base64
import binascii
import itertools
import json
import math
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fl_core.contracts.errors import IntegrityError
from fl_core.link.envelope import COUNTER_LIMIT, TYPE_PATTERN

RECORDS, RECORDS_TAKEN = "records", "records-taken"  # types of the two messages
TELEMETRY_PATH = "/fieldfleet/v1/telemetry"
STORE_PATTERN = re.compile(r"[0-9a-f]{32}")
RECORD_LIMIT = 32 * 1024  # bytes of one record's body as JSON
BATCH_RECORDS = 200
PACKED_LIMIT = 40 * 1024  # bytes on the wire; an envelope holds them in base 64
UNPACKED_LIMIT = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Record:
    """seq: counts a store's records from 1, without a repeat. time: seconds since 1970 by the device's clock."""

    seq: int
    kind: str
    time: float
    body: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Consecutive records of one store, the oldest that its device still has."""

    store: str
    records: tuple[Record, ...]


def pack(batch: Batch) -> bytes:
    """Raises IntegrityError for a body that is not JSON."""
    rows = [[r.seq, r.kind, round(r.time, 3), r.body] for r in batch.records]
    try:
        text = json.dumps({"store": batch.store, "records": rows}, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise IntegrityError(f"batch of records: not JSON: {error}") from None
    return zlib.compress(text.encode(), 9)


def pack_fitting(batch: Batch) -> tuple[Batch, bytes]:
    """As many of the first records as fit into PACKED_LIMIT; one always does."""
    while True:
        data = pack(batch)
        if len(data) <= PACKED_LIMIT or len(batch.records) == 1:
            return batch, data
        batch = Batch(store=batch.store, records=batch.records[: len(batch.records) // 2])


def unpack(data: bytes, *, origin: str) -> Batch:
    """Raises IntegrityError naming what is wrong: nothing that arrives is trusted."""
    if len(data) > PACKED_LIMIT:
        raise IntegrityError(f"{origin}: {len(data):,} bytes of records are over the limit of {PACKED_LIMIT:,}")
    try:
        inflate = zlib.decompressobj()
        text = inflate.decompress(data, UNPACKED_LIMIT)
        if not inflate.eof:
            raise IntegrityError(f"{origin}: the batch is cut short, or unpacks to over {UNPACKED_LIMIT:,} bytes")
        table = json.loads(text)
    except (zlib.error, ValueError, RecursionError) as error:
        raise IntegrityError(f"{origin}: not a batch of records: {error}") from None
    store = table.get("store") if isinstance(table, dict) else None
    rows = table.get("records") if isinstance(table, dict) else None
    if not isinstance(store, str) or not STORE_PATTERN.fullmatch(store):
        raise IntegrityError(f"{origin}: a batch's store must be 32 hexadecimal digits")
    if not isinstance(rows, list) or not 1 <= len(rows) <= BATCH_RECORDS:
        raise IntegrityError(f"{origin}: a batch holds 1 to {BATCH_RECORDS} records")
    records = tuple(_record(row, origin) for row in rows)
    if any(later.seq <= former.seq for former, later in itertools.pairwise(records)):
        raise IntegrityError(f"{origin}: the records' numbers do not ascend")
    return Batch(store=store, records=records)


def to_text(data: bytes) -> str:
    """Packed bytes inside an envelope."""
    return base64.b85encode(data).decode("ascii")


def from_text(text: Any, *, origin: str) -> bytes:
    try:
        if not isinstance(text, str):
            raise ValueError("not a text")
        return base64.b85decode(text)
    except (ValueError, binascii.Error) as error:
        raise IntegrityError(f"{origin}: not a batch of records: {error}") from None


def taken_of(table: Any, *, origin: str) -> tuple[str, int]:
    """(store, number of the last record that the server keeps) of a server's answer."""
    store = table.get("store") if isinstance(table, dict) else None
    upto = table.get("upto") if isinstance(table, dict) else None
    if not isinstance(store, str) or not STORE_PATTERN.fullmatch(store) or not _counter(upto):
        raise IntegrityError(f"{origin}: not an answer to a batch of records")
    return store, int(upto)  # type: ignore[arg-type]


def checked_body(kind: str, body: dict[str, Any]) -> str:
    """The body as JSON. Raises IntegrityError when it is too large or is not JSON."""
    try:
        text = json.dumps(body, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise IntegrityError(f"record {kind!r}: not JSON: {error}") from None
    if len(text) > RECORD_LIMIT or not TYPE_PATTERN.fullmatch(kind):
        raise IntegrityError(
            f"record {kind!r}: {len(text):,} bytes are over the limit of {RECORD_LIMIT:,}, or its kind is no name"
        )
    return text


def first_fitting(sizes: Sequence[int]) -> int:
    """How many records of these sizes (bytes of JSON) go into one batch before it is packed."""
    total = 0
    for count, size in enumerate(sizes):
        total += size + 128
        if total > UNPACKED_LIMIT // 2:
            return max(1, count)
    return len(sizes)


def _record(row: Any, origin: str) -> Record:
    if not isinstance(row, list) or len(row) != 4:
        raise IntegrityError(f"{origin}: a record is [number, kind, time, body]")
    seq, kind, made, body = row
    if not _counter(seq) or seq == 0 or not isinstance(kind, str) or not TYPE_PATTERN.fullmatch(kind):
        raise IntegrityError(f"{origin}: a record's number or kind is not usable")
    if type(made) not in (int, float) or not math.isfinite(made) or not abs(made) < COUNTER_LIMIT:
        raise IntegrityError(f"{origin}: record {seq}: its time is not a number of seconds")
    if not isinstance(body, dict):
        raise IntegrityError(f"{origin}: record {seq}: its body is not an object")
    checked_body(kind, body)  # also NaN, which json reads but which is not JSON
    return Record(seq=seq, kind=kind, time=float(made), body=body)


def _counter(value: Any) -> bool:
    return type(value) is int and 0 <= value < COUNTER_LIMIT
