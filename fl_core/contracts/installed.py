"""What is installed here, without importing any of it: applications, packages and their versions. Standard library only."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import pkgutil

APPLICATION_ENTRY_POINTS = "fieldfleet.applications"
OWN_DISTRIBUTION = "fieldfleet"


def known_applications() -> list[str]:
    """Folders of ``applications`` and entry points of other people's packages."""
    return sorted({*_own_applications(), *(entry.name for entry in _entry_points())})


def package_version(name: str) -> str | None:
    """Of an installed distribution; None where there is none."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def application_version(name: str) -> str | None:
    """The version of the distribution that brings the application ("" where that has none); None: not installed."""
    if name in _own_applications():
        return package_version(OWN_DISTRIBUTION) or ""
    for entry in _entry_points():
        if entry.name == name:
            return entry.dist.version if entry.dist is not None else ""
    return None


def is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _own_applications() -> list[str]:
    spec = importlib.util.find_spec("applications")
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    return [module.name for module in pkgutil.iter_modules(places) if module.ispkg]


def _entry_points() -> importlib.metadata.EntryPoints:
    return importlib.metadata.entry_points(group=APPLICATION_ENTRY_POINTS)
