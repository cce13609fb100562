"""A device whose clock is wrong: corrected by the server's, led forward into a certificate's dates, never back."""

from __future__ import annotations

import datetime
import email.utils
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from fl_clients.connection import CertificateRefused, ServerConnection, welcome
from fl_core.identity import ca, keys, signature
from tests.federation import connect, new_home, new_key, running

DAY = 86_400.0
Make = Callable[..., ServerConnection]


class Answering(BaseHTTPRequestHandler):
    """Says what time it is on the server, and nothing else."""

    ahead_s = 0.0
    asked: list[str]

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_POST(self) -> None:
        self.asked.append(self.headers[signature.TIMESTAMP])
        self.do_HEAD()

    def date_time_string(self, timestamp: float | None = None) -> str:
        return email.utils.formatdate(time.time() + self.ahead_s, usegmt=True)

    def log_message(self, format: str, *arguments: object) -> None:
        return


@contextmanager
def tls_server(folder: Path, ahead_s: float) -> Iterator[tuple[int, list[str]]]:
    asked: list[str] = []
    handler = type("Handler", (Answering,), {"ahead_s": ahead_s, "asked": asked, "protocol_version": "HTTP/1.1"})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / ca.SERVER_NAME, folder / ca.SERVER_KEY_NAME)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.server_address[1], asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)


def certificates(folder: Path, patch: pytest.MonkeyPatch, made_in_s: float, days: int = 30) -> None:
    """An authority and a server certificate that are made (as seen from this machine) in so many seconds."""
    made = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=made_in_s)
    with patch.context() as context:
        context.setattr(ca, "_now", lambda: made)
        ca.create_ca(folder, "fleet")
        ca.issue_server_certificate(folder, folder, ["127.0.0.1"], days=days)


def ask(port: int, authority: Path) -> ServerConnection:
    connection = ServerConnection(
        f"https://127.0.0.1:{port}", authority / ca.CA_NAME, ec.generate_private_key(ec.SECP384R1())
    )
    try:
        assert connection.request("POST", "/", b"", limit=100).status == 200
    finally:
        connection.close()
    return connection


def test_a_clock_that_stands_before_the_certificate_is_led_forward(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificates(tmp_path, monkeypatch, 10 * DAY)
    with tls_server(tmp_path, 11 * DAY) as (port, asked):
        connection = ask(port, tmp_path)
    assert connection.signer.offset_s == pytest.approx(11 * DAY, abs=60)
    stamp = datetime.datetime.fromisoformat(asked[-1]).timestamp()
    assert stamp - time.time() == pytest.approx(11 * DAY, abs=60), "its signatures carry the server's time"


@pytest.mark.parametrize("says_s", [0.0, -20 * DAY, 11 * DAY + 30 * DAY])
def test_a_server_whose_own_time_does_not_fit_its_certificate_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, says_s: float
) -> None:
    certificates(tmp_path, monkeypatch, 10 * DAY)
    with tls_server(tmp_path, says_s) as (port, asked), pytest.raises(CertificateRefused):
        ask(port, tmp_path)
    assert asked == [], "nothing was said to it"


def test_an_expired_certificate_stays_expired_whatever_the_server_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificates(tmp_path, monkeypatch, -40 * DAY)
    with tls_server(tmp_path, -20 * DAY) as (port, asked), pytest.raises(CertificateRefused, match="expired"):
        ask(port, tmp_path)
    assert asked == []


def test_without_a_clock_the_authority_still_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    certificates(tmp_path / "server", monkeypatch, 10 * DAY)
    certificates(tmp_path / "other", monkeypatch, 10 * DAY)
    with tls_server(tmp_path / "server", 11 * DAY) as (port, asked), pytest.raises(CertificateRefused):
        ask(port, tmp_path / "other")
    assert asked == []


@pytest.mark.parametrize("off_s", [-2 * DAY, 2 * DAY, -20 * 365 * DAY])
def test_a_device_with_a_wrong_clock_is_welcome(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, off_s: float) -> None:
    with running(new_home(tmp_path / "home")) as superlink:
        key = new_key(tmp_path)
        superlink.registry.register("van-1", keys.public_pem(key))
        wrong = SimpleNamespace(time=lambda: time.time() + off_s, monotonic=time.monotonic)
        monkeypatch.setattr(signature, "time", wrong)  # of the device's signatures: the server does not use it
        connection = connect(superlink, key)
        assert welcome(connection).name == "van-1"
        facts = connection.signer.clock_facts()
        assert facts["skew_s"] == pytest.approx(off_s, abs=60)
        assert facts["corrected_s"] == pytest.approx(-off_s, abs=60)
