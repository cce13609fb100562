"""The Open Inference Protocol, spoken by the public Triton client and by raw messages."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.utils import InferenceServerException

from fl_clients.edge.inference import InferenceEngine
from fl_clients.edge.oip import generate, tensors
from fl_clients.edge.oip.messages import METHODS, REQUESTS, RESPONSES, SERVICE, message
from fl_clients.edge.oip.open_inference_pb2 import SERIALIZED_FILE
from fl_clients.edge.service import Server, serve
from fl_clients.edge.slots import Slots
from fl_core.contracts.errors import EnvironmentFault, InputError
from tests.bundles import TARGET, TOY, toy_bundle


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> InferenceEngine:
    home = tmp_path_factory.mktemp("home")
    Slots(home).install(toy_bundle(home / "staging"), 0, TARGET)
    return InferenceEngine(home, TOY)


@pytest.fixture(scope="module")
def server(engine: InferenceEngine) -> Iterator[Server]:
    running = serve({TOY: engine}, port=0, max_batch=64, max_message_bytes=1 << 20)
    yield running
    running.stop()


@pytest.fixture
def client(server: Server) -> Iterator[triton.InferenceServerClient]:
    found = triton.InferenceServerClient(f"127.0.0.1:{server.port}")
    yield found
    found.close()


@pytest.fixture
def call(server: Server) -> Iterator[Any]:
    """call(method, request) -> response, without a client library."""
    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:

        def send(method: str, request: Any) -> Any:
            stub = channel.unary_unary(
                f"/{SERVICE}/{method}", REQUESTS[method].SerializeToString, RESPONSES[method].FromString
            )
            return stub(request, timeout=10)

        yield send


def features(count: int = 3) -> np.ndarray[Any, Any]:
    return np.random.default_rng(2).normal(size=(count, 8)).astype(np.float32)


def triton_input(array: np.ndarray[Any, Any], name: str = "features", kind: str = "FP32") -> triton.InferInput:
    found = triton.InferInput(name, array.shape, kind)
    found.set_data_from_numpy(array)
    return found


def typed_request(array: np.ndarray[Any, Any], **fields: Any) -> Any:
    request = REQUESTS["ModelInfer"](model_name=TOY, **fields)
    tensor = request.inputs.add(name="features", datatype="FP32", shape=array.shape)
    tensor.contents.fp32_contents.extend(array.ravel().tolist())
    return request


def test_the_public_client_sees_a_ready_server(client: triton.InferenceServerClient) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready(TOY)
    assert client.is_model_ready(TOY, "0")
    assert not client.is_model_ready(TOY, "7")
    assert not client.is_model_ready("other")
    assert client.get_server_metadata().name == "fieldfleet"


def test_the_public_client_reads_the_model_metadata(client: triton.InferenceServerClient) -> None:
    metadata = client.get_model_metadata(TOY)
    assert (metadata.name, list(metadata.versions), metadata.platform) == (TOY, ["0"], "onnxruntime_onnx")
    assert [(t.name, t.datatype, list(t.shape)) for t in metadata.inputs] == [("features", "FP32", [-1, 8])]
    assert [(t.name, t.datatype, list(t.shape)) for t in metadata.outputs] == [("value", "FP32", [-1])]


@pytest.mark.parametrize("count", [1, 3, 64])
def test_the_public_client_infers(client: triton.InferenceServerClient, engine: InferenceEngine, count: int) -> None:
    answer = client.infer(TOY, [triton_input(features(count))], request_id="r-1")
    np.testing.assert_array_equal(answer.as_numpy("value"), engine.run({"features": features(count)})[1]["value"])
    assert answer.get_response().id == "r-1"
    assert answer.get_response().model_version == "0"


def test_typed_contents_are_answered_in_kind(call: Any, engine: InferenceEngine) -> None:
    response = call("ModelInfer", typed_request(features(), id="x"))
    assert list(response.raw_output_contents) == []
    (output,) = response.outputs
    assert (output.name, output.datatype, list(output.shape), response.id) == ("value", "FP32", [3], "x")
    expected = engine.run({"features": features()})[1]["value"]
    np.testing.assert_allclose(np.array(output.contents.fp32_contents, np.float32), expected)


def test_requested_outputs(call: Any) -> None:
    request = typed_request(features())
    request.outputs.add(name="value")
    assert [o.name for o in call("ModelInfer", request).outputs] == ["value"]
    request.outputs.add(name="other")
    with pytest.raises(grpc.RpcError) as caught:
        call("ModelInfer", request)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "output 'other' is unknown" in caught.value.details()


@pytest.mark.parametrize(
    ("array", "name", "kind", "said"),
    [
        (np.zeros((2, 7), np.float32), "features", "FP32", "must be float32[-1, 8]"),
        (np.zeros((2, 8), np.float64), "features", "FP64", "must be float32"),
        (np.zeros((2, 8), np.float32), "window", "FP32", "input 'features' is missing"),
        (np.zeros((65, 8), np.float32), "features", "FP32", "over the limit of 64"),
        (np.zeros((1,) * 9, np.float32), "features", "FP32", "is not usable"),
    ],
)
def test_wrong_inputs_are_invalid_arguments(
    client: triton.InferenceServerClient, array: np.ndarray[Any, Any], name: str, kind: str, said: str
) -> None:
    with pytest.raises(InferenceServerException) as caught:
        client.infer(TOY, [triton_input(array, name, kind)])
    assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"
    assert said in caught.value.message()


@pytest.mark.parametrize(("name", "version"), [("other", ""), (TOY, "9"), ("", "")])
def test_an_unknown_model_is_not_found(client: triton.InferenceServerClient, name: str, version: str) -> None:
    for ask in (
        lambda: client.get_model_metadata(name, version),
        lambda: client.infer(name, [triton_input(features())], model_version=version),
    ):
        with pytest.raises(InferenceServerException) as caught:
            ask()
        assert caught.value.status() == "StatusCode.NOT_FOUND"


def test_a_message_over_the_limit_is_refused(client: triton.InferenceServerClient) -> None:
    with pytest.raises(InferenceServerException) as caught:
        client.infer(TOY, [triton_input(np.zeros((50_000, 8), np.float32))])
    assert caught.value.status() == "StatusCode.RESOURCE_EXHAUSTED"


def test_an_unimplemented_method_says_so(client: triton.InferenceServerClient) -> None:
    with pytest.raises(InferenceServerException) as caught:
        client.get_model_repository_index()
    assert caught.value.status() == "StatusCode.UNIMPLEMENTED"


def test_without_a_model_the_server_is_live_but_not_ready(tmp_path: Path) -> None:
    running = serve({TOY: InferenceEngine(tmp_path, TOY)}, port=0)
    try:
        found = triton.InferenceServerClient(f"127.0.0.1:{running.port}")
        assert found.is_server_live()
        assert not found.is_server_ready()
        assert not found.is_model_ready(TOY)
        with pytest.raises(InferenceServerException) as caught:
            found.infer(TOY, [triton_input(features())])
        assert caught.value.status() == "StatusCode.UNAVAILABLE"
        found.close()
    finally:
        running.stop()


def test_a_busy_port_is_named(engine: InferenceEngine, server: Server) -> None:
    with pytest.raises(EnvironmentFault, match=f"127.0.0.1:{server.port} cannot be bound"):
        serve({TOY: engine}, port=server.port)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(EnvironmentFault, match="cannot be bound"):
            serve({TOY: engine}, port=other.getsockname()[1])


def test_a_failure_inside_shows_no_traceback(
    server: Server, engine: InferenceEngine, call: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(inputs: Any) -> Any:
        raise ZeroDivisionError("secret path /home/owner")

    monkeypatch.setattr(engine, "run", broken)
    with pytest.raises(grpc.RpcError) as caught:
        call("ModelInfer", typed_request(features()))
    assert caught.value.code() == grpc.StatusCode.INTERNAL
    assert "secret" not in caught.value.details()


def test_the_committed_descriptor_is_the_proto_file() -> None:
    assert generate.compile_descriptor() == SERIALIZED_FILE
    assert generate.GENERATED.read_text() == generate.render(SERIALIZED_FILE)


def test_the_protocol_is_the_one_of_the_public_client() -> None:
    """Every field of our messages has the name, number and type that the public client's copy has."""
    from tritonclient.grpc import service_pb2

    for name in METHODS:
        for kind, ours in (("Request", REQUESTS[name]), ("Response", RESPONSES[name])):
            theirs = getattr(service_pb2, name + kind).DESCRIPTOR.fields_by_name
            for field in ours.DESCRIPTOR.fields:
                if field.name == "properties":  # of the protocol, but not of this client
                    continue
                assert (field.number, field.type) == (theirs[field.name].number, theirs[field.name].type)


@given(st.sampled_from(sorted(tensors.DATATYPES)), st.integers(0, 4), st.integers(1, 3), st.booleans(), st.data())
def test_tensors_survive_both_ways(kind: str, rows: int, columns: int, raw: bool, data: st.DataObject) -> None:
    dtype = np.dtype(tensors.DATATYPES[kind][0])
    values = data.draw(st.binary(min_size=rows * columns * dtype.itemsize, max_size=rows * columns * dtype.itemsize))
    array = np.frombuffer(values, dtype).reshape(rows, columns)
    if kind == "BOOL":
        array = np.frombuffer(values, np.uint8).reshape(rows, columns) % 2 == 1
    elif dtype.kind == "f":
        array = np.nan_to_num(array, nan=1.0, posinf=2.0, neginf=3.0)
    request = REQUESTS["ModelInfer"]()
    tensor = request.inputs.add(name="x", datatype=kind, shape=array.shape)
    if kind == "FP16" and not raw:
        with pytest.raises(InputError, match="raw contents only"):
            tensors.fill_contents(tensor, array)
        return
    if raw:
        request.raw_input_contents.append(tensors.raw_bytes(array))
    else:
        tensors.fill_contents(tensor, array)
    back = tensors.decode_inputs(request.inputs, request.raw_input_contents, max_batch=10)
    np.testing.assert_array_equal(back["x"], array)
    assert back["x"].dtype == array.dtype


@given(
    st.lists(st.sampled_from(["FP32", "INT8", "BOOL", "BYTES", "", "FP16"]), max_size=3),
    st.lists(st.integers(-3, 5) | st.integers(2**40, 2**62), max_size=4),
    st.lists(st.binary(max_size=40), max_size=3),
    st.lists(st.floats(width=32), max_size=5),
)
def test_hostile_tensors_are_input_errors(
    kinds: list[str], shape: list[int], raw: list[bytes], values: list[float]
) -> None:
    request = REQUESTS["ModelInfer"](raw_input_contents=raw)
    for i, kind in enumerate(kinds):
        tensor = request.inputs.add(name=f"x{i % 2}", datatype=kind, shape=shape)
        tensor.contents.fp32_contents.extend(values)
    try:
        arrays = tensors.decode_inputs(request.inputs, request.raw_input_contents, max_batch=4)
    except InputError:
        return
    for array in arrays.values():
        assert array.shape == tuple(shape)


@pytest.mark.parametrize("shape", [[0, 2**62], [0, 2**31, 2**31, 2**31], [-1, 8], []])
def test_absurd_shapes_are_refused_before_any_array_is_made(shape: list[int]) -> None:
    tensor = message("ModelInferRequest.InferInputTensor")(name="x", datatype="FP32", shape=shape)
    with pytest.raises(InputError, match="is not usable"):
        tensors.decode_inputs([tensor], [b""], max_batch=1)


def test_values_that_do_not_fit_eight_bits_are_refused() -> None:
    tensor = message("ModelInferRequest.InferInputTensor")(name="x", datatype="INT8", shape=[1])
    tensor.contents.int_contents.append(300)
    with pytest.raises(InputError, match="does not fit"):
        tensors.decode_inputs([tensor], [], max_batch=1)
