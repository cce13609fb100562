"""The files for an external mosquitto, read by the real one; its own password tool accepts our hashes and we its."""

from __future__ import annotations

import base64
import shutil
import subprocess
from pathlib import Path

import pytest

from fl_core.identity import ca
from fl_core.link import topics
from fl_core.link.session import Outgoing
from fl_server import mosquitto
from fl_server.accounts import all_accounts, lookup, service_passwords
from fl_server.field import service_address, write_broker_files
from fl_server.home import ListenSettings, MqttSettings, ServerSettings, create_home
from tests.helpers import eventually
from tests.mqtt_helpers import PASSWORDS, Mosquitto, device_topic, free_port, needs_mosquitto, session

PEM = b"-----BEGIN PUBLIC KEY-----\n%s\n-----END PUBLIC KEY-----\n"


@pytest.mark.skipif(shutil.which("mosquitto_passwd") is None, reason="mosquitto_passwd is not installed")
def test_our_hash_is_the_one_that_mosquitto_passwd_makes(tmp_path: Path) -> None:
    file = tmp_path / "passwords"
    subprocess.run(["mosquitto_passwd", "-b", "-c", str(file), "van-1", "sécret"], check=True, capture_output=True)
    theirs = file.read_text().strip()
    _, _, version, iterations, salt, _ = theirs.replace(":", "$").split("$")
    assert version == "7"
    ours = mosquitto.password_entry("van-1", "sécret", salt=base64.b64decode(salt), iterations=int(iterations))
    assert ours == theirs


@needs_mosquitto
def test_mosquitto_knows_exactly_our_accounts(tmp_path: Path) -> None:
    broker = Mosquitto(tmp_path)
    broker.start()
    try:
        for name in PASSWORDS:
            with session(name, broker.port) as right, session(name, broker.port, changes={"password": "x"}) as wrong:
                assert right.wait_connected(10), right.failure
                assert "refused" in eventually(lambda opened=wrong: opened.failure)
    finally:
        broker.stop()
    assert (tmp_path / mosquitto.PASSWORDS_NAME).stat().st_mode & 0o077 == 0


@needs_mosquitto
def test_a_device_cannot_end_the_connection_of_another(tmp_path: Path) -> None:
    broker = Mosquitto(tmp_path)
    broker.start()
    try:
        with session("van-1", broker.port) as first:
            assert first.wait_connected(10)
            with session("van-2", broker.port, changes={"client_id": "van-1"}) as thief:
                assert thief.wait_connected(10)
                own = Outgoing(topic=device_topic("van-1", topics.STATE), payload=b"x")
                assert first.deliver(own, 10)
                assert first.connection == 1
    finally:
        broker.stop()


@needs_mosquitto
def test_a_home_writes_the_files_of_its_external_broker(tmp_path: Path) -> None:
    """``server init --mqtt HOST:PORT``: TLS with the home's certificate, the registry's accounts, a kept session."""
    port = free_port()
    settings = ServerSettings(
        fleet="fleet-1",
        listen=ListenSettings(port=1),
        mqtt=MqttSettings(mode="external", host="127.0.0.1", port=port),
    )
    home = create_home(tmp_path / "home", settings)
    registry = home.registry()
    device = registry.register("van-1", PEM % b"A")
    config = write_broker_files(home, registry)
    assert config is not None
    broker = Mosquitto(tmp_path / "unused", port=port)
    broker.config.write_text(config.read_text() + ("user root\n" if "user root" in broker.config.read_text() else ""))
    broker.start()
    try:
        address = service_address(home, topics.SERVER_ACCOUNT)
        assert address.session_expiry_s > 0
        changes = {"password": address.password, "ca": home.ca_file, "session_expiry_s": address.session_expiry_s}
        with session(topics.SERVER_ACCOUNT, port, changes=changes) as server:
            assert server.wait_connected(10), server.failure
            assert server.protocol == "5"
        changes = {"password": device.mqtt_password, "ca": home.ca_file}
        with session("van-1", port, changes=changes) as opened:
            assert opened.wait_connected(10), opened.failure
    finally:
        broker.stop()
        registry.close()


def test_accounts_are_made_once_and_follow_the_registry(tmp_path: Path) -> None:
    home = create_home(tmp_path / "home", ServerSettings(fleet="fleet-1", listen=ListenSettings(port=1)))
    registry = home.registry()
    device = registry.register("van-1", PEM % b"A")
    services = service_passwords(home.broker_folder)
    assert services == service_passwords(home.broker_folder)
    assert (home.broker_folder / "accounts.json").stat().st_mode & 0o077 == 0
    find = lookup(registry, services)
    assert find("van-1") == device.mqtt_password
    assert find(topics.SERVER_ACCOUNT) == services[topics.SERVER_ACCOUNT]
    assert find("van-2") is None
    registry.revoke("van-1")
    assert find("van-1") is None
    assert set(all_accounts(registry, services)) == set(topics.SERVICE_ACCOUNTS)
    assert write_broker_files(home, registry) is None
    registry.close()


def test_the_certificate_names_are_those_of_the_home(tmp_path: Path) -> None:
    ca.create_ca(tmp_path / "ca", "f")
    ca.issue_server_certificate(tmp_path / "ca", tmp_path / "tls", ["localhost"])
    listener = mosquitto.Listener(port=8883, certificate=tmp_path / "tls" / ca.SERVER_NAME, key=tmp_path / "k")
    text = mosquitto.configuration(tmp_path, listener)
    assert f"certfile {tmp_path / 'tls' / ca.SERVER_NAME}" in text
    assert "allow_anonymous false" in text
