"""``fieldfleet agent``: init, run, status, roll-back. Light to import: the agent's process stays small."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fl_clients.edge.samples.commands import add_data_commands
from fl_core.contracts.cli import Subparsers, command, emit
from fl_core.contracts.errors import InputError
from fl_core.contracts.names import checked_name

if TYPE_CHECKING:
    from fl_core.identity.token import EnrolmentToken


def add_commands(subparsers: Subparsers) -> None:
    group = subparsers.add_parser(
        "agent", help="the agent on a device: its home, its life", description="The agent on a device."
    )
    inner = group.add_subparsers(dest="agent_command", required=True, metavar="COMMAND")
    init = command(inner, "init", run_init, help="make this device's home and its key", config=False)
    init.add_argument("home", type=Path, metavar="HOME")
    init.add_argument("--token", default="", help="what the operator gave you: enrols this device by itself")
    init.add_argument("--server", default="", metavar="URL", help="without a token: https://HOST:PORT of the server")
    init.add_argument("--ca", type=Path, metavar="FILE", help="without a token: the server's ca.pem")
    init.add_argument(
        "--transport",
        choices=("auto", "https", "mqtt"),
        default="auto",
        help="mqtt: through the broker alone, without --server (default: https, and the broker where that fails)",
    )
    init.add_argument(
        "--account", type=Path, metavar="FILE", help="this device's account at the broker, from 'server account NAME'"
    )
    init.add_argument(
        "--name", default="", help="of this device in the fleet (default with a token: this machine's name)"
    )
    init.add_argument(
        "--application", action="append", default=[], metavar="APP", help="that runs here; again for another one"
    )
    run = command(inner, "run", run_agent, help="take part: train, update, infer, report", config=False)
    run.add_argument("home", type=Path, metavar="HOME")
    run.add_argument(
        "--data",
        action="append",
        default=[],
        metavar="[APP=]DIR",
        help="this device's own data (default: as in agent.toml); with several applications, one folder in DIR for each",
    )
    run.add_argument("--once", action="store_true", help="update and infer once, then end")
    run.add_argument("--serve", type=int, metavar="PORT", help="serve other programs on this device over gRPC")
    run.add_argument("--no-train", action="store_true", help="take no part in federations")
    run.add_argument("--no-infer", action="store_true", help="do not run the model on this device's data")
    account = command(inner, "account", run_account, help="reach the server through the broker", config=False)
    account.add_argument("home", type=Path, metavar="HOME")
    account.add_argument("file", type=Path, metavar="FILE", help="made on the server by 'server account NAME'")
    status = command(inner, "status", run_status, help="this device, its agent and what waits", config=False)
    status.add_argument("home", type=Path, metavar="HOME")
    enable = command(
        inner, "enable-training", run_enable_training, help="forget that the worker kept crashing", config=False
    )
    enable.add_argument("home", type=Path, metavar="HOME")
    rotate = command(inner, "rotate-key", run_rotate_key, help="give this device a new key", config=False)
    rotate.add_argument("home", type=Path, metavar="HOME")
    add_data_commands(inner)
    back = command(inner, "roll-back", run_roll_back, help="return to the former model", config=False)
    back.add_argument("home", type=Path, metavar="HOME")
    back.add_argument("--application", default="", metavar="APP", help="whose model (needed where there are several)")


def run_init(args: argparse.Namespace) -> int:
    """The whole home or nothing: it appears only when key, settings and authority are in place, and it is enrolled."""
    from fl_clients.connection import ServerConnection
    from fl_clients.edge.broker_account import write_account
    from fl_clients.edge.home import SETTINGS_NAME, AgentHome
    from fl_clients.edge.settings import settings_text
    from fl_clients.enrolment import enrol
    from fl_core.identity import keys
    from fl_core.learning.application import application
    from fl_core.storage import atomic

    if args.home.exists() and (not args.home.is_dir() or any(args.home.iterdir())):
        raise InputError(f"{args.home}: exists and is not empty", remedy="name a new folder")
    account = _account(args.account) if args.account else None
    url, authority, token = _server_of(args)
    name = args.name or (_machine_name() if token else "")
    if name:
        checked_name(name, "--name")
    for application_name in args.application:
        application(application_name)
    enrolled = None
    with atomic.new_folder(args.home) as folder:
        folder.chmod(0o700)
        home = AgentHome(folder)
        key = keys.create_device_key(home.key_file)
        atomic.write_bytes(home.public_key_file, keys.public_pem(key))
        atomic.write_bytes(home.ca_file, authority)
        if account is not None:
            write_account(home.account_file, account)
        text = settings_text(url=url, name=name, applications=args.application, transport=args.transport)
        (folder / SETTINGS_NAME).write_text(text, encoding="utf-8")
        home.settings()
        if url:
            connection = ServerConnection(url, home.ca_file, key)
            if token is not None:
                enrolled = enrol(connection, token, key, name)
            connection.close()
    public = AgentHome(args.home).public_key_file
    facts: dict[str, Any] = {
        "home": str(args.home),
        "public_key": str(public),
        "fingerprint": keys.fingerprint(keys.public_pem(key)),
    }
    if enrolled is not None:
        facts |= {"name": enrolled.name, "fleet": enrolled.fleet, "status": enrolled.status}
        then = "it may work at once" if enrolled.status == "active" else "its operator approves it:"
        line = "" if enrolled.status == "active" else f"\n  fieldfleet fleet approve {enrolled.name} --home HOME"
        emit(args, facts, f"{args.home}: enrolled in {enrolled.fleet} as {enrolled.name}; {then}{line}")
        return 0
    line = f"fieldfleet fleet register {public.name} --name {args.name or 'NAME'} --home HOME"
    emit(
        args,
        {**facts, "register": line},
        f"{args.home}: made. Hand {public} to the server's operator, who runs:\n  {line}",
    )
    return 0


def _server_of(args: argparse.Namespace) -> tuple[str, bytes, EnrolmentToken | None]:
    """(URL, CA certificate, token) from --token, or from --server and --ca."""
    from fl_core.identity import ca

    if args.token:
        from fl_clients.enrolment import fetch_authority
        from fl_core.identity.token import read_token

        if args.server or args.ca or args.transport == "mqtt":
            raise InputError(
                "--token says where the server is, and needs to reach it",
                remedy="leave --server, --ca, --transport mqtt out",
            )
        token = read_token(args.token)
        return token.url, fetch_authority(token), token
    if args.transport == "mqtt" and args.server:
        raise InputError("--transport mqtt takes no --server", remedy="leave one of them out")
    url = args.server if "://" in args.server or not args.server else f"https://{args.server}"
    if args.ca is None or (not url and args.transport != "mqtt"):
        remedy = "give --token TOKEN, or --server https://HOST:PORT (or --transport mqtt) and --ca FILE"
        raise InputError("--server or --ca is missing", remedy=remedy)
    if url and not url.startswith("https://"):
        raise InputError(f"--server {args.server!r} is not an https:// address", remedy="write https://HOST:PORT")
    ca.load_certificate(args.ca)
    return url, args.ca.read_bytes(), None


def _machine_name() -> str:
    import re
    import socket

    return re.sub(r"[^A-Za-z0-9._-]", "-", socket.gethostname().partition(".")[0]).strip("-._")[:64] or "device"


def run_rotate_key(args: argparse.Namespace) -> int:
    from fl_clients.connection import open_transport
    from fl_clients.edge.home import AgentHome
    from fl_clients.enrolment import rotate_key, settle_rotation
    from fl_core.identity import keys

    home = AgentHome(args.home)
    settings = home.settings()
    with home.lock():  # an agent that runs would go on with the former key
        settle_rotation(home, settings)
        connection = open_transport(home, settings, keys.load_private_key(home.key_file))
        try:
            fingerprint = rotate_key(home, connection)
        finally:
            connection.close()
    emit(args, {"home": str(args.home), "fingerprint": fingerprint}, f"{args.home}: has a new key, {fingerprint}")
    return 0


def _account(file: Path) -> dict[str, Any]:
    from fl_clients.edge.broker_account import LIMIT, parse_account

    try:
        with file.open(encoding="utf-8") as stream:
            return parse_account(stream.read(LIMIT), origin=str(file))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: not readable: {error}") from None


def run_account(args: argparse.Namespace) -> int:
    """For a device whose key had to be registered before it could have an account."""
    from fl_clients.edge.broker_account import write_account
    from fl_clients.edge.home import AgentHome

    home = AgentHome(args.home)
    home.settings()
    account = _account(args.file)
    write_account(home.account_file, account)
    facts = {"home": str(args.home), "broker": f"{account['host']}:{account['port']}", "name": account["username"]}
    emit(args, facts, f"{home.account_file}: written; remove {args.file}, it holds a password")
    return 0


def run_agent(args: argparse.Namespace) -> int:
    from fl_clients.edge.home import AgentHome
    from fl_clients.edge.layout import migrate
    from fl_clients.edge.shell import Agent, RunOptions
    from fl_clients.enrolment import settle_rotation
    from fl_core.contracts.installed import application_version, known_applications

    home = AgentHome(args.home)
    settings = home.settings()
    for name in settings.device.names:
        if application_version(name) is None:
            raise InputError(
                f"{home.settings_file}: application {name!r} is not installed here",
                remedy=f"installed: {', '.join(known_applications())}",
            )
    if args.serve is not None and not 0 <= args.serve <= 65535:
        raise InputError(f"--serve {args.serve}: not a port", remedy="accepted: 0 (any free one) to 65535")
    port = args.serve if args.serve is not None else (settings.grpc.port if settings.roles.serve else None)
    options = RunOptions(
        data=home.data_folders(settings, args.data),
        train=settings.roles.train and not args.no_train,
        infer=settings.roles.infer and not args.no_infer,
        serve_port=port,
        once=args.once,
    )
    with home.lock():
        migrate(home, settings)
        settle_rotation(home, settings)
        agent = Agent(home, settings, options)
        try:
            agent.run()
            facts = {"name": agent.name, "fleet": agent.fleet, **agent.facts()}
        finally:
            agent.close()
    emit(args, facts, lambda: None if not args.once else print(_in_words(facts)))
    return 0


def _in_words(facts: dict[str, Any]) -> str:
    models = [model for model in facts["models"].values() if model]
    versions = ", ".join(f"{model['application']} version {model['version']}" for model in models) or "no model"
    inference = facts["inference"]
    done = f"; {inference['num_examples']} examples, {inference['latency_ms_p50']} ms each" if inference else ""
    return f"{facts['name']}: {versions}{done}"


def run_status(args: argparse.Namespace) -> int:
    from fl_clients.edge.home import AgentHome
    from fl_clients.edge.status import in_words, status_document

    document = status_document(AgentHome(args.home))
    emit(args, document, lambda: print(in_words(document)))
    return 0


def run_enable_training(args: argparse.Namespace) -> int:
    from fl_clients.edge.home import AgentHome
    from fl_clients.edge.operator import ask

    home = AgentHome(args.home)
    home.settings()
    if ask(home, "enable-training") is None:
        with home.lock():
            (home.fleet / "breaker.json").unlink(missing_ok=True)
    emit(args, {"home": str(args.home)}, f"{args.home}: trains again when it is asked")
    return 0


def run_roll_back(args: argparse.Namespace) -> int:
    from fl_clients.edge.home import AgentHome
    from fl_clients.edge.slots import roll_back

    home = AgentHome(args.home)
    names = home.settings().device.names
    if args.application not in names and (args.application or len(names) != 1):
        raise InputError(
            f"{args.home}: --application {args.application or 'is missing'}", remedy=f"one of: {', '.join(names)}"
        )
    name = args.application or names[0]
    state = roll_back(home.application(name).folder)
    emit(
        args,
        {"home": str(args.home), "application": name, "version": state.version},
        f"{args.home}: {name} runs version {state.version} again; the agent picks it up at its next inference",
    )
    return 0
