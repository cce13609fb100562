"""How a device reaches its server: the Transport, and its first kind, one keep-alive HTTPS connection.

HTTPS: verified TLS, signed headers, bounded answers. Standard library and cryptography only, so that a device that
never trains can use it too.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import ssl
import urllib.parse
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from fl_core.contracts.errors import FieldfleetError, InputError, IntegrityError, RefusedError
from fl_core.contracts.names import DEFAULT_SERVER_PORT, checked_name
from fl_core.identity.keys import PrivateKey
from fl_core.identity.signature import HeaderSigner

if TYPE_CHECKING:
    from fl_clients.edge.settings import AgentHome, AgentSettings
    from fl_clients.tunnel import TunnelClient

WELCOME_PATH = "/fieldfleet/v1/welcome"
WELCOME_LIMIT = 1 << 20
# A long poll is quiet for minutes: a dead way there is noticed after 3 minutes, and middle boxes remember a live one.
KEEPALIVE = [(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)]
if hasattr(socket, "TCP_KEEPIDLE"):
    KEEPALIVE += [
        (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 120),
        (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 20),
        (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
    ]
REGISTER_REMEDY = "on the server: fieldfleet server register device.pub --name NAME --home HOME"


class Unreachable(Exception):
    """The server did not answer, or asked to be tried later (5xx, 429): nothing is wrong with the request."""


class CertificateRefused(RefusedError):
    """The server's certificate is not from this device's authority, not for this host, or out of date."""


class Unregistered(RefusedError):
    """401: the server does not know this device's key (any more), or the device's clock is wrong."""


@dataclass(frozen=True)
class Answer:
    status: int
    body: bytes
    headers: Mapping[str, str]

    def reason(self) -> str:
        """What the server says about a refusal, safe to print."""
        try:
            table = json.loads(self.body)
            text = str(table.get("error") or table.get("detail") or "")
        except (ValueError, AttributeError):
            text = ""
        return "".join(c for c in text if c.isprintable())[:300] or f"HTTP status {self.status}"


class Response(Protocol):
    """An answer that is still arriving; ``read`` and ``read1`` are those of a binary file."""

    @property
    def status(self) -> int: ...

    def read(self, amount: int, /) -> bytes: ...

    def read1(self, amount: int, /) -> bytes: ...

    def getheaders(self) -> list[tuple[str, str]]: ...


class Transport(Protocol):
    """Requests of one thread to the server, however they travel; ``interrupt`` may be called from any thread."""

    @property
    def url(self) -> str: ...

    @property
    def signer(self) -> HeaderSigner: ...

    def request(
        self,
        method: str,
        path: str,
        body: bytes | Iterable[bytes] = b"",
        *,
        limit: int,
        timeout: float = 30.0,
        headers: Mapping[str, str] | None = None,
    ) -> Answer:
        """Raises Unreachable, CertificateRefused, or IntegrityError for an answer of more than ``limit`` bytes."""
        ...

    def stream(
        self,
        method: str,
        path: str,
        body: bytes | Iterable[bytes] = b"",
        *,
        timeout: float = 30.0,
        headers: Mapping[str, str] | None = None,
    ) -> AbstractContextManager[Response]:
        """The answer to read at one's own pace; what the block raises ends the request. Errors as ``request``.

        A ``body`` of several parts needs a content-length header.
        """
        ...

    def interrupt(self) -> None:
        """Make a request that waits in another thread fail at once."""
        ...

    def close(self) -> None:
        """Let go of what is held; a later request opens it again."""
        ...


def open_transport(
    home: AgentHome, settings: AgentSettings, key: PrivateKey, tunnel: TunnelClient | None = None
) -> Transport:
    """The way to the server that agent.toml chooses; ``tunnel``: the agent's, None = HTTPS only.

    Raises InputError for a wrong address or a missing CA file.
    """
    if tunnel is None:
        return ServerConnection(settings.server.url, home.ca_file, key)
    from fl_clients.auto_connection import AutoConnection
    from fl_clients.broker_connection import BrokerConnection

    broker = BrokerConnection(tunnel, key)
    if settings.server.transport == "mqtt":
        return broker
    direct = ServerConnection(settings.server.url, home.ca_file, key)
    return AutoConnection(direct, broker, tunnel)


def open_tunnel(home: AgentHome, settings: AgentSettings, key: PrivateKey) -> TunnelClient | None:
    """One for the whole agent; None where agent.toml wants HTTPS alone. Raises InputError, IntegrityError (ca.pem)."""
    if settings.server.transport == "https" or not settings.mqtt.enabled:
        return None
    from fl_clients.tunnel import TunnelClient

    return TunnelClient(key, home.ca_file)


class ServerConnection:
    """The Transport over HTTPS: requests of one thread; ``interrupt`` may be called from any other. Raises InputError for a malformed URL."""

    def __init__(self, url: str, ca: Path, key: PrivateKey) -> None:
        parts = urllib.parse.urlsplit(url if "://" in url else f"https://{url}")
        if parts.scheme != "https" or not parts.hostname or parts.path.strip("/"):
            raise InputError(f"server {url!r} is not an https:// address", remedy="write https://HOST:PORT")
        self.host, self.port = parts.hostname, parts.port or DEFAULT_SERVER_PORT
        self.url = f"https://{self.host}:{self.port}"
        self.signer = HeaderSigner(key)
        if not ca.is_file():
            raise InputError(f"{ca}: no such CA file", remedy="copy HOME/ca/ca.pem from the server")
        try:
            self._tls = ssl.create_default_context(cafile=str(ca))
        except ssl.SSLError as error:
            raise IntegrityError(f"{ca}: not a PEM certificate: {error.reason}") from None
        self._tls.minimum_version = ssl.TLSVersion.TLSv1_2
        self._http: http.client.HTTPSConnection | None = None

    def request(
        self,
        method: str,
        path: str,
        body: bytes | Iterable[bytes] = b"",
        *,
        limit: int,
        timeout: float = 30.0,
        headers: Mapping[str, str] | None = None,
    ) -> Answer:
        with self.stream(method, path, body, timeout=timeout, headers=headers) as response:
            data = response.read(limit + 1)
            if len(data) > limit:
                raise IntegrityError(f"{self.url}{path}: the answer is over the limit of {limit:,} bytes")
            return Answer(response.status, data, dict(response.getheaders()))

    @contextlib.contextmanager
    def stream(
        self,
        method: str,
        path: str,
        body: bytes | Iterable[bytes] = b"",
        *,
        timeout: float = 30.0,
        headers: Mapping[str, str] | None = None,
    ) -> Iterator[http.client.HTTPResponse]:
        try:
            connection = self._open(timeout)
            connection.request(method, path, body, {**self.signer.headers(), **(headers or {})})
            with connection.getresponse() as response:
                if response.status >= 500 or response.status == 429:
                    raise Unreachable(
                        f"{self.url}{path}: {Answer(response.status, response.read(65_536), {}).reason()}"
                    )
                yield response
        except ssl.SSLCertVerificationError as error:
            self.close()
            raise CertificateRefused(
                f"{self.url}: the server's certificate was refused: {error.verify_message}",
                remedy="check that ca.pem is this server's and that the server's name and dates are right "
                "(on the server: fieldfleet server renew)",
            ) from None
        except (OSError, http.client.HTTPException) as error:
            self.close()
            raise Unreachable(f"{self.url}: {error or type(error).__name__}") from None
        except BaseException:
            self.close()
            raise

    def interrupt(self) -> None:
        connection = self._http
        if connection is not None and connection.sock is not None:
            with contextlib.suppress(OSError):
                connection.sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        if self._http is not None:
            self._http.close()
            self._http = None

    def _open(self, timeout: float) -> http.client.HTTPSConnection:
        if self._http is None:
            self._http = http.client.HTTPSConnection(self.host, self.port, timeout=min(timeout, 15), context=self._tls)
            self._http.connect()
            self._http.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for level, option, value in KEEPALIVE:
                self._http.sock.setsockopt(level, option, value)
        self._http.sock.settimeout(timeout)
        return self._http


@dataclass(frozen=True)
class Welcome:
    """What the server tells a registered device about itself and the fleet.

    mqtt: {host, port, tls, username, password} or None. repository: URL path of the signed repository.
    tuf_root: text of its first root metadata, or None while nothing is published. time: the server's, in seconds.
    """

    name: str
    fleet: str
    node_id: int
    mqtt: dict[str, Any] | None
    repository: str
    tuf_root: str | None
    time: float


def welcome(connection: Transport) -> Welcome:
    """Ask the server who this device is. Raises Unregistered (with the remedy), CertificateRefused or Unreachable."""
    answer = connection.request("POST", WELCOME_PATH, b"", limit=WELCOME_LIMIT)
    if answer.status == 401:
        raise Unregistered(f"{connection.url} refuses this device: {answer.reason()}", remedy=REGISTER_REMEDY)
    if answer.status != 200:
        raise RefusedError(f"{connection.url}{WELCOME_PATH}: {answer.reason()}", remedy="is this a fieldfleet server?")
    return parse_welcome(answer.body, origin=connection.url)


def parse_welcome(data: bytes, *, origin: str) -> Welcome:
    """Raises IntegrityError naming the field."""
    try:
        table = json.loads(data)
    except (ValueError, RecursionError):
        raise IntegrityError(f"{origin}: the welcome is not JSON") from None

    def field(holder: Any, name: str, *kinds: type) -> Any:
        value = holder.get(name) if isinstance(holder, dict) else None
        if type(value) not in kinds:
            raise IntegrityError(f"{origin}: field {name!r} of the welcome is missing or of a wrong type")
        return value

    mqtt = field(table, "mqtt", dict, type(None))
    if mqtt is not None:
        mqtt = {
            "host": field(mqtt, "host", str),
            "port": field(mqtt, "port", int),
            "tls": field(mqtt, "tls", bool),
            "username": field(mqtt, "username", str),
            "password": field(mqtt, "password", str),
        }
    try:
        name, fleet = (checked_name(field(table, key, str), key) for key in ("name", "fleet"))
    except FieldfleetError as error:
        raise IntegrityError(f"{origin}: {error.message}") from None
    return Welcome(
        name=name,
        fleet=fleet,
        node_id=field(table, "node_id", int),
        mqtt=mqtt,
        repository=field(table, "repository", str),
        tuf_root=field(table, "tuf_root", str, type(None)),
        time=float(field(table, "time", float, int)),
    )
