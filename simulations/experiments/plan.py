"""What an experiment is made of: settings times seeds. Each cell has a name, and a manifest that says all it depends on."""

from __future__ import annotations

import fcntl
import itertools
import json
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fl_core.contracts.errors import InputError, IntegrityError
from fl_core.storage import atomic

MANIFEST, RESULT = "manifest.json", "result.json"
FORMAT_VERSION = 1
NAME_LIMIT = 120
KEY = re.compile(r"[a-z0-9_]+(\.[a-z0-9_]+)+")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One simulation. settings: what the sweep sets here, dotted key -> value; config: the whole configuration as a table.

    data: a folder, or "generated"; examples_sha256: of the examples that it trains and evaluates on. options: of
    ``simulate`` beside these. engine (the local update that was chosen), model_sha256: known at the end.
    """

    application: str
    application_version: str
    config: dict[str, Any]
    settings: dict[str, Any]
    seed: int
    rounds: int
    data: str
    start: str = ""
    start_sha256: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    examples_sha256: str = ""
    engine: dict[str, Any] = field(default_factory=dict)
    model_sha256: str = ""
    format_version: int = FORMAT_VERSION

    @property
    def setting_name(self) -> str:
        return ", ".join(f"{k}={v}" for k, v in self.settings.items()) or "as configured"

    @property
    def name(self) -> str:
        parts = [f"{k}={v}" for k, v in self.settings.items()]
        plain = re.sub(r"[^A-Za-z0-9._=,-]+", "_", ",".join([*parts, f"seed={self.seed}"]))
        if len(plain) <= NAME_LIMIT:
            return plain
        digest = atomic.sha256_bytes(json.dumps(self.settings, sort_keys=True).encode())[:12]
        return f"{plain[: NAME_LIMIT - 30]}-{digest},seed={self.seed}"

    def same_question(self, other: Cell) -> bool:
        """Whether both ask for the same: what came out, and by which versions, aside."""
        keys = ("application", "config", "seed", "rounds", "data", "start_sha256")
        return all(getattr(self, k) == getattr(other, k) for k in keys) and _asked(self) == _asked(other)

    def write(self, folder: Path) -> None:
        atomic.write_json(folder / MANIFEST, asdict(self))


def _asked(cell: Cell) -> dict[str, Any]:
    """The number of workers changes no result."""
    return {k: v for k, v in cell.options.items() if k != "workers"}


def read_cell(path: Path) -> Cell:
    """Of a manifest, or the folder that holds it. Raises InputError, IntegrityError."""
    file = path / MANIFEST if path.is_dir() else path
    try:
        table = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{file}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise IntegrityError(f"{file}: not a manifest of a simulation: {error}") from None
    version = table.get("format_version") if isinstance(table, dict) else None
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise IntegrityError(f"{file}: format version {version!r} is not readable here", remedy="upgrade fieldfleet")
    known = Cell.__dataclass_fields__
    try:
        cell = Cell(**{k: v for k, v in table.items() if k in known})
    except TypeError as error:
        raise IntegrityError(f"{file}: {error}") from None
    for name, kind in (
        ("application", str),
        ("config", dict),
        ("settings", dict),
        ("options", dict),
        ("engine", dict),
        ("seed", int),
    ):
        if not isinstance(getattr(cell, name), kind):
            raise IntegrityError(f"{file}: field {name!r} must be of type {kind.__name__}")
    return cell


def parse_sweeps(items: Iterable[str]) -> dict[str, list[Any]]:
    """``section.key=a,b,c``; a is a TOML value, or a bare string. Raises InputError."""
    found: dict[str, list[Any]] = {}
    for item in items:
        key, equals, raw = item.partition("=")
        key = key.strip()
        values = list(_values(raw)) if equals else []
        if not KEY.fullmatch(key) or not values:
            raise InputError(f"--sweep {item!r} is malformed", remedy="write --sweep section.key=VALUE,VALUE")
        if key in found:
            raise InputError(f"--sweep {key} is given twice")
        if len({json.dumps(v) for v in values}) < len(values):
            raise InputError(f"--sweep {item!r} names a value twice")
        found[key] = values
    return found


def _values(raw: str) -> Sequence[Any]:
    try:
        found = tomllib.loads(f"v = [{raw}]")["v"]
        return found if isinstance(found, list) else []
    except tomllib.TOMLDecodeError:
        return [_value(part.strip()) for part in raw.split(",") if part.strip()]


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        return text


def settings_of(sweeps: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Every combination; one without any setting where nothing is swept."""
    found = itertools.product(*sweeps.values())
    return [dict(sorted(zip(sweeps, values, strict=True))) for values in found]  # a manifest's order: names stay equal


def override(key: str, value: Any) -> str:
    """As ``--set`` takes it."""
    return f"{key}={json.dumps(value)}"


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """One process at a time; the others wait. A killed one's lock is gone with it."""
    with file.open("w") as opened:
        fcntl.flock(opened, fcntl.LOCK_EX)
        yield
