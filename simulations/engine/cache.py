"""Where this machine keeps what it has measured and compiled."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/fieldfleet``, else ``~/.cache/fieldfleet``; may not exist yet."""
    root = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(root).expanduser() / "fieldfleet"
