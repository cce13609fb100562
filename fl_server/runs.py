"""The runs of one server: each with its name, its thread, its engine and its grid, after each other or side by side."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import math
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fl_core.contracts import checkpoint as checkpoints
from fl_core.contracts.cli import LOG_FACTS
from fl_core.contracts.errors import FieldfleetError, InputError, Interrupted, RefusedError
from fl_server.federation import read_federation
from fl_server.history import RoundRecord
from fl_server.home import ServerHome
from fl_server.run import RunOptions, RunResult, federate
from fl_server.run_table import RunSpec, RunTable, Status
from fl_server.superlink import SuperLink

log = logging.getLogger(__name__)
STOP_S = 20.0
START_FOLDER = ".start"  # a copy of the checkpoint that a run began with: it must be there at every restart
OnRound = Callable[[str, RoundRecord], None]


class ActiveRun:
    """A run under way. ``result`` waits for its end."""

    def __init__(self, options: RunOptions, on_round: Callable[[RoundRecord], None] | None) -> None:
        self.options, self.on_round = options, on_round
        self.stop, self.done = threading.Event(), threading.Event()
        self.asked_to_stop = False  # by an operator, rather than by the end of the server
        self.outcome: RunResult | None = None
        self.error: BaseException | None = None

    def result(self, timeout: float | None = None) -> RunResult:
        """Raises what ended the run; RefusedError when it has not ended in time."""
        if not self.done.wait(timeout):
            raise RefusedError(f"run {self.options.name!r} goes on", remedy="wait again")
        if self.error is not None:
            raise self.error
        assert self.outcome is not None
        return self.outcome


class RunManager:
    """A service: stop() ends every run at its next safe point; those of a standing server go on at its next start."""

    def __init__(self, superlink: SuperLink, *, on_round: OnRound | None = None) -> None:
        self._superlink, self._table = superlink, superlink.registry.runs
        self._on_round = on_round or (lambda name, record: None)
        self._active: dict[str, ActiveRun] = {}
        self._lock = threading.Lock()
        self._closing = False

    @property
    def table(self) -> RunTable:
        return self._table

    def start(self) -> None:
        pass

    def stop(self) -> None:
        with self._lock:
            self._closing = True
            runs = list(self._active.values())
        for run in runs:
            run.stop.set()
        self._superlink.bell.ring_engine()
        for run in runs:
            if not run.done.wait(STOP_S):
                log.warning("run %s did not stop in time; it is taken up where it was last saved", run.options.name)

    def begin(
        self, options: RunOptions, *, attended: bool = False, on_round: Callable[[RoundRecord], None] | None = None
    ) -> ActiveRun:
        run = ActiveRun(options, on_round)
        with self._lock:
            if self._closing:
                raise RefusedError("the server is stopping")
            if options.name in self._active:
                raise InputError(f"run {options.name!r} is under way")
            self._active[options.name] = run
        threading.Thread(target=self._run, args=(run, attended), name=f"run-{options.name}", daemon=True).start()
        return run

    def resume_all(self) -> list[str]:
        """After a restart: every run that was under way goes on."""
        resumed = []
        for row in self._table.all():
            if row.status != "running":
                continue
            if row.attended:  # its command was killed, and takes it up when it is repeated
                self._table.note(row.spec.name, "stopped")
                continue
            try:
                self.begin(options_of(self._superlink.home, row.spec))
                resumed.append(row.spec.name)
            except FieldfleetError as error:
                self._table.note(row.spec.name, "failed", error=str(error))
                log.exception("run %s could not be resumed", row.spec.name)
        return resumed

    # the control socket

    def asked_start(self, request: Mapping[str, Any]) -> dict[str, Any]:
        spec = spec_from(request.get("spec"))
        if self._table.find(spec.name) is not None:
            self._table.add(spec, attended=False)  # says what is wrong
        options = options_of(self._superlink.home, spec)
        if options.start is not None:
            folder = options.out / START_FOLDER
            checkpoints.Checkpoint(options.start.manifest, options.start.arrays).save(folder)
            spec = dataclasses.replace(spec, start=str(folder.relative_to(self._superlink.home.path)))
        self._table.add(spec, attended=False)
        self.begin(options)
        return self._table.get(spec.name).facts()

    def asked_resume(self, request: Mapping[str, Any]) -> dict[str, Any]:
        row = self._table.get(str(request.get("name")))
        if row.attended:
            raise InputError(f"run {row.spec.name!r} is of a 'server run' command", remedy="repeat that command")
        if row.status == "finished":
            raise InputError(f"run {row.spec.name!r} is finished")
        if row.spec.name not in self._active:
            options = options_of(self._superlink.home, row.spec)
            self._table.note(row.spec.name, "running")
            self.begin(options)
        return self._table.get(row.spec.name).facts()

    def asked_stop(self, request: Mapping[str, Any]) -> dict[str, Any]:
        row = self._table.get(str(request.get("name")))
        run = self._active.get(row.spec.name)
        if run is None:
            if row.status == "running":
                self._table.note(row.spec.name, "stopped")
        else:
            run.asked_to_stop = True
            run.stop.set()
            self._superlink.bell.ring_engine()
            run.done.wait(STOP_S)
        return self._table.get(row.spec.name).facts()

    def asked_wait(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Returns when the run has ended, or after ``seconds``."""
        row = self._table.get(str(request.get("name")))
        run = self._active.get(row.spec.name)
        if run is not None:
            run.done.wait(float(request.get("seconds", 0.0)))
        return self._table.get(row.spec.name).facts()

    # the thread of a run

    def _run(self, run: ActiveRun, attended: bool) -> None:
        name = run.options.name
        LOG_FACTS.set({"run": name})

        def on_round(record: RoundRecord) -> None:
            self._table.note_round(name, record.round)
            self._on_round(name, record)
            if run.on_round is not None:
                run.on_round(record)

        status: Status | None = None
        try:
            run.outcome = federate(run.options, self._superlink, stop=run.stop, on_round=on_round)
            status = "finished"
        except Interrupted as error:
            run.error = error
            status = "stopped" if run.asked_to_stop or attended else None  # None: goes on at the next start
        except FieldfleetError as error:
            run.error, status = error, "failed"
            log.error("run failed: %s", error.message)
        except BaseException as error:
            run.error, status = error, "failed"
            log.exception("run failed")
        finally:
            if status is not None:
                self._table.note(name, status, error=str(run.error) if status == "failed" else "")
            with self._lock:
                self._active.pop(name, None)
            log.info("run ended: %s", status or "until the next start")
            run.done.set()


def options_of(home: ServerHome, spec: RunSpec) -> RunOptions:
    """A stored run, parsed and checked. Raises as ``read_federation``."""
    out, start = home.path / spec.out, home.path / spec.start if spec.start else None  # an absolute path stays one
    args = argparse.Namespace(
        application=spec.application,
        overrides=list(spec.overrides),
        preset=spec.preset,
        rounds=spec.rounds,
        start=start,
        out=out,
    )
    found = read_federation(args)
    minimum = found.config.algorithm.min_clients if spec.min_devices is None else spec.min_devices
    if minimum < 0 or (spec.wait_s is not None and spec.wait_s < 0):
        raise InputError("--min-devices and --wait must not be negative")
    return RunOptions(
        home=home,
        name=spec.name,
        application=found.application,
        config=found.config,
        start=found.start,
        num_rounds=spec.rounds,
        seed=spec.seed,
        out=out,
        grid=str(out) if Path(spec.out).is_absolute() else f"run {spec.name}",  # a home may be restored elsewhere
        min_devices=minimum,
        wait_seconds=math.inf if spec.wait_s is None else spec.wait_s,
    )


def spec_from(table: Any) -> RunSpec:
    """From the control socket. Raises InputError."""
    try:
        spec = RunSpec(**{**table, "overrides": tuple(table["overrides"])})
        if not isinstance(spec.rounds, int) or not isinstance(spec.seed, int):
            raise TypeError
    except (TypeError, KeyError):
        raise InputError("not the description of a run") from None
    return spec
