"""``server status`` and ``server command``: what devices say over MQTT, and jobs for one of them."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fl_core.contracts.cli import Subparsers, command, emit
from fl_core.contracts.errors import InputError, RefusedError, unknown_name

if TYPE_CHECKING:
    from fl_server.home import ServerHome

COMMANDS = ("ping", "update", "infer", "report", "enable-training")
BODY_LIMIT = 32_768


def add_field_commands(subparsers: Subparsers) -> None:
    status = command(subparsers, "status", _status, help="the devices and what they last said", config=False)
    status.add_argument("--home", required=True, type=Path, help="the server's home")
    order = command(
        subparsers, "command", _command, help="ask one device for something and print its reply", config=False
    )
    order.add_argument("device", metavar="NAME")
    order.add_argument("type", metavar="TYPE", help=", ".join(COMMANDS))
    order.add_argument("--home", required=True, type=Path, help="the server's home")
    order.add_argument("--application", default="", metavar="APP", help="only this one, on a device with several")
    order.add_argument("--body", default="{}", help="a JSON object that goes with the command")
    order.add_argument("--timeout", type=float, default=30.0, help="seconds to wait for the reply (default: 30)")


def _status(args: argparse.Namespace) -> int:
    from fl_server.device_table import DATABASE_NAME, DeviceTable

    home = _home_with_mqtt(args.home)
    reachable, why = _broker_answers(home)
    file = home.path / DATABASE_NAME
    devices: list[dict[str, Any]] = []
    if file.exists():
        table = DeviceTable(file)
        devices = table.devices()
        table.close()
    registry = home.registry()
    known = {d.name for d in registry.devices() if d.active}
    registry.close()
    silent = sorted(known - {d["name"] for d in devices})
    for device in devices:
        device["alive"] = device["alive"] and reachable
    document = {"fleet": home.settings.fleet, "broker": reachable, "devices": devices, "never_seen": silent}
    emit(args, document, lambda: _print_status(document, why))
    return 0 if reachable else int(RefusedError.exit_code)


def _print_status(document: dict[str, Any], why: str) -> None:
    import time

    print(f"fleet {document['fleet']}: broker {'answers' if document['broker'] else f'does not answer ({why})'}")
    for device in document["devices"]:
        state = device["state"]
        seen = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(device["last_seen"]))
        print(f"  {device['name']:24} {'alive' if device['alive'] else 'away ':6} last seen {seen}, {_models(state)}")
    for name in document["never_seen"]:
        print(f"  {name:24} registered, never seen")


def _models(state: dict[str, Any]) -> str:
    models = state.get("models")
    if not isinstance(models, dict) or not any(isinstance(model, dict) for model in models.values()):
        return "no model"
    return ", ".join(f"{name} {model.get('version')}" for name, model in models.items() if isinstance(model, dict))


def _command(args: argparse.Namespace) -> int:
    from fl_core.link.topics import OPERATOR_ACCOUNT
    from fl_server.bridge import ask
    from fl_server.field import service_address

    home = _home_with_mqtt(args.home)
    if args.type not in COMMANDS:
        raise unknown_name("command", args.type, list(COMMANDS))
    registry = home.registry()
    known = {d.name: d.public_key_pem for d in registry.devices() if d.active}
    registry.close()
    if args.device not in known:
        raise unknown_name("device", args.device, list(known))
    key = known[args.device]
    body = _body(args.body)
    if args.application:
        body["application"] = args.application
    with _one_operator(home):
        address = service_address(home, OPERATOR_ACCOUNT)
        gate = home.gate(lambda name: key if name == args.device else None)
        reply = ask(address, home.settings.fleet, args.device, args.type, body, timeout=args.timeout, gate=gate)
    emit(args, {"device": args.device, "type": args.type, "reply": reply}, json.dumps(reply, indent=2, sort_keys=True))
    return 0 if reply.get("ok") is True else 1


def _body(text: str) -> dict[str, Any]:
    try:
        table = json.loads(text) if len(text) <= BODY_LIMIT else None
    except (ValueError, RecursionError):
        table = None
    if not isinstance(table, dict):
        raise InputError("--body is not a JSON object", remedy=f"at most {BODY_LIMIT:,} characters, such as '{{}}'")
    return table


def _home_with_mqtt(path: Path) -> ServerHome:
    from fl_server.home import ServerHome

    home = ServerHome(path)
    if home.settings.mqtt.mode == "off":
        raise InputError(
            f"{path}: MQTT is switched off in server.toml", remedy='[mqtt] mode = "embedded" or "external"'
        )
    return home


def _broker_answers(home: ServerHome) -> tuple[bool, str]:
    from fl_core.link.session import MqttSession
    from fl_core.link.topics import OPERATOR_ACCOUNT
    from fl_server.field import service_address

    with _one_operator(home):
        session = MqttSession(service_address(home, OPERATOR_ACCOUNT))
        session.start()
        answers = session.wait_connected(3.0)
        why = session.failure
        session.stop()
    return answers, why


@contextmanager
def _one_operator(home: ServerHome) -> Iterator[None]:
    """A broker that takes the account's name as the client id keeps one connection of it: operators take turns."""
    import fcntl
    import os

    handle = os.open(home.broker_folder / ".operator", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
