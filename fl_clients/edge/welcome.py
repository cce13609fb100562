"""The first contact: who the server says we are, and the root of trust for models, pinned once and kept."""

from __future__ import annotations

import dataclasses
import logging
import time
from pathlib import Path

from fl_clients.connection import Transport, Unreachable, Welcome, parse_welcome, welcome
from fl_clients.edge.home import AgentHome
from fl_core.contracts.errors import IntegrityError, RefusedError
from fl_core.storage import atomic

LOG = logging.getLogger(__name__)
WELCOME_LIMIT = 1 << 20
CLOCK_TOLERANCE_S = 60.0


def enter(home: AgentHome, connection: Transport) -> Welcome:
    """Ask the server who we are, and keep its answer.

    Raises Unreachable, Unregistered or CertificateRefused (both exit 4, with a remedy), RefusedError or IntegrityError.
    """
    found = welcome(connection)
    drift = time.time() - found.time
    if abs(drift) > CLOCK_TOLERANCE_S:
        LOG.warning("this device's clock is %.0f s %s the server's", abs(drift), "ahead of" if drift > 0 else "behind")
    return _keep(home, found)


def enter_or_remember(home: AgentHome, connection: Transport) -> Welcome:
    """Without an answer, what the server said last time: a device must start without its network.

    Raises RefusedError when the server cannot be reached and never was; else as ``enter``.
    """
    try:
        return enter(home, connection)
    except Unreachable as error:
        stored = stored_welcome(home)
        if stored is None:
            raise RefusedError(
                f"no answer from the server: {error}", remedy="is it running, and its port open?"
            ) from None
        LOG.warning("no answer from the server, starting from the last welcome: %s", error)
        return stored


def stored_welcome(home: AgentHome) -> Welcome | None:
    """None when there is none; an unreadable one counts as none, since the server can repeat it."""
    file = home.welcome_file
    try:
        if file.stat().st_size > WELCOME_LIMIT:
            raise IntegrityError(f"{file}: larger than {WELCOME_LIMIT:,} bytes")
        return parse_welcome(file.read_bytes(), origin=str(file))
    except FileNotFoundError:
        return None
    except IntegrityError as error:
        LOG.warning("%s", error.message)
        return None


def pinned_root(home: AgentHome) -> bytes | None:
    """The TUF root of the first contact: the trust of every later update begins there."""
    file = root_file(home)
    return file.read_bytes() if file.is_file() else None


def root_file(home: AgentHome) -> Path:
    return home.folder / "root.json"


def _keep(home: AgentHome, found: Welcome) -> Welcome:
    if found.tuf_root is not None and not root_file(home).exists():
        atomic.write_bytes(root_file(home), found.tuf_root.encode())
    atomic.write_json(home.welcome_file, dataclasses.asdict(found), mode=0o600)
    return found
