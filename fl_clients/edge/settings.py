"""agent.toml: what the owner of a device decides."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fl_clients.edge.device_state import StateSettings
from fl_clients.edge.policy import PolicySettings
from fl_core.contracts import config
from fl_core.contracts.errors import ConfigError
from fl_core.contracts.names import DEFAULT_GRPC_PORT, NAME_PATTERN


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """auto: HTTPS, and through the broker where that does not get through. mqtt: through the broker alone."""

    url: str = config.text("", help='https://HOST:PORT; empty only with transport = "mqtt"')
    transport: str = config.choice("auto", "auto", "https", "mqtt")

    def __post_init__(self) -> None:
        if not self.url.startswith("https://") and (self.url or self.transport != "mqtt"):
            raise ConfigError(f"server.url = {self.url!r} is not an https:// address", remedy="write https://HOST:PORT")


@dataclass(frozen=True, kw_only=True)
class DeviceSettings:
    name: str = config.text("", help="a hint for the operator; the registered name counts")
    applications: tuple[str, ...] = config.sequence((), help="that run here; empty = train any installed one")
    application: str = config.text("", help="the older form of a single one")
    channel: str = config.text("stable", help="of the signed repository")
    data: str = config.text("data", help="folder of this device's own data, relative to agent.toml")

    def __post_init__(self) -> None:
        _usable(self.channel, "device.channel")
        for name in self.names:
            _usable(name, "device.applications")
        if self.application and self.applications and self.application not in self.applications:
            raise ConfigError(
                "device.application and device.applications contradict each other", remedy="keep device.applications"
            )
        if len(set(self.applications)) != len(self.applications):
            raise ConfigError("device.applications names one of them twice")

    @property
    def names(self) -> tuple[str, ...]:
        """The applications that run here; empty: none infers, any installed one may train."""
        return self.applications or ((self.application,) if self.application else ())


@dataclass(frozen=True, kw_only=True)
class ApplicationSettings:
    """``[applications.NAME]``: what differs for one application. Empty = as in [device], or as the machine is."""

    channel: str = config.text("", help="of the signed repository")
    target: str = config.text("", help="edge target of its models")
    data: str = config.text("", help="folder of its data, relative to agent.toml")

    def __post_init__(self) -> None:
        for key in ("channel", "target"):
            if value := getattr(self, key):
                _usable(value, key)


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
class InferenceSettings:
    idle_s: float = config.number(
        300.0, low=0.0, high=30 * 86_400.0, help="a model leaves memory so long after its last use; 0 = never"
    )
    threads: int = config.number(1, low=1, high=256)


@dataclass(frozen=True, kw_only=True)
class MqttSettings:
    enabled: bool = config.flag(True)
    protocol: str = config.choice("auto", "auto", "5", "311")
    keepalive_s: int = config.number(120, low=5, high=3_600)


@dataclass(frozen=True, kw_only=True)
class OutboxSettings:
    """What waits for the server on this device's disk."""

    max_mb: float = config.number(16.0, low=0.1, high=100_000.0, help="the oldest telemetry goes first")
    max_days: float = config.number(30.0, low=0.01, high=3_650.0, help="what is older is dropped, and counted")
    hold_s: float = config.number(
        3_600.0, low=0.0, high=86_400.0, help="telemetry waits so long to be sent with more of it"
    )

    @property
    def bytes(self) -> int:
        return int(self.max_mb * 2**20)

    @property
    def seconds(self) -> float:
        return self.max_days * 86_400.0


@dataclass(frozen=True, kw_only=True)
class SampleSettings:
    """``[samples]``: this device's data come one by one; instead of the folder of whole data sets."""

    enabled: bool = config.flag(False, help="take samples from the inbox, MQTT and programs on this device")
    inbox: str = config.text("", help="folder of files to take, relative to agent.toml; empty = samples/inbox")
    settle_s: float = config.number(2.0, low=0.0, high=3_600.0, help="a file must not have changed for so long")
    poll_s: float = config.number(5.0, low=0.1, high=3_600.0, help="between two looks at the inbox")
    max_mb: float = config.number(1_024.0, low=0.01, high=1e7, help="the oldest samples go first")
    max_samples: int = config.number(100_000, low=1, high=10_000_000)
    max_days: float = config.number(90.0, low=0.001, high=36_500.0, help="older samples are deleted")
    mqtt_topics: tuple[str, ...] = config.sequence(
        (), help="of a broker on this device: samples and labels of other programs"
    )
    mqtt_application: str = config.text("", help="whose samples they are; needed where there are several")
    mqtt_host: str = config.text("127.0.0.1")
    mqtt_port: int = config.number(1883, low=1, high=65_535)
    mqtt_username: str = config.text("")
    mqtt_password_file: str = config.text("", help="relative to agent.toml")


@dataclass(frozen=True, kw_only=True)
class IntervalSettings:
    update_s: float = config.number(3_600.0, low=1.0, high=30 * 86_400.0, help="between checks for a new model")
    infer_s: float = config.number(0.0, low=0.0, high=30 * 86_400.0, help="between runs; 0 = for each new model only")
    telemetry_s: float = config.number(1_800.0, low=1.0, high=86_400.0)


@dataclass(frozen=True, kw_only=True)
class AgentSettings:
    server: ServerSettings
    device: DeviceSettings = field(default_factory=DeviceSettings)
    roles: RoleSettings = field(default_factory=RoleSettings)
    inference: InferenceSettings = field(default_factory=InferenceSettings)
    grpc: GrpcSettings = field(default_factory=GrpcSettings)
    mqtt: MqttSettings = field(default_factory=MqttSettings)
    outbox: OutboxSettings = field(default_factory=OutboxSettings)
    samples: SampleSettings = field(default_factory=SampleSettings)
    state: StateSettings = field(default_factory=StateSettings)
    policy: PolicySettings = field(default_factory=PolicySettings)
    intervals: IntervalSettings = field(default_factory=IntervalSettings)
    applications: Mapping[str, ApplicationSettings] = field(default_factory=dict)

    def of(self, application: str) -> ApplicationSettings:
        """Its own settings, with the device's channel where it names none."""
        found = self.applications.get(application, ApplicationSettings())
        return found if found.channel else replace(found, channel=self.device.channel)


def read_settings(file: Path) -> AgentSettings:
    """Raises ConfigError naming the file and the key."""
    origin = str(file)
    table = config.read_toml(file)
    if "server" not in table:
        raise ConfigError(f"{origin}: section 'server' is missing", remedy='[server] url = "https://HOST:PORT"')
    try:
        own = _application_settings(table.pop("applications", {}), origin)
        found = replace(config.parse(AgentSettings, table, origin=origin), applications=own)
        _check_samples(found, origin)
        if odd := sorted(set(own) - set(found.device.names)):
            raise ConfigError(
                f"{origin}: [applications.{odd[0]}] is for no application of this device",
                remedy=f"device.applications: {', '.join(found.device.names) or 'empty'}",
            )
        return found
    except ConfigError as error:
        if error.message.startswith(origin):
            raise
        raise ConfigError(f"{origin}: {error.message}", remedy=error.remedy) from None


def _check_samples(found: AgentSettings, origin: str) -> None:
    samples, names = found.samples, found.device.names
    if samples.enabled and not names:
        raise ConfigError(f"{origin}: samples.enabled needs device.applications", remedy="name the applications")
    if samples.mqtt_topics and samples.mqtt_application not in (*names, *([""] if len(names) == 1 else [])):
        raise ConfigError(
            f"{origin}: samples.mqtt_application = {samples.mqtt_application!r}", remedy=f"one of: {', '.join(names)}"
        )


def _application_settings(table: Any, origin: str) -> dict[str, ApplicationSettings]:
    if not isinstance(table, dict) or not all(isinstance(own, dict) for own in table.values()):
        raise ConfigError(f"{origin}: 'applications' must hold sections", remedy="write [applications.NAME]")
    return {
        name: config.parse(ApplicationSettings, own, origin=origin, prefix=f"applications.{name}.")
        for name, own in table.items()
    }


def _usable(name: str, key: str) -> None:
    if not NAME_PATTERN.fullmatch(name):
        raise ConfigError(f"{key} = {name!r} is not usable as a name")


TEMPLATE = """\
# This device's own settings. The server cannot change them.
[server]
url = {url}
transport = {transport}  # "https", "mqtt" (through the broker alone) or "auto": https, and the broker where that fails

[device]
name = {name}
applications = {applications}  # that run here; [] = train any installed one, infer none
channel = "stable"
data = "data"  # folder of this device's own data; relative to this file; with several applications, one folder in it for each

# [applications.NAME]  # what differs for one of them: channel, target, data

[roles]
train = true   # where torch and flwr are installed
infer = true
serve = false  # gRPC for other programs on this device

[inference]
idle_s = 300.0  # a model leaves memory so long after its last use; 0 = never
threads = 1

[grpc]
host = "127.0.0.1"
port = {grpc_port}

[mqtt]
enabled = true
protocol = "auto"  # "5", "311" or "auto"
keepalive_s = 120

[outbox]  # what waits for the server on this device's disk
max_mb = 16.0
max_days = 30.0
hold_s = 3600.0  # telemetry waits so long to be sent with more of it

[samples]  # data that come one by one, instead of the folder above
enabled = false
inbox = ""      # files of samples and labels; "" = applications/NAME/samples/inbox
max_mb = 1024.0
max_days = 90.0

[state]  # what the server hears of this device, beside what it finds out: battery, network, temperature, storage
group = ""
tags = []         # such as "front-camera"
power = "auto"    # "mains": no battery, always supplied
metered = "auto"  # "yes", "no"; auto: a cellular network is
file = ""         # JSON that the vehicle's own software keeps current

[policy]  # when this device trains
train_min_battery = 0.0        # from 0 to 1
train_require_charging = false
train_max_temperature_c = 0.0  # 0 = no bound
train_on_metered = true
quiet_hours = ""               # no training then, local time: "22:00-06:00"
max_train_s_per_day = 0.0      # 0 = no bound
wait_s = 60.0                  # a message that may not be trained now waits so long, then it is refused
pause_s = 300.0                # paused training waits so long to go on, then it is given up
worker_memory_mb = 0           # of the training process; 0 = no bound
worker_nice = 5                # 0 to 19: how far training stands behind other programs

[intervals]
update_s = 3600.0     # between checks for a new model; fewer while the server tells of new ones
infer_s = 0.0         # between runs on the data; 0 = for each new model only
telemetry_s = 1800.0
"""


def settings_text(*, url: str, name: str, applications: Sequence[str], transport: str = "auto") -> str:
    values = {"url": url, "name": name, "applications": list(applications), "transport": transport}
    quoted = {key: json.dumps(value) for key, value in values.items()}
    return TEMPLATE.format(**quoted, grpc_port=DEFAULT_GRPC_PORT)
