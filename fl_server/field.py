"""The field service: the embedded broker (or the address of an external one) and the bridge, from a server's home."""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fl_core.contracts.errors import EnvironmentFault, InputError, unknown_name
from fl_core.link.session import BrokerAddress
from fl_core.link.topics import OPERATOR_ACCOUNT, SERVER_ACCOUNT
from fl_server import accounts, mosquitto
from fl_server.bridge import Bridge, Event
from fl_server.broker import Accounts, EmbeddedBroker
from fl_server.home import ServerHome
from fl_server.registry import Registry
from fl_server.repository_files import RepositoryFiles
from fl_server.repository_watch import RepositoryWatch
from fl_server.tunnel import TunnelServer

log = logging.getLogger(__name__)
RELOAD_S = 20.0
WILDCARDS = ("0.0.0.0", "::", "")  # noqa: S104 compared, not bound
DOWNLOADS_PER_SECOND = 50.0
SESSION_EXPIRY_S = 7 * 86_400


class FieldService:
    """start() / stop(). ``bridge`` is None when MQTT is switched off in server.toml."""

    def __init__(
        self,
        home: ServerHome,
        registry: Registry,
        *,
        on_event: Event | None = None,
        tunnel: TunnelServer | None = None,
    ) -> None:
        settings, self._home = home.settings.mqtt, home
        self.broker: EmbeddedBroker | None = None
        self.bridge: Bridge | None = None
        self._registry, self._on_event = registry, on_event
        self._files = RepositoryFiles(home.repository)
        self._watch = RepositoryWatch(self._files, lambda generation: self._desire(self._names()))
        if settings.mode == "off":
            return
        if settings.mode == "embedded":
            services = accounts.service_passwords(home.broker_folder)
            self.broker = EmbeddedBroker(
                accounts=Accounts(home.settings.fleet, accounts.lookup(registry, services)),
                host=settings.host or home.settings.listen.host,
                port=settings.port,
                certificate=(home.certificate, home.certificate_key) if settings.tls else None,
                admit_devices=False,
            )
            if tunnel is not None:  # no detour over a connection of our own
                tunnel.attach(self.broker.carry(tunnel.tap))
                tunnel = None
        gate = home.gate(self._key_of)
        self.bridge = Bridge(
            home.path,
            home.settings.fleet,
            service_address(home, SERVER_ACCOUNT),
            on_event=self._heard,
            tunnel=tunnel,
            gate=gate,
            telemetry=home.telemetry(),
        )

    def start(self) -> None:
        """Raises EnvironmentFault: a busy port, an unreachable broker, a refused account."""
        if self.broker is not None:
            self.broker.start()
        if self.bridge is not None:
            try:
                self.bridge.start()
                if self.broker is not None:
                    self.broker.admit()
                self._desire(self._names())
                self._watch.start()
            except BaseException:
                self.stop()
                raise

    def stop(self) -> None:
        self._watch.stop()
        if self.bridge is not None:
            self.bridge.stop()
        if self.broker is not None:
            self.broker.stop()

    def renew(self) -> None:
        """Use the certificate that lies in the home now."""
        if self.broker is not None:
            self.broker.renew()
        if self.bridge is not None:
            self.bridge.renew(self._home.gate(self._key_of))
        reload_broker(self._home)

    def end_sessions(self, names: Iterable[str]) -> None:
        """Devices that were shut out leave the broker, as far as it is ours."""
        for name in names:
            if self.broker is not None:
                self.broker.end_session(name)
            if self.bridge is not None:
                self.bridge.table.shut_out(name)

    def _key_of(self, device: str) -> bytes | None:
        found = self._registry.by_name(device)
        return found.public_key_pem if found is not None and found.active else None

    def wake(self, names: Iterable[str]) -> None:
        """Ring devices that have a message waiting."""
        if self.bridge is not None:
            self.bridge.wake(names)

    def _heard(self, event: str, device: str, facts: Mapping[str, Any]) -> None:
        if event == "birth":
            self._desire([device])
        if self._on_event is not None:
            self._on_event(event, device, facts)

    def _names(self) -> list[str]:
        return [device.name for device in self._registry.devices() if not device.revoked]

    def _desire(self, names: Sequence[str]) -> None:
        """Tell devices which models the repository offers; a large fleet is asked to come one after the other."""
        generation = self._files.generation()
        if self.bridge is None or generation is None:
            return
        body = {"repository": generation, "models": self._files.offers(), "spread_s": len(names) / DOWNLOADS_PER_SECOND}
        for name in names:
            self.bridge.desire(name, body)


def service_address(home: ServerHome, account: str) -> BrokerAddress:
    """How the server itself, or an operator on this machine, reaches the broker."""
    settings = home.settings.mqtt
    host = settings.host or home.settings.listen.host
    if settings.mode == "embedded" and host in WILDCARDS:
        host = "127.0.0.1"
    username, password = account, ""
    if settings.mode == "external" and settings.username:
        username, password = settings.username, _password_file(Path(settings.password_file))
    else:
        password = accounts.service_passwords(home.broker_folder)[account]
    unique = f"-{os.getpid()}" if account == OPERATOR_ACCOUNT else ""
    return BrokerAddress(
        host=host,
        port=settings.port,
        username=username,
        password=password,
        client_id=f"{username}{unique}",
        ca=home.ca_file if settings.tls else None,
        keepalive_s=30,
        # an external broker keeps what devices say while this server is down
        session_expiry_s=SESSION_EXPIRY_S if settings.mode == "external" and account == SERVER_ACCOUNT else 0,
    )


def device_account(home: ServerHome, registry: Registry, name: str, *, host: str = "") -> dict[str, Any]:
    """What a device needs to reach the broker, and through it the server. Raises InputError: no such device, no MQTT.

    host: the broker's name as devices see it (default: as in server.toml).
    """
    settings = home.settings.mqtt
    if settings.mode == "off":
        raise InputError(f"{home.path}: MQTT is switched off", remedy='[mqtt] mode = "embedded" in server.toml')
    password = registry.mqtt_password(name)
    if password is None:
        raise unknown_name("device", name, [d.name for d in registry.devices() if not d.revoked])
    listen = home.settings.listen
    public = settings.host or (listen.names[0] if listen.names else listen.host)
    return {
        "host": host or public,
        "port": settings.port,
        "tls": settings.tls,
        "username": name,
        "password": password,
        "fleet": home.settings.fleet,
    }


def write_broker_files(home: ServerHome, registry: Registry) -> Path | None:
    """For an external mosquitto: its files in HOME/broker, after each change of the registry. None in other modes."""
    settings = home.settings.mqtt
    if settings.mode != "external":
        return None
    services = accounts.service_passwords(home.broker_folder)
    listener = mosquitto.Listener(
        port=settings.port,
        certificate=home.certificate.resolve() if settings.tls else None,
        key=home.certificate_key.resolve() if settings.tls else None,
    )
    written = mosquitto.write_files(
        home.broker_folder,
        fleet=home.settings.fleet,
        accounts=accounts.all_accounts(registry, services),
        listener=listener,
    )
    reload_broker(home)
    return written


def reload_broker(home: ServerHome) -> None:
    """Have an external broker read its files again, by the command of server.toml; a failure is logged with its remedy."""
    settings = home.settings.mqtt
    if settings.mode != "external":
        return
    if not settings.reload:
        log.info("the broker reads %s again on SIGHUP: [mqtt] reload in server.toml has it done", home.broker_folder)
        return
    try:
        done = subprocess.run(list(settings.reload), capture_output=True, text=True, timeout=RELOAD_S, check=False)
        failure = "" if done.returncode == 0 else f"exit code {done.returncode}: {done.stderr.strip()[-300:]}"
    except (OSError, subprocess.SubprocessError) as error:
        failure = str(error)
    if failure:
        log.warning("[mqtt] reload = %s failed, the broker knows the former accounts: %s", settings.reload, failure)


def _password_file(path: Path) -> str:
    with contextlib.suppress(OSError, UnicodeDecodeError):
        password = path.read_text(encoding="utf-8").strip()
        if password:
            return password
    raise EnvironmentFault(f"{path}: no password for the MQTT broker in it", remedy="mqtt.password_file in server.toml")
