"""TrainRequest, EvaluateRequest and their replies <-> Flower's RecordDict.

The layout is the one that Flower's own strategies expect (one ArrayRecord, one ConfigRecord; replies with one
ArrayRecord and one MetricRecord holding ``num-examples``), so that unmodified Flower strategies and clients fit.
Records come from the network: types, sizes and values are checked here, once, on both sides.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from fl_core.contracts.arrays import Arrays
from fl_core.contracts.errors import IntegrityError

ARRAYS, CONFIG, METRICS, EXTRA = "arrays", "config", "metrics", "extra"
NUM_EXAMPLES, MAX_STEPS, DEFAULTS = "num-examples", "max-steps", "config-defaults"
PROTOCOL = 1
CONFIG_LIMIT = 1 << 20
DTYPES = {"float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "bool"}


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a client is asked to do. ``config`` is a table that the client validates with the application's own schema.

    defaults: dotted keys of ``config`` at their defaults; a client of an older version, which does not know one, does without.
    arrays: the global model. extra: what the algorithm sends beside it (a control variate, say), by name.
    max_steps: of the optimiser, at most; 0 = the whole local update.
    """

    application: str
    config: Mapping[str, Any]
    round: int
    num_rounds: int
    seed: int
    arrays: Arrays
    extra: Arrays = field(default_factory=dict)
    max_steps: int = 0
    defaults: tuple[str, ...] = ()

    def to_record(self) -> RecordDict:
        header: dict[str, Any] = {
            "protocol": PROTOCOL,
            "application": self.application,
            "config-json": json.dumps(self.config, sort_keys=True),
            "server-round": self.round,
            "num-rounds": self.num_rounds,
            "seed": self.seed,
        }
        if self.max_steps:
            header[MAX_STEPS] = self.max_steps
        if self.defaults:
            header[DEFAULTS] = list(self.defaults)
        content: dict[str, Any] = {ARRAYS: array_record(self.arrays), CONFIG: ConfigRecord(header)}
        if self.extra:
            content[EXTRA] = array_record(self.extra)
        return RecordDict(content)

    @classmethod
    def from_record(cls, record: RecordDict, *, origin: str) -> Request:
        """Raises IntegrityError naming ``origin`` and the field."""
        header = record.config_records.get(CONFIG)
        if header is None:
            raise IntegrityError(f"{origin}: record {CONFIG!r} is missing")
        if header.get("protocol") != PROTOCOL:
            raise IntegrityError(
                f"{origin}: protocol {header.get('protocol')!r} is not {PROTOCOL}", remedy="upgrade the older side"
            )
        table = json_object(_typed(header, "config-json", str, origin), origin)
        max_steps = _typed(header, MAX_STEPS, int, origin) if MAX_STEPS in header else 0
        if max_steps < 0:
            raise IntegrityError(f"{origin}: field {MAX_STEPS!r} is {max_steps}, expected at least 0")
        defaults = _typed(header, DEFAULTS, list, origin) if DEFAULTS in header else []
        if not all(isinstance(key, str) for key in defaults):
            raise IntegrityError(f"{origin}: field {DEFAULTS!r} is no list of keys")
        return cls(
            application=_typed(header, "application", str, origin),
            config=table,
            round=_typed(header, "server-round", int, origin),
            num_rounds=_typed(header, "num-rounds", int, origin),
            seed=_typed(header, "seed", int, origin),
            arrays=read_arrays(record, ARRAYS, origin),
            extra=read_arrays(record, EXTRA, origin) if EXTRA in record.array_records else {},
            max_steps=max_steps,
            defaults=tuple(defaults),
        )


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What a client answers. ``arrays`` is empty after an evaluation; ``metrics`` are finite numbers by name."""

    num_examples: int
    metrics: Mapping[str, float]
    arrays: Arrays = field(default_factory=dict)
    extra: Arrays = field(default_factory=dict)

    def to_record(self) -> RecordDict:
        metrics: dict[str, Any] = {NUM_EXAMPLES: self.num_examples, **{k: float(v) for k, v in self.metrics.items()}}
        content: dict[str, Any] = {METRICS: MetricRecord(metrics)}
        if self.arrays:
            content[ARRAYS] = array_record(self.arrays)
        if self.extra:
            content[EXTRA] = array_record(self.extra)
        return RecordDict(content)

    @classmethod
    def from_record(cls, record: RecordDict, *, origin: str) -> Reply:
        """Raises IntegrityError naming ``origin`` and the field."""
        metrics = record.metric_records.get(METRICS)
        if metrics is None:
            raise IntegrityError(f"{origin}: record {METRICS!r} is missing")
        count = metrics.get(NUM_EXAMPLES)
        if not isinstance(count, int) or count < 0:
            raise IntegrityError(f"{origin}: {NUM_EXAMPLES} is {count!r}, expected an integer of at least 0")
        values: dict[str, float] = {}
        for name, value in metrics.items():
            if isinstance(value, (int, float)) and name != NUM_EXAMPLES:
                if not math.isfinite(value):
                    raise IntegrityError(f"{origin}: metric {name!r} is not finite")
                values[name] = float(value)
        return cls(
            num_examples=count,
            metrics=values,
            arrays=read_arrays(record, ARRAYS, origin) if ARRAYS in record.array_records else {},
            extra=read_arrays(record, EXTRA, origin) if EXTRA in record.array_records else {},
        )


def array_record(arrays: Arrays) -> ArrayRecord:
    return ArrayRecord({name: Array(np.asarray(a, order="C")) for name, a in arrays.items()})


def read_arrays(record: RecordDict, name: str, origin: str) -> dict[str, np.ndarray[Any, np.dtype[Any]]]:
    """The arrays of one record: numpy bytes without pickle, plain numeric types only."""
    found = record.array_records.get(name)
    if found is None:
        raise IntegrityError(f"{origin}: record {name!r} is missing")
    result = {}
    for key, array in found.items():
        try:
            value = array.numpy()
        except Exception as error:  # numpy parses headers as Python text: SyntaxError, MemoryError and more
            raise IntegrityError(f"{origin}: array {key!r} is not readable: {str(error)[:200]}") from None
        if not isinstance(value, np.ndarray):  # the bytes were an archive
            raise IntegrityError(f"{origin}: array {key!r} is not a plain array")
        if value.dtype.name not in DTYPES:
            raise IntegrityError(f"{origin}: array {key!r} has type {value.dtype.name}")
        result[key] = value
    return result


def json_object(text: str, origin: str) -> dict[str, Any]:
    if len(text) > CONFIG_LIMIT:
        raise IntegrityError(
            f"{origin}: configuration of {len(text):,} characters is over the limit of {CONFIG_LIMIT:,}"
        )
    try:
        table = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"{origin}: configuration is not JSON: {error}") from None
    if not isinstance(table, dict):
        raise IntegrityError(f"{origin}: configuration is not a table")
    return table


def _typed(header: Mapping[str, Any], key: str, kind: type, origin: str) -> Any:
    value = header.get(key)
    if type(value) is not kind:
        raise IntegrityError(f"{origin}: field {key!r} is {value!r}, expected {kind.__name__}")
    return value
