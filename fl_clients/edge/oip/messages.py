"""The protocol's message classes, and its methods with the types that they take and give."""

from __future__ import annotations

from typing import Any

from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass

from fl_clients.edge.oip.open_inference_pb2 import SERIALIZED_FILE

PACKAGE = "inference"
SERVICE = f"{PACKAGE}.GRPCInferenceService"
METHODS = ("ServerLive", "ServerReady", "ModelReady", "ServerMetadata", "ModelMetadata", "ModelInfer")

# A pool of our own: a client library's copy of the same protocol may be loaded in this process too.
_pool = DescriptorPool()
_pool.AddSerializedFile(SERIALIZED_FILE)


def message(name: str) -> Any:
    """The class of a message, such as ``ModelInferResponse``."""
    return GetMessageClass(_pool.FindMessageTypeByName(f"{PACKAGE}.{name}"))


REQUESTS = {name: message(f"{name}Request") for name in METHODS}
RESPONSES = {name: message(f"{name}Response") for name in METHODS}
