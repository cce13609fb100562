"""The worker's own half: where the device's data comes from, and how it answers."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from flwr.app import Message

from fl_clients.training import frames
from fl_clients.training.outbox import parse_reply
from fl_clients.training.worker import device_source, serve
from fl_core.contracts.errors import DataError, IntegrityError
from fl_core.flower import adapter
from fl_core.learning.application import application
from tests.federation import request

APP = application("toy_regression")
CONFIG = APP.configure(["data.clients=3", "data.examples_per_client=5"])


def test_a_device_reads_its_own_folder(tmp_path: Path) -> None:
    raw = APP.generate(CONFIG, 0)
    raw.write(tmp_path / "all")  # type: ignore[attr-defined]
    assert len(device_source(str(tmp_path / "all"), "", 0)(APP, CONFIG)) == 15
    one = device_source(str(tmp_path / "all"), "client-0001", 0)(APP, CONFIG)
    assert one.clients() == ("client-0001",)
    with pytest.raises(DataError, match="known: client-0000, client-0001"):
        device_source(str(tmp_path / "all"), "van-9", 0)(APP, CONFIG)
    with pytest.raises(DataError, match=r"rows\.csv"):
        device_source(str(tmp_path / "nothing"), "", 0)(APP, CONFIG)


def test_generated_data_needs_a_client() -> None:
    assert len(device_source("generated", "client-0002", 0)(APP, CONFIG)) == 5
    with pytest.raises(DataError, match="client name"):
        device_source("generated", "", 0)(APP, CONFIG)


def asked() -> bytes:
    adapter.assume_identity(run_id=11, task_id=12, node_id=1)
    message = Message(request().to_record(), 42, "train", ttl=100.0)
    _, _, objects = adapter.deflate(message)
    return frames.to_bytes({"message_id": message.metadata.message_id, "ids": list(objects)}, list(objects.values()))


def answers(handler: object, data: bytes) -> list[Message]:
    out = io.BytesIO()
    serve(handler, io.BytesIO(data), out)  # type: ignore[arg-type]
    out.seek(0)
    found = []
    while frame := frames.read_frame(out, origin="worker"):
        reply = parse_reply({**frame[0], "run_id": 11, "instruction_id": "0" * 64}, frame[1], origin="worker")
        found.append(adapter.inflate(list(reply.objects)[-1], dict(reply.objects), origin="worker"))
    return found


def test_one_answer_a_request() -> None:
    found = answers(lambda message: Message(message.content, reply_to=message), asked() * 2)
    assert [message.has_content() for message in found] == [True, True]


@pytest.mark.parametrize("error", [ValueError("boom"), DataError("boom"), MemoryError("boom")])
def test_a_failure_is_an_error_reply(error: Exception) -> None:
    def handler(message: Message) -> Message:
        raise error

    (reply,) = answers(handler, asked())
    assert reply.has_error()
    assert "boom" in reply.error.reason


def test_a_torn_request_ends_the_worker() -> None:
    with pytest.raises(IntegrityError, match="agent"):
        answers(lambda message: message, asked()[:-1])
