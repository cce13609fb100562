"""How a device reaches its server: the Transport, and its first kind, one keep-alive HTTPS connection.

HTTPS: verified TLS, signed headers, bounded answers. Standard library and cryptography only, so that a device that
never trains can use it too.
"""

from __future__ import annotations

import contextlib
import email.utils
import http.client
import json
import socket
import ssl
import time
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
    from fl_clients.edge.home import AgentHome
    from fl_clients.edge.settings import AgentSettings
    from fl_clients.tunnel import TunnelClient

WELCOME_PATH = "/fieldfleet/v1/welcome"
CLOCK_PATH = "/fieldfleet/v1/authority"  # anything that every server answers would do: its time is in the headers
WELCOME_LIMIT = 1 << 20
# A long poll is quiet for minutes: a dead way there is noticed after 3 minutes, and middle boxes remember a live one.
KEEPALIVE = [(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)]
if hasattr(socket, "TCP_KEEPIDLE"):
    KEEPALIVE += [
        (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 120),
        (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 20),
        (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
    ]
REGISTER_REMEDY = "on the server: fieldfleet fleet register device.pub --name NAME --home HOME"
NOT_YET_VALID = 9  # OpenSSL's X509_V_ERR_CERT_NOT_YET_VALID
NO_CHECK_TIME = 0x200000  # OpenSSL's X509_V_FLAG_NO_CHECK_TIME


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
    """Requests of one thread to the server, however they travel; ``interrupt`` may be called from any thread.

    The kinds of it say how ``stream`` goes; ``request`` is the same for all.
    """

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
        with self.stream(method, path, body, timeout=timeout, headers=headers) as response:
            data = response.read(limit + 1)
            if len(data) > limit:
                raise IntegrityError(f"{self.url}{path}: the answer is over the limit of {limit:,} bytes")
            return Answer(response.status, data, dict(response.getheaders()))

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
    """The way to the server that agent.toml chooses.

    tunnel: the agent's; without one, "auto" is HTTPS alone and "mqtt" brings its own connection to the broker, for
    commands that run while no agent does. Raises InputError for a wrong address or a missing CA file.
    """
    if tunnel is None and settings.server.transport == "mqtt":
        from fl_clients.own_connection import OwnBrokerConnection

        return OwnBrokerConnection(home, settings, key)
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


class ServerConnection(Transport):
    """The Transport over HTTPS: requests of one thread; ``interrupt`` may be called from any other. Raises InputError for a malformed URL."""

    def __init__(self, url: str, ca: Path, key: PrivateKey) -> None:
        parts = urllib.parse.urlsplit(url if "://" in url else f"https://{url}")
        if parts.scheme != "https" or not parts.hostname or parts.path.strip("/"):
            raise InputError(f"server {url!r} is not an https:// address", remedy="write https://HOST:PORT")
        self.host, self.port = parts.hostname, parts.port or DEFAULT_SERVER_PORT
        self._signer = HeaderSigner(key)
        if not ca.is_file():
            raise InputError(f"{ca}: no such CA file", remedy="copy HOME/ca/ca.pem from the server")
        try:
            self._tls = ssl.create_default_context(cafile=str(ca))
        except ssl.SSLError as error:
            raise IntegrityError(f"{ca}: not a PEM certificate: {error.reason}") from None
        self._tls.minimum_version = ssl.TLSVersion.TLSv1_2
        self._http: http.client.HTTPSConnection | None = None
        self._trusting_server_clock = False

    @property
    def url(self) -> str:
        return f"https://{self.host}:{self.port}"

    @property
    def signer(self) -> HeaderSigner:
        return self._signer

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
            with self._answered(method, path, body, timeout, headers) as response:
                if response.status >= 500 or response.status == 429:
                    raise Unreachable(
                        f"{self.url}{path}: {Answer(response.status, response.read(65_536), {}).reason()}"
                    )
                yield response
        except ssl.SSLCertVerificationError as error:
            self.close()
            if error.verify_code == NOT_YET_VALID and not self._trusting_server_clock:
                self._trusting_server_clock = True  # this device has no clock: ask again by the server's
                with self.stream(method, path, body, timeout=timeout, headers=headers) as response:
                    yield response
                return
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

    def _answered(
        self,
        method: str,
        path: str,
        body: bytes | Iterable[bytes],
        timeout: float,
        headers: Mapping[str, str] | None,
    ) -> http.client.HTTPResponse:
        """The answer; a refusal that a wrong clock may have caused is asked for once more with a corrected one."""
        for attempt in (1, 2):
            connection = self._open(timeout)
            connection.request(method, path, body, {**self.signer.headers(), **(headers or {})})
            response = connection.getresponse()
            corrected = self._observe(response.getheader("date"))
            if response.status != 401 or not corrected or attempt == 2 or not isinstance(body, bytes):
                break
            with response:
                response.read(65_536)
        return response

    def _observe(self, date: str | None) -> bool:
        found = http_time(date)
        return found is not None and self.signer.observe(found)

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
            if self._trusting_server_clock:
                self._tls.verify_flags |= NO_CHECK_TIME
            self._http = http.client.HTTPSConnection(self.host, self.port, timeout=min(timeout, 15), context=self._tls)
            self._http.connect()
            self._http.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for level, option, value in KEEPALIVE:
                self._http.sock.setsockopt(level, option, value)
            if self._trusting_server_clock:
                self._check_dates(self._http)
        self._http.sock.settimeout(timeout)
        return self._http

    def _check_dates(self, connection: http.client.HTTPSConnection) -> None:
        """For a device whose clock stands before the certificate's time, as one without a battery does after a power cut.

        The server's own time decides, if it is later than this device's and inside the certificate's dates: a clock
        can be led forward so far, never back to when an expired certificate was valid. Raises CertificateRefused.
        """
        connection.request("HEAD", CLOCK_PATH)
        with connection.getresponse() as response:
            response.read(65_536)
            said = http_time(response.getheader("date"))
        certificate: dict[str, Any] = connection.sock.getpeercert() or {}
        begins, ends = (ssl.cert_time_to_seconds(certificate[key]) for key in ("notBefore", "notAfter"))
        if said is None or not max(time.time(), begins) <= said <= ends:
            connection.close()
            self._http = None
            raise CertificateRefused(
                f"{self.url}: the server's certificate is not valid yet, and its clock does not explain it",
                remedy="set this device's clock (on the server: fieldfleet server renew)",
            )
        self.signer.observe(said)


def http_time(date: str | None) -> float | None:
    """A Date header in seconds since 1970; None where it is missing or not one."""
    try:
        return email.utils.parsedate_to_datetime(date).timestamp() if date else None
    except (ValueError, OverflowError):
        return None


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
