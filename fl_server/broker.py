"""The embedded MQTT broker: its own thread and event loop, TLS with the home's certificate, accounts of the registry."""

from __future__ import annotations

import asyncio
import errno
import hmac
import logging
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fl_core.contracts.errors import EnvironmentFault
from fl_core.link import topics
from fl_core.link.session import PACKET_LIMIT, Message, Outgoing
from fl_core.link.topics import SERVICE_ACCOUNTS
from fl_server.certificate_watch import reload_between_connections

Lookup = Callable[[str], str | None]  # account name -> its password; None = no such account
START_S, STOP_S = 15.0, 10.0
LISTENER = "default"


@dataclass(frozen=True)
class Accounts:
    """Who may log in. ``lookup`` is asked at each connection, so that a newly registered device needs no restart."""

    fleet: str
    lookup: Lookup

    def login(self, username: str, password: str, client_id: str) -> bool:
        """A device's client id is its name: else one device could end the connection of another."""
        known = self.lookup(username)
        if known is None or not known or not hmac.compare_digest(known.encode(), password.encode()):
            return False
        return client_id == username or (username in SERVICE_ACCOUNTS and client_id.startswith(f"{username}-"))

    def may(self, username: str, action: str, name: str) -> bool:
        if action not in ("publish", "subscribe", "receive"):
            return False
        return topics.may(username, self.fleet, action, name)  # type: ignore[arg-type]


class EmbeddedBroker:
    """start() / stop(). ``certificate`` is (certificate file, key file); None serves plain TCP, for tests.

    ``port`` 0 takes a free one; ``port`` tells which after start(). With ``admit_devices=False`` only the server's own
    accounts get in until ``admit``: what devices have kept for the bridge must not arrive before it has subscribed.
    """

    def __init__(
        self,
        *,
        accounts: Accounts,
        host: str,
        port: int,
        certificate: tuple[Path, Path] | None,
        admit_devices: bool = True,
    ) -> None:
        self.host, self.port = host, port
        self._accounts, self._certificate = accounts, certificate
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._broker: Any = None
        self._started = threading.Event()
        self._failure: BaseException | None = None
        self._admitting = admit_devices
        self._tap: Callable[[Message], bool] | None = None

    def start(self) -> None:
        """Raises EnvironmentFault for a busy port or an unusable certificate, before anything else has begun."""
        check_port_free(self.host, self.port, "the MQTT broker")
        for name in ("amqtt", "transitions"):  # they log each packet and each stranger at warning level and above
            logging.getLogger(name).setLevel(logging.CRITICAL + 1)
        self._started.clear()
        self._failure = None
        self._thread = threading.Thread(target=self._run, name="mqtt-broker", daemon=True)
        self._thread.start()
        if not self._started.wait(START_S):
            raise EnvironmentFault(f"the MQTT broker did not start within {START_S:.0f} s")
        if self._failure is not None:
            raise self._explained(self._failure)

    def carry(self, tap: Callable[[Message], bool]) -> Carrier:
        """Before start(): messages that ``tap`` takes go there, and the Carrier sends without a connection of its own."""
        self._tap = tap
        return Carrier(self)

    def admit(self) -> None:
        self._admitting = True

    @property
    def running(self) -> bool:
        return self._started.is_set() and self._thread is not None and self._thread.is_alive()

    def deliver(self, device: str, message: Outgoing, then: Callable[[bool], None] | None) -> bool:
        """From any thread; False when the broker does not run."""
        if not self.running or self._loop is None:
            return False
        try:
            self._loop.call_soon_threadsafe(self._broker.deliver, device, message.topic, message.payload, then)
        except RuntimeError:  # its loop has just closed
            return False
        return True

    def _login(self, username: str, password: str, client_id: str) -> bool:
        open_to = self._admitting or username in SERVICE_ACCOUNTS
        return open_to and self._accounts.login(username, password, client_id)

    def renew(self) -> None:
        """Use the certificate files as they are now, for connections that begin from now on. From another thread than the loop's."""
        if self._broker is not None and self._broker.tls is not None and self._certificate is not None:
            reload_between_connections(self._broker.tls, *self._certificate, self._loop)

    def end_session(self, name: str) -> None:
        """Cut off a device that may not log in any more; its will is published. From any thread."""
        loop, broker = self._loop, self._broker
        if loop is not None and broker is not None and loop.is_running():
            asyncio.run_coroutine_threadsafe(broker.end_session(name), loop)

    def stop(self) -> None:
        if self._thread is None or self._loop is None or not self._thread.is_alive():
            return
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(STOP_S)
        self._thread = None

    def __enter__(self) -> EmbeddedBroker:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _run(self) -> None:
        loop = asyncio.new_event_loop()
        asyncio.set_event_loop(loop)
        # A stranger's half handshake is no error of this server.
        loop.set_exception_handler(lambda _loop, _context: None)
        self._loop = loop
        try:
            loop.run_until_complete(self._start())
        except BaseException as error:
            self._failure = error
            self._started.set()
        else:
            self._started.set()
            loop.run_forever()
            loop.run_until_complete(self._broker.end(STOP_S / 2))
        finally:
            _cancel_all(loop)
            loop.close()

    async def _start(self) -> None:
        from fl_server.mqtt_adapter import Guard, GuardedBroker

        listener: dict[str, Any] = {"type": "tcp", "bind": f"{self.host}:{self.port}", "max_connections": -1}
        if self._certificate is not None:
            listener |= {"ssl": True, "certfile": str(self._certificate[0]), "keyfile": str(self._certificate[1])}
        guard = Guard(self._login, self._accounts.may)
        self._broker = GuardedBroker({"listeners": {LISTENER: listener}, "plugins": {}}, guard)
        if (tap := self._tap) is not None:
            self._broker.tap = lambda topic, payload, retained: tap(Message(topic, payload, retained))
        await self._broker.start()
        self.port = self._broker.bound_port(LISTENER)

    def _explained(self, error: BaseException) -> EnvironmentFault:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, OSError) and cause.errno == errno.EADDRINUSE:
                return port_busy(self.host, self.port, "the MQTT broker")
            cause = cause.__cause__
        return EnvironmentFault(f"the MQTT broker on {self.host}:{self.port} did not start: {error}")


class Carrier:
    """For the tunnel: what MqttSession offers, straight into the broker of this process."""

    largest_packet = PACKET_LIMIT

    def __init__(self, broker: EmbeddedBroker) -> None:
        self._owner = broker

    @property
    def connected(self) -> bool:
        return self._owner.running

    def publish(self, message: Outgoing, then: Callable[[bool], None] | None = None) -> object | None:
        """To the device that the topic names, if it is connected; None when the broker does not run."""
        found = topics.parse(message.topic)
        if found is None or not self._owner.deliver(found.device, message, then):
            return None
        return self


def check_port_free(host: str, port: int, what: str) -> None:
    """Raises EnvironmentFault naming the port. Port 0 is always free."""
    try:
        infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise EnvironmentFault(f"{host}: not an address of this machine: {error}") from None
    for family, kind, protocol, _name, address in infos:
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(address)
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    raise port_busy(host, port, what) from None
                raise EnvironmentFault(f"{host}:{port}: {what} cannot listen there: {error.strerror}") from None


def port_busy(host: str, port: int, what: str) -> EnvironmentFault:
    return EnvironmentFault(
        f"port {port} on {host} is busy: {what} cannot start",
        remedy="stop the program that uses it, or choose another port",
    )


def _cancel_all(loop: asyncio.AbstractEventLoop) -> None:
    tasks = asyncio.all_tasks(loop)
    for task in tasks:
        task.cancel()
    if tasks:
        loop.run_until_complete(asyncio.wait(tasks, timeout=STOP_S / 2))
