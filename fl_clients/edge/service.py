"""Inference for other programs on the device: the Open Inference Protocol (KServe v2) over gRPC, on loopback by default.

Imported only where serving is switched on: grpc and protobuf cost about 15 MB.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import grpc
import numpy.typing as npt

from fl_clients.edge.inference import InferenceEngine, Loaded
from fl_clients.edge.oip.messages import METHODS, REQUESTS, RESPONSES, SERVICE
from fl_clients.edge.oip.tensors import datatype, decode_inputs, fill_contents, fill_output, raw_bytes
from fl_core.contracts.errors import EnvironmentFault, FieldfleetError, InputError
from fl_core.contracts.names import DEFAULT_GRPC_PORT, is_loopback
from fl_core.learning.application import TensorSpec
from fl_core.runtime.machine import release_library_pages

LOG = logging.getLogger(__name__)
SERVER_NAME = "fieldfleet"
PLATFORM = "onnxruntime_onnx"
LOOPBACK = "127.0.0.1"
MAX_MESSAGE_BYTES = 16 << 20
MAX_BATCH = 1024
WORKERS = 2
# Each call waits for a worker; more than this many at once are refused, so that memory stays bounded.
MAX_CALLS = 16


class Refusal(Exception):
    """A gRPC status with the words for the caller."""

    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        super().__init__(message)
        self.code, self.message = code, message


class Service:
    """The protocol's methods: each takes a request message and gives the response message."""

    def __init__(self, engines: Mapping[str, InferenceEngine], *, max_batch: int = MAX_BATCH) -> None:
        self._engines, self._max_batch = engines, max_batch

    def server_live(self, request: Any) -> Any:
        return RESPONSES["ServerLive"](live=True)

    def server_ready(self, request: Any) -> Any:
        ready = [self._ready(engine) is not None for engine in self._engines.values()]
        return RESPONSES["ServerReady"](ready=bool(ready) and all(ready))

    def model_ready(self, request: Any) -> Any:
        engine = self._engines.get(request.name)
        model = self._ready(engine) if engine is not None else None
        return RESPONSES["ModelReady"](ready=model is not None and _is_meant(model, request.name, request.version))

    def server_metadata(self, request: Any) -> Any:
        return RESPONSES["ServerMetadata"](name=SERVER_NAME, version=_own_version(), extensions=[])

    def model_metadata(self, request: Any) -> Any:
        model = self._find(request.name, request.version)
        response = RESPONSES["ModelMetadata"](
            name=model.application.name, versions=[str(model.version)], platform=PLATFORM
        )
        _describe(response.inputs, model.session.inputs)
        _describe(response.outputs, model.session.outputs)
        facts = {**model.facts(), "labels": ",".join(model.application.labels(model.config))}
        response.properties.update({key: str(value) for key, value in facts.items()})
        return response

    def model_infer(self, request: Any) -> Any:
        self._find(request.model_name, request.model_version)
        arrays = decode_inputs(request.inputs, request.raw_input_contents, max_batch=self._max_batch)
        model, outputs = self._engines[request.model_name].run(arrays)
        if not _is_meant(model, request.model_name, request.model_version):
            raise Refusal(grpc.StatusCode.UNAVAILABLE, "the model was replaced during the call: ask again")
        return _response(request, model, _wanted(request, outputs))

    @staticmethod
    def _ready(engine: InferenceEngine) -> Loaded | None:
        try:
            return engine.model()
        except FieldfleetError:
            return engine.loaded

    def _find(self, name: str, wanted: str) -> Loaded:
        engine = self._engines.get(name)
        if engine is None:
            raise Refusal(
                grpc.StatusCode.NOT_FOUND, f"no model {name!r}: this device has {', '.join(self._engines) or 'none'}"
            )
        model = engine.model()
        if not _is_meant(model, name, wanted):
            raise Refusal(
                grpc.StatusCode.NOT_FOUND,
                f"no model {name!r} version {wanted}: this device has version {model.version}",
            )
        return model


class Server:
    """A running service; ``port`` is the one that was bound (of use where 0 was asked for)."""

    def __init__(self, server: Any, host: str, port: int) -> None:
        self._server, self.host, self.port = server, host, port

    def stop(self, grace_s: float = 1.0) -> None:
        """Refuses new calls at once and waits up to ``grace_s`` for the running ones."""
        self._server.stop(grace_s).wait(grace_s + 1.0)


def serve(
    engines: Mapping[str, InferenceEngine],
    *,
    host: str = LOOPBACK,
    port: int = DEFAULT_GRPC_PORT,
    max_message_bytes: int = MAX_MESSAGE_BYTES,
    max_batch: int = MAX_BATCH,
) -> Server:
    """Serve each application's model under its name, in background threads. Raises EnvironmentFault when the port cannot be bound."""
    options = [
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.so_reuseport", 0),  # a second agent on the port must fail, not share it
        ("grpc.max_concurrent_streams", MAX_CALLS),
    ]
    pool = ThreadPoolExecutor(WORKERS, thread_name_prefix="open-inference")
    server = grpc.server(pool, options=options, maximum_concurrent_rpcs=MAX_CALLS)
    server.add_generic_rpc_handlers((_handlers(Service(engines, max_batch=max_batch)),))
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        bound = server.add_insecure_port(address)
    except RuntimeError:
        bound = 0
    if bound == 0:
        pool.shutdown(wait=False)
        raise EnvironmentFault(
            f"gRPC: {address} cannot be bound", remedy="another program listens there: choose another port"
        )
    if not is_loopback(host):
        LOG.warning("gRPC: %s is open to the network, without encryption or authentication", address)
    server.start()
    release_library_pages()
    return Server(server, host, bound)


def _handlers(service: Service) -> Any:
    names = {"".join(f"_{c.lower()}" if c.isupper() else c for c in name).lstrip("_"): name for name in METHODS}
    return grpc.method_handlers_generic_handler(
        SERVICE,
        {
            name: grpc.unary_unary_rpc_method_handler(
                _guarded(getattr(service, attribute)),
                request_deserializer=REQUESTS[name].FromString,
                response_serializer=RESPONSES[name].SerializeToString,
            )
            for attribute, name in names.items()
        },
    )


def _guarded(method: Callable[[Any], Any]) -> Callable[[Any, Any], Any]:
    """Errors as gRPC statuses; the caller never sees a traceback or a path of this device."""

    def call(request: Any, context: Any) -> Any:
        try:
            return method(request)
        except Refusal as error:
            context.abort(error.code, error.message)
        except InputError as error:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        except EnvironmentFault as error:
            context.abort(grpc.StatusCode.UNAVAILABLE, str(error))
        except Exception:
            LOG.exception("gRPC: a call failed")
            context.abort(grpc.StatusCode.INTERNAL, "the call failed on the device: see its log")

    return call


def _is_meant(model: Loaded, name: str, wanted: str) -> bool:
    return name == model.application.name and wanted in ("", str(model.version))


def _describe(field: Any, specs: tuple[TensorSpec, ...]) -> None:
    for spec in specs:
        field.add(name=spec.name, datatype=datatype(spec.dtype), shape=spec.shape)


def _wanted(request: Any, outputs: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
    names = [output.name for output in request.outputs] or list(outputs)
    for name in names:
        if name not in outputs:
            raise InputError(f"output {name!r} is unknown", remedy=f"outputs: {', '.join(outputs)}")
    return {name: outputs[name] for name in names}


def _response(request: Any, model: Loaded, outputs: Mapping[str, npt.NDArray[Any]]) -> Any:
    """Raw contents where the request had raw contents, typed contents where it had those."""
    response = RESPONSES["ModelInfer"](
        model_name=model.application.name, model_version=str(model.version), id=request.id
    )
    for name, array in outputs.items():
        tensor = response.outputs.add()
        fill_output(tensor, name, array)
        if request.raw_input_contents:
            response.raw_output_contents.append(raw_bytes(array))
        else:
            fill_contents(tensor, array)
    return response


def _own_version() -> str:
    try:
        return version("fieldfleet")
    except PackageNotFoundError:
        return "unknown"
