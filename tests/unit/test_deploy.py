"""The examples in deploy/ call commands that exist, with options that exist, and give away no more than they need."""

from __future__ import annotations

import configparser
import re
import shlex
from pathlib import Path

import pytest
import yaml

from fieldfleet.__main__ import build_parser
from tests.helpers import ROOT

DEPLOY = ROOT / "deploy"
HARDENED = {"NoNewPrivileges": "yes", "ProtectSystem": "strict", "ProtectHome": "yes", "CapabilityBoundingSet": ""}


def unit(name: str) -> configparser.ConfigParser:
    parser = configparser.ConfigParser(strict=True, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read(DEPLOY / name)
    return parser


@pytest.mark.parametrize("name", ["fieldfleet-server.service", "fieldfleet-agent.service"])
def test_units(name: str) -> None:
    service = unit(name)["Service"]
    program, *words = shlex.split(service["ExecStart"])
    assert program.endswith("/fieldfleet")
    args = build_parser().parse_args(words)
    assert str(args.home).startswith(f"/var/lib/{service['StateDirectory']}/")
    assert service["Restart"] == "always"
    assert {key: service[key] for key in HARDENED} == HARDENED


def test_compose() -> None:
    services = yaml.safe_load((DEPLOY / "docker-compose.yml").read_text())["services"]
    args = build_parser().parse_args(services["server"]["command"])
    assert str(args.home) == "/var/lib/fieldfleet/server"
    for service in services.values():
        assert service["cap_drop"] == ["ALL"]
        assert service["read_only"] is True
    ports = [port for service in services.values() for port in service["ports"]]
    assert ports == ["8433:8433", "127.0.0.1:9464:9464", "8883:8883"], "metrics are not for the network"
    shared = [v.split(":", 2)[-1] for v in services["mosquitto"]["volumes"]]
    assert not any("/ca" in v or v.endswith("/server") for v in shared), (
        "the authority's key is none of the broker's business"
    )


def test_commands_of_the_guide_parse() -> None:
    text = (DEPLOY / "README.md").read_text().replace("\\\n", " ")
    found = re.findall(
        r"(?:bin/fieldfleet|\bfieldfleet:local|server fieldfleet|    fieldfleet) +((?:server|fleet) [^#\n]+)", text
    )
    assert len(found) >= 5
    for line in found:
        words = [Path(w).name if w.startswith("$(") else w for w in shlex.split(line.replace("$(date +%F)", "today"))]
        build_parser().parse_args(words)


def test_the_image_installs_what_the_server_needs() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    assert "ARG EXTRA=server" in text
    assert "USER fieldfleet" in text
    entry = re.search(r"^CMD (\[.*\])$", text, re.M)
    assert entry
    build_parser().parse_args(yaml.safe_load(entry[1]))
