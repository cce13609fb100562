"""Envelope: the one form of every MQTT message, bounded JSON that keeps the fields it does not know."""

from __future__ import annotations

import json
import math
import re
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from fl_core.contracts.errors import IntegrityError

SCHEMA = 1
SIZE_LIMIT = 64 * 1024  # bytes; models never travel in an envelope
DEPTH_LIMIT = 16
TYPE_PATTERN = re.compile(r"[a-z][a-z0-9-]{0,31}")
ID_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
COUNTER_LIMIT = 2**53  # integers that every JSON reader represents exactly
FIELDS = ("schema", "type", "id", "time", "boot", "connection", "body")


def new_id() -> str:
    return uuid.uuid4().hex


@dataclass(frozen=True, kw_only=True)
class Envelope:
    """One message.

    type: what it is ("birth", "death", "ping", ...). id: a job's id, repeated in its reply. time: seconds since 1970
    by the sender's clock, for display only. boot: counts the sender's starts. connection: counts the connections
    since that start; (boot, connection) orders births and deaths whatever the clocks say. unknown: kept as found.
    """

    type: str
    id: str = field(default_factory=new_id)
    time: float = field(default_factory=time.time)
    boot: int = 0
    connection: int = 0
    body: dict[str, Any] = field(default_factory=dict)
    schema: int = SCHEMA
    unknown: dict[str, Any] = field(default_factory=dict)

    @property
    def order(self) -> tuple[int, int]:
        return (self.boot, self.connection)


def encode(envelope: Envelope) -> bytes:
    """ASCII JSON. Raises IntegrityError when it is over the size limit or holds what JSON cannot."""
    table = {**envelope.unknown, **{name: getattr(envelope, name) for name in FIELDS}}
    try:
        data = json.dumps(table, separators=(",", ":"), allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise IntegrityError(f"message {envelope.type!r}: not JSON: {error}") from None
    if len(data) > SIZE_LIMIT:
        raise IntegrityError(f"message {envelope.type!r}: {len(data):,} bytes are over the limit of {SIZE_LIMIT:,}")
    return data


def decode(data: bytes, *, origin: str) -> Envelope:
    """Raises IntegrityError naming ``origin`` (a topic) and the field."""
    if len(data) > SIZE_LIMIT:
        raise IntegrityError(f"{origin}: {len(data):,} bytes are over the limit of {SIZE_LIMIT:,}")
    try:
        table = json.loads(data.decode("utf-8"), object_pairs_hook=_unique, parse_float=_finite, parse_constant=_finite)
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"{origin}: not a JSON message: {error}") from None
    if not isinstance(table, dict):
        raise IntegrityError(f"{origin}: a message must be a JSON object")
    _check_depth(table, origin)
    schema = _integer(table, "schema", origin, low=1)
    if schema > SCHEMA:
        raise IntegrityError(f"{origin}: schema {schema} is newer than {SCHEMA}", remedy="upgrade the older side")
    body = table.get("body", {})
    if not isinstance(body, dict):
        raise IntegrityError(f"{origin}: field 'body' must be an object")
    return Envelope(
        schema=schema,
        type=_matching(table, "type", TYPE_PATTERN, origin),
        id=_matching(table, "id", ID_PATTERN, origin),
        time=_seconds(table, origin),
        boot=_integer(table, "boot", origin),
        connection=_integer(table, "connection", origin),
        body=body,
        unknown={key: value for key, value in table.items() if key not in FIELDS},
    )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a key occurs twice")
    return table


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):  # also 1e999, which float() reads as infinity
        raise ValueError(f"{text} is not a finite number")
    return value


def _check_depth(table: dict[str, Any], origin: str) -> None:
    level: list[Any] = [table]
    for _ in range(DEPTH_LIMIT):
        level = [v for item in level for v in (item.values() if isinstance(item, dict) else item)]
        level = [v for v in level if isinstance(v, (dict, list))]
        if not level:
            return
    raise IntegrityError(f"{origin}: nested deeper than {DEPTH_LIMIT} levels")


def _matching(table: dict[str, Any], key: str, pattern: re.Pattern[str], origin: str) -> str:
    value = table.get(key)
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise IntegrityError(f"{origin}: field {key!r} must match {pattern.pattern}")
    return value


def _integer(table: dict[str, Any], key: str, origin: str, *, low: int = 0) -> int:
    value = table.get(key, 0)
    if type(value) is not int or not low <= value < COUNTER_LIMIT:
        raise IntegrityError(f"{origin}: field {key!r} must be an integer of at least {low}")
    return value


def _seconds(table: dict[str, Any], origin: str) -> float:
    value = table.get("time", 0)
    if type(value) not in (int, float) or not abs(value) < COUNTER_LIMIT or not math.isfinite(value):
        raise IntegrityError(f"{origin}: field 'time' must be a finite number of seconds")
    return float(value)
