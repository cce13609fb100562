"""A thousand devices' worth of protocol clients on one machine through ten rounds, against the real ``server run``.

    python -m benchmarks scale [--devices 1000] [--rounds 10] [--json] [--quick]   (--quick: 50 devices, 3 rounds)

The server is the real command in a process of its own; the devices are coroutines of this process that speak the
real Fleet protocol over TLS, each with a registered P-384 key, a connection, long polls and bulk transfers of its own
(benchmarks/_protocol_device.py). Their reply costs no torch, so that what is measured is the server. Each reply adds a
number of its device's to the model: at the end the model must be what exactly one reply of each device makes of it.

There is no peer: stock Flower starts a process per message, and 1,000 of its SuperNodes do not fit on one machine.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import ssl
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric import ec

from benchmarks._protocol_device import Http, Ledger, ProtocolDevice
from fieldfleet.processes import Children, free_ports
from fl_core.contracts import checkpoint
from fl_core.identity.keys import PrivateKey, public_pem
from fl_core.identity.signature import HeaderSigner
from fl_core.storage.log import read_log
from fl_server.descriptors import raise_file_limit
from fl_server.home import ServerHome

APPLICATION = "toy_regression"
JOINING_AT_ONCE = 64
LIMIT_S = 1800.0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args(arguments)
    devices = args.devices or (50 if args.quick else 1000)
    rounds = args.rounds or (3 if args.quick else 10)
    with tempfile.TemporaryDirectory() as folder:
        result = measure(Path(folder), devices, rounds)
    print(json.dumps(result) if args.json else table(result))
    return 0 if result["exact"] else 1


@contextmanager
def usual_file_limit() -> Iterator[None]:
    """What starts now begins with 1,024 descriptors, as on most systems: the server has to help itself."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 1024), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def measure(folder: Path, devices: int, rounds: int) -> dict[str, Any]:
    home, out, (port,) = folder / "server", folder / "out", free_ports(1)
    with Children(folder / "logs") as children:
        children.run("init", ["server", "init", str(home), "--port", str(port), "--mqtt", "off"])
        began = time.monotonic()
        keys = register(ServerHome(home), devices)
        registering = time.monotonic() - began
        run = ["server", "run", APPLICATION, "--home", str(home), "--rounds", str(rounds), "--out", str(out), "--stay"]
        run += ["--min-devices", str(devices), "--wait", "600", "--set", "algorithm.evaluate_every=0"]
        run += ["--set", f"algorithm.min_clients={devices}"]
        began = time.monotonic()
        with usual_file_limit():
            server = children.start("server", run)
        raise_file_limit()
        log = folder / "logs" / "server.log"
        children.until(lambda: "listening" in log.read_text(), 120, "the server's start")
        starting = time.monotonic() - began
        usage = Usage(server.pid)
        ledger = Ledger()
        facts = asyncio.run(federation(ServerHome(home), port, keys, ledger, usage, out, children))
        peak = usage.peak_mb()
        exact = is_exact(out, devices, rounds)
        history = list(read_log(out / "history.jsonl"))
        errors = dict(ledger.errors)
    seconds = [float(entry["seconds"]) for entry in history]
    return {
        "devices": devices,
        "rounds": rounds,
        "register_s": round(registering, 2),
        "server_start_s": round(starting, 2),
        **facts,
        "round_s": percentiles(seconds),
        "devices_per_s": round(devices / statistics.median(seconds), 1),
        "delivery_after_first_ms": in_ms(ledger.delivered_after),
        "instruction_to_reply_ms": in_ms(ledger.answered_after),
        "requests_ms": {name: in_ms(values) for name, values in sorted(ledger.seconds.items())},
        "server_peak_mb": round(peak, 1),
        "replies": ledger.replies,
        "refused": sum(len(entry["refused"]) for entry in history),
        "late": sum(len(entry.get("late", [])) for entry in history),
        "errors": errors,
        "exact": exact,
    }


def register(home: ServerHome, devices: int) -> dict[str, PrivateKey]:
    registry = home.registry()
    try:
        found = {f"device-{i:05d}": ec.generate_private_key(ec.SECP384R1()) for i in range(devices)}
        for name, key in found.items():
            registry.register(name, public_pem(key))
        return found
    finally:
        registry.close()


class Usage:
    """CPU seconds and memory of another process, from /proc."""

    def __init__(self, pid: int) -> None:
        self._folder, self._tick = Path(f"/proc/{pid}"), os.sysconf("SC_CLK_TCK")

    def cpu_s(self) -> float:
        fields = (self._folder / "stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / self._tick

    def peak_mb(self) -> float:
        return self._status("VmHWM")

    def resident_mb(self) -> float:
        return self._status("VmRSS")

    def _status(self, key: str) -> float:
        lines = (self._folder / "status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith(key)).split()[1]) / 1024


async def federation(
    home: ServerHome,
    port: int,
    keys: dict[str, PrivateKey],
    ledger: Ledger,
    usage: Usage,
    out: Path,
    children: Children,
) -> dict[str, Any]:
    """Join, then go through all rounds; what each phase cost the server."""
    tls, gate = ssl.create_default_context(cafile=str(home.ca_file)), asyncio.Semaphore(JOINING_AT_ONCE)
    cpu, began, own = usage.cpu_s(), time.monotonic(), time.process_time()
    tasks = []
    for index, (name, key) in enumerate(keys.items()):
        device = ProtocolDevice(index, name, key, Http("127.0.0.1", port, tls, HeaderSigner(key)), ledger)
        tasks.append(asyncio.create_task(device.run(gate)))
    facts: dict[str, Any] = {}
    try:
        while ledger.joined < len(keys):
            await _pause(children, began)
        facts["join_s"] = round(time.monotonic() - began, 2)
        facts["join_server_cpu_ms_per_device"] = round((usage.cpu_s() - cpu) / len(keys) * 1e3, 2)
        facts["resident_mb_joined"] = round(usage.resident_mb(), 1)
        cpu, own = usage.cpu_s(), time.process_time()
        while not (out / "final").is_dir():
            await _pause(children, began)
        done = len(list(read_log(out / "history.jsonl"))) * len(keys)
        facts["server_cpu_ms_per_device_round"] = round((usage.cpu_s() - cpu) / done * 1e3, 2)
        facts["clients_cpu_ms_per_device_round"] = round((time.process_time() - own) / done * 1e3, 2)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return facts


async def _pause(children: Children, began: float) -> None:
    children.check()
    if time.monotonic() - began > LIMIT_S:
        raise TimeoutError(f"not done within {LIMIT_S:.0f} s")
    await asyncio.sleep(0.1)


def is_exact(out: Path, devices: int, rounds: int) -> bool:
    """Each device counted once in each round: the last round's weights differ from the one before by the mean of 1..n."""
    folders = sorted(out.glob("round-*"))
    after = checkpoint.load(folders[-1]).arrays
    before = checkpoint.load(folders[-2]).arrays if rounds > 1 else None
    history = list(read_log(out / "history.jsonl"))
    if [entry["round"] for entry in history] != list(range(1, rounds + 1)):
        return False
    if any(len(entry["clients"]) != devices for entry in history):
        return False
    if before is None:
        return True
    step = (devices + 1) / 2
    return all(np.allclose(after[name] - before[name], step, rtol=1e-5, atol=1e-2) for name in after)


def percentiles(values: Sequence[float], digits: int = 3) -> dict[str, float]:
    if not values:
        return {}
    found = np.percentile(np.asarray(values), [50, 90, 99, 100])
    return {name: round(float(v), digits) for name, v in zip(("p50", "p90", "p99", "max"), found, strict=True)}


def in_ms(values: Sequence[float]) -> dict[str, float]:
    return percentiles([v * 1e3 for v in values], 1)


def table(result: dict[str, Any]) -> str:
    lines = []
    for name, value in result.items():
        if name == "requests_ms":
            lines += [f"{f'request: {kind} (ms)':34} {_row(found)}" for kind, found in value.items()]
        else:
            lines.append(f"{name:34} {_row(value) if isinstance(value, dict) else value}")
    return "\n".join(lines)


def _row(values: dict[str, float]) -> str:
    return "  ".join(f"{name} {value}" for name, value in values.items()) or "none"


if __name__ == "__main__":
    sys.exit(main())
