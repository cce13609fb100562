"""Presets (TOML) and ``--set section.key=value`` overrides, parsed once into frozen dataclasses.

Unknown keys, wrong types and out-of-range values are refused with the file, the key and the accepted values.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import tomllib
import types
import typing
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from fl_core.contracts.errors import ConfigError

T = TypeVar("T")


def number(default: Any, *, low: float = -math.inf, high: float = math.inf, help: str = "") -> Any:
    """A dataclass field for an int or float in the closed interval [low, high]."""
    return dataclasses.field(default=default, metadata={"low": low, "high": high, "help": help})


def choice(default: str, *accepted: str, help: str = "") -> Any:
    """A dataclass field for one of the accepted names."""
    return dataclasses.field(default=default, metadata={"choices": accepted, "help": help})


def flag(default: bool, *, help: str = "") -> Any:
    return dataclasses.field(default=default, metadata={"help": help})


def text(default: str, *, help: str = "") -> Any:
    return dataclasses.field(default=default, metadata={"help": help})


def sequence(default: tuple[Any, ...], *, low: float = -math.inf, high: float = math.inf, help: str = "") -> Any:
    return dataclasses.field(default=default, metadata={"low": low, "high": high, "help": help})


def parse(kind: type[T], table: Mapping[str, Any], *, origin: str, prefix: str = "") -> T:
    """Build the dataclass ``kind`` from a TOML table.

    Raises ConfigError naming ``origin`` (a file or "--set"), the dotted key and the accepted values.
    """
    fields = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(kind)
    values: dict[str, Any] = {}
    for key, value in table.items():
        dotted = f"{prefix}{key}"
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            hint = f"did you mean {prefix}{near[0]}? " if near else ""
            raise ConfigError(f"{origin}: unknown key {dotted!r}", remedy=f"{hint}accepted: {', '.join(fields)}")
        hint_type = hints[key]
        if dataclasses.is_dataclass(hint_type):
            if not isinstance(value, Mapping):
                raise ConfigError(f"{origin}: {dotted} must be a table, not {value!r}")
            values[key] = parse(typing.cast("type[Any]", hint_type), value, origin=origin, prefix=f"{dotted}.")
        else:
            values[key] = _convert(value, hint_type, fields[key].metadata, origin, dotted)
    try:
        return kind(**values)
    except ConfigError:
        raise
    except (TypeError, ValueError) as error:  # a __post_init__ that relates several keys
        raise ConfigError(f"{origin}: {prefix.rstrip('.') or 'configuration'}: {error}") from None


def _convert(value: Any, hint: Any, meta: Mapping[str, Any], origin: str, key: str) -> Any:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        hint = next(a for a in typing.get_args(hint) if a is not type(None))
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{origin}: {key} must be a list, not {value!r}")
        return tuple(_convert(v, typing.get_args(hint)[0], meta, origin, key) for v in value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            value = float(value)
        except OverflowError:  # an integer beyond every float
            value = math.inf if value > 0 else -math.inf
    if type(value) is not hint:
        names = {int: "an integer", float: "a number", str: "a string", bool: "true or false"}
        raise ConfigError(f"{origin}: {key} must be {names.get(hint, hint)}, not {value!r}")
    if "choices" in meta and value not in meta["choices"]:
        raise ConfigError(
            f"{origin}: {key} = {value!r} is not accepted", remedy=f"accepted: {', '.join(meta['choices'])}"
        )
    if "low" in meta and not isinstance(value, (bool, str)):
        low, high = meta["low"], meta["high"]
        if not (abs(value) < math.inf and low <= value <= high):  # comparisons hold for integers of any size
            raise ConfigError(
                f"{origin}: {key} = {f'{value}'[:40]} is out of range", remedy=f"accepted: {low} to {high}"
            )
    return value


def read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None


def apply_overrides(table: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """``a.b=c`` laid over a nested table; c is a TOML value, or a bare string where it is not one."""
    result: dict[str, Any] = _deep_copy(table)
    for item in overrides:
        dotted, equals, raw = item.partition("=")
        path = dotted.strip().split(".")
        if not equals or not all(path):
            raise ConfigError(f"--set {item!r} is malformed", remedy="write --set section.key=value")
        try:
            value = tomllib.loads(f"v = {raw.strip()}")["v"]
        except tomllib.TOMLDecodeError:
            value = raw.strip()
        node = result
        for part in path[:-1]:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise ConfigError(f"--set {item!r}: {part!r} is not a section")
        node[path[-1]] = value
    return result


def _deep_copy(table: Mapping[str, Any]) -> dict[str, Any]:
    return {k: _deep_copy(v) if isinstance(v, Mapping) else v for k, v in table.items()}


def at_default(config: Any, prefix: str = "") -> list[str]:
    """Dotted keys whose value is the schema's default: what a reader with an older schema may leave out."""
    found = []
    for f in dataclasses.fields(config):
        value, dotted = getattr(config, f.name), f"{prefix}{f.name}"
        if dataclasses.is_dataclass(value):
            inner = at_default(value, f"{dotted}.")
            found += [dotted, *inner] if value == _default(f) else inner
        elif value == _default(f):
            found.append(dotted)
    return found


def known(kind: type[Any], table: Mapping[str, Any], defaults: Collection[str], prefix: str = "") -> dict[str, Any]:
    """The table of a writer with a newer schema, less the keys that ``kind`` lacks and that say nothing (``at_default``)."""
    hints = typing.get_type_hints(kind)
    left: dict[str, Any] = {}
    for key, value in table.items():
        dotted = f"{prefix}{key}"
        if key not in hints and dotted in defaults:
            continue
        inner = hints.get(key)
        nested = dataclasses.is_dataclass(inner) and isinstance(value, Mapping)
        left[key] = known(typing.cast("type[Any]", inner), value, defaults, f"{dotted}.") if nested else value
    return left


def describes(table: Mapping[str, Any], config: Any) -> bool:
    """Whether a table that was written earlier means this configuration; keys that came since are at their defaults."""
    fields = {f.name: f for f in dataclasses.fields(config)}
    if not table.keys() <= fields.keys():
        return False
    for name, f in fields.items():
        value = getattr(config, name)
        if name not in table:
            if value is not None and value != _default(f):
                return False
        elif dataclasses.is_dataclass(value):
            if not isinstance(table[name], Mapping) or not describes(table[name], value):
                return False
        elif table[name] != (list(value) if isinstance(value, tuple) else value):
            return False
    return True


def _default(f: dataclasses.Field[Any]) -> Any:
    return f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default


def to_table(config: Any, *, chosen: bool = False) -> dict[str, Any]:
    """The inverse of parse: nested plain values, JSON- and TOML-ready (no None). chosen: without what is at its default."""
    result: dict[str, Any] = {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if chosen and value == _default(f):
            continue
        if dataclasses.is_dataclass(value):
            result[f.name] = to_table(value, chosen=chosen)
        elif isinstance(value, tuple):
            result[f.name] = list(value)
        elif value is not None:
            result[f.name] = value
    return result


def dotted(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(``section.key``, value) of each setting in a nested table."""
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from dotted(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
