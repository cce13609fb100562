"""``fieldfleet doctor``: what this machine can do, and for each thing that is amiss a remedy."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from fl_core.contracts.cli import Subparsers, command, emit
from fl_core.contracts.errors import ExitCode, FieldfleetError, InputError
from fl_core.contracts.names import DATA_ENVIRONMENT_VARIABLE, DEFAULT_GRPC_PORT, DEFAULT_MQTT_PORT, DEFAULT_SERVER_PORT

OK, NOTE, FAULT = "ok", "note", "fault"
EARLIEST_CLOCK = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
PACKAGES: dict[str, dict[str, tuple[int, ...]]] = {
    "edge": {
        "onnxruntime": (1, 20),
        "paho-mqtt": (2, 1),
        "grpcio": (1, 66),
        "protobuf": (5, 28),
        "tuf": (6,),
        "pillow": (10,),
    },
    "train": {"torch": (2, 13)},
    "server": {"flwr": (1, 41), "amqtt": (0, 11), "uvicorn": (0, 30)},
    "export": {"onnx": (1, 17), "onnxscript": (0, 5)},
    "report": {"matplotlib": (3, 9)},
}
BELOW: dict[str, tuple[int, ...]] = {"flwr": (1, 42), "protobuf": (7,), "paho-mqtt": (3,), "amqtt": (0, 12)}
MIN_FREE_GB = 1.0
DIAL_SECONDS = 3.0


@dataclass(frozen=True)
class Finding:
    """state: ok, note (something is not there, which may be as wanted) or fault (it will fail)."""

    check: str
    state: str
    detail: str
    remedy: str = ""


def add_commands(subparsers: Subparsers) -> None:
    parser = command(
        subparsers,
        "doctor",
        run_doctor,
        help="check installation, ports, certificates, clock, broker, processor",
        config=False,
    )
    parser.add_argument("--home", type=Path, metavar="HOME", help="also check this server's or agent's home")
    parser.add_argument(
        "--run",
        type=Path,
        metavar="DIR",
        dest="measured",
        help="name the bottleneck in what 'scaling' or 'profile' left there",
    )


def run_doctor(args: argparse.Namespace) -> int:
    findings = [*installation(), *processor(), *disk(), *clock(), *data()]
    if args.measured is not None:
        from fieldfleet.bottlenecks import bottlenecks

        findings += bottlenecks(args.measured)
    if args.home is None:
        findings += [
            *ports(
                {
                    "server": DEFAULT_SERVER_PORT,
                    "MQTT broker": DEFAULT_MQTT_PORT,
                    "inference service": DEFAULT_GRPC_PORT,
                }
            )
        ]
        findings += broker_program()
    elif (args.home / "server.toml").is_file():
        findings += server_home(args.home)
    elif (args.home / "agent.toml").is_file():
        findings += agent_home(args.home)
    else:
        raise InputError(
            f"--home {args.home}: holds neither server.toml nor agent.toml",
            remedy="make one with 'fieldfleet server init' or 'fieldfleet agent init'",
        )
    faults = sum(f.state == FAULT for f in findings)
    emit(args, {"faults": faults, "findings": [asdict(f) for f in findings]}, lambda: print_findings(findings))
    return ExitCode.ENVIRONMENT if faults else ExitCode.DONE


def installation() -> Iterator[Finding]:
    version = sys.version_info
    yield Finding(
        "Python",
        OK if version >= (3, 11) else FAULT,
        platform.python_version(),
        "" if version >= (3, 11) else "install Python 3.11 or newer",
    )
    for extra, packages in PACKAGES.items():
        for name, lowest in packages.items():
            yield package(extra, name, lowest)


def package(extra: str, name: str, lowest: tuple[int, ...]) -> Finding:
    install = f"pip install 'fieldfleet[{extra}]'"
    try:
        found = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, NOTE, f"not installed (extra {extra})", install)
    number = tuple(int(part) for part in found.split("+")[0].split(".")[:3] if part.isdigit())
    if number < lowest:
        return Finding(name, FAULT, f"{found} is older than {'.'.join(map(str, lowest))}", install)
    if name in BELOW and number >= BELOW[name]:
        return Finding(name, FAULT, f"{found} is not supported, below {'.'.join(map(str, BELOW[name]))} is", install)
    return Finding(name, OK, found)


def processor() -> Iterator[Finding]:
    from fl_core.runtime.machine import cpu_flags, local_target

    flags = cpu_flags()
    fast = {"avx512_vnni", "avx_vnni", "asimddp", "amx_int8"} & set(flags)
    detail = f"{os.cpu_count()} cores, edge target {local_target()}, {' '.join(flags) or 'no vector flags known'}"
    yield Finding(
        "processor",
        OK if fast else NOTE,
        detail,
        "" if fast else "int8 models run without dot-product instructions here: compare with fp32",
    )
    if "torch" in sys.modules or importlib.util.find_spec("torch"):
        import torch

        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        yield Finding(
            "GPU", OK if count else NOTE, f"{count} CUDA devices", "" if count else "training runs on the processor"
        )


def disk() -> Iterator[Finding]:
    free = shutil.disk_usage(Path.cwd()).free / 1e9
    yield Finding(
        "disk",
        OK if free >= MIN_FREE_GB else FAULT,
        f"{free:.1f} GB free here",
        "" if free >= MIN_FREE_GB else "make room: checkpoints and stores need space to be written safely",
    )


def clock() -> Iterator[Finding]:
    now = datetime.datetime.now(datetime.UTC)
    good = now >= EARLIEST_CLOCK
    yield Finding(
        "clock",
        OK if good else FAULT,
        f"{now:%Y-%m-%d %H:%M:%S} UTC",
        "" if good else "set the clock: certificates and signed metadata are checked against it",
    )


def data() -> Iterator[Finding]:
    root = os.environ.get(DATA_ENVIRONMENT_VARIABLE)
    if not root:
        yield Finding(
            "data",
            NOTE,
            f"{DATA_ENVIRONMENT_VARIABLE} is not set",
            "generated data is used unless --data names a folder",
        )
    elif not Path(root).is_dir():
        yield Finding(
            "data",
            FAULT,
            f"{DATA_ENVIRONMENT_VARIABLE}={root}: no such folder",
            "unset it, or name a folder of data sets",
        )
    else:
        yield Finding(
            "data", OK, f"{root}: {', '.join(sorted(p.name for p in Path(root).iterdir() if p.is_dir())) or 'empty'}"
        )


def ports(wanted: dict[str, int], host: str = "127.0.0.1") -> Iterator[Finding]:
    for what, port in wanted.items():
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
                yield Finding(f"port {port}", OK, f"free for the {what}")
            except OSError as error:
                yield Finding(
                    f"port {port}",
                    NOTE,
                    f"{what}: {error.strerror}",
                    "something runs there already; give --port another number if it is not fieldfleet",
                )


def broker_program() -> Iterator[Finding]:
    found = shutil.which("mosquitto", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
    yield Finding(
        "mosquitto",
        OK if found else NOTE,
        found or "not installed",
        "" if found else "the embedded broker serves small fleets; install mosquitto for large ones",
    )


def server_home(path: Path) -> Iterator[Finding]:
    from fl_server.home import ServerHome

    home = None
    try:
        home = ServerHome(path)
        facts = home.check()
        yield Finding(
            "certificate",
            OK,
            f"{home.certificate}: valid until {facts.not_after:%Y-%m-%d}, names {', '.join(facts.hosts)}",
        )
    except FieldfleetError as error:
        yield Finding("certificate", FAULT, error.message, error.remedy)
    if home is None:
        return
    settings = home.settings
    yield from ports({"server": settings.listen.port}, settings.listen.host)
    if settings.mqtt.mode == "embedded":
        yield from ports({"MQTT broker": settings.mqtt.port}, settings.mqtt.host or settings.listen.host)
    elif settings.mqtt.mode == "external":
        yield dial(
            "MQTT broker", settings.mqtt.host, settings.mqtt.port, "start the broker, or correct [mqtt] in server.toml"
        )
    if settings.metrics.port:
        yield from ports({"metrics": settings.metrics.port}, settings.metrics.host)
    for key in (path / "ca" / "ca.key", home.certificate_key):
        yield private_file(key)


def agent_home(path: Path) -> Iterator[Finding]:
    from urllib.parse import urlsplit

    from fl_clients.edge.home import AgentHome
    from fl_core.identity.ca import check_certificate

    home = AgentHome(path)

    def settings() -> Finding:
        found = home.settings().server
        url = urlsplit(found.url)
        if not url.hostname:
            return Finding("server", OK, "reached through the MQTT broker alone")
        return dial("server", url.hostname or "", url.port or 443, "is the server running, and its port open?")

    def authority() -> Finding:
        facts = check_certificate(home.ca_file, remedy="ask the server's operator for a new ca.pem")
        return Finding("certificate", OK, f"{home.ca_file}: valid until {facts.not_after:%Y-%m-%d}")

    yield attempt("server", settings)
    yield attempt("certificate", authority)
    yield private_file(home.key_file)
    if home.welcome_file.is_file():
        from fl_clients.edge.welcome import stored_welcome

        welcome = stored_welcome(home)
        if welcome and welcome.mqtt:
            yield dial(
                "MQTT broker",
                str(welcome.mqtt["host"]),
                int(welcome.mqtt["port"]),
                "is the broker running, and its port open?",
            )
    else:
        yield Finding(
            "registration",
            NOTE,
            "this device was not welcomed yet",
            f"on the server: fieldfleet fleet register {home.public_key_file} --name NAME",
        )


def attempt(check: str, finding: Callable[[], Finding]) -> Finding:
    try:
        return finding()
    except FieldfleetError as error:
        return Finding(check, FAULT, error.message, error.remedy)


def dial(check: str, host: str, port: int, remedy: str) -> Finding:
    try:
        socket.create_connection((host, port), DIAL_SECONDS).close()
    except OSError as error:
        return Finding(check, FAULT, f"{host}:{port}: {error.strerror or error}", remedy)
    return Finding(check, OK, f"{host}:{port} answers")


def private_file(path: Path) -> Finding:
    if not path.is_file():
        return Finding(path.name, FAULT, f"{path}: no such file", "restore it, or make a new home")
    mode = path.stat().st_mode & 0o777
    good = not mode & 0o077
    return Finding(path.name, OK if good else FAULT, f"{path}: mode {mode:o}", "" if good else f"chmod 600 {path}")


def print_findings(findings: list[Finding]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title="fieldfleet doctor", show_lines=False)
    for heading in ("check", "", "found", "remedy"):
        table.add_column(heading, overflow="fold")
    colours = {OK: "green", NOTE: "yellow", FAULT: "red"}
    for f in findings:
        table.add_row(f.check, f"[{colours[f.state]}]{f.state}", escape(f.detail), escape(f.remedy))
    Console().print(table)
