"""Results that a benchmark keeps, so that a repeated call resumes, are of the settings that it has now."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fl_core.contracts.config import dotted, to_table
from fl_core.contracts.errors import InputError
from fl_core.storage import atomic


def check(folder: Path, configs: Mapping[str, Any]) -> None:
    """configs: name -> configuration of what lies in ``folder``, which keeps them in ``settings.json``.

    A setting that did not exist then counts as its default. Raises InputError, which names a setting, for a folder of
    others (presets change), and for one that does not say.
    """
    record = folder / "settings.json"
    remedy = f"remove {folder}"
    if not record.is_file():
        if folder.is_dir():
            raise InputError(f"{record} is missing: what is kept there is of settings not known", remedy=remedy)
        then = {}
    else:
        then = json.loads(record.read_text(encoding="utf-8"))
    now = json.loads(json.dumps({name: to_table(config) for name, config in configs.items()}))
    for name in then.keys() & now.keys():
        before, after = dict(dotted(then[name])), dict(dotted(now[name]))
        chosen = dict(dotted(to_table(configs[name], chosen=True)))
        for key in sorted(before.keys() | (after.keys() & chosen.keys())):
            was, is_now = before.get(key, "nothing"), after.get(key, "nothing")
            if was != is_now:
                raise InputError(f"{folder} was made with {name}: {key} = {was}, which is {is_now} now", remedy=remedy)
    if now.keys() - then.keys():
        atomic.write_json(record, {**then, **now})
