"""Ways to deal the examples of any application out to simulated clients, one file each, found by name.

    --partition NAME:key=value,key=value            e.g. dirichlet:alpha=0.3,clients=50

A file exposes ``Options`` (frozen, validated) and ``assign(units, options, rng) -> (U,) client numbers``. Units are whole
groups of examples, so that no group is ever split between clients.
"""

from __future__ import annotations

import importlib
import pkgutil
import tomllib
from dataclasses import replace
from typing import Any

import numpy as np

from fl_core.contracts.config import parse
from fl_core.contracts.errors import ConfigError, unknown_name
from fl_core.learning import seeding
from fl_core.learning.examples import Examples
from simulations.partitioners.base import Ids, units_of, with_least


def known_partitioners() -> list[str]:
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name not in ("base", "picture"))


def read_spec(spec: str) -> tuple[str, Any]:
    """(name, options). Raises InputError for an unknown name, ConfigError for a wrong key or value."""
    name, _, rest = spec.partition(":")
    if name not in known_partitioners():
        raise unknown_name("partitioner", name, known_partitioners())
    table: dict[str, Any] = {}
    for item in filter(None, rest.split(",")):
        key, equals, raw = item.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"--partition {spec}: {item!r} is not key=value")
        try:
            table[key.strip()] = tomllib.loads(f"v = {raw.strip()}")["v"]
        except tomllib.TOMLDecodeError:
            table[key.strip()] = raw.strip()
    options = importlib.import_module(f"{__name__}.{name}").Options
    return name, parse(options, table, origin=f"--partition {spec}")


def partitioned(examples: Examples, spec: str, seed: int) -> Examples:
    """The same examples with other clients, seeded. Raises InputError where they cannot be dealt out so."""
    name, options = read_spec(spec)
    module = importlib.import_module(f"{__name__}.{name}")
    units, unit_of = units_of(examples, getattr(options, "by", ""))
    rng = seeding.generator(seed, "partition", spec)
    owner: Ids = module.assign(units, options, rng)
    clients = getattr(options, "clients", 0)
    if clients:
        owner = with_least(owner, units.sizes, clients, options.min_size, spec)
        digits = max(4, len(str(clients - 1)))
        names = np.array([f"part-{i:0{digits}d}" for i in range(clients)])
    else:
        names = units.names
    return replace(examples, columns={**examples.columns, "client": names[owner][unit_of]})
