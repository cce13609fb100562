"""Small seismic data sets for tests."""

from __future__ import annotations

from applications.seismic_facies import APPLICATION
from applications.seismic_facies.config import Config

SMALL = (
    *("data.clients=2", "data.volumes_per_client=2", "data.crop=16", "data.stride=16", "data.inlines=24"),
    *("data.crosslines=20", "data.samples=28", "data.reference=stored"),
)


def configured(*overrides: str) -> Config:
    found: Config = APPLICATION.configure([*SMALL, *overrides])
    return found


CONFIG = configured()
