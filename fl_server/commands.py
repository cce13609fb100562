"""``fieldfleet server ...``: make a home, run federations."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fl_core.contracts.cli import Subparsers, command, emit
from fl_core.contracts.errors import InputError
from fl_core.contracts.names import DEFAULT_MQTT_PORT, DEFAULT_SERVER_PORT
from fl_server.field_commands import add_field_commands
from fl_server.fleet_commands import add_fleet_commands, add_register
from fl_server.run_commands import add_run_commands, add_server_runs
from fl_server.telemetry_commands import add_telemetry_command

if TYPE_CHECKING:
    from fl_server.backup import Backup
    from fl_server.home import MqttSettings, ServerHome


def add_commands(subparsers: Subparsers) -> None:
    text = "the federation's server: its home, its devices, its runs"
    group: Any = subparsers.add_parser("server", help=text, description=text)
    actions = group.add_subparsers(dest="action", required=True, metavar="ACTION")
    _add_init(actions)
    add_register(actions)
    _add_account(actions)
    add_server_runs(actions)
    _add_backup(actions)
    add_field_commands(actions)
    fleet = add_fleet_commands(subparsers)
    add_telemetry_command(fleet)
    add_run_commands(subparsers)


def _add_init(actions: Subparsers) -> None:
    init = command(actions, "init", run_init, help="make a home: settings, CA, certificate, registry", config=False)
    init.add_argument("home", type=Path, metavar="HOME")
    init.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1; 0.0.0.0 = all)")
    init.add_argument("--port", type=int, default=DEFAULT_SERVER_PORT, help=f"default: {DEFAULT_SERVER_PORT}")
    init.add_argument("--name", action="append", default=[], help="DNS name or address that devices use; repeatable")
    init.add_argument("--fleet", default="fieldfleet", help="name of the fleet (default: fieldfleet)")
    init.add_argument("--mqtt", default="embedded", help="embedded (default), off, or HOST:PORT of your own broker")
    init.add_argument(
        "--metrics-port", type=int, default=0, help="serve /metrics, /healthz, /readyz there (default: 0 = off)"
    )
    init.add_argument("--metrics-host", default="127.0.0.1", help="address they listen on (default: loopback)")
    init.add_argument("--mqtt-port", type=int, default=DEFAULT_MQTT_PORT, help="port of the embedded broker")
    renew = command(actions, "renew", run_renew, help="issue a new server certificate from the home's CA", config=False)
    _home_option(renew)
    renew.add_argument("--name", action="append", default=[], help="a further DNS name or address; repeatable")


def _add_account(actions: Subparsers) -> None:
    account = command(actions, "account", run_account, help="a device's account at the MQTT broker", config=False)
    account.add_argument("name", metavar="NAME")
    account.add_argument("--out", type=Path, metavar="FILE", help="write it there (0600) instead of showing it")
    account.add_argument("--host", default="", help="the broker's name as the device reaches it")
    _home_option(account)


def _add_backup(actions: Subparsers) -> None:
    backup = command(actions, "backup", run_backup, help="copy a home, also of a running server", config=False)
    backup.add_argument("target", type=Path, metavar="DEST")
    _home_option(backup)
    restore = command(actions, "restore", run_restore, help="make a home from a backup", config=False)
    restore.add_argument("source", type=Path, metavar="BACKUP")
    restore.add_argument("home", type=Path, metavar="HOME")


def _home_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--home", required=True, type=Path, help="the server's home")


def run_init(args: argparse.Namespace) -> int:
    from fl_core.contracts import config as configuration
    from fl_server.home import ListenSettings, MetricsSettings, ServerSettings, create_home

    listen = {"host": args.host, "port": args.port, "names": args.name}
    settings = ServerSettings(
        fleet=args.fleet,
        listen=configuration.parse(ListenSettings, listen, origin="server init"),
        mqtt=_mqtt_settings(args.mqtt, args.mqtt_port),
        metrics=configuration.parse(
            MetricsSettings, {"host": args.metrics_host, "port": args.metrics_port}, origin="server init --metrics-port"
        ),
    )
    home = create_home(args.home, settings)
    _write_broker_files(home)
    document = {"home": str(home.path), "ca": str(home.ca_file), "certificate": str(home.certificate)}
    emit(args, document, f"{home.path}: ready. Devices come in by 'fieldfleet fleet token create'.")
    return 0


def _mqtt_settings(mode: str, port: int) -> MqttSettings:
    from fl_core.contracts import config as configuration
    from fl_server.home import MqttSettings

    table: dict[str, Any] = {"mode": mode, "port": port}
    if mode not in ("embedded", "off"):
        host, colon, number = mode.rpartition(":")
        if not colon or not host or not number.isdigit():
            raise InputError(f"--mqtt {mode!r} is not accepted", remedy="accepted: embedded, off, or HOST:PORT")
        table = {"mode": "external", "host": host.strip("[]"), "port": int(number)}
    return configuration.parse(MqttSettings, table, origin="server init --mqtt")


def run_renew(args: argparse.Namespace) -> int:
    from fl_server.home import ServerHome

    home = ServerHome(args.home)
    facts = home.renew(args.name)
    document = {"certificate": str(home.certificate), "not_after": facts.not_after.isoformat(), "hosts": facts.hosts}
    text = f"{home.certificate}: valid until {facts.not_after:%Y-%m-%d} for {', '.join(facts.hosts)}; a running server takes it in seconds"
    emit(args, document, text)
    return 0


def run_account(args: argparse.Namespace) -> int:
    """For a device that can reach nothing but the broker: 'agent account HOME FILE' takes the file."""
    from fl_core.storage import atomic
    from fl_server.field import device_account
    from fl_server.home import ServerHome

    home = ServerHome(args.home)
    registry = home.registry()
    try:
        document = {"broker": device_account(home, registry, args.name, host=args.host)}
    finally:
        registry.close()
    if args.out is None:
        print(json.dumps(document))
        return 0
    atomic.write_json(args.out, document, mode=0o600)
    emit(
        args, {"file": str(args.out), "name": args.name}, f"{args.out}: the account of {args.name}; hand it over safely"
    )
    return 0


def run_backup(args: argparse.Namespace) -> int:
    from fl_server import backup
    from fl_server.home import ServerHome

    made = backup.create(ServerHome(args.home), args.target)
    lines = [f"{made.path}: {made.files} files, {made.bytes:,} bytes, verified; holds private keys: keep it safe"]
    lines += [f"  not in it, outside the home: {folder}" for folder in made.outside]
    emit(args, _backup_facts(made), "\n".join(lines))
    return 0


def run_restore(args: argparse.Namespace) -> int:
    from fl_server import backup

    made = backup.restore(args.source, args.home)
    text = (
        f"{made.path}: as of {made.created}. Revoke again whom you revoked since; never run two servers of one fleet."
    )
    emit(args, _backup_facts(made), text)
    return 0


def _backup_facts(made: Backup) -> dict[str, Any]:
    return {
        "path": str(made.path),
        "created": made.created,
        "fleet": made.fleet,
        "files": made.files,
        "bytes": made.bytes,
        "outside": list(made.outside),
    }


def _write_broker_files(home: ServerHome) -> None:
    """An external mosquitto reads its accounts from files."""
    from fl_server.field import write_broker_files

    registry = home.registry()
    try:
        write_broker_files(home, registry)
    finally:
        registry.close()
