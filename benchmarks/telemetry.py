"""What a device's telemetry costs on the wire, and how fast a backlog drains after an outage.

    python -m benchmarks telemetry [--quick] [--json]

A real server with its embedded broker over TLS; a device in this process with the agent's own link, outbox and courier, behind a
relay that counts bytes both ways with 52 bytes of headers for each segment of 1,400. Peer: the same facts as plain JSON
messages, one each, acknowledged by the broker alone. A day has 48 records (one in half an hour).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.tunnel import Relay, station
from fl_clients.connection import ServerConnection, welcome
from fl_clients.edge.courier import Courier
from fl_clients.edge.field_link import FieldLink
from fl_clients.edge.home import AgentHome
from fl_clients.edge.settings import AgentSettings, OutboxSettings, ServerSettings
from fl_clients.edge.shell import Agent, RunOptions
from fl_core.identity import keys
from fl_core.link import topics
from fl_core.link.envelope import Envelope, encode
from fl_core.link.session import Outgoing

NAME, PER_DAY, TOGETHER = "device-1", 48, 4
WAIT_S = 60.0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer repetitions, a smaller backlog")
    parser.add_argument("--json", action="store_true", help="one JSON document")
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder, device(Path(folder)) as bench:
        document = measure(bench, repetitions=5 if args.quick else 15, backlog=400 if args.quick else 5_000)
    if args.json:
        print(json.dumps(document))
        return 0
    print(f"the agent's facts as JSON: {document['body_bytes']:,} bytes")
    for name, value in document["bytes_per_record"].items():
        peer = document["bytes_per_record"]["peer: plain message"]
        print(
            f"  {name:34} {value:8,.0f} bytes a record, {value * PER_DAY / 1000:7.1f} kB a day, {value / peer:5.2f} x"
        )
    for name, (seconds, size) in document["backlog"].items():
        count = document["backlog_records"]
        print(
            f"  backlog of {count:,} over {name:6} {seconds:6.2f} s, {count / seconds:8,.0f} records/s, {size / 1000:8,.0f} kB"
        )
    return 0


@dataclasses.dataclass
class Bench:
    link: FieldLink
    courier: Courier
    mqtt: Relay
    https: Relay
    connection: ServerConnection
    facts: dict[str, Any]

    def wire(self) -> int:
        return self.mqtt.wire + self.https.wire


@contextlib.contextmanager
def device(folder: Path) -> Iterator[Bench]:
    with station(folder, "embedded") as (home, superlink, mqtt_port):
        mqtt, https = Relay(mqtt_port), Relay(superlink.port)
        own = AgentHome(folder / "device")
        key = keys.create_device_key(own.key_file)
        own.ca_file.write_bytes(home.ca_file.read_bytes())
        superlink.registry.register(NAME, keys.public_pem(key))
        connection = ServerConnection(f"https://127.0.0.1:{https.port}", own.ca_file, key)
        found = welcome(connection)
        assert found.mqtt is not None
        settings = AgentSettings(server=ServerSettings(url=superlink.url))
        agent = Agent(own, settings, RunOptions(data={}, train=False, infer=False))
        facts = agent.facts()
        agent.close()
        stop = threading.Event()
        link = FieldLink(
            own,
            settings.mqtt,
            dict,
            lambda: courier.ring(),
            OutboxSettings(hold_s=0),
            key,
            answered=lambda store, upto: courier.answered(store, upto),
        )
        courier = Courier(link.records, link, lambda: connection)
        link.enter(dataclasses.replace(found, mqtt={**found.mqtt, "port": mqtt.port}))
        assert link.session is not None
        assert link.session.wait_connected(WAIT_S)
        pump = threading.Thread(target=lambda: _pump(link, stop), daemon=True)
        pump.start()
        try:
            yield Bench(link, courier, mqtt, https, connection, facts)
        finally:
            stop.set()
            link.ring()
            pump.join(5)
            link.stop()
            link.close()
            connection.close()
            mqtt.close()
            https.close()


def _pump(link: FieldLink, stop: threading.Event) -> None:
    while not stop.is_set():
        link.receive(1.0)


def measure(bench: Bench, *, repetitions: int, backlog: int) -> dict[str, Any]:
    def repeat(step: Callable[[], object], records: int) -> float:
        step()  # certificates and signatures that travel once
        sizes = []
        for _ in range(repetitions):
            before = bench.wire()
            step()
            settle(bench)
            sizes.append((bench.wire() - before) / records)
        return statistics.median(sizes)

    per_record = {
        "peer: plain message": repeat(lambda: plain(bench), 1),
        "MQTT, one at a time": repeat(lambda: over_mqtt(bench, 1), 1),
        f"MQTT, {TOGETHER} together": repeat(lambda: over_mqtt(bench, TOGETHER), TOGETHER),
        "HTTPS, a new connection each": repeat(lambda: over_https(bench, 1), 1),
        f"HTTPS, {TOGETHER} on one": repeat(lambda: over_https(bench, TOGETHER), TOGETHER),
    }
    drained = {"MQTT": timed(bench, lambda: over_mqtt(bench, backlog))}
    drained["HTTPS"] = timed(bench, lambda: over_https(bench, backlog))
    return {
        "body_bytes": len(json.dumps(bench.facts)),
        "bytes_per_record": per_record,
        "backlog_records": backlog,
        "backlog": drained,
    }


def fill(bench: Bench, count: int) -> None:
    for number in range(count):
        bench.link.report("telemetry", {**bench.facts, "uptime_s": 1800.5 * number}, droppable=True)


def over_mqtt(bench: Bench, count: int) -> float:
    """Seconds to deliver what was made before."""
    fill(bench, count)
    began = time.perf_counter()
    stop = threading.Event()
    while bench.link.records.first() is not None:
        if not bench.courier.deliver(stop):
            raise TimeoutError("the server did not take the records")
    return time.perf_counter() - began


def over_https(bench: Bench, count: int) -> float:
    fill(bench, count)
    began = time.perf_counter()
    if not bench.courier.flush(WAIT_S):
        raise TimeoutError("the server did not take the records")
    return time.perf_counter() - began


def plain(bench: Bench) -> None:
    link = bench.link
    assert link.session is not None
    payload = encode(Envelope(type="telemetry", boot=link.boot, connection=1, body=bench.facts))
    topic = topics.topic(link.fleet, link.name, topics.TELEMETRY)
    if not link.session.deliver(Outgoing(topic=topic, payload=payload), WAIT_S):
        raise TimeoutError("the broker did not take the message")


def timed(bench: Bench, step: Callable[[], float]) -> tuple[float, int]:
    """(seconds, bytes)"""
    before = bench.wire()
    seconds = step()
    settle(bench)
    return seconds, bench.wire() - before


def settle(bench: Bench) -> None:
    """Until the counters stand still."""
    last = -1
    while last != bench.wire():
        last = bench.wire()
        time.sleep(0.05)


if __name__ == "__main__":
    sys.exit(main())
