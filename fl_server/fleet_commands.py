"""``fieldfleet fleet ...``: the devices of a fleet, their enrolment, groups and tags."""

from __future__ import annotations

import argparse
import csv
import io
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fl_core.contracts.cli import Subparsers, command, emit
from fl_core.contracts.errors import DataError, FieldfleetError, InputError

if TYPE_CHECKING:
    from fl_server.home import ServerHome
    from fl_server.registry import Device, Registry
    from fl_server.tokens import Token

UNITS = {"s": 1, "m": 60, "h": 3_600, "d": 86_400}
CSV_COLUMNS = ("name", "public_key", "group", "tags")


def add_fleet_commands(subparsers: Subparsers) -> Subparsers:
    """Returns the group, for further commands of other modules."""
    text = "the fleet: devices, enrolment, groups and tags"
    group: Any = subparsers.add_parser("fleet", help=text, description=text)
    actions = group.add_subparsers(dest="action", required=True, metavar="ACTION")
    listing = _add(actions, "list", _list, "the devices of the fleet")
    listing.add_argument("--status", choices=("active", "pending", "revoked"), help="only these")
    listing.add_argument("--group", metavar="G", help="only this group")
    listing.add_argument("--tag", metavar="T", help="only with this tag")
    _add(actions, "show", _show, "one device: what is known of it and what happened to it").add_argument("name")
    add_register(actions)
    for name, run, text in (
        ("approve", _approve, "let enrolled devices take part"),
        ("revoke", _revoke, "refuse devices from now on, in mid-round too"),
        ("restore", _restore, "let revoked devices take part again"),
    ):
        _names(_add(actions, name, run, text))
    grouping = _add(actions, "group", _group, "put devices into a group")
    grouping.add_argument("group", metavar="GROUP", help="'' takes them out of theirs")
    _names(grouping)
    tagging = _add(actions, "tag", _tag, "change the tags of devices")
    _names(tagging)
    tagging.add_argument("--add", action="append", default=[], metavar="TAG")
    tagging.add_argument("--remove", action="append", default=[], metavar="TAG")
    importing = _add(actions, "import", _import, f"register devices of a CSV file: {', '.join(CSV_COLUMNS)}")
    importing.add_argument("file", type=Path, metavar="CSV")
    _add(actions, "export", _export, "the devices as CSV, to stdout; 'fleet import' reads it")
    _add_token(actions)
    return actions


def add_register(actions: Subparsers) -> None:
    """Also of ``fieldfleet server``, where it used to be."""
    register = _add(actions, "register", run_register, "let a device take part")
    register.add_argument("key", type=Path, metavar="KEY.pub", help="the device's public key (its keys/device.pub)")
    register.add_argument("--name", required=True, help="the device's name in the fleet")
    register.add_argument("--group", default="", metavar="G")
    register.add_argument("--tag", action="append", default=[], metavar="T")


def _add_token(actions: Subparsers) -> None:
    text = "enrolment tokens"
    group: Any = actions.add_parser("token", help=text, description=text)
    inner = group.add_subparsers(dest="token_action", required=True, metavar="ACTION")
    create = _add(inner, "create", _token_create, "a token for 'fieldfleet agent init HOME --token TOKEN'")
    create.add_argument("--uses", type=int, default=1, metavar="N", help="how many devices (default: 1)")
    create.add_argument("--expires", default="7d", metavar="T", help="such as 90m, 12h, 7d (default: 7d)")
    create.add_argument("--group", default="", metavar="G", help="that its devices belong to")
    create.add_argument("--auto-approve", action="store_true", help="its devices need no 'fleet approve'")
    create.add_argument("--url", default="", help="how devices reach the server (default: as in server.toml)")
    _add(inner, "list", _token_list, "the tokens, without their secrets")
    _add(inner, "withdraw", _token_withdraw, "let in nobody more by this token").add_argument("id")


def _add(actions: Subparsers, name: str, run: Any, help: str) -> argparse.ArgumentParser:
    parser = command(actions, name, run, help=help, config=False)
    parser.add_argument("--home", required=True, type=Path, help="the server's home")
    return parser


def _names(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("names", nargs="+", metavar="NAME")


@contextmanager
def opened(path: Path, *, changing: bool = False) -> Iterator[tuple[ServerHome, Registry]]:
    """A home and its registry. ``changing``: a running server and the broker's files are told afterwards."""
    from fl_server.control import ring_fleet
    from fl_server.field import write_broker_files
    from fl_server.home import ServerHome

    home = ServerHome(path)
    registry = home.registry()
    try:
        yield home, registry
        if changing:
            write_broker_files(home, registry)
            ring_fleet(home)
    finally:
        registry.close()


# devices


def _list(args: argparse.Namespace) -> int:
    with opened(args.home) as (home, registry):
        devices = [
            d
            for d in registry.devices()
            if args.status in (None, d.status)
            and args.group in (None, d.group)
            and (args.tag is None or args.tag in d.tags)
        ]
        said = _said(home)
        facts = [facts_of(d, said.get(d.name)) for d in devices]
    emit(args, {"fleet": home.settings.fleet, "devices": facts}, lambda: _print_devices(facts))
    return 0


def _print_devices(devices: list[dict[str, Any]]) -> None:
    for d in devices:
        version = str(d["version"] or "-")
        seen = _when(d["last_seen"])
        print(
            f"{d['name']:24} {d['status']:8} {d['presence']:7} {d['group'] or '-':12} {version:10} {seen:20} "
            f"{','.join(d['tags'])}".rstrip()
        )
    if not devices:
        print("no such device")


def facts_of(device: Device, said: dict[str, Any] | None = None) -> dict[str, Any]:
    """said: what the device last said over MQTT, see DeviceTable.devices."""
    state = (said or {}).get("state")
    state = state if isinstance(state, dict) else {}
    capabilities = state.get("capabilities")
    runtime = capabilities.get("runtime") if isinstance(capabilities, dict) else None
    version = runtime.get("fieldfleet") if isinstance(runtime, dict) else None
    return {
        "name": device.name,
        "status": device.status,
        "group": device.group,
        "tags": list(device.tags),
        "fingerprint": device.fingerprint,
        "registered_at": device.registered_at,
        "approved_at": device.approved_at.strip("-") or None,
        "revoked_at": device.revoked_at or None,
        "presence": "unknown" if said is None else ("alive" if said["alive"] else "away"),
        "last_seen": max(device.seen_at, said["last_seen"] if said else 0.0) or None,
        "version": version if isinstance(version, str) else None,
    }


def _said(home: ServerHome) -> dict[str, dict[str, Any]]:
    from fl_server.device_table import DATABASE_NAME, DeviceTable

    file = home.path / DATABASE_NAME
    if not file.exists():
        return {}
    table = DeviceTable(file)
    try:
        return {d["name"]: d for d in table.devices()}
    finally:
        table.close()


def _when(seconds: float | None) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds)) if seconds else "never seen"


def _show(args: argparse.Namespace) -> int:
    from fl_core.contracts.errors import unknown_name

    with opened(args.home) as (home, registry):
        device = registry.by_name(args.name)
        if device is None:
            raise unknown_name("device", args.name, [d.name for d in registry.devices()])
        said = _said(home).get(device.name)
        history = registry.happenings(device.name)
    document = {**facts_of(device, said), "state": said["state"] if said else None, "history": history}

    def show() -> None:
        for key, value in document.items():
            if key not in ("history", "state"):
                print(f"{key:14} {value if value not in (None, '', []) else '-'}")
        for entry in history:
            print(f"  {entry['time']}  {entry['what']} {entry['detail']}".rstrip())

    emit(args, document, show)
    return 0


def run_register(args: argparse.Namespace) -> int:
    from fl_core.identity import keys

    pem = keys.read_public_key(args.key)
    with opened(args.home, changing=True) as (_, registry):
        device = registry.register(args.name, pem, group=args.group, tags=args.tag)
    emit(args, facts_of(device), f"{device.name}: registered, key {device.fingerprint}")
    return 0


def _approve(args: argparse.Namespace) -> int:
    with opened(args.home, changing=True) as (_, registry):
        devices = registry.approve(args.names)
    return _changed(args, devices, "approved; it may take part at its next call")


def _revoke(args: argparse.Namespace) -> int:
    with opened(args.home, changing=True) as (_, registry):
        devices = registry.revoke_all(args.names)
    return _changed(args, devices, "revoked; a running server refuses it from now on")


def _restore(args: argparse.Namespace) -> int:
    with opened(args.home, changing=True) as (_, registry):
        devices = registry.restore(args.names)
    return _changed(args, devices, "may take part again")


def _group(args: argparse.Namespace) -> int:
    with opened(args.home, changing=True) as (_, registry):
        devices = registry.set_group(args.names, args.group)
    return _changed(args, devices, f"group {args.group or '-'}")


def _tag(args: argparse.Namespace) -> int:
    if not args.add and not args.remove:
        raise InputError("no tag is named", remedy="--add TAG or --remove TAG")
    with opened(args.home, changing=True) as (_, registry):
        devices = registry.change_tags(args.names, args.add, args.remove)
    return _changed(args, devices, "tags changed")


def _changed(args: argparse.Namespace, devices: list[Device], what: str) -> int:
    emit(args, {"devices": [facts_of(d) for d in devices]}, "\n".join(f"{d.name}: {what}" for d in devices))
    return 0


# CSV


def _import(args: argparse.Namespace) -> int:
    """All rows are checked before the first device is registered. public_key: a file beside the CSV, or a PEM."""
    from fl_core.contracts.names import checked_name
    from fl_core.identity import keys
    from fl_core.storage.tables import read_csv

    rows = read_csv(args.file, required=("name", "public_key"), limit_rows=1_000_000)
    found = []
    for number, row in enumerate(rows, 2):
        try:
            value = row["public_key"]
            pem = (
                keys.canonical_public_pem(value.encode(), origin="public_key")
                if value.startswith(("-----", "ecdsa-"))
                else keys.read_public_key(args.file.parent / value)
            )
            tags = [tag for tag in row.get("tags", "").split() if checked_name(tag, "tag")]
            group = row.get("group", "")
            found.append((checked_name(row["name"], "name"), pem, checked_name(group, "group") if group else "", tags))
        except FieldfleetError as error:
            raise DataError(f"{args.file}: line {number}: {error.message}", remedy=error.remedy) from None
    with opened(args.home, changing=True) as (_, registry):
        devices = registry.register_all(found, by=f"import {args.file.name}")
    return _changed(args, devices, "registered")


def _export(args: argparse.Namespace) -> int:
    with opened(args.home) as (_, registry):
        devices = registry.devices()
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*CSV_COLUMNS, "status"])
    for d in devices:
        writer.writerow([d.name, d.public_key_pem.decode("ascii"), d.group, " ".join(d.tags), d.status])
    emit(args, {"devices": [facts_of(d) for d in devices]}, lambda: print(text.getvalue(), end=""))
    return 0


# tokens


def seconds(text: str) -> float:
    """7d, 12h, 90m, 30s. Raises InputError."""
    match = re.fullmatch(r"(\d{1,6})([smhd])", text)
    if not match:
        raise InputError(f"--expires {text!r} is not a duration", remedy="such as 90m, 12h or 7d")
    return float(int(match[1]) * UNITS[match[2]])


def _token_create(args: argparse.Namespace) -> int:
    from fl_core.contracts.names import checked_name
    from fl_core.identity.token import EnrolmentToken, certificate_sha256

    if args.group:
        checked_name(args.group, "group")
    with opened(args.home) as (home, registry):
        url = args.url or home.public_url
        if not url.startswith("https://"):
            raise InputError(f"--url {url!r} is not an https:// address", remedy="write https://HOST:PORT")
        token, secret = registry.tokens.create(
            uses=args.uses, valid_s=seconds(args.expires), group=args.group, auto_approve=args.auto_approve
        )
        ca_sha256 = certificate_sha256(home.ca_file.read_bytes(), origin=str(home.ca_file))
    text = EnrolmentToken(url, ca_sha256, secret).text()
    emit(args, {**_token_facts(token), "url": url, "token": text}, text)
    return 0


def _token_list(args: argparse.Namespace) -> int:
    with opened(args.home) as (_, registry):
        tokens = registry.tokens.all()

    def show() -> None:
        for t in tokens:
            how = "approved at once" if t.auto_approve else "to be approved"
            print(f"{t.id}  {t.uses_left:6} uses left  until {_when(t.expires)}  group {t.group or '-'}  {how}")

    emit(args, {"tokens": [_token_facts(t) for t in tokens]}, show)
    return 0


def _token_withdraw(args: argparse.Namespace) -> int:
    with opened(args.home) as (_, registry):
        token = registry.tokens.withdraw(args.id)
    emit(args, _token_facts(token), f"{token.id}: withdrawn")
    return 0


def _token_facts(token: Token) -> dict[str, Any]:
    return {
        "id": token.id,
        "uses_left": token.uses_left,
        "expires": token.expires,
        "group": token.group,
        "auto_approve": token.auto_approve,
    }
