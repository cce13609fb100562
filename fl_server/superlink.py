"""The embedded SuperLink: Flower's state in SQLite, our endpoint in front of it, uvicorn in a thread of this process."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import threading
import time
from typing import Any

import uvicorn

from fl_core.contracts.errors import EnvironmentFault
from fl_core.flower import wire
from fl_core.flower.adapter import LinkStore
from fl_core.runtime.machine import return_memory_early
from fl_server.bell import Bell
from fl_server.certificate_watch import reload_between_connections
from fl_server.device_table import DATABASE_NAME, DeviceTable
from fl_server.directory import Caller, Directory
from fl_server.doorman import Doorman
from fl_server.endpoint import Endpoint
from fl_server.field import write_broker_files
from fl_server.fleet_watch import FleetWatch
from fl_server.home import ServerHome
from fl_server.link_grid import LinkGrid
from fl_server.registry import Device
from fl_server.repository_files import RepositoryFiles
from fl_server.repository_watch import RepositoryWatch
from fl_server.traffic import Traffic
from fl_server.tunnel import TunnelServer

KEEP_ALIVE_SECONDS = 300  # else each slow poll pays a TLS handshake
DEFAULT_RUN = "run"
REUSED_BYTES = 2 << 20  # objects of 1 MiB and what TLS and SQLite make of them
START_SECONDS, DRAIN_SECONDS, CLOSE_SECONDS = 30.0, 15.0, 1


class _Server(uvicorn.Server):
    """Ends connections that their devices did not close in time, rather than leaving them to the garbage collector."""

    loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self.loop = asyncio.get_running_loop()
        await super().startup(sockets)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """What devices are just sending is still taken; idle connections, which TLS is slow to close, are not waited for."""
        if self.server_state.tasks:
            await asyncio.wait(set(self.server_state.tasks), timeout=DRAIN_SECONDS)
        await super().shutdown(sockets)
        for connection in list(self.server_state.connections):
            transport = getattr(connection, "transport", None)
            if transport is not None:
                transport.abort()
        await asyncio.sleep(0)  # let the aborts take effect before the loop closes


class SuperLink:
    """start() / stop(). Everything that can be wrong with the home or the port is found before anything starts.

    Raises EnvironmentFault: an expired certificate, a busy port. port 0 takes a free one (``port`` tells which).
    """

    def __init__(self, home: ServerHome, *, port: int | None = None) -> None:
        self.home = home
        home.check()
        return_memory_early(reused_bytes=REUSED_BYTES)  # uploads come and go by megabytes, in several threads
        listen = home.settings.listen
        self._socket = bind(listen.host, listen.port if port is None else port)
        self.port: int = self._socket.getsockname()[1]
        self.bell = Bell()
        try:
            self.store = LinkStore(home.state_file)
            home.state_file.chmod(0o600)
            self.registry = home.registry()
            self.directory = Directory(self.registry, self.store)
            self.telemetry = home.telemetry()
            self.devices = DeviceTable(home.path / DATABASE_NAME, self.telemetry)
        except BaseException:
            self._socket.close()
            raise
        self._files = RepositoryFiles(home.repository)
        self._watch = RepositoryWatch(self._files, lambda generation: self.bell.ring_doors())
        doorman = Doorman(self.registry, home.settings.fleet, home.ca_file.read_bytes(), self._came_in)
        self._endpoint = Endpoint(
            self.store,
            self.directory,
            self.bell,
            self._files,
            self._welcome,
            self.telemetry,
            doorman,
            self.devices.note_posted,
        )
        self.fleet_watch = FleetWatch(self.registry, self.directory, self.store, self.bell)
        self.fleet_watch.on_shut_out(lambda names: self.tunnel.shut_out(names))
        self.traffic = Traffic(self._endpoint)
        self.tunnel = TunnelServer(
            self.traffic, fleet=home.settings.fleet, certificate=home.certificate, key=home.certificate_key
        )
        self._server = _Server(
            uvicorn.Config(
                self.traffic,
                log_level="warning",
                access_log=False,
                server_header=False,
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=CLOSE_SECONDS,
                ssl_certfile=str(home.certificate),
                ssl_keyfile=str(home.certificate_key),
            )
        )
        self._thread: threading.Thread | None = None

    @property
    def url(self) -> str:
        """As seen from this machine; devices use one of the public names."""
        host = self.home.settings.listen.host
        return f"https://{'127.0.0.1' if host in ('0.0.0.0', '::') else host}:{self.port}"  # noqa: S104 compared

    @property
    def serving(self) -> bool:
        return self._server.started and self._thread is not None and self._thread.is_alive()

    def start(self) -> None:
        def serve() -> None:
            with contextlib.suppress(SystemExit):  # uvicorn's way to say that it could not start
                self._server.run(sockets=[self._socket])

        self._thread = threading.Thread(target=serve, name="superlink", daemon=True)
        self._thread.start()
        deadline = time.monotonic() + START_SECONDS
        while not self._server.started and self._thread.is_alive() and time.monotonic() < deadline:
            time.sleep(0.005)  # uvicorn tells it by an attribute only
        if not self._server.started:
            self.stop()
            raise EnvironmentFault("the HTTPS server did not start", remedy="run again with --verbose")
        assert self._server.loop is not None
        self.tunnel.start(self._server.loop)
        self._watch.start()
        self.fleet_watch.start()

    def stop(self) -> None:
        """Waiting devices are told to come back later; requests under way get a few seconds."""
        self._watch.stop()
        self.bell.close()
        self.fleet_watch.stop()
        self.tunnel.stop()
        self._server.should_exit = True
        if self._thread is not None:
            self._thread.join(DRAIN_SECONDS + 5)
        self._socket.close()
        self._endpoint.close()
        self.registry.close()
        self.devices.close()

    def renew(self) -> None:
        """Use the certificate that lies in the home now, for connections that begin from now on."""
        context, home = self._server.config.ssl, self.home
        if context is not None:
            reload_between_connections(context, home.certificate, home.certificate_key, self._server.loop)
        self.tunnel.renew(home.certificate, home.certificate_key)

    def grid(self, run_name: str = DEFAULT_RUN) -> LinkGrid:
        """The run of this name, as an earlier grid left it (in another process too), or a new one."""
        return LinkGrid(self.store, self.bell, self.directory, run_name)

    def gone(self, name: str) -> None:
        """The broker has lost this device: unless it waits here by itself, it is not asked before it is heard from."""
        device = self.registry.by_name(name)
        if device is not None and not self.bell.waits(node := self.directory.node(device)):
            self.store.deactivate(node)
            self.bell.ring_engine()

    def _came_in(self, device: Device) -> None:
        """A device enrolled or rotated its key: an external broker needs to know, and a former key is shut out."""
        write_broker_files(self.home, self.registry)
        self.fleet_watch.look()

    def _welcome(self, caller: Caller, host: str) -> dict[str, Any]:
        settings = self.home.settings
        mqtt = None
        if settings.mqtt.mode != "off":
            mqtt = {
                "host": settings.mqtt.host if settings.mqtt.mode == "external" else host,
                "port": settings.mqtt.port,
                "tls": settings.mqtt.tls,
                "username": caller.device.name,
                "password": caller.device.mqtt_password,
            }
        return {
            "name": caller.device.name,
            "fleet": settings.fleet,
            "mqtt": mqtt,
            "repository": wire.REPOSITORY_PATH,
            "tuf_root": self._files.root_metadata(),
        }


def bind(host: str, port: int, *, setting: str = "[listen]") -> socket.socket:
    """A listening socket, or EnvironmentFault naming the port and what to do."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=256)
    except OSError as error:
        reason = {
            errno.EADDRINUSE: "is in use by another program",
            errno.EACCES: "may not be used by this user",
            errno.EADDRNOTAVAIL: f"cannot be opened: this machine has no address {host}",
        }.get(error.errno or 0, f"cannot be opened: {error}")
        raise EnvironmentFault(
            f"port {port} on {host} {reason}",
            remedy=f"stop that program, or change {setting} in server.toml"
            + (" (devices need the new address too)" if setting == "[listen]" else ""),
        ) from None
