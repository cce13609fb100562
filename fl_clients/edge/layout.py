"""Homes made before a device could have several applications: their one application's files move into its own folder."""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path

from fl_clients.edge.home import AgentHome
from fl_clients.edge.settings import AgentSettings
from fl_clients.edge.slots import NAMES
from fl_core.contracts.errors import IntegrityError
from fl_core.contracts.manifests import BundleManifest, read_manifest
from fl_core.contracts.names import NAME_PATTERN
from fl_core.storage import atomic

LOG = logging.getLogger(__name__)
# The slots come last: while they are at the old place, the move is not done, and the next start goes on with it.
PARTS = ("predictions", "update", "slots")


def migrate(home: AgentHome, settings: AgentSettings) -> None:
    """To be called by the one who holds the home's lock. Each part is moved by one rename; kill -9 costs nothing."""
    parts = [part for part in PARTS if (home.folder / part).is_dir()]
    if not parts:
        return
    name = _application_of(home.folder / "slots") or next(iter(settings.device.names), "")
    if not name:
        return  # it never had a model
    target = home.application(name).folder
    target.mkdir(parents=True, exist_ok=True)
    atomic.fsync_folder(target.parent)
    for part in parts:
        if (target / part).exists():
            LOG.warning("%s: %s is newer; the old one stays where it is", home.folder / part, target / part)
            continue
        os.rename(home.folder / part, target / part)
        atomic.fsync_folder(target)
        atomic.fsync_folder(home.folder)
    LOG.info("%s: the files of %s are in %s now", home.folder, name, target)


def _application_of(slots: Path) -> str | None:
    for slot in NAMES:
        with contextlib.suppress(IntegrityError):
            name = read_manifest(BundleManifest, slots / slot).application
            if NAME_PATTERN.fullmatch(name):
                return name
    return None
