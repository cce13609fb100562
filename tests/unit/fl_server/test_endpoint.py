"""The server's door: who gets in, what is served, what is not, and the limits."""

from __future__ import annotations

import datetime
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fl_clients.connection import CertificateRefused, ServerConnection, Unreachable, Unregistered, welcome
from fl_clients.training.fleet import Gone
from fl_core.contracts.errors import EnvironmentFault
from fl_core.flower import wire
from fl_core.identity import ca, keys, signature
from fl_server.superlink import SuperLink
from tests.federation import connect, joined, new_home, new_key, running
from tests.helpers import eventually


@pytest.fixture(scope="module")
def superlink(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SuperLink]:
    with running(new_home(tmp_path_factory.mktemp("server") / "home")) as found:
        yield found


def post(connection: ServerConnection, path: str, body: bytes = b"", **headers: str) -> int:
    return connection.request("POST", path, body, limit=1 << 20, headers=headers).status


def test_an_unregistered_device_is_told_so(superlink: SuperLink, tmp_path: Path) -> None:
    connection = connect(superlink, new_key(tmp_path))
    with pytest.raises(Unregistered) as refused:
        welcome(connection)
    assert "not registered" in str(refused.value)
    assert "fleet register" in str(refused.value)
    assert refused.value.exit_code == 4


def test_registered_while_the_server_runs(superlink: SuperLink, tmp_path: Path) -> None:
    key = new_key(tmp_path)
    registry = superlink.home.registry()  # as 'server register' does, in its own process
    registry.register("late", keys.public_pem(key))
    registry.close()
    found = welcome(connect(superlink, key))
    assert (found.name, found.fleet, found.mqtt, found.tuf_root) == ("late", "test", None, None)
    assert abs(found.time - time.time()) < 60
    assert found.node_id


def test_a_revoked_device_is_refused_at_its_next_call(superlink: SuperLink, tmp_path: Path) -> None:
    client = joined(superlink, tmp_path, "revoked")
    client.heartbeat()
    superlink.registry.revoke("revoked")
    with pytest.raises(Unregistered, match="revoked"):
        client.heartbeat()
    with pytest.raises(Unregistered, match="revoked"):
        welcome(client.connection)


def test_a_wrong_clock_is_named(superlink: SuperLink, tmp_path: Path) -> None:
    key = new_key(tmp_path)
    connection = connect(superlink, key)
    past = datetime.datetime.now(datetime.UTC) - datetime.timedelta(hours=1)
    connection.signer.headers = lambda: signature.sign(key, now=past)  # type: ignore[method-assign]
    with pytest.raises(Unregistered, match="clock"):
        welcome(connection)


def test_without_signature_nothing_is_answered(superlink: SuperLink, tmp_path: Path) -> None:
    connection = connect(superlink, new_key(tmp_path))
    connection.signer.headers = dict  # type: ignore[method-assign, assignment]
    for path in (wire.WELCOME_PATH, wire.WAIT_PATH, "/v1/fleet/pull-messages", "/v1/fleet/activate-node"):
        assert post(connection, path) == 401


def test_only_the_fleet_api_is_served(superlink: SuperLink, tmp_path: Path) -> None:
    """Flower's own app answers these to anyone who reaches its port."""
    client = joined(superlink, tmp_path, "curious")
    for path in ("/v1/control/start-run", "/v1/control/register-node", "/v1/control/list-nodes", "/health"):
        assert post(client.connection, path) == 404
    for name in ("register-node", "unregister-node", "../control/start-run"):
        assert post(client.connection, f"/v1/fleet/{name}") == 404
    assert client.connection.request("GET", "/docs", limit=1 << 20).status == 404


def test_nobody_speaks_for_another_node(superlink: SuperLink, tmp_path: Path) -> None:
    honest, rogue = joined(superlink, tmp_path, "honest"), joined(superlink, tmp_path, "rogue")
    own = rogue.node
    rogue.node = honest.node
    for call in (rogue.heartbeat, rogue.deactivate, rogue.pull, lambda: rogue.wait(0)):
        with pytest.raises(Unregistered, match="another node"):
            call()
    rogue.node = own
    metadata = wire.message.Metadata(run_id=1, message_id="a" * 64, src_node_id=honest.node.node_id, dst_node_id=1)
    forged = wire.WireReply(
        1,
        "b" * 64,
        wire.message.Message(metadata=metadata).SerializeToString(),
        wire.message.ObjectTree(object_id="a" * 64).SerializeToString(),
        {},
    )
    with pytest.raises(Gone, match="the node that was asked"):
        rogue.push(forged)
    assert "honest" in superlink.grid().device_names().values()


def test_bodies_have_limits(superlink: SuperLink, tmp_path: Path) -> None:
    client = joined(superlink, tmp_path, "large")
    big = b"\0" * (wire.MAX_OBJECT_BYTES + (65 << 10))
    for path, body in (
        ("/v1/fleet/push-object", big),
        ("/v1/fleet/push-messages", big),
        ("/v1/fleet/pull-messages", big[: 65 << 10]),
        (wire.WAIT_PATH, big[: 65 << 10]),
    ):
        try:
            assert post(client.connection, path, body) == 413
        except Unreachable:  # the server may close while we are still sending
            continue
    client.heartbeat()


@pytest.mark.parametrize("name", ["pull-messages", "push-messages", "push-object", "activate-node"])
def test_noise_is_a_bad_request(superlink: SuperLink, tmp_path: Path, name: str) -> None:
    client = joined(superlink, tmp_path, f"noise-{name}")
    assert post(client.connection, f"/v1/fleet/{name}", b"\xff" * 40) == 400
    assert post(client.connection, wire.WAIT_PATH, b"\xff" * 40) == 400
    own = wire.fleet.PullMessagesRequest(node=client.node).SerializeToString()
    assert post(client.connection, f"{wire.WAIT_PATH}?seconds=nan", own) == 400
    assert post(client.connection, f"{wire.WAIT_PATH}?seconds=1e9", own) == 400


def test_a_cut_connection_means_offline(superlink: SuperLink, tmp_path: Path) -> None:
    client = joined(superlink, tmp_path, "cut")
    grid = superlink.grid()
    online = lambda: "cut" in grid.device_names().values()  # noqa: E731
    assert online()
    failed = threading.Event()

    def poll() -> None:
        try:
            client.wait(60)
        except Unreachable:
            failed.set()

    thread = threading.Thread(target=poll)
    thread.start()
    eventually(lambda: client.node.node_id in superlink.bell._doors)
    client.connection.interrupt()
    eventually(lambda: not online())
    thread.join(10)
    assert failed.is_set()
    assert not client.wait(0), "its next sign of life brings it back"
    assert online()


def test_another_authority_is_refused(superlink: SuperLink, tmp_path: Path) -> None:
    ca.create_ca(tmp_path / "other", "other")
    with pytest.raises(CertificateRefused) as refused:
        welcome(ServerConnection(superlink.url, tmp_path / "other" / "ca.pem", new_key(tmp_path)))
    assert refused.value.exit_code == 4
    assert "ca.pem" in str(refused.value)


def test_another_host_name_is_refused(superlink: SuperLink, tmp_path: Path) -> None:
    connection = ServerConnection(f"https://127.0.0.2:{superlink.port}", superlink.home.ca_file, new_key(tmp_path))
    with pytest.raises((CertificateRefused, Unreachable)):
        welcome(connection)


def test_a_busy_port_is_named_before_anything_starts(superlink: SuperLink, tmp_path: Path) -> None:
    home = new_home(tmp_path / "second")
    with pytest.raises(EnvironmentFault) as busy:
        SuperLink(home, port=superlink.port)
    assert f"port {superlink.port}" in str(busy.value)
    assert not home.state_file.exists()


def test_an_expired_certificate_stops_the_start(tmp_path: Path) -> None:
    home = new_home(tmp_path / "home")
    ca.issue_server_certificate(home.path / "ca", home.path / "tls", ["localhost"], days=0)
    with pytest.raises(EnvironmentFault, match="expired"):
        SuperLink(home, port=0)


def test_the_repository_is_served_read_only(superlink: SuperLink, tmp_path: Path) -> None:
    repository = superlink.home.repository
    for name, text in {"metadata/1.root.json": '{"signed": 1}', "targets/model.onnx": "0123456789"}.items():
        (repository / name).parent.mkdir(exist_ok=True)
        (repository / name).write_text(text)
    (repository / "keys").mkdir()
    (repository / "keys" / "root.key").write_text("secret")
    (repository / "targets" / "link").symlink_to(superlink.home.path / "ca" / "ca.key")
    client = joined(superlink, tmp_path, "reader")

    def get(name: str, **headers: str) -> tuple[int, bytes]:
        answer = client.connection.request("GET", wire.REPOSITORY_PATH + name, limit=1 << 20, headers=headers)
        return answer.status, answer.body

    assert get("metadata/1.root.json") == (200, b'{"signed": 1}')
    assert get("targets/model.onnx") == (200, b"0123456789")
    assert get("targets/model.onnx", Range="bytes=3-5") == (206, b"345")
    assert get("targets/model.onnx", Range="bytes=7-") == (206, b"789")
    assert get("targets/model.onnx", Range="bytes=99-")[0] == 416
    for name in (
        "keys/root.key",
        "targets/link",
        "targets",
        "",
        "targets/../keys/root.key",
        "targets/%2e%2e/x",
        "targets//x",
    ):
        assert get(name)[0] == 404, name
    assert welcome(client.connection).tuf_root == '{"signed": 1}'
    assert json.loads(client.connection.request("PUT", wire.REPOSITORY_PATH, limit=99).body)["error"] == "not found"
