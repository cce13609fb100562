"""What a signed repository calls its files, and the signed index that says which version a channel offers.

Every file of a bundle is a TUF target of its own, ``APPLICATION/VERSION/FILE``, so that a device fetches only its
edge target's model. ``APPLICATION/CHANNEL.json`` is the channel's index.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from fl_core.contracts.errors import InputError, IntegrityError
from fl_core.contracts.names import checked_name

INDEX_FORMAT = 1
INDEX_LIMIT = 1 << 20
MAX_VERSION = 2**53
FILE_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
APPLICATION_PATTERN = re.compile(r"[a-z][a-z0-9_]{0,63}")
SHA256_PATTERN = re.compile(r"[0-9a-f]{64}")
DEFAULT_CHANNEL = "stable"


def checked_application(name: str) -> str:
    if not APPLICATION_PATTERN.fullmatch(name):
        raise InputError(f"application {name!r} is not usable in a repository", remedy="use a-z, 0-9 and '_'")
    return name


def checked_channel(name: str) -> str:
    """A channel must not look like a version, which is all digits."""
    if checked_name(name, "channel").isdigit():
        raise InputError(f"channel {name!r} is a number", remedy="name it with a letter, such as 'stable'")
    return name


def checked_file(name: str) -> str:
    if not FILE_PATTERN.fullmatch(name):
        raise InputError(f"{name!r} is not a plain file name")
    return name


def file_target(application: str, version: int, name: str) -> str:
    return f"{checked_application(application)}/{version}/{checked_file(name)}"


def index_target(application: str, channel: str) -> str:
    return f"{checked_application(application)}/{checked_channel(channel)}.json"


@dataclass(frozen=True, kw_only=True)
class ChannelIndex:
    """``files``: name -> {sha256, bytes} of the whole bundle; ``targets``: edge target -> its model file.

    published: RFC 3339, UTC: a device whose clock is earlier has a wrong clock.
    """

    application: str
    channel: str
    version: int
    published: str
    model_sha256: str  # of the checkpoint that was exported
    files: Mapping[str, Mapping[str, Any]]
    targets: Mapping[str, str]

    def to_bytes(self) -> bytes:
        return (json.dumps({"format_version": INDEX_FORMAT, **asdict(self)}, indent=1, sort_keys=True) + "\n").encode()

    def files_for(self, target: str) -> tuple[str, ...]:
        """What a device of this edge target fetches: everything but the other targets' models.

        Raises InputError with the list of edge targets that this version serves.
        """
        if target not in self.targets:
            raise InputError(
                f"version {self.version} of {self.application} has no model for edge target {target!r}",
                remedy=f"it serves: {', '.join(sorted(self.targets)) or 'none'}; add it to export.targets",
            )
        others = {file for name, file in self.targets.items() if name != target} - {self.targets[target]}
        return tuple(sorted(name for name in self.files if name not in others))


def read_index(data: bytes, *, application: str, channel: str) -> ChannelIndex:
    """Checks every field. Raises IntegrityError naming the one that is missing or wrong."""
    origin = f"{application}/{channel}.json"
    try:
        table = json.loads(data) if len(data) <= INDEX_LIMIT else None
    except (ValueError, RecursionError):
        table = None
    if not isinstance(table, dict):
        raise IntegrityError(f"{origin}: not a JSON object of at most {INDEX_LIMIT:,} bytes")
    if table.get("format_version") != INDEX_FORMAT:
        raise IntegrityError(
            f"{origin}: format version {table.get('format_version')!r} is not readable here",
            remedy=f"this release reads {INDEX_FORMAT}: upgrade the device",
        )
    files, targets = table.get("files"), table.get("targets")
    checks = {
        "application": table.get("application") == application,
        "channel": table.get("channel") == channel,
        "version": type(table.get("version")) is int and 0 < table["version"] < MAX_VERSION,
        "published": isinstance(table.get("published"), str),
        "model_sha256": isinstance(table.get("model_sha256"), str),
        "files": isinstance(files, dict) and bool(files) and all(_is_file(k, v) for k, v in files.items()),
        "targets": isinstance(targets, dict)
        and all(isinstance(v, str) and v in (files or ()) for v in targets.values()),
    }
    for name, good in checks.items():
        if not good:
            raise IntegrityError(f"{origin}: field {name!r} is missing or wrong")
    return ChannelIndex(**{name: table[name] for name in checks})


def _is_file(name: str, facts: Any) -> bool:
    return (
        bool(FILE_PATTERN.fullmatch(name))
        and isinstance(facts, dict)
        and type(facts.get("bytes")) is int
        and facts["bytes"] >= 0
        and isinstance(facts.get("sha256"), str)
        and bool(SHA256_PATTERN.fullmatch(facts["sha256"]))
    )
