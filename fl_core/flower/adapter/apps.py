"""Flower projects: ``pyproject.toml`` with its components and run configuration, as ``flwr run`` reads them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flwr.app import Context, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.client_app import LoadClientAppError
from flwr.common.config import flatten_dict, get_project_config
from flwr.common.constant import NUM_PARTITIONS_KEY, PARTITION_ID_KEY, SUPERLINK_NODE_ID, ErrorCode
from flwr.common.serde import context_from_proto, context_to_proto
from flwr.proto.message_pb2 import Context as ContextProto
from flwr.serverapp import ServerApp
from flwr.serverapp.server_app import LoadServerAppError
from flwr.supercore.object_ref import load_app

from fl_core.contracts.errors import InputError

SERVER_NODE: int = SUPERLINK_NODE_ID
RAISED: int = ErrorCode.CLIENT_APP_RAISED_EXCEPTION
UNKNOWN: int = ErrorCode.UNKNOWN


def read_project(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the whole pyproject.toml, the run configuration with dotted keys). Raises InputError in Flower's own words."""
    try:
        table = get_project_config(folder)
        return table, dict(flatten_dict(table["tool"]["flwr"]["app"].get("config", {})))
    except (ValueError, OSError) as error:  # tomli's errors are ValueErrors too
        raise InputError(
            f"{folder / 'pyproject.toml'}: not a Flower project: {error}",
            remedy="it needs [project] name and version and [tool.flwr.app] publisher, components.serverapp and "
            "components.clientapp",
        ) from None


def load_server_app(reference: str, folder: Path) -> ServerApp:
    """Raises InputError where the reference names no ServerApp; an error of the app's own code passes through."""
    return _load(reference, folder, ServerApp, LoadServerAppError)  # type: ignore[no-any-return]


def load_client_app(reference: str, folder: Path) -> ClientApp:
    """Raises InputError where the reference names no ClientApp; an error of the app's own code passes through."""
    return _load(reference, folder, ClientApp, LoadClientAppError)  # type: ignore[no-any-return]


def _load(reference: str, folder: Path, kind: type, refusal: type[Exception]) -> Any:
    try:
        found = load_app(reference, refusal, folder)
    except refusal as error:
        raise InputError(f"{folder}: {reference}: {' '.join(str(error).split())[:300]}") from None
    if not isinstance(found, kind):
        raise InputError(f"{folder}: {reference} is a {type(found).__name__}, not a {kind.__name__}")
    return found


def node_config(partition: int, count: int) -> Mapping[str, int]:
    """What Flower's own simulation tells client ``partition`` of ``count``."""
    return {PARTITION_ID_KEY: partition, NUM_PARTITIONS_KEY: count}


def kept_of(context: Context) -> bytes:
    """What a client keeps of its Context, in Flower's own wire format. Raises TypeError or ValueError for what that cannot hold."""
    made: bytes = context_to_proto(context).SerializeToString()
    return made


def restore(context: Context, kept: bytes) -> None:
    """Puts back the state and the node's configuration that ``kept_of`` wrote."""
    found = context_from_proto(ContextProto.FromString(kept))
    state: RecordDict = found.state
    context.state, context.node_config = state, found.node_config
