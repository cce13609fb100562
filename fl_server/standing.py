"""The server process: SuperLink, broker, bridge, runs, metrics and control socket under one command and one lock."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from types import FrameType, TracebackType
from typing import Any, Self

from fl_server.certificate_watch import CertificateWatch
from fl_server.control import ControlSocket
from fl_server.descriptors import check_file_limit, raise_file_limit
from fl_server.field import FieldService
from fl_server.home import ServerHome
from fl_server.metrics import MetricsService
from fl_server.runs import RunManager
from fl_server.services import Services
from fl_server.superlink import SuperLink

log = logging.getLogger(__name__)


class StandingServer:
    """``with StandingServer(home) as server:`` serves devices, and runs through ``server.runs``.

    Raises EnvironmentFault (another server, a busy port, an expired certificate, the broker) before any work. At the end
    runs stop first, at a safe point, then what devices are just sending is taken, then the rest ends.
    """

    def __init__(self, home: ServerHome) -> None:
        self.home = home
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with self._stack:
            self._stack.enter_context(self.home.lock())
            services = self._stack.enter_context(Services())
            limit = raise_file_limit()
            self.superlink = SuperLink(self.home)  # binds its port; nothing has started yet
            try:
                check_file_limit(limit, len(self.superlink.directory.names()))
                self.field = FieldService(
                    self.home, self.superlink.registry, tunnel=self.superlink.tunnel, on_event=self._heard
                )
                self.metrics = MetricsService(self.superlink, self.field)
            except BaseException:
                self.superlink.stop()
                raise
            services.start(self.superlink)
            services.start(self.field)
            services.start(self.metrics)
            self.superlink.fleet_watch.on_shut_out(self.field.end_sessions)
            self.superlink.bell.on_push(self._wake)
            self.runs = RunManager(self.superlink, on_round=self.metrics.count_round)
            renewed = [self.superlink.renew, self.field.renew]
            services.start(CertificateWatch(self.home.certificate, self.home.certificate_key, renewed))
            services.start(self._control())
            services.start(self.runs)
            self._stack = self._stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.metrics.draining = True
        self._stack.close()

    def _control(self) -> ControlSocket:
        control = ControlSocket(self.home.control_socket)
        control.on("fleet-changed", self.superlink.fleet_watch.asked)
        control.on("run-start", self.runs.asked_start)
        control.on("run-resume", self.runs.asked_resume)
        control.on("run-stop", self.runs.asked_stop)
        control.on("run-wait", self.runs.asked_wait)
        return control

    def _heard(self, event: str, device: str, facts: Mapping[str, Any]) -> None:
        """From the MQTT bridge."""
        if event in ("birth", "state"):
            self.superlink.bell.ring_engine()  # a round may wait for a device that may be asked
        elif event in ("death", "stopped"):
            self.superlink.gone(device)

    def _wake(self, nodes: list[int]) -> None:
        names = self.superlink.directory.names()
        self.field.wake([names[node] for node in nodes if node in names])


class Signals:
    """SIGTERM and SIGINT: KeyboardInterrupt while something is awaited, the end of ``stay`` otherwise."""

    def __init__(self) -> None:
        self._stop, self._staying = threading.Event(), False

    def handle(self, number: int, frame: FrameType | None) -> None:
        log.info("stopping on signal %s", signal.Signals(number).name)
        if not self._staying:
            raise KeyboardInterrupt
        self._stop.set()

    def stay(self) -> None:
        """Until a signal."""
        self._staying = True
        while not self._stop.wait(3600):
            pass


@contextlib.contextmanager
def interruptible() -> Iterator[Signals]:
    signals = Signals()
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return
    before = {number: signal.signal(number, signals.handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
