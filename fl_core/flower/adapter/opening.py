"""flwr's server half, imported when a store is opened, and its SQLite file as this project opens it."""

from __future__ import annotations

import importlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fl_core.flower.adapter import steady

PAGE_BYTES = "16384"
WAL_BYTES = 32 << 20  # a round's pages are copied once, not at each commit; as much more on disk


@dataclass(frozen=True)
class Modules:
    """flwr's server half, imported when a store is opened."""

    handlers: Any
    fleet_pb2: Any
    message_pb2: Any
    heartbeat_pb2: Any
    run_pb2: Any
    fab_pb2: Any
    errors: Any
    catalog: Any
    constant: Any
    core_constant: Any
    utils: Any
    sqlalchemy_errors: Any


def load_modules() -> Modules:
    names = {
        "handlers": "flwr.superlink.servicer.fleet.fleet_handlers",
        "fleet_pb2": "flwr.proto.fleet_pb2",
        "message_pb2": "flwr.proto.message_pb2",
        "heartbeat_pb2": "flwr.proto.heartbeat_pb2",
        "run_pb2": "flwr.proto.run_pb2",
        "fab_pb2": "flwr.proto.fab_pb2",
        "errors": "flwr.supercore.error",
        "catalog": "flwr.supercore.error.catalog",
        "constant": "flwr.common.constant",
        "core_constant": "flwr.supercore.constant",
        "utils": "flwr.supercore.utils",
        "sqlalchemy_errors": "sqlalchemy.exc",
    }
    return Modules(**{field: importlib.import_module(name) for field, name in names.items()})


def open_state(database: Path) -> Any:
    """LinkState and ObjectStore in one SQLite file, with a small page cache: 64 MB and a 256 MB map suit no edge server.

    Its content is mostly objects of 1 MiB: larger pages (of a new file) cost fewer system calls, and what is deleted is
    not written once more as zeros, as some builds of SQLite do.
    """
    sql_mixin: Any = importlib.import_module("flwr.supercore.sql_mixin")
    config_loader = importlib.import_module("flwr.superlink.config_loader")
    logging.getLogger("flwr").setLevel(logging.ERROR)
    steady.install()
    ours = {"cache_size": "-8000", "mmap_size": "0", "busy_timeout": "30000", "secure_delete": "FAST"}
    ours["wal_autocheckpoint"] = str(WAL_BYTES // int(PAGE_BYTES))
    theirs = {key: value for key, value in sql_mixin.SQLITE_PRAGMAS if key != "page_size"}
    sql_mixin.SQLITE_PRAGMAS = (("page_size", PAGE_BYTES), *{**theirs, **ours}.items())  # the size of pages comes first
    manager = config_loader.get_federation_manager()
    _, factory = config_loader.get_objectstore_linkstate_factories(str(database), manager)
    return factory.state()
