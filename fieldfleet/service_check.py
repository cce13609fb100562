"""What another program on the device sees: the bundle's golden inputs through the agent's gRPC service."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from fl_clients.edge.oip.messages import REQUESTS, RESPONSES, SERVICE
from fl_clients.edge.oip.tensors import DATATYPES, datatype, raw_bytes
from fl_core.contracts.bundle import GOLDEN_NAME
from fl_core.contracts.errors import GoalMissed, RefusedError
from fl_core.runtime.golden import read_golden

CALL_SECONDS = 20.0


def check_service(port: int, model: str, bundle: Path, target: str) -> dict[str, Any]:
    """ModelInfer with the golden inputs; returns the largest deviation from the golden outputs and the milliseconds.

    Raises RefusedError when the service does not answer, GoalMissed when it answers something else.
    """
    golden = read_golden(bundle / GOLDEN_NAME)
    request = REQUESTS["ModelInfer"](model_name=model)
    for name, array in golden.inputs.items():
        tensor = request.inputs.add(name=name, datatype=datatype(array.dtype))
        tensor.shape.extend(array.shape)
        request.raw_input_contents.append(raw_bytes(array))
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = channel.unary_unary(
            f"/{SERVICE}/ModelInfer",
            request_serializer=REQUESTS["ModelInfer"].SerializeToString,
            response_deserializer=RESPONSES["ModelInfer"].FromString,
        )
        began = time.perf_counter()
        try:
            answer = call(request, timeout=CALL_SECONDS, wait_for_ready=True)
        except grpc.RpcError as error:
            raise RefusedError(f"inference service on port {port}: {error}") from None
        milliseconds = 1000 * (time.perf_counter() - began)
    deviation = 0.0
    for tensor, raw in zip(answer.outputs, answer.raw_output_contents, strict=True):
        found = np.frombuffer(raw, DATATYPES[tensor.datatype][0]).reshape(tuple(tensor.shape))
        deviation = max(deviation, float(np.max(np.abs(found - golden.outputs[target][tensor.name]))))
    if not answer.outputs or deviation > 1e-3:
        raise GoalMissed(f"inference service on port {port}: deviates by {deviation:g} from the golden outputs")
    return {
        "port": port,
        "examples": len(next(iter(golden.inputs.values()))),
        "max_abs": deviation,
        "ms": round(milliseconds, 2),
    }
