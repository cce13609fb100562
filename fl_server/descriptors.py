"""A device that waits holds one descriptor: a server takes as many as the system grants, rather than the usual 1,024."""

from __future__ import annotations

import logging
import resource

log = logging.getLogger(__name__)
MOST = 1 << 20
OWN, EACH = 200, 2  # of the server itself; of a device: its HTTPS connection and its session at the broker


def raise_file_limit() -> int:
    """Lift this process's soft limit to its hard limit; returns what it is now."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST if hard == resource.RLIM_INFINITY else min(hard, MOST)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        return wanted
    return MOST if soft == resource.RLIM_INFINITY else soft


def check_file_limit(limit: int, devices: int) -> bool:
    """Whether so many descriptors suffice for so many registered devices; says what to do when they do not."""
    needed = OWN + EACH * devices
    if limit < needed:
        facts = {"limit": limit, "needed": needed, "devices": devices}
        log.warning("too few file descriptors for the fleet: raise LimitNOFILE (ulimit -n)", extra={"facts": facts})
    return limit >= needed
