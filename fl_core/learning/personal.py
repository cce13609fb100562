"""Personal layers: arrays of the model that stay on each client (FedPer, Arivazhagan et al. 2019; FedBN, Li et al. 2021)."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable

from fl_core.contracts.errors import ConfigError


def personal_names(names: Iterable[str], patterns: Iterable[str]) -> frozenset[str]:
    """The arrays that ``algorithm.personal`` names, as in a shell: ``head.*``, ``*norm*``.

    Raises ConfigError for a pattern that fits no array, or when nothing would be left to share.
    """
    known, found = sorted(names), set[str]()
    for pattern in patterns:
        fitting = fnmatch.filter(known, pattern)
        if not fitting:
            shown = ", ".join(known[:20]) + (", ..." if len(known) > 20 else "")
            raise ConfigError(f"algorithm.personal: {pattern!r} fits no array of the model", remedy=f"known: {shown}")
        found.update(fitting)
    if found and len(found) == len(known):
        raise ConfigError("algorithm.personal: every array of the model is personal, nothing would be learned together")
    return frozenset(found)
