"""A renewed certificate is used without a restart; an external broker is told to read its files again."""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
import sys
import threading
from pathlib import Path

import pytest

from fl_core.contracts.config import parse
from fl_server.certificate_watch import reload_between_connections
from fl_server.field import reload_broker
from fl_server.home import MqttSettings, ServerHome, ServerSettings, create_home
from fl_server.standing import StandingServer
from tests.helpers import eventually
from tests.mqtt_helpers import free_port


def served(home: ServerHome, port: int) -> bytes:
    """The certificate that a new connection gets, verified with the fleet's authority."""
    context = ssl.create_default_context(cafile=str(home.ca_file))
    with (
        socket.create_connection(("127.0.0.1", port), timeout=10) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as secure,
    ):
        found = secure.getpeercert(binary_form=True)
    assert found is not None
    return found


def test_https_and_the_broker_take_a_renewed_certificate_while_they_run(tmp_path: Path) -> None:
    table = {"listen": {"port": free_port()}, "mqtt": {"port": free_port()}}
    home = create_home(tmp_path / "home", parse(ServerSettings, table, origin="test"))
    ports = (home.settings.listen.port, home.settings.mqtt.port)
    with StandingServer(home) as server:
        gate = server.field.bridge._gate  # type: ignore[union-attr]
        assert gate is not None
        before = [served(home, port) for port in ports]
        assert before[0] == before[1] == gate.certificate
        home.renew()
        eventually(lambda: [served(home, port) for port in ports] != before, 30)
        after = eventually(lambda: len(set(found := [served(home, port) for port in ports])) == 1 and found, 30)
        assert after[0] != before[0]
        eventually(lambda: server.field.bridge._gate.certificate == after[0], 30)  # type: ignore[union-attr]
        assert server.superlink.tunnel._identity[0] == after[0]


def test_no_handshake_falls_between_a_new_certificate_and_its_key(tmp_path: Path) -> None:
    """A certificate loaded again and again while connections begin: each one is served."""
    home = create_home(tmp_path / "home", ServerSettings())
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(home.certificate, home.certificate_key)
    loop, done, seen = asyncio.new_event_loop(), threading.Event(), set[bytes]()

    def close(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    server = loop.run_until_complete(asyncio.start_server(close, "127.0.0.1", 0, ssl=context))
    port = server.sockets[0].getsockname()[1]
    running = threading.Thread(target=loop.run_forever)
    running.start()

    def renew() -> None:
        while not done.is_set():
            home.renew()
            reload_between_connections(context, home.certificate, home.certificate_key, loop)

    renewing = threading.Thread(target=renew)
    renewing.start()
    try:
        for _ in range(150):
            seen.add(served(home, port))
    finally:
        done.set()
        renewing.join()
        loop.call_soon_threadsafe(server.close)
        loop.call_soon_threadsafe(loop.stop)
        running.join()
        loop.close()
    assert len(seen) > 3


def external(tmp_path: Path, reload: list[str]) -> ServerHome:
    mqtt = parse(MqttSettings, {"mode": "external", "host": "127.0.0.1", "reload": reload}, origin="test")
    return create_home(tmp_path / "home", ServerSettings(mqtt=mqtt))


def test_the_reload_command_runs(tmp_path: Path) -> None:
    mark = tmp_path / "reloaded"
    home = external(tmp_path, [sys.executable, "-c", f"open({str(mark)!r}, 'w')"])
    assert ServerHome(home.path).settings.mqtt.reload == home.settings.mqtt.reload, "kept in server.toml"
    reload_broker(home)
    assert mark.exists()


@pytest.mark.parametrize("command", [["/no/such/program"], [sys.executable, "-c", "import sys; sys.exit('no broker')"]])
def test_a_reload_that_fails_is_said(tmp_path: Path, command: list[str], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        reload_broker(external(tmp_path, command))
    assert "the broker knows the former accounts" in caplog.text
