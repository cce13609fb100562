"""Flower's Fleet API over the embedded SuperLink's state: flwr's own handlers, for devices that speak it unchanged."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from fl_core.flower import wire
from fl_core.flower.adapter.opening import Modules
from fl_core.flower.wire import FleetRefused


@dataclass(frozen=True)
class FleetAnswer:
    """The response message; ``reply_complete`` when this call brought in the last part of a reply."""

    body: bytes
    reply_complete: bool


class FleetApi:
    """parse() checks who speaks, answer() is one transaction. Both raise FleetRefused."""

    def __init__(self, modules: Modules, state: Any) -> None:
        self._m, self._state = modules, state
        self._calls = self._known_calls()

    def parse(self, name: str, body: bytes, node: int, public_pem: bytes) -> Any:
        if name not in self._calls:
            raise FleetRefused(404, f"no such Fleet call: {name}")
        try:
            request = self._calls[name][0].FromString(body)
        except Exception as error:  # protobuf's DecodeError, whichever implementation is loaded
            raise FleetRefused(400, f"not a readable {name} request: {type(error).__name__}") from None
        wire.check_sender(request, node, public_pem)
        return request

    def answer(self, name: str, request: Any, together: Callable[[], AbstractContextManager[None]]) -> Any:
        """flwr's response to a parsed request, within ``together()``."""
        handler = self._calls[name][1]
        try:
            with together():
                response = handler(request, self._state)
                if name == "push-object" and not response.stored:
                    raise _NotStored(response)  # flwr swallows the error: undo the half-done statements before it
        except _NotStored as refused:
            return refused.response
        except self._m.errors.FlowerError as error:
            spec = self._m.catalog.API_ERROR_MAP[error.code]
            raise FleetRefused(spec.http_status_code, spec.public_message) from None
        except (KeyError, ValueError) as error:  # an unknown run, a malformed message or tree
            raise FleetRefused(400, f"{name} refused: {type(error).__name__}") from None
        except self._m.sqlalchemy_errors.OperationalError:
            raise FleetRefused(503, "the server's store is busy") from None
        return response

    def _known_calls(self) -> dict[str, tuple[Any, Callable[[Any, Any], Any]]]:
        """register-node and unregister-node are left out: keys come from our registry. The bundle of get-fab has no code."""
        m, h = self._m, self._m.handlers
        return {
            "activate-node": (m.fleet_pb2.ActivateNodeRequest, h.activate_node),
            "deactivate-node": (m.fleet_pb2.DeactivateNodeRequest, h.deactivate_node),
            "send-node-heartbeat": (m.heartbeat_pb2.SendNodeHeartbeatRequest, h.send_node_heartbeat),
            "pull-messages": (m.fleet_pb2.PullMessagesRequest, lambda r, s: h.pull_messages(r, s, s.object_store)),
            "push-messages": (m.fleet_pb2.PushMessagesRequest, h.push_messages),
            "get-run": (m.run_pb2.GetRunRequest, h.get_run),
            "get-fab": (m.fab_pb2.GetFabRequest, h.get_fab),
            "push-object": (m.message_pb2.PushObjectRequest, h.push_object),
            "pull-object": (m.message_pb2.PullObjectRequest, h.pull_object),
            "confirm-message-received": (m.message_pb2.ConfirmMessageReceivedRequest, self._confirm),
        }

    def _confirm(self, request: Any, state: Any) -> Any:
        """Flower's handler deletes whatever object is named: only an instruction to this very node may be."""
        query = "SELECT 1 FROM message_ins WHERE message_id=:m AND dst_node_id=:n"
        values = {"m": request.message_object_id, "n": self._m.utils.uint64_to_int64(request.node.node_id)}
        if state.query(query, values):
            return self._m.handlers.confirm_message_received(request, state, state.object_store)
        return self._m.message_pb2.ConfirmMessageReceivedResponse()


class _NotStored(Exception):
    def __init__(self, response: Any) -> None:
        super().__init__("not stored")
        self.response = response
