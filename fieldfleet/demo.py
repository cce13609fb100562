"""The main job on one machine, with the real commands in separate processes.

    data -> pretrain (2 processes) -> federate (server + agents over TLS and MQTT) -> export -> publish (TUF)
         -> each agent fetches, verifies, tests, switches, infers, reports -> evaluation on clients never seen

Everything lies under one folder: ``data/ pretrained/ server/ agents/ global/ bundle/ logs/ report.json report.html``.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fieldfleet.processes import Children, free_ports, listens
from fieldfleet.service_check import check_service
from fl_core.contracts import checkpoint as checkpoints
from fl_core.contracts.bundle import open_bundle
from fl_core.contracts.config import to_table
from fl_core.contracts.errors import DataError, InputError
from fl_core.learning.application import Application
from fl_core.learning.examples import RawData
from fl_core.learning.partition import split_clients
from fl_core.learning.sources import open_data
from fl_core.storage import atomic
from fl_core.storage.log import read_log

MARK = ".fieldfleet-demo"
UNSEEN, CENTRE = "unseen", "centre"
CENTRE_SHARE = 0.3
Say = Callable[[str, int, int, str], None]  # stage, done, total, status


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    application: Application
    config: Any
    data: str | None
    out: Path
    seed: int
    rounds: int
    devices: int
    overrides: tuple[str, ...]


@dataclass
class Demo:
    """``results`` becomes report.json."""

    options: DemoOptions
    say: Say
    results: dict[str, Any] = field(default_factory=dict)

    def run(self) -> dict[str, Any]:
        began = time.monotonic()
        prepare_folder(self.options.out)
        self._data()
        with Children(self.options.out / "logs") as children:
            self._pretrain(children)
            self._federate(children)
            self._deliver(children)
            self._inference(children)
            self._evaluate(children)
        self.results["seconds"] = round(time.monotonic() - began, 1)
        return self.results

    def path(self, *parts: str) -> str:
        return str(self.options.out.joinpath(*parts))

    def _settings(self, *extra: str) -> list[str]:
        return [part for item in (*self.options.overrides, *extra) for part in ("--set", item)]

    def _data(self) -> None:
        """Clients go to three sides that never mix: the centre, the devices, and the unseen ones for evaluation."""
        o = self.options
        self.say("data", 0, 1, "")
        found = open_data(o.application, o.config, o.data, seed=o.seed)
        clients = tuple(found.raw.examples(o.config).clients())
        shares = divide(clients, o.devices, o.config.data.holdout_fraction, o.seed)
        for name, share in shares.items():
            write_share(found.raw, share, o.out / "data" / name)
        self.results["data"] = {
            "origin": found.origin,
            "clients": len(clients),
            "shares": {k: len(v) for k, v in shares.items()},
        }
        self.results["application"] = o.application.name
        self.results["config"] = to_table(o.config)
        self.say("data", 1, 1, f"{len(clients)} {o.application.client_term}s")

    def _pretrain(self, children: Children) -> None:
        epochs = self.options.config.pretrain.epochs
        out = self.options.out / "pretrained"
        self.results["pretrain"] = children.run(
            "pretrain",
            [
                *("pretrain", self.options.application.name, "--data", self.path("data", CENTRE), "--out", str(out)),
                *("--procs", "2", "--seed", str(self.options.seed)),
                *self._settings("data.holdout_fraction=0.0"),
            ],
            watch=lambda: self._watch("pretrain", out, epochs, "epoch"),
        )
        self.say("pretrain", epochs, epochs, "")

    def _federate(self, children: Children) -> None:
        o = self.options
        home, out = self.path("server"), o.out / "global"
        port, mqtt_port, self.grpc_port = free_ports(3)
        self.results["ports"] = {"server": port, "mqtt": mqtt_port, "grpc": self.grpc_port}
        self.say("federate", 0, o.rounds, "server and agents start")
        children.run(
            "server-init",
            ["server", "init", home, "--host", "127.0.0.1", "--port", str(port), "--mqtt-port", str(mqtt_port)],
        )
        for name in self.devices():
            agent = self.path("agents", name)
            children.run(
                f"{name}-init",
                [
                    *(
                        "agent",
                        "init",
                        agent,
                        "--server",
                        f"https://127.0.0.1:{port}",
                        "--ca",
                        str(Path(home) / "ca" / "ca.pem"),
                    ),
                    *("--application", o.application.name),
                ],
            )
            key = str(Path(agent) / "keys" / "device.pub")
            children.run(f"{name}-register", ["server", "register", key, "--name", name, "--home", home])
        children.start(
            "server",
            [
                *("server", "run", o.application.name, "--home", home, "--from", self.path("pretrained")),
                *("--rounds", str(o.rounds), "--out", str(out), "--stay", "--seed", str(o.seed)),
                *("--min-devices", str(o.devices), *self._settings(f"algorithm.min_clients={o.devices}")),
            ],
        )
        children.until(lambda: listens(port), 60, "the server's start")
        for index, name in enumerate(self.devices()):
            serve = ["--serve", str(self.grpc_port)] if index == 0 else []
            children.start(name, ["agent", "run", self.path("agents", name), "--data", self.path("data", name), *serve])

        def finished() -> bool:
            self._watch("federate", out, o.rounds, "round")
            return (out / "final").is_dir()

        children.until(finished, 600, "the federation")
        self.results["federation"] = history(out)
        self.say("federate", o.rounds, o.rounds, "")

    def _deliver(self, children: Children) -> None:
        self.say("export", 0, 2, "ONNX, int8, parity")
        children.run(
            "export",
            ["export", self.path("global"), "--out", self.path("bundle"), "--calibration", self.path("data", CENTRE)],
        )
        self.say("export", 1, 2, "sign and publish")
        self.results["publish"] = children.run(
            "publish", ["publish", self.path("bundle"), "--repo", self.path("server", "repository")]
        )
        manifest = open_bundle(self.options.out / "bundle").manifest
        self.results["bundle"] = {
            "targets": manifest.targets,
            "files": manifest.files,
            "lineage": manifest.lineage,
            "parent_sha256": manifest.parent_sha256,
        }
        self.say("export", 2, 2, "")

    def _inference(self, children: Children) -> None:
        """Each agent is told over MQTT: update, then infer on your own data."""
        home, replies = self.path("server"), dict[str, Any]()
        self.say("deliver", 0, len(self.devices()), "")
        for done, name in enumerate(self.devices(), start=1):
            replies[name] = {}
            for kind in ("update", "infer"):
                replies[name][kind] = children.run(
                    f"{name}-{kind}", ["server", "command", name, kind, "--home", home, "--timeout", "120"]
                )
            self.say("deliver", done, len(self.devices()), f"{name} runs the new model")
        manifest = open_bundle(self.options.out / "bundle").manifest
        self.results["service"] = check_service(
            self.grpc_port, manifest.application, self.options.out / "bundle", next(iter(manifest.targets))
        )
        self.results["devices"] = children.run("status", ["server", "status", "--home", home])
        self.results["replies"] = replies
        self.results["memory_mb"] = {name: resident_mb(children.pid(name)) for name in self.devices()}

    def _evaluate(self, children: Children) -> None:
        results = {}
        models = {"pretrained": "pretrained", "global": "global", "bundle": "bundle"}
        for done, (name, folder) in enumerate(models.items()):
            self.say("evaluate", done, len(models), name)
            results[name] = children.run(
                f"evaluate-{name}",
                [
                    *("evaluate", self.path(folder), "--data", self.path("data", UNSEEN)),
                    *("--predictions", self.path("predictions", f"{name}.csv")),
                ],
            )
        self.results["evaluation"] = results
        self.say("evaluate", len(models), len(models), "")

    def devices(self) -> list[str]:
        return [f"device-{i + 1}" for i in range(self.options.devices)]

    def _watch(self, stage: str, out: Path, total: int, key: str) -> None:
        entries = history(out)
        if entries:
            last = entries[-1]
            metric = (last.get("evaluation") or last.get("validation") or {}).get(
                self.options.application.primary_metric
            )
            loss = last.get("loss")
            status = f"loss {loss:.4f}" if isinstance(loss, float) else ""
            if metric is not None:
                status += f" {self.options.application.primary_metric} {metric:.3f}"
            self.say(stage, int(last[key]), total, status)


def prepare_folder(out: Path) -> None:
    """A former demo is replaced; any other folder with content is refused."""
    if out.is_dir() and (out / MARK).is_file():
        shutil.rmtree(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"--out {out}: holds something that is not a demo", remedy="name another folder")
    out.mkdir(parents=True, exist_ok=True)
    atomic.write_bytes(out / MARK, b"")


def divide(clients: tuple[str, ...], devices: int, holdout: float, seed: int) -> dict[str, tuple[str, ...]]:
    """unseen, centre and one share for each device; by client, so that nobody's data is on two sides."""
    training, unseen = split_clients(clients, holdout, seed)
    field_clients, centre = split_clients(training, CENTRE_SHARE, seed + 1)
    if not unseen or not centre or len(field_clients) < devices:
        raise DataError(
            f"{len(clients)} clients are too few for {devices} devices",
            remedy=f"at least {2 * devices + 3} are needed, or lower --devices",
        )
    shares = {UNSEEN: unseen, CENTRE: centre}
    return {**shares, **{f"device-{i + 1}": field_clients[i::devices] for i in range(devices)}}


def write_share(raw: RawData, clients: tuple[str, ...], folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    raw.select(clients).write(folder)


def history(out: Path) -> list[dict[str, Any]]:
    return list(read_log(out / "history.jsonl"))


def resident_mb(pid: int) -> float | None:
    """Resident memory of a process now, from Linux's /proc; None elsewhere."""
    try:
        text = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    except OSError:
        return None
    return next(
        (round(int(line.split()[1]) / 1024, 1) for line in text.splitlines() if line.startswith("VmRSS:")), None
    )


def write_json_report(out: Path, results: dict[str, Any]) -> None:
    atomic.write_bytes(out / "report.json", (json.dumps(results, indent=2, sort_keys=True) + "\n").encode())


def model_lineage(out: Path, version: int) -> list[tuple[str, str]]:
    """(title, detail) from the pretraining run to the devices, by the hashes in the manifests."""
    pretrained = checkpoints.load(out / "pretrained").manifest
    federated = checkpoints.load(out / "global").manifest
    bundle = open_bundle(out / "bundle").manifest
    if federated.parent_sha256 != pretrained.model_sha256 or bundle.parent_sha256 != federated.model_sha256:
        raise InputError(f"{out}: the lineage of the bundle does not reach back to the pretrained model")
    target, facts = next(iter(bundle.targets.items()))
    return [
        (
            "pretrained",
            f"{pretrained.step} epochs\n{len(pretrained.clients_seen)} clients\nsha {pretrained.model_sha256[:12]}",
        ),
        (
            "federated",
            f"{federated.step} rounds\n{len(set(federated.clients_seen) - set(pretrained.clients_seen))} devices\nsha {federated.model_sha256[:12]}",
        ),
        ("bundle", f"version {version}\n{target} {facts.get('precision', '')}\nsha {facts['sha256'][:12]}"),
        ("devices", "verified, tested,\nswitched, inferring"),
    ]
