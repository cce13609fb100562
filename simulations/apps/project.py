"""A Flower project on disk: components, run configuration and overrides, checked before anything is started."""

from __future__ import annotations

import tomllib
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from fl_core.contracts.config import dotted, read_toml
from fl_core.contracts.errors import FieldfleetError, InputError
from fl_core.flower.adapter import apps as adapter

T = TypeVar("T")
ROUND_KEYS = ("num-server-rounds", "num-rounds", "num_rounds", "num_server_rounds", "rounds")
DEFAULT_CLIENTS = 2  # as Flower's own simulation


@dataclass(frozen=True, kw_only=True)
class FlowerProject:
    """run_config: the defaults of pyproject.toml with the overrides; num_clients: of the project's own federation, or 2."""

    folder: Path
    name: str
    version: str
    server: str
    client: str
    run_config: Mapping[str, Any]
    num_clients: int


def read_project(folder: Path, overrides: Iterable[str] = (), *, rounds: int | None = None) -> FlowerProject:
    """overrides: ``key=value`` items or one .toml file. rounds: for the key that the project keeps its rounds in.

    Raises InputError naming the file or key.
    """
    if not folder.is_dir():
        raise InputError(f"--flower-app {folder}: no such folder")
    table, defaults = adapter.read_project(folder)
    given = dict(_overrides(list(overrides)))
    if rounds is not None:
        given[_round_key(defaults, folder)] = rounds
    components = table["tool"]["flwr"]["app"]["components"]
    for kind in ("serverapp", "clientapp"):
        if not isinstance(components.get(kind), str):
            raise InputError(f"{folder / 'pyproject.toml'}: [tool.flwr.app.components] {kind} is missing")
    return FlowerProject(
        folder=folder.resolve(),
        name=str(table["project"]["name"]),
        version=str(table["project"]["version"]),
        server=components["serverapp"],
        client=components["clientapp"],
        run_config={**defaults, **{k: _like(defaults, k, v, folder) for k, v in given.items()}},
        num_clients=_federation_size(table),
    )


def loaded(load: Callable[[str, Path], T], reference: str, folder: Path) -> T:
    """The component. Raises InputError with the place in the app's code where its import failed."""
    try:
        return load(reference, folder)
    except FieldfleetError:
        raise
    except Exception as error:  # the app's own code runs at import
        raise InputError(f"{reference}: {describe(error, folder)}", remedy=_remedy(error)) from error


def describe(error: BaseException, folder: Path) -> str:
    """The error with the last line of the app's own code that it went through."""
    own = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).is_relative_to(folder)]
    place = f" ({own[-1].filename}:{own[-1].lineno})" if own else ""
    return f"{type(error).__name__}: {error}{place}"


def _remedy(error: BaseException) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"install what the app needs here: {error.name.partition('.')[0]}"
    return ""


def _overrides(items: list[str]) -> Iterable[tuple[str, Any]]:
    for item in items:
        if item.endswith(".toml") and "=" not in item:
            yield from dotted(read_toml(Path(item)))
            continue
        key, equals, raw = item.partition("=")
        if not equals or not key.strip():
            raise InputError(f"--run-config {item!r} is malformed", remedy="write --run-config key=value")
        try:
            yield key.strip(), tomllib.loads(f"v = {raw.strip()}")["v"]
        except tomllib.TOMLDecodeError:
            yield key.strip(), raw.strip()


def _like(defaults: Mapping[str, Any], key: str, value: Any, folder: Path) -> Any:
    """Of the same type as the project's own default: its code was written for that."""
    if key not in defaults:
        raise InputError(
            f"--run-config {key}: not a key of {folder / 'pyproject.toml'}",
            remedy=f"known: {', '.join(sorted(defaults)) or 'none, [tool.flwr.app.config] is empty'}",
        )
    kind = type(defaults[key])
    if kind is float and type(value) is int:
        return float(value)
    if kind is str and type(value) in (int, float):
        return str(value)
    if type(value) is not kind:
        raise InputError(f"--run-config {key} = {value!r}: must be {kind.__name__}, as in pyproject.toml")
    return value


def _round_key(defaults: Mapping[str, Any], folder: Path) -> str:
    found = [key for key in ROUND_KEYS if isinstance(defaults.get(key), int)]
    if not found:
        raise InputError(
            f"--rounds: {folder / 'pyproject.toml'} has none of {', '.join(ROUND_KEYS)} in [tool.flwr.app.config]",
            remedy="set the key that the app reads its rounds from: --run-config KEY=N",
        )
    return found[0]


def _federation_size(table: Mapping[str, Any]) -> int:
    """``options.num-supernodes`` of the project's default federation, where it has one."""
    federations = table["tool"]["flwr"].get("federations", {})
    default = federations.get(federations.get("default", ""), {}) if isinstance(federations, Mapping) else {}
    size = default.get("options", {}).get("num-supernodes") if isinstance(default, Mapping) else None
    return size if type(size) is int and size > 0 else DEFAULT_CLIENTS
