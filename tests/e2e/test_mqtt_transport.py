"""Two devices that can reach nothing but the broker: enrolled, trained with, given a model; all with the real commands."""

from __future__ import annotations

import functools
import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from fieldfleet.processes import Children, free_ports, listens
from fl_core.delivery.publication import publish_bundle
from fl_core.learning.application import application
from fl_core.storage.log import read_log
from tests.bundles import TOY, toy_bundle
from tests.helpers import fieldfleet
from tests.mqtt_helpers import MOSQUITTO, needs_mosquitto

NAMES = ("client-0000", "client-0001")
ROUNDS, KILLED_ROUNDS = 3, 40


@contextmanager
def broker_of(home: Path, folder: Path, port: int, children: Children) -> Iterator[None]:
    """The operator's own mosquitto, run from the files that ``server init`` and ``server register`` wrote."""
    assert MOSQUITTO
    config = folder / "mosquitto.conf"
    text = (home / "broker" / "mosquitto.conf").read_text()
    config.write_text(text + ("user root\n" if os.geteuid() == 0 else ""))
    process = subprocess.Popen([MOSQUITTO, "-c", str(config)], stdout=-3, stderr=-3)
    try:
        children.until(lambda: listens(port), 30, "the broker's start")
        yield
    finally:
        process.terminate()
        process.wait(20)


@contextmanager
def no_broker() -> Iterator[None]:
    yield


@pytest.mark.parametrize(
    ("broker", "protocol"),
    [
        pytest.param("mosquitto", "5", marks=needs_mosquitto),
        pytest.param("mosquitto", "311", marks=[needs_mosquitto, pytest.mark.slow]),
        pytest.param("embedded", "auto", marks=pytest.mark.slow),
    ],
)
def test_a_device_without_https_takes_part_in_everything(tmp_path: Path, broker: str, protocol: str) -> None:
    (port, mqtt_port), home = free_ports(2), tmp_path / "server"
    raw = application(TOY).generate(application(TOY).configure(["data.clients=2"]), 0)
    with Children(tmp_path / "logs") as children:
        place = ["--mqtt", f"127.0.0.1:{mqtt_port}"] if broker == "mosquitto" else ["--mqtt-port", str(mqtt_port)]
        children.run("init", ["server", "init", str(home), "--port", str(port), *place])
        for name in NAMES:
            raw.select([name]).write(tmp_path / "data" / name)  # type: ignore[attr-defined]
            enrol(tmp_path, home, name, protocol)
        publish_bundle(toy_bundle(tmp_path / "bundle", seed=0), home / "repository")
        with broker_of(home, tmp_path, mqtt_port, children) if broker == "mosquitto" else no_broker():
            history = federate(tmp_path, home, children)
    assert [sorted(record["clients"]) for record in history] == [list(NAMES)] * ROUNDS
    assert not any(record["refused"] or record["late"] for record in history)


@pytest.mark.slow
@needs_mosquitto
def test_a_killed_server_and_a_killed_broker_cost_no_round(tmp_path: Path) -> None:
    (port, mqtt_port), home, out = free_ports(2), tmp_path / "server", tmp_path / "out"
    raw = application(TOY).generate(application(TOY).configure(["data.clients=2"]), 0)
    with Children(tmp_path / "logs") as children, Children(tmp_path / "first") as first:
        children.run("init", ["server", "init", str(home), "--port", str(port), "--mqtt", f"127.0.0.1:{mqtt_port}"])
        for name in NAMES:
            raw.select([name]).write(tmp_path / "data" / name)  # type: ignore[attr-defined]
            enrol(tmp_path, home, name, "auto")
        run = ["server", "run", TOY, "--home", str(home), "--rounds", str(KILLED_ROUNDS), "--out", str(out), "--stay"]
        run += ["--set", "algorithm.min_clients=2"]
        with broker_of(home, tmp_path, mqtt_port, children):
            server = first.start("server", run)
            for name in NAMES:
                data = str(tmp_path / "data" / name)
                children.start(name, ["agent", "run", str(tmp_path / name), "--data", data, "--no-infer"])
            children.until(lambda: (out / "history.jsonl").exists(), 120, "the first round")
            assert not (out / "final").exists()
            server.kill()
            server.wait()
        with broker_of(home, tmp_path, mqtt_port, children):  # which was ended, too
            children.start("server", run)
            children.until((out / "final").is_dir, 180, "the rest of the federation")
    history = list(read_log(out / "history.jsonl"))
    assert [record["round"] for record in history] == list(range(1, KILLED_ROUNDS + 1))
    assert [sorted(record["clients"]) for record in history] == [list(NAMES)] * KILLED_ROUNDS


def test_what_is_wrong_with_an_account_is_said(tmp_path: Path) -> None:
    home, agent = tmp_path / "server", tmp_path / "agent"
    done(fieldfleet("server", "init", home, "--mqtt-port", "18883"))
    unknown = fieldfleet("server", "account", "van-1", "--home", home)
    assert (unknown.returncode, "van-1" in unknown.stderr) == (2, True)
    done(fieldfleet("agent", "init", agent, "--transport", "mqtt", "--ca", home / "ca" / "ca.pem", "--name", "van-1"))
    without = fieldfleet("agent", "run", agent, "--once")
    assert without.returncode == 4, without.stderr
    assert "no broker is known" in without.stderr
    (tmp_path / "wrong.json").write_text("{}")
    wrong = fieldfleet("agent", "account", agent, tmp_path / "wrong.json")
    assert (wrong.returncode, "server account" in wrong.stderr) == (2, True)
    assert not (agent / "keys" / "broker.json").exists()


def enrol(folder: Path, home: Path, name: str, protocol: str) -> None:
    agent = folder / name
    options: list[str | Path] = [
        "--transport",
        "mqtt",
        "--ca",
        home / "ca" / "ca.pem",
        "--application",
        TOY,
        "--name",
        name,
    ]
    done(fieldfleet("agent", "init", agent, *options))
    done(fieldfleet("server", "register", agent / "keys" / "device.pub", "--name", name, "--home", home))
    account = folder / f"{name}.json"
    done(fieldfleet("server", "account", name, "--home", home, "--out", account))
    done(fieldfleet("agent", "account", agent, account))
    settings = (agent / "agent.toml").read_text()
    assert 'transport = "mqtt"' in settings
    (agent / "agent.toml").write_text(settings.replace('protocol = "auto"', f'protocol = "{protocol}"'))


def done(process: subprocess.CompletedProcess[str]) -> None:
    assert process.returncode == 0, process.stderr


def federate(folder: Path, home: Path, children: Children) -> list[dict[str, Any]]:
    out = folder / "out"
    run = ["server", "run", TOY, "--home", str(home), "--rounds", str(ROUNDS), "--out", str(out), "--stay"]
    children.start("server", [*run, "--set", "algorithm.min_clients=2"])
    children.until(lambda: "listening" in (folder / "logs" / "server.log").read_text(), 90, "the server's start")
    for name in NAMES:
        children.start(name, ["agent", "run", str(folder / name), "--data", str(folder / "data" / name), "--no-infer"])
    children.until(lambda: (out / "final").is_dir(), 180, "the federation")
    for name in NAMES:
        children.until(functools.partial(model_of, folder / name), 90, f"the model of {name}")
    return list(read_log(out / "history.jsonl"))


def model_of(agent: Path) -> int | None:
    status = fieldfleet("agent", "status", agent, "--json")
    done(status)
    document = json.loads(status.stdout)
    found = document["models"][TOY] if "models" in document else document["model"]
    return found["version"] if found else None
