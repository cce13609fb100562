"""The device's own folder: settings, key, counters. Nothing in it comes from the server but welcome.json and the slots.

agent.toml     what the owner decides          keys/          device.key, device.pub: made here, never leave
ca.pem         the server's authority          welcome.json   what the server said at the last contact (0600)
boot           how often the agent started     outbox.db      MQTT messages and jobs
slots/         the model bundles               predictions/   what the device computed; stays here
fleet/         replies of the federation       data/          the device's own data, unless agent.toml says where
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from fl_core.contracts import config
from fl_core.contracts.errors import ConfigError, EnvironmentFault, InputError
from fl_core.contracts.names import DEFAULT_GRPC_PORT, NAME_PATTERN
from fl_core.storage import atomic

SETTINGS_NAME = "agent.toml"


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    url: str = config.text("", help="https://HOST:PORT")

    def __post_init__(self) -> None:
        if not self.url.startswith("https://"):
            raise ConfigError(f"server.url = {self.url!r} is not an https:// address", remedy="write https://HOST:PORT")


@dataclass(frozen=True, kw_only=True)
class DeviceSettings:
    name: str = config.text("", help="a hint for the operator; the registered name counts")
    application: str = config.text("", help="the only application that runs here; empty = any installed one")
    channel: str = config.text("stable", help="of the signed repository")
    data: str = config.text("data", help="folder of this device's own data, relative to agent.toml")

    def __post_init__(self) -> None:
        if not NAME_PATTERN.fullmatch(self.channel):
            raise ConfigError(f"device.channel = {self.channel!r} is not usable as a name")


@dataclass(frozen=True, kw_only=True)
class RoleSettings:
    train: bool = config.flag(True, help="take part in federations, where torch and flwr are installed")
    infer: bool = config.flag(True, help="run the current model on this device's data")
    serve: bool = config.flag(False, help="serve other programs on this device over gRPC")


@dataclass(frozen=True, kw_only=True)
class GrpcSettings:
    host: str = config.text("127.0.0.1", help="only programs on this device, by default")
    port: int = config.number(DEFAULT_GRPC_PORT, low=0, high=65_535)


@dataclass(frozen=True, kw_only=True)
class MqttSettings:
    enabled: bool = config.flag(True)
    protocol: str = config.choice("auto", "auto", "5", "311")
    keepalive_s: int = config.number(60, low=5, high=3_600)


@dataclass(frozen=True, kw_only=True)
class IntervalSettings:
    update_s: float = config.number(3_600.0, low=1.0, high=30 * 86_400.0, help="between checks for a new model")
    infer_s: float = config.number(0.0, low=0.0, high=30 * 86_400.0, help="between runs; 0 = for each new model only")
    telemetry_s: float = config.number(300.0, low=1.0, high=86_400.0)


@dataclass(frozen=True, kw_only=True)
class AgentSettings:
    server: ServerSettings
    device: DeviceSettings = field(default_factory=DeviceSettings)
    roles: RoleSettings = field(default_factory=RoleSettings)
    grpc: GrpcSettings = field(default_factory=GrpcSettings)
    mqtt: MqttSettings = field(default_factory=MqttSettings)
    intervals: IntervalSettings = field(default_factory=IntervalSettings)


@dataclass(frozen=True)
class AgentHome:
    """Paths inside HOME."""

    folder: Path

    @property
    def settings_file(self) -> Path:
        return self.folder / SETTINGS_NAME

    @property
    def key_file(self) -> Path:
        return self.folder / "keys" / "device.key"

    @property
    def public_key_file(self) -> Path:
        return self.folder / "keys" / "device.pub"

    @property
    def ca_file(self) -> Path:
        return self.folder / "ca.pem"

    @property
    def welcome_file(self) -> Path:
        return self.folder / "welcome.json"

    @property
    def store_file(self) -> Path:
        return self.folder / "outbox.db"

    @property
    def predictions(self) -> Path:
        return self.folder / "predictions"

    @property
    def fleet(self) -> Path:
        return self.folder / "fleet"

    def data_folder(self, settings: AgentSettings, option: str | None = None) -> Path:
        """``--data``, else the settings' folder. Raises InputError for a ``--data`` that does not exist."""
        if option:
            if not Path(option).is_dir():
                raise InputError(f"--data {option}: no such folder")
            return Path(option)
        return self.folder / Path(settings.device.data).expanduser()

    def settings(self) -> AgentSettings:
        """Raises ConfigError naming the file and the key."""
        if not self.settings_file.is_file():
            raise ConfigError(
                f"{self.settings_file}: no such file",
                remedy=f"fieldfleet agent init {self.folder} --server URL --ca FILE",
            )
        origin = str(self.settings_file)
        table = config.read_toml(self.settings_file)
        if "server" not in table:
            raise ConfigError(f"{origin}: section 'server' is missing", remedy='[server] url = "https://HOST:PORT"')
        try:
            return config.parse(AgentSettings, table, origin=origin)
        except ConfigError as error:
            if error.message.startswith(origin):
                raise
            raise ConfigError(f"{origin}: {error.message}", remedy=error.remedy) from None

    def next_boot(self) -> int:
        """Counts this start, durably. A new or unreadable counter begins at the clock, so that it still grows."""
        file = self.folder / "boot"
        try:
            last = json.loads(file.read_text(encoding="ascii"))
            if type(last) is not int or not 0 < last < 2**52:
                raise ValueError
        except (OSError, ValueError):
            last = int(time.time() * 1000)
        atomic.write_json(file, last + 1)
        return last + 1

    @contextmanager
    def lock(self) -> Iterator[None]:
        """One agent per HOME. Raises EnvironmentFault when another one runs; the lock ends with the process."""
        handle = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise EnvironmentFault(
                    f"{self.folder}: another agent runs in this folder", remedy="stop it first, or use another HOME"
                ) from None
            yield
        finally:
            os.close(handle)


TEMPLATE = """\
# This device's own settings. The server cannot change them.
[server]
url = {url}

[device]
name = {name}
application = {application}  # the only application that runs here; "" = any installed one
channel = "stable"
data = "data"  # folder of this device's own data; relative to this file

[roles]
train = true   # where torch and flwr are installed
infer = true
serve = false  # gRPC for other programs on this device

[grpc]
host = "127.0.0.1"
port = {grpc_port}

[mqtt]
enabled = true
protocol = "auto"  # "5", "311" or "auto"
keepalive_s = 60

[intervals]
update_s = 3600.0     # between checks for a new model
infer_s = 0.0         # between runs on the data; 0 = for each new model only
telemetry_s = 300.0
"""


def settings_text(*, url: str, name: str, application: str) -> str:
    quoted = {key: json.dumps(value) for key, value in {"url": url, "name": name, "application": application}.items()}
    return TEMPLATE.format(**quoted, grpc_port=DEFAULT_GRPC_PORT)
