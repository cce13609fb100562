"""What an operator's monitoring asks: /metrics in Prometheus' text format, /healthz (alive), /readyz (may take work); and
what the ``flwr`` commands list of runs and nodes.

Format: https://prometheus.io/docs/instrumenting/exposition_formats/
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING

from fl_core.contracts.installed import package_version
from fl_core.flower.adapter.stock import CONTROL_PATH
from fl_core.flower.wire import FleetRefused
from fl_core.identity.ca import certificate_facts
from fl_core.runtime.machine import resident_bytes
from fl_server.history import RoundRecord

if TYPE_CHECKING:
    from fl_server.field import FieldService
    from fl_server.superlink import SuperLink

log = logging.getLogger(__name__)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
BUCKETS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 900.0, 3600.0)
REQUEST_S = 10.0
LIST_LIMIT = 4_096
Labels = tuple[tuple[str, str], ...]


class Rounds:
    """What has come of rounds since the process started."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rounds, self._replies = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
        self._buckets, self._seconds, self._count = Counter[tuple[str, float]](), Counter[str](), Counter[str]()

    def count(self, run: str, record: RoundRecord) -> None:
        outcomes = {
            "counted": len(record.clients),
            "counted_late": len(record.late_counted),
            "refused": len(record.refused),
            "late": len(record.late),
        }
        with self._lock:
            self._rounds[run, "applied" if record.applied else "failed"] += 1
            for outcome, number in outcomes.items():
                self._replies[run, outcome] += number
            for bound in BUCKETS:
                self._buckets[run, bound] += record.seconds <= bound
            self._seconds[run] += record.seconds  # type: ignore[assignment]
            self._count[run] += 1

    def lines(self) -> Iterator[str]:
        with self._lock:
            yield from family("rounds_total", "counter", "Rounds that ended.", _pairs(self._rounds, "run", "result"))
            yield from family(
                "replies_total", "counter", "Replies of devices, by what came of them.",
                _pairs(self._replies, "run", "outcome"),
            )  # fmt: skip
            yield from _head("round_seconds", "histogram", "Duration of a round.")
            for run in sorted(self._count):
                for bound in BUCKETS:
                    yield sample(
                        "round_seconds_bucket", self._buckets[run, bound], (("run", run), ("le", f"{bound:g}"))
                    )
                yield sample("round_seconds_bucket", self._count[run], (("run", run), ("le", "+Inf")))
                yield sample("round_seconds_sum", self._seconds[run], (("run", run),))
                yield sample("round_seconds_count", self._count[run], (("run", run),))


class MetricsService:
    """A service: start() ... stop(); listens only where server.toml says so. ``port`` tells where."""

    def __init__(self, superlink: SuperLink, field: FieldService) -> None:
        self._superlink, self._field = superlink, field
        self._settings = superlink.home.settings.metrics
        self._rounds = Rounds()
        self.draining = False
        self._server: ThreadingHTTPServer | None = None
        self.port = 0
        if self._settings.port:
            from fl_server.superlink import bind

            listener = bind(self._settings.host, self._settings.port, setting="[metrics]")
            self._server = _Listener(listener.getsockname()[:2], _handler(self), bind_and_activate=False)
            self._server.socket.close()
            self._server.socket = listener
            self.port = listener.getsockname()[1]

    def start(self) -> None:
        if self._server is not None:
            threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True).start()

    def stop(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()

    def count_round(self, run: str, record: RoundRecord) -> None:
        self._rounds.count(run, record)

    def healthy(self) -> str:
        """ "" when the process does its work; else what is wrong."""
        if not self._superlink.serving:
            return "the HTTPS server does not serve"
        return ""

    def ready(self) -> str:
        """ "" when devices and runs may come; else why not yet, or not any more."""
        if self.draining:
            return "draining"
        if self._field.bridge is not None and not self._field.bridge.session.connected:
            return "not connected to the MQTT broker"
        return self.healthy()

    def listing(self, name: str, body: bytes) -> bytes | None:
        return self._superlink.store.listing(name, body)

    def text(self) -> str:
        return "\n".join([*self._rounds.lines(), *self._state()]) + "\n"

    def _state(self) -> Iterator[str]:
        superlink = self._superlink
        names, devices = superlink.directory.names(), superlink.registry.devices()
        online = sum(node in names for node in superlink.store.online())
        status = Counter(device.status for device in devices)
        yield from family(
            "devices", "gauge", "Devices of the fleet.",
            [((("status", s),), status[s]) for s in ("active", "pending", "revoked")],
        )  # fmt: skip
        yield from family("devices_online", "gauge", "Devices with a live session.", [((), online)])
        runs = Counter(row.status for row in superlink.registry.runs.all())
        yield from family("runs", "gauge", "Runs.", [((("status", s),), n) for s, n in sorted(runs.items())])
        yield from family(
            "messages_waiting",
            "gauge",
            "Instructions that no device has fetched yet.",
            [((), superlink.store.waiting())],
        )
        traffic = superlink.traffic
        yield from family(
            "http_requests_total", "counter", "Answered requests.",
            [((("code", str(code)),), n) for code, n in sorted(traffic.answers.items())],
        )  # fmt: skip
        yield from family(
            "http_bytes_total", "counter", "Bodies of requests and answers.",
            [((("direction", "received"),), traffic.received), ((("direction", "sent"),), traffic.sent)],
        )  # fmt: skip
        yield from family(
            "tunnel_sessions", "gauge", "Tunnels through the broker.", [((), len(superlink.tunnel.sessions))]
        )
        yield from family("tunnel_handshakes_total", "counter", "Tunnels begun.", [((), superlink.tunnel.handshakes)])
        yield from family("process_resident_memory_bytes", "gauge", "Of this process.", [((), resident_bytes())])
        yield from family("store_bytes", "gauge", "Size on disk.", sorted(_sizes(superlink.home.path).items()))
        expires = certificate_facts(superlink.home.certificate).not_after.timestamp()
        yield from family("certificate_expiry_seconds", "gauge", "When it expires, since 1970.", [((), expires)])
        version = package_version("fieldfleet") or ""
        yield from family("build_info", "gauge", "The version that runs.", [((("version", version),), 1)])


def _sizes(home: Path) -> Mapping[Labels, int]:
    """Each database with its write-ahead log."""
    return {
        (("store", path.stem),): sum(p.stat().st_size for p in home.glob(f"{path.name}*"))
        for path in sorted(home.glob("*.db"))
    }


def family(name: str, kind: str, help: str, values: Iterable[tuple[Labels, float]]) -> Iterator[str]:
    yield from _head(name, kind, help)
    for labels, value in values:
        yield sample(name, value, labels)


def _head(name: str, kind: str, help: str) -> Iterator[str]:
    yield f"# HELP fieldfleet_{name} {help}"
    yield f"# TYPE fieldfleet_{name} {kind}"


def sample(name: str, value: float, labels: Labels = ()) -> str:
    shown = ",".join(f'{key}="{_escaped(text)}"' for key, text in labels)
    number = str(value) if isinstance(value, int) else repr(float(value))
    return f"fieldfleet_{name}{{{shown}}} {number}" if shown else f"fieldfleet_{name} {number}"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _pairs(counter: Mapping[tuple[str, str], int], *names: str) -> Iterator[tuple[Labels, float]]:
    for key in sorted(counter):
        yield tuple(zip(names, key, strict=True)), counter[key]


class _Listener(ThreadingHTTPServer):
    daemon_threads = True


def _handler(service: MetricsService) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = REQUEST_S
        server_version = sys_version = ""

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            try:
                if path == "/metrics":
                    self._send(200, service.text(), CONTENT_TYPE)
                elif path in ("/healthz", "/readyz"):
                    wrong = service.healthy() if path == "/healthz" else service.ready()
                    self._send(503 if wrong else 200, (wrong or "ok") + "\n")
                else:
                    self._send(404, "not found\n")
            except (BrokenPipeError, ConnectionResetError):
                return
            except Exception as error:
                log.exception("metrics")
                self._send(500, f"{type(error).__name__}\n")

        def do_POST(self) -> None:
            """What the ``flwr`` commands list, for operators on this machine; nothing can be changed here."""
            length = self.headers.get("content-length", "0")
            if not self.path.startswith(CONTROL_PATH) or not length.isdigit() or int(length) > LIST_LIMIT:
                self._send(404, "not found\n")
                return
            try:
                found = service.listing(self.path.removeprefix(CONTROL_PATH), self.rfile.read(int(length)))
            except FleetRefused as refused:
                self._send(refused.status, refused.reason)
                return
            if found is None:
                self._send(403, "read only: use 'fieldfleet runs' and 'fieldfleet fleet'\n")
            else:
                self._send(200, found, "application/protobuf")

        def _send(self, status: int, text: str | bytes, kind: str = "text/plain; charset=utf-8") -> None:
            body = text.encode() if isinstance(text, str) else text
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *arguments: object) -> None:
            return

    return Handler
