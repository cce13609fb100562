"""Results that a benchmark keeps, so that a repeated call resumes, are of the settings that it has now."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fl_core.contracts.config import dotted, to_table
from fl_core.contracts.errors import InputError
from fl_core.storage import atomic


def check(record: Path, configs: Mapping[str, Any], *, kept: bool, remove: str) -> None:
    """configs: name -> configuration, which ``record`` (JSON) holds beside the results. ``kept``: whether there are any yet.

    Raises InputError, which names a setting and says what to ``remove``, for results of others: presets change.
    """
    now = json.loads(json.dumps({name: to_table(config) for name, config in configs.items()}))
    if not record.is_file():
        if kept:
            raise InputError(f"{record} is missing: what is kept there is of settings not known", remedy=remove)
        atomic.write_json(record, now)
        return
    then = json.loads(record.read_text(encoding="utf-8"))
    for key, value in dotted(now):
        before = dict(dotted(then)).get(key, "nothing")
        if before != value:
            raise InputError(
                f"what is kept beside {record} was made with {key} = {before}, which is {value} now", remedy=remove
            )
