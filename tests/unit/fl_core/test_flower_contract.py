"""The contract with flwr 1.41: every private name that the adapter uses exists and has the signature it relies on.

A new flwr version that moves one fails here, with its name, before anything stranger happens.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from typing import Any

import numpy as np
import pytest

FUNCTIONS = {
    "flwr.app.message:remove_content_from_message": ["message"],
    "flwr.common.serde:message_to_proto": ["message"],
    "flwr.common.serde:message_from_proto": ["message_proto"],
    "flwr.supercore.inflatable.inflatable_object:get_all_nested_objects": ["obj"],
    "flwr.supercore.inflatable.inflatable_object:get_object_tree": ["obj"],
    "flwr.supercore.inflatable.inflatable_object:get_object_children_ids_from_object_content": ["object_content"],
    "flwr.supercore.inflatable.inflatable_object:no_object_id_recompute": [],
    "flwr.supercore.inflatable.inflatable_utils:inflate_object_from_contents": ["object_id", "object_contents"],
    "flwr.server.superlink.linkstate.utils:message_to_dict": ["message"],
    "flwr.server.superlink.linkstate.utils:dict_to_message": ["message_dict"],
    "flwr.server.utils.validator:validate_message": ["message", "is_reply_message"],
    "flwr.supercore.utils:uint64_to_int64": ["unsigned"],
    "flwr.supercore.utils:int64_to_uint64": ["signed"],
    "flwr.superlink.config_loader:get_federation_manager": [],
    "flwr.superlink.config_loader:get_objectstore_linkstate_factories": ["database", "federation_manager"],
    "flwr.superlink.servicer.fleet.fleet_handlers:activate_node": ["request", "state"],
    "flwr.superlink.servicer.fleet.fleet_handlers:deactivate_node": ["request", "state"],
    "flwr.superlink.servicer.fleet.fleet_handlers:send_node_heartbeat": ["request", "state"],
    "flwr.superlink.servicer.fleet.fleet_handlers:pull_messages": ["request", "state", "store"],
    "flwr.superlink.servicer.fleet.fleet_handlers:push_messages": ["request", "state"],
    "flwr.superlink.servicer.fleet.fleet_handlers:get_run": ["request", "state"],
    "flwr.superlink.servicer.fleet.fleet_handlers:push_object": ["request", "state"],
    "flwr.superlink.servicer.fleet.fleet_handlers:pull_object": ["request", "state"],
    "flwr.superlink.servicer.fleet.fleet_handlers:confirm_message_received": ["request", "state", "store"],
    "flwr.common.config:get_project_config": ["project_dir"],
    "flwr.common.config:flatten_dict": ["raw_dict"],
    "flwr.supercore.object_ref:load_app": ["module_attribute_str", "error_type", "project_dir"],
    "flwr.simulation.run_simulation:_run_simulation": ["num_supernodes", "exit_event"],
}
STATE = "flwr.server.superlink.linkstate.sql_linkstate:SqlLinkState"
METHODS = {
    "session": [],
    "query": ["query", "data"],
    "get_node_id_by_public_key": ["public_key"],
    "create_node": ["owner_aid", "owner_name", "public_key", "heartbeat_interval"],
    "get_node_info": [],
    "deactivate_node": ["node_id"],
    "get_run_info": [],
    "create_run": [
        *("fab_id", "fab_version", "fab_hash", "override_config", "federation_id", "federation_config", "flwr_aid"),
        "primary_task_type",
    ],
    "stop_run": ["run_id"],
    "cleanup_run": ["run_id"],
    "claim_task": ["task_id"],
    "activate_task": ["task_id"],
    "finish_task": ["task_id", "sub_status", "details"],
    "delete_messages": ["message_ins_ids"],
}
CONSTANTS = {
    "flwr.server.superlink.linkstate.sql_linkstate": ["now"],
    "flwr.server.superlink.linkstate.utils": ["now"],
    "flwr.server.utils.validator": ["now"],
    "flwr.clientapp.client_app": ["LoadClientAppError"],
    "flwr.serverapp.server_app": ["LoadServerAppError"],
    "flwr.supercore.telemetry": ["EventType"],
    "flwr.common.constant": [
        "SUPERLINK_NODE_ID",
        "NOOP_FLWR_AID",
        "NOOP_ACCOUNT_NAME",
        "Status",
        "SubStatus",
        "PARTITION_ID_KEY",
        "NUM_PARTITIONS_KEY",
    ],
    "flwr.supercore.constant": ["NOOP_FEDERATION_ID", "TaskType", "NodeStatus"],
    "flwr.supercore.error": ["FlowerError"],
    "flwr.supercore.error.catalog": ["API_ERROR_MAP"],
    "flwr.supercore.sql_mixin": ["SQLITE_PRAGMAS"],
}
COLUMNS = {
    "flwr.supercore.state.schema.linkstate_models:MessageIns": [
        *("message_id", "group_id", "run_id", "src_node_id", "dst_node_id", "reply_to_message_id", "created_at"),
        *("delivered_at", "ttl", "message_type", "content", "error"),
    ],
    "flwr.supercore.state.schema.linkstate_models:MessageRes": [
        *("message_id", "group_id", "run_id", "src_node_id", "dst_node_id", "reply_to_message_id", "created_at"),
        *("delivered_at", "ttl", "message_type", "content", "error"),
    ],
    "flwr.supercore.state.schema.linkstate_models:Node": [
        *("node_id", "status", "online_until", "heartbeat_interval", "last_activated_at", "public_key")
    ],
    "flwr.supercore.state.schema.linkstate_models:Run": ["run_id", "primary_task_id", "bytes_sent"],
    "flwr.supercore.state.schema.corestate_models:Task": [
        *("task_id", "token", "active_until", "running_at", "finished_at")
    ],
    "flwr.supercore.state.schema.corestate_models:ObjectPushSession": ["session_id", "pending_count"],
    "flwr.supercore.state.schema.corestate_models:ObjectPushSessionRoot": ["session_id", "root_object_id"],
    "flwr.supercore.state.schema.objectstore_models:StoredObject": [
        *("object_id", "content", "is_available", "ref_count")
    ],
    "flwr.supercore.state.schema.objectstore_models:ObjectChild": ["parent_id", "child_id"],
    "flwr.supercore.state.schema.objectstore_models:RunObject": ["run_id", "object_id"],
}
TABLES = {
    "StoredObject": "objects",
    "ObjectChild": "object_children",
    "RunObject": "run_objects",
    "MessageIns": "message_ins",
    "MessageRes": "message_res",
    "Node": "node",
    "Run": "run",
    "Task": "task",
    "ObjectPushSession": "object_push_sessions",
    "ObjectPushSessionRoot": "object_push_session_roots",
}


def resolve(reference: str) -> Any:
    module, _, name = reference.partition(":")
    found = importlib.import_module(module)
    assert hasattr(found, name), f"flwr moved {reference}"
    return getattr(found, name)


def check_parameters(function: Any, expected: list[str], reference: str) -> None:
    parameters = inspect.signature(function).parameters
    names = [n for n in parameters if n != "self"]
    assert names[: len(expected)] == expected, f"{reference} takes {names}"
    needed = [n for n in names[len(expected) :] if parameters[n].default is inspect.Parameter.empty]
    assert not [n for n in needed if parameters[n].kind not in (inspect.Parameter.VAR_KEYWORD,)], (
        f"{reference}: {needed}"
    )


@pytest.mark.parametrize("reference", FUNCTIONS)
def test_function(reference: str) -> None:
    check_parameters(resolve(reference), FUNCTIONS[reference], reference)


@pytest.mark.parametrize("name", METHODS)
def test_state_method(name: str) -> None:
    state = resolve(STATE)
    assert hasattr(state, name), f"flwr moved {STATE}.{name}"
    check_parameters(getattr(state, name), METHODS[name], f"{STATE}.{name}")


@pytest.mark.parametrize("name", ["get"])
def test_object_store_method(name: str) -> None:
    store = resolve("flwr.supercore.object_store.sql_object_store:SqlObjectStore")
    check_parameters(getattr(store, name), ["object_id"], name)


@pytest.mark.parametrize("module", CONSTANTS)
def test_constants(module: str) -> None:
    for name in CONSTANTS[module]:
        resolve(f"{module}:{name}")


@pytest.mark.parametrize("reference", COLUMNS)
def test_tables_and_columns(reference: str) -> None:
    model = resolve(reference)
    assert model.__tablename__ == TABLES[model.__name__]
    assert set(COLUMNS[reference]) <= {c.name for c in model.__table__.columns}


def test_statuses_and_pragmas() -> None:
    constant, core = importlib.import_module("flwr.common.constant"), importlib.import_module("flwr.supercore.constant")
    assert {constant.Status.PENDING, constant.Status.STARTING, constant.Status.RUNNING}
    assert {constant.SubStatus.COMPLETED, constant.SubStatus.STOPPED}
    assert {core.NodeStatus.ONLINE, core.NodeStatus.OFFLINE, core.NodeStatus.UNREGISTERED}
    assert constant.HEARTBEAT_PATIENCE == 2
    assert core.TaskType.SERVER_APP
    assert {"busy_timeout", "cache_size", "mmap_size"} <= {key for key, _ in core.SQLITE_PRAGMAS}
    assert constant.HEARTBEAT_MAX_INTERVAL == 1800
    assert constant.TIMESTAMP_TOLERANCE == 300


def test_task_identity_and_message_id_are_settable() -> None:
    identity = resolve("flwr.supercore.task_identity:TaskIdentity")
    assert all(isinstance(getattr(type(identity), n), property) for n in ("run_id", "task_id", "node_id"))
    metadata = resolve("flwr.app.metadata:Metadata")
    assert metadata.message_id.fset is None
    assert "_message_id" in inspect.getsource(metadata)


@pytest.mark.parametrize(
    ("message", "fields"),
    {
        "fleet_pb2:ActivateNodeRequest": {"public_key", "heartbeat_interval"},
        "fleet_pb2:DeactivateNodeRequest": {"node_id"},
        "fleet_pb2:PullMessagesRequest": {"node"},
        "fleet_pb2:PullMessagesResponse": {"messages_list", "message_object_trees"},
        "fleet_pb2:PushMessagesRequest": {"node", "messages_list", "message_object_trees"},
        "fleet_pb2:PushMessagesResponse": {"objects_to_push", "session_id"},
        "heartbeat_pb2:SendNodeHeartbeatRequest": {"node", "heartbeat_interval"},
        "message_pb2:PullObjectRequest": {"node", "run_id", "object_id"},
        "message_pb2:PullObjectResponse": {"object_found", "object_available", "object_content"},
        "message_pb2:PushObjectRequest": {"node", "run_id", "object_id", "object_content", "session_id"},
        "message_pb2:PushObjectResponse": {"stored"},
        "message_pb2:ConfirmMessageReceivedRequest": {"node", "run_id", "message_object_id"},
        "message_pb2:ObjectTree": {"object_id", "children"},
        "message_pb2:Message": {"metadata", "content", "error"},
        "error_pb2:Error": {"code", "reason"},
    }.items(),
)
def test_wire_messages(message: str, fields: set[str]) -> None:
    found = resolve(f"flwr.proto.{message}")
    assert fields <= {f.name for f in found.DESCRIPTOR.fields}


def test_arrays_are_cut_into_small_pieces() -> None:
    from flwr.app import Array

    from fl_core.flower.adapter import messages

    assert messages.array.FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE == 1 << 20
    pieces = Array(np.zeros(3 << 20, np.uint8)).children
    assert pieces is not None
    assert max(len(piece.deflate()) for piece in pieces.values()) < (1 << 20) + 100


def test_error_code_of_a_crashed_client() -> None:
    from fl_core.flower import wire

    assert resolve("flwr.common.constant:ErrorCode").CLIENT_APP_CRASHED == wire.CLIENT_CRASHED


def test_simulation_of_a_project_takes_what_we_give_it() -> None:
    parameters = inspect.signature(resolve("flwr.simulation.run_simulation:_run_simulation")).parameters
    assert {"client_app_attr", "server_app_attr", "server_app_context", "app_dir", "run", "is_app"} <= set(parameters)
    assert {"backend_config"} <= set(parameters)
    assert resolve("flwr.supercore.telemetry:EventType").FLWR_SIMULATION_RUN_LEAVE
    codes = resolve("flwr.common.constant:ErrorCode")
    assert {codes.CLIENT_APP_RAISED_EXCEPTION, codes.UNKNOWN}
    constant = importlib.import_module("flwr.common.constant")
    assert (constant.PARTITION_ID_KEY, constant.NUM_PARTITIONS_KEY) == ("partition-id", "num-partitions")


def test_an_array_can_leave_its_bytes_elsewhere() -> None:
    """``StoredArray`` sets the fields around the constructor, and ``numpy()`` asks for ``data`` each time."""
    array = resolve("flwr.app:Array")
    assert [f.name for f in dataclasses.fields(array)] == ["dtype", "shape", "stype", "data"]
    assert "self.data" in inspect.getsource(array.numpy)
    assert "data" not in vars(array)
