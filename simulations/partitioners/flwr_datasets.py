"""A partitioner of Flower's ``flwr-datasets``, by its class: ``flwr_datasets:partitioner=PathologicalPartitioner,...``

The package is optional (``pip install flwr-datasets``). It is given one row for each group, with columns ``label`` (its
most frequent one) and ``size``; its other arguments are ``settings=num_classes_per_partition:2;class_assignment_mode:random``.
"""

from __future__ import annotations

import inspect
import tomllib
from dataclasses import dataclass
from typing import Any

import numpy as np

from fl_core.contracts.config import text
from fl_core.contracts.errors import ConfigError, EnvironmentFault
from simulations.partitioners.base import ClientsOptions, Ids, Units


@dataclass(frozen=True, kw_only=True)
class Options(ClientsOptions):
    partitioner: str = text("IidPartitioner", help="a class of flwr_datasets.partitioner")
    settings: str = text("", help="its other arguments, as key:value;key:value")


def assign(units: Units, options: Options, rng: np.random.Generator) -> Ids:
    try:
        from datasets import Dataset  # type: ignore[import-not-found]
        from flwr_datasets import partitioner as theirs  # type: ignore[import-not-found]
    except ImportError as error:
        raise EnvironmentFault(f"--partition flwr_datasets: {error}", remedy="pip install flwr-datasets") from None
    kind = getattr(theirs, options.partitioner, None)
    if not inspect.isclass(kind):
        known = ", ".join(n for n in dir(theirs) if n.endswith("Partitioner"))
        raise ConfigError(f"--partition flwr_datasets: no class {options.partitioner!r}", remedy=f"known: {known}")
    accepted = inspect.signature(kind).parameters
    given: dict[str, Any] = {
        "num_partitions": options.clients,
        "partition_by": "label",
        "seed": int(rng.integers(2**31)),
    }
    arguments = {**{k: v for k, v in given.items() if k in accepted}, **_settings(options.settings)}
    try:
        made: Any = kind(**arguments)
        rows = {"label": units.labels, "size": units.sizes, "unit": np.arange(len(units))}
        made.dataset = Dataset.from_dict(rows)
        count = made.num_partitions  # natural ones have as many as there are values
        parts = [np.array(made.load_partition(i)["unit"], np.int64) for i in range(count)]
    except (TypeError, ValueError) as error:
        raise ConfigError(f"--partition flwr_datasets: {options.partitioner}: {error}") from None
    if count != options.clients:
        raise ConfigError(
            f"--partition flwr_datasets: {options.partitioner} makes {count} clients of these examples, not {options.clients}",
            remedy=f"clients={count}",
        )
    owner = np.full(len(units), -1, np.int64)
    for client, part in enumerate(parts):
        owner[part] = client
    if (owner < 0).any() or sum(map(len, parts)) != len(units):
        raise ConfigError(
            f"--partition flwr_datasets: {options.partitioner} does not use every example exactly once",
            remedy="change its settings so that every class belongs to a partition, or take another one",
        )
    return owner


def _settings(text_: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for item in filter(None, text_.split(";")):
        key, colon, raw = item.partition(":")
        try:
            found[key.strip()] = tomllib.loads(f"v = {raw.strip()}")["v"]
        except tomllib.TOMLDecodeError:
            found[key.strip()] = raw.strip()
        if not colon:
            raise ConfigError(f"--partition flwr_datasets: settings: {item!r} is not key:value")
    return found
