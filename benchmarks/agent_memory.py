"""Resident memory of ``agent run``: idle, while it infers, and while it serves gRPC. Prints one line of JSON.

    python -m benchmarks.agent_memory [BUNDLE] [--data DIR] [--python INTERPRETER]

BUNDLE: from ``fieldfleet export`` (default: driver_conflict, one epoch on generated data). DIR: a data set in the
application's format (default: generated); the agent gets the share of one client. INTERPRETER: of an environment with
``pip install '.[edge]'``, for the inference-only device. The server, its broker and a gRPC client run in this process;
the agent and its inference process in their own, whose VmRSS is read from /proc after each of several inferences
(median), together with VmHWM, the peak. ``idle``: the inference process has ended by itself; ``idle_trains``: of an
agent that takes part in federations, before torch is loaded.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fieldfleet.processes import free_ports
from fl_clients.edge.shell import FIRST_SETTLE_S
from fl_core.contracts.bundle import open_bundle
from fl_core.delivery.publication import publish_bundle
from fl_core.identity import keys
from fl_core.learning.application import application
from fl_server.bridge import Bridge
from fl_server.field import FieldService
from fl_server.home import ListenSettings, MqttSettings, ServerSettings, create_home
from fl_server.superlink import SuperLink

NAME = "device-1"
INFERENCES = 5
SETTLED_S = FIRST_SETTLE_S + 7.0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, nargs="?")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--quick", action="store_true", help="accepted for uniformity: there is no shorter run")
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        if args.bundle is None:
            args.bundle = small_bundle(work)
        serving, mqtt = free_ports(2)
        home = create_home(
            work / "server", ServerSettings(listen=ListenSettings(port=serving), mqtt=MqttSettings(port=mqtt))
        )
        publish_bundle(args.bundle, home.repository)
        manifest = open_bundle(args.bundle).manifest
        prepare_data(manifest.application, manifest.config, args.data, work / "data")
        superlink = SuperLink(home)
        superlink.start()
        service = FieldService(home, superlink.registry)
        service.start()
        assert service.bridge is not None
        try:
            agent = [args.python, "-m", "fieldfleet", "agent"]
            init = [str(work / "agent"), "--server", superlink.url, "--ca", str(home.ca_file)]
            subprocess.run([*agent, "init", *init, "--application", manifest.application], check=True, stdout=-3)
            superlink.registry.register(NAME, keys.read_public_key(work / "agent" / "keys" / "device.pub"))
            run = [*agent, "run", str(work / "agent"), "--data", str(work / "data"), "--no-train"]
            result: dict[str, Any] = {"application": manifest.application}
            result["infers"] = measure(run, service.bridge, None, work)
            result["serves"] = measure([*run, "--serve", "0"], service.bridge, manifest, work)
            settings = work / "agent" / "agent.toml"
            settings.write_text(settings.read_text().replace("idle_s = 300.0", "idle_s = 1.0"))
            result["idle"] = idle(run, service.bridge, work)
            result["idle_trains"] = idle([word for word in run if word != "--no-train"], service.bridge, work)
        finally:
            service.stop()
            superlink.stop()
    print(json.dumps(result))
    return 0


def prepare_data(name: str, table: dict[str, Any], data: Path | None, folder: Path) -> None:
    app = application(name)
    config = app.configure_from(table, origin="the bundle")
    raw = app.read(data) if data else app.generate(config, 0)
    raw.select(list(raw.client_ids()[:1])).write(folder)


def small_bundle(work: Path) -> Path:
    """Memory does not depend on the weights: one epoch on generated data will do."""
    fieldfleet = [sys.executable, "-m", "fieldfleet"]
    train = ["pretrain", "driver_conflict", "--data", "generated", "--out", str(work / "model")]
    subprocess.run([*fieldfleet, *train, "--set", "pretrain.epochs=1"], check=True, stdout=subprocess.DEVNULL)
    subprocess.run(
        [*fieldfleet, "export", str(work / "model"), "--out", str(work / "bundle")],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return work / "bundle"


def measure(command: list[str], bridge: Bridge, manifest: Any, work: Path) -> dict[str, Any]:
    with (work / "log").open("ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        assert bridge.wait_alive([NAME], 60), (work / "log").read_text()
        time.sleep(SETTLED_S)
        samples: list[dict[str, float]] = []
        while len(samples) < INFERENCES:
            if manifest is not None:
                serve_some(bridge, manifest)
            reply = bridge.wait_reply(bridge.command(NAME, "infer"), 120)
            if reply is None or not reply["ok"]:  # the first update is not done yet
                time.sleep(1)
                continue
            child = inference_process(process.pid)
            assert child is not None
            samples.append({"agent": status(process.pid)["VmRSS"], "inference": status(child)["VmRSS"]})
        return {
            "agent_mb": round(statistics.median(s["agent"] for s in samples), 1),
            "inference_mb": round(statistics.median(s["inference"] for s in samples), 1),
            "both_mb": round(statistics.median(s["agent"] + s["inference"] for s in samples), 1),
            "agent_peak_mb": round(status(process.pid)["VmHWM"], 1),
            "inference_peak_mb": round(status(child)["VmHWM"], 1),
            "examples": reply["num_examples"],
            "samples": len(samples),
        }
    finally:
        process.terminate()
        process.wait(30)


def idle(command: list[str], bridge: Bridge, work: Path) -> dict[str, Any]:
    """After a first inference: the inference process is gone and the agent has given back what its start needed."""
    with (work / "log").open("ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        assert bridge.wait_alive([NAME], 60), (work / "log").read_text()
        assert bridge.wait_reply(bridge.command(NAME, "infer"), 120)
        time.sleep(SETTLED_S)
        assert inference_process(process.pid) is None, "it ends when idle"
        found = status(process.pid)
        return {"agent_mb": round(found["VmRSS"], 1), "agent_peak_mb": round(found["VmHWM"], 1)}
    finally:
        process.terminate()
        process.wait(30)


def inference_process(agent: int) -> int | None:
    """The process id of an agent's inference process, from /proc."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError):
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == agent and b"inference_worker" in (folder / "cmdline").read_bytes():
                return int(folder.name)
    return None


def serve_some(bridge: Bridge, manifest: Any) -> None:
    """Real requests of another program, one example each."""
    import tritonclient.grpc as triton

    state = next(d for d in bridge.devices() if d["name"] == NAME)["state"]
    if state["model"] is None:
        return
    with triton.InferenceServerClient(f"127.0.0.1:{state['roles']['serve']}") as client:
        for _ in range(20):
            inputs = []
            for spec in manifest.inputs:
                array = np.zeros([1 if d == -1 else d for d in spec["shape"]], spec["dtype"])
                tensor = triton.InferInput(spec["name"], list(array.shape), triton.np_to_triton_dtype(array.dtype))
                tensor.set_data_from_numpy(array)
                inputs.append(tensor)
            client.infer(manifest.application, inputs)


def status(pid: int) -> dict[str, float]:
    """VmRSS and VmHWM in MiB."""
    found = {}
    for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines():
        if line.startswith(("VmRSS", "VmHWM")):
            name, value, _ = line.split()
            found[name.rstrip(":")] = int(value) / 1024
    return found


if __name__ == "__main__":
    sys.exit(main())
