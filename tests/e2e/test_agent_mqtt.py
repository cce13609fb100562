"""The agent as its users run it, against a real server and its embedded broker: TLS, MQTT, update, inference, gRPC."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from fl_core.identity import keys
from fl_core.link import topics
from fl_core.link.envelope import Envelope, decode, encode
from fl_core.link.session import MqttSession, Outgoing
from fl_server.field import service_address
from tests.bundles import TOY
from tests.field import NAME, Field
from tests.helpers import eventually, fieldfleet


@pytest.fixture(scope="module")
def field(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Field]:
    found = Field(tmp_path_factory.mktemp("field"))
    yield found
    found.stop()


def test_1_an_unregistered_device_is_refused_with_the_remedy(field: Field) -> None:
    assert f"fieldfleet fleet register device.pub --name {NAME}" in field.init_output
    done = fieldfleet("agent", "run", field.agent, "--once")
    assert done.returncode == 4, done.stderr
    assert "register" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (field.agent / "welcome.json").exists()


def test_2_birth_ping_wake_and_a_command_that_comes_twice(field: Field) -> None:
    registered = fieldfleet(
        "server", "register", field.agent / "keys" / "device.pub", "--name", NAME, "--home", field.home.path
    )
    assert registered.returncode == 0, registered.stderr
    with field.running("--no-train", "--no-infer"):
        assert field.ask("ping")["ok"] is True
        assert field.ask("report")["ok"] is True
        first, second = _twice(field, Envelope(type="ping", id="job-1"))
        assert first == second, "the first reply is repeated, the job is not run again"
        assert decode(first, origin="reply").body["ok"] is True
        strange = decode(_twice(field, Envelope(type="reboot", id="job-2"))[1], origin="reply")
        assert strange.body == {"ok": False, "error": "unknown command 'reboot'"}
        # nothing is published yet: the update is refused, the agent lives on
        refused = field.ask("update")
        assert refused["ok"] is False
        assert "published no model" in refused["error"]
    assert not field.device()["alive"]


def _twice(field: Field, command: Envelope) -> tuple[bytes, bytes]:
    """Both answers to one command that is sent twice; the same one unsigned, before them, is not heard."""
    signed = field.home.gate(lambda name: None).commands.sign(command, NAME)
    session = MqttSession(service_address(field.home, topics.OPERATOR_ACCOUNT), subscriptions=[_topic("reply")])
    session.start()
    try:
        assert session.wait_connected(10), session.failure
        forged = Envelope(type=command.type, id=f"{command.id}-forged")
        assert session.deliver(Outgoing(topic=_topic("command"), payload=encode(forged)), 10)
        answers = []
        for _ in range(2):
            assert session.deliver(Outgoing(topic=_topic("command"), payload=encode(signed)), 10)
            answer = session.receive(20)
            assert answer is not None
            assert decode(answer.payload, origin="reply").id == command.id
            answers.append(answer.payload)
        return answers[0], answers[1]
    finally:
        session.stop()


def _topic(kind: str) -> str:
    return topics.topic("test", NAME, kind)


def test_3_kill_9_is_a_death_and_the_next_start_a_birth(field: Field) -> None:
    with field.running("--no-train", "--no-infer") as process:
        boot = field.device()["boot"]
        process.send_signal(signal.SIGKILL)
        process.wait()
        eventually(lambda: not field.device()["alive"])
    with field.running("--no-train", "--no-infer"):
        assert field.device()["boot"] == boot + 1


def test_4_a_published_model_is_fetched_run_and_reported_without_raw_data(field: Field) -> None:
    field.publish(0)
    with field.running("--no-train", "--serve", "0") as process:
        assert field.ask("update")["model"]["version"] == 1
        report = eventually(lambda: field.device()["state"].get("inference"), 60)
        assert report["model"]["version"] == 1
        assert report["num_examples"] > 0
        assert report["latency_ms_p50"] > 0
        (predictions,) = field.predictions.glob("*.csv")
        rows = predictions.read_text().splitlines()
        assert rows[0].startswith("example_id,client,")
        assert len(rows) == report["num_examples"] + 1
        # no example, no id, no single prediction has left the device
        seen = json.dumps([field.bridge.devices(), field.bridge.table.reports(NAME)])
        assert rows[1].split(",")[0] not in seen
        assert rows[1].split(",")[-1] not in seen
        _infers_over_grpc(field.device()["state"]["roles"]["serve"])
        state = field.device()["state"]
        assert state["rss_mb"] < 60, "the agent itself loads no model"
        assert state["rss_mb"] + state["inference_rss_mb"] < 150
        field.publish(1)
        assert field.ask("update")["model"] == eventually(lambda: _second(field), 60)
        eventually(lambda: field.device()["state"]["inference"]["model"]["version"] == 2, 30)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    eventually(lambda: not field.device()["alive"])


def _second(field: Field) -> dict[str, Any] | None:
    model = field.device()["state"].get("model")
    return dict(model) if model and model["version"] == 2 else None


def _infers_over_grpc(port: int) -> None:
    import tritonclient.grpc as triton

    with triton.InferenceServerClient(f"127.0.0.1:{port}") as client:
        assert client.is_model_ready(TOY)


def test_5_operators_see_and_ask_from_their_command_line(field: Field) -> None:
    home = field.home.path
    with field.running("--no-train", "--no-infer"):
        status = fieldfleet("server", "status", "--home", home, "--json")
        assert status.returncode == 0, status.stderr
        (device,) = json.loads(status.stdout)["devices"]
        assert (device["name"], device["alive"], device["state"]["model"]["version"]) == (NAME, True, 2)
        ping = fieldfleet("server", "command", NAME, "ping", "--home", home, "--json")
        assert ping.returncode == 0, ping.stderr
        assert json.loads(ping.stdout)["reply"]["ok"] is True
        unknown = fieldfleet("server", "command", "van-9", "ping", "--home", home)
        assert unknown.returncode == 2
        assert NAME in unknown.stderr
        second = fieldfleet("agent", "run", field.agent)
        assert second.returncode == 3
        assert "another agent runs" in second.stderr


def test_6_once_without_the_server_uses_what_is_there(field: Field) -> None:
    done = fieldfleet("agent", "run", field.agent, "--once", "--data", field.data, "--json")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["inference"]["model"]["version"] == 2
    back = fieldfleet("agent", "roll-back", field.agent, "--json")
    assert back.returncode == 0, back.stderr
    assert json.loads(back.stdout)["version"] == 1
    status = fieldfleet("agent", "status", field.agent, "--json")
    assert json.loads(status.stdout)["models"][TOY]["version"] == 1


def test_7_a_revoked_device_is_refused(field: Field) -> None:
    field.superlink.registry.revoke(NAME)
    assert field.superlink.registry.mqtt_password(NAME) is None
    done = fieldfleet("agent", "run", field.agent, "--once")
    assert done.returncode == 4
    assert "revoked" in done.stderr


def test_device_keys_are_made_on_the_device_and_stay_private(field: Field) -> None:
    file = field.agent / "keys" / "device.key"
    assert file.stat().st_mode & 0o077 == 0
    assert keys.read_public_key(field.agent / "keys" / "device.pub") == keys.public_pem(keys.load_private_key(file))
    assert (field.agent / "welcome.json").stat().st_mode & 0o077 == 0
