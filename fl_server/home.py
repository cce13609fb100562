"""A server's home: its settings, authority, certificate, stores. ``server init`` makes one; everything else opens it.

server.toml  ca/{ca.pem,ca.key}  tls/{server.pem,server.key}  state.db  registry.db  broker/  repository/
"""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fl_core.contracts import config as configuration
from fl_core.contracts.config import choice, flag, number, sequence, text
from fl_core.contracts.errors import EnvironmentFault, InputError
from fl_core.contracts.names import DEFAULT_MQTT_PORT, DEFAULT_SERVER_PORT, checked_name
from fl_core.identity import ca
from fl_core.link.sealed import RecordGate
from fl_core.storage import atomic
from fl_server.device_table import DATABASE_NAME
from fl_server.registry import Registry
from fl_server.telemetry import Telemetry

SETTINGS_NAME = "server.toml"
LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True, kw_only=True)
class ListenSettings:
    """Where the server listens, and the names by which devices reach it (its certificate carries them)."""

    host: str = text("127.0.0.1", help="0.0.0.0 listens on every interface")
    port: int = number(DEFAULT_SERVER_PORT, low=1, high=65535)
    names: tuple[str, ...] = sequence((), help="DNS names or addresses beside localhost")


@dataclass(frozen=True, kw_only=True)
class MqttSettings:
    """embedded: a broker inside the server, with the registry's accounts. external: yours, at host:port."""

    mode: str = choice("embedded", "embedded", "external", "off")
    host: str = text("", help="external: where the broker is; embedded: where it listens (default: as the server)")
    port: int = number(DEFAULT_MQTT_PORT, low=1, high=65535)
    tls: bool = flag(True)
    reload: tuple[str, ...] = sequence(
        (), help='external: makes it read its files again, such as ["systemctl", "reload", "mosquitto"]'
    )
    username: str = text("", help="external: the server's own account")
    password_file: str = text("", help="external: a file with its password")

    def __post_init__(self) -> None:
        if self.mode == "external" and not self.host:
            raise ValueError('mode = "external" needs a host')


@dataclass(frozen=True, kw_only=True)
class MetricsSettings:
    """/metrics (Prometheus), /healthz and /readyz, without authentication: keep them on loopback, or behind a proxy."""

    host: str = text("127.0.0.1")
    port: int = number(0, low=0, high=65535, help="0 = off")


@dataclass(frozen=True, kw_only=True)
class TelemetrySettings:
    """What is kept of what devices tell; the oldest goes first."""

    max_per_device: int = number(10_000, low=1, high=10_000_000, help="records")
    max_days: float = number(90.0, low=0.01, high=36_500.0)


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    fleet: str = text("fieldfleet")
    listen: ListenSettings = field(default_factory=ListenSettings)
    mqtt: MqttSettings = field(default_factory=MqttSettings)
    metrics: MetricsSettings = field(default_factory=MetricsSettings)
    telemetry: TelemetrySettings = field(default_factory=TelemetrySettings)


class ServerHome:
    """Opens a home. Raises InputError when ``path`` is none, ConfigError for a wrong setting."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not (path / SETTINGS_NAME).is_file():
            raise InputError(f"{path}: not a server home (no {SETTINGS_NAME})", remedy=f"fieldfleet server init {path}")
        origin = path / SETTINGS_NAME
        self.settings = configuration.parse(ServerSettings, configuration.read_toml(origin), origin=str(origin))
        checked_name(self.settings.fleet, f"{origin}: fleet")

    @property
    def public_url(self) -> str:
        """How devices reach the server: by the first of its public names, or by the address it listens on."""
        listen = self.settings.listen
        host = listen.names[0] if listen.names else listen.host
        if host in ("0.0.0.0", "::"):  # noqa: S104 compared, not bound
            host = socket.gethostname()
        return f"https://{f'[{host}]' if ':' in host else host}:{listen.port}"

    @property
    def control_socket(self) -> Path:
        return self.path / "control.sock"

    @property
    def runs_folder(self) -> Path:
        return self.path / "runs"

    @property
    def ca_file(self) -> Path:
        return self.path / "ca" / ca.CA_NAME

    @property
    def certificate(self) -> Path:
        return self.path / "tls" / ca.SERVER_NAME

    @property
    def certificate_key(self) -> Path:
        return self.path / "tls" / ca.SERVER_KEY_NAME

    @property
    def state_file(self) -> Path:
        return self.path / "state.db"

    @property
    def broker_folder(self) -> Path:
        return self.path / "broker"

    @property
    def repository(self) -> Path:
        return self.path / "repository"

    def registry(self) -> Registry:
        return Registry(self.path / "registry.db")

    def telemetry(self) -> Telemetry:
        """What devices told, with this home's limits."""
        limits = self.settings.telemetry
        return Telemetry(
            self.path / DATABASE_NAME, max_per_device=limits.max_per_device, max_age_s=limits.max_days * 86_400.0
        )

    def gate(self, key_of: Callable[[str], bytes | None]) -> RecordGate:
        """Checks what devices say over a broker, and signs what they are told. key_of: device -> PEM, None = nobody."""
        return RecordGate.of_files(self.settings.fleet, self.certificate, self.certificate_key, key_of)

    def check(self) -> ca.CertificateFacts:
        """Raises EnvironmentFault (an expired certificate, with the command that renews it) or InputError."""
        ca.check_certificate(self.ca_file, remedy=f"make a new home: fieldfleet server init NEW_{self.path.name}")
        return ca.check_certificate(self.certificate, remedy=f"fieldfleet server renew --home {self.path}")

    @contextmanager
    def lock(self) -> Iterator[None]:
        """One server per home. Raises EnvironmentFault when another one runs; the lock ends with the process."""
        handle = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise EnvironmentFault(
                    f"{self.path}: another server runs from this home", remedy="stop it first, or use another home"
                ) from None
            yield
        finally:
            os.close(handle)

    def renew(self, extra_names: Iterable[str] = (), *, days: int = ca.SERVER_DAYS) -> ca.CertificateFacts:
        """A new server certificate from the same authority: devices need nothing new."""
        hosts = [*certificate_hosts(self.settings.listen), *extra_names]
        ca.issue_server_certificate(self.path / "ca", self.path / "tls", hosts, days=days)
        return ca.certificate_facts(self.certificate)


def create_home(path: Path, settings: ServerSettings) -> ServerHome:
    """Make a whole home, or none: it appears under ``path`` only when everything in it is done.

    Raises InputError when ``path`` is taken.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InputError(f"{path}: exists and is not empty", remedy="name a new folder")
    checked_name(settings.fleet, "fleet")
    with atomic.new_folder(path) as temporary:
        temporary.chmod(0o700)
        ca.create_ca(temporary / "ca", settings.fleet)
        ca.issue_server_certificate(temporary / "ca", temporary / "tls", certificate_hosts(settings.listen))
        for name in ("broker", "repository"):
            (temporary / name).mkdir()
        Registry(temporary / "registry.db").close()
        atomic.write_bytes(temporary / SETTINGS_NAME, to_toml(configuration.to_table(settings)).encode())
    return ServerHome(path)


def certificate_hosts(listen: ListenSettings) -> list[str]:
    """localhost, this machine's name, the address it listens on and the public names."""
    own = [listen.host] if listen.host not in ("0.0.0.0", "::") else []  # noqa: S104 compared, not bound
    machine = socket.gethostname()
    return list(
        dict.fromkeys([*LOCAL_HOSTS, *([machine] if machine.isascii() and machine else []), *own, *listen.names])
    )


def to_toml(table: dict[str, Any]) -> str:
    """Two levels of plain values, as settings are."""
    lines = [f"{key} = {_value(value)}" for key, value in table.items() if not isinstance(value, dict)]
    for section, values in table.items():
        if isinstance(values, dict):
            lines += ["", f"[{section}]", *(f"{key} = {_value(value)}" for key, value in values.items())]
    return "\n".join(lines) + "\n"


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return "[" + ", ".join(_value(v) for v in value) + "]"
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        if not escaped.isprintable():
            raise InputError(f"{value!r} cannot be written to {SETTINGS_NAME}")
        return f'"{escaped}"'
    return str(value)
