"""``server run``: home -> SuperLink -> MQTT -> devices -> rounds -> checkpoints, in one process."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from fl_core.contracts.arrays import Arrays
from fl_core.contracts.checkpoint import Checkpoint
from fl_core.learning.application import Application
from fl_server.control import ControlSocket
from fl_server.device_states import fleet_selector
from fl_server.engine import RoundEngine
from fl_server.field import FieldService
from fl_server.history import RoundRecord
from fl_server.home import ServerHome
from fl_server.services import Services
from fl_server.superlink import SuperLink

log = logging.getLogger(__name__)
STAGE = "federated"


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What one ``server run`` does. min_devices are waited for, ``wait_seconds`` at most, before the first round."""

    home: ServerHome
    application: Application
    config: Any
    start: Checkpoint | None
    num_rounds: int
    seed: int
    out: Path
    min_devices: int
    wait_seconds: float
    stay: bool = False


@dataclass(frozen=True)
class RunResult:
    final: Path
    history: list[RoundRecord]
    devices: tuple[str, ...]


def serve(
    options: RunOptions,
    *,
    on_listening: Callable[[SuperLink], None] = lambda superlink: None,
    on_round: Callable[[RoundRecord], None] | None = None,
    on_result: Callable[[RunResult], None] = lambda result: None,
) -> RunResult:
    """The whole run. Raises EnvironmentFault (port, certificate, broker) before any work, RefusedError without devices.

    With ``stay`` it goes on serving devices after the last round, until SIGTERM or SIGINT; during the run these raise
    KeyboardInterrupt.
    """
    with _interruptible() as signals, options.home.lock(), Services() as services:
        superlink = SuperLink(options.home)  # binds its port; nothing has started yet
        try:
            field = FieldService(
                options.home,
                superlink.registry,
                tunnel=superlink.tunnel,
                on_event=lambda event, device, facts: _heard(superlink, event),
            )
        except BaseException:
            superlink.stop()
            raise
        services.start(superlink)
        services.start(field)
        superlink.fleet_watch.on_shut_out(field.end_sessions)
        superlink.bell.on_push(lambda nodes: field.wake(_names(superlink, nodes)))
        services.start(control := ControlSocket(options.home.control_socket))
        control.on("fleet-changed", superlink.fleet_watch.asked)
        on_listening(superlink)
        result = _federate(options, superlink, on_round)
        on_result(result)
        if options.stay:
            signals.stay()
    return result


def initial_arrays(application: Application, config: Any, start: Checkpoint | None) -> Arrays:
    """The arrays of the starting checkpoint, or of a fresh model."""
    if start is not None:
        return start.arrays
    from fl_core.learning.torch_arrays import get_arrays

    return get_arrays(application.build_model(config))


def _federate(options: RunOptions, superlink: SuperLink, on_round: Callable[[RoundRecord], None] | None) -> RunResult:
    grid = superlink.grid(str(options.out.resolve()))
    if not (options.out / "final").is_dir():
        grid.wait_devices(max(1, options.min_devices), options.wait_seconds)
    engine = RoundEngine(
        grid=grid,
        application=options.application,
        config=options.config,
        start=options.start,
        initial=initial_arrays(options.application, options.config, options.start),
        num_rounds=options.num_rounds,
        seed=options.seed,
        out=options.out,
        stage=STAGE,
        on_round=on_round,
        selector=fleet_selector(options.config, options.application.name, superlink, options.seed),
    )
    devices = tuple(sorted(grid.device_names().values()))
    final = engine.run()
    grid.close(completed=True)  # an interrupted run stays open: the same command goes on in the same round
    return RunResult(final, engine.history.records, devices)


def _heard(superlink: SuperLink, event: str) -> None:
    if event in ("birth", "state"):
        superlink.bell.ring_engine()  # a round may wait for a device that may be asked


def _names(superlink: SuperLink, nodes: list[int]) -> list[str]:
    names = superlink.directory.names()
    return [names[node] for node in nodes if node in names]


class _Signals:
    """During the run a signal raises KeyboardInterrupt; in ``stay`` it ends the waiting."""

    def __init__(self) -> None:
        self._stop, self._staying = threading.Event(), False

    def handle(self, number: int, frame: FrameType | None) -> None:
        log.info("stopping on signal %s", signal.Signals(number).name)
        if not self._staying:
            raise KeyboardInterrupt
        self._stop.set()

    def stay(self) -> None:
        self._staying = True
        log.info("the run is done; serving devices until stopped")
        while not self._stop.wait(3600):
            pass


@contextlib.contextmanager
def _interruptible() -> Iterator[_Signals]:
    signals = _Signals()
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return
    before = {number: signal.signal(number, signals.handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
