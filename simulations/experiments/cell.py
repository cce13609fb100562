"""Runs one cell, from its manifest to its result; a cell that was interrupted goes on in its round."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fl_core.contracts import checkpoint as checkpoints
from fl_core.contracts.errors import IntegrityError
from fl_core.contracts.installed import application_version, package_version
from fl_core.learning.application import application
from fl_core.learning.examples import Examples
from fl_core.learning.sources import open_data
from fl_core.storage import atomic
from fl_server.history import RoundRecord, check_applied
from simulations.engine.names import AUTO
from simulations.engine.native.build import version as kernels_version
from simulations.experiments.plan import RESULT, Cell, locked, read_cell
from simulations.experiments.trackers import Tracking, open_trackers
from simulations.simulate import ENGINE_NAME, Simulation, simulate

RUN = "run"


def versions() -> dict[str, str]:
    found = {name: package_version(name) or "" for name in ("fieldfleet", "flwr", "numpy")}
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "kernels": kernels_version(),
        **found,
    }


def run_cell(
    folder: Path, tracking: Tracking, *, on_round: Callable[[RoundRecord], None] = lambda record: None
) -> None:
    """The rest of the cell; nothing when it is finished. Raises what the simulation raises, IntegrityError for other data."""
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / ".lock"):  # what an earlier command left running ends first
        if (folder / RESULT).is_file():
            return
        cell, began = read_cell(folder), time.monotonic()
        with ExitStack() as stack:
            done = last_round(folder / RUN)
            trackers = [stack.enter_context(t) for t in open_trackers(tracking, cell, folder, done)]

            def seen(record: RoundRecord) -> None:
                for tracker in trackers:
                    tracker.round(record)
                on_round(record)

            digest, found = simulate_cell(cell, folder / RUN, seen)
            manifest = checkpoints.load(found.final).manifest
            cell = replace(
                cell,
                examples_sha256=digest,
                engine=json.loads((folder / RUN / ENGINE_NAME).read_text()),
                model_sha256=manifest.model_sha256,
            )
            cell.write(folder)
            for tracker in trackers:
                tracker.finish(found.history, manifest.metrics)
        check_applied(found.history)
        result = {
            "model_sha256": manifest.model_sha256,
            "metrics": manifest.metrics,
            "seconds": sum(r.seconds for r in found.history),
            "this_call_seconds": time.monotonic() - began,
            "updates": sum(len(r.clients) for r in found.history),
        }
        atomic.write_json(folder / RESULT, result)


def simulate_cell(cell: Cell, out: Path, on_round: Callable[[RoundRecord], None]) -> tuple[str, Simulation]:
    """(sha256 of its examples, the simulation). Raises IntegrityError when the examples are not those of the manifest."""
    app = application(cell.application)
    config = app.configure_from(cell.config, origin=f"manifest of {cell.name}")
    start = checkpoints.load(Path(cell.start)) if cell.start else None
    if start is not None and start.manifest.model_sha256 != cell.start_sha256:
        raise IntegrityError(f"{cell.start}: its model is not the one that {cell.name} starts from")
    raw = open_data(app, config, cell.data, seed=cell.seed).raw
    digest = fingerprint(raw.examples(config))
    if cell.examples_sha256 and digest != cell.examples_sha256:
        raise IntegrityError(f"{cell.data}: other data than those of {cell.name}", remedy="name the data set it ran on")
    options = dict(cell.options)
    if cell.engine:  # as it was chosen then, whatever this machine would choose
        options["engine"] = AUTO
        atomic.write_json(out / ENGINE_NAME, cell.engine)
    found = simulate(
        app, config, raw, start=start, num_rounds=cell.rounds, seed=cell.seed, out=out, on_round=on_round, **options
    )  # fmt: skip
    return digest, found


def fingerprint(examples: Examples) -> str:
    """sha256 over inputs, targets and owners, in the order of example ids."""
    order = np.argsort(examples.columns["example_id"], kind="stable")
    arrays: dict[str, Any] = {**examples.inputs, "targets": examples.targets}
    parts = [
        f"{k} {v.dtype} {v.shape}".encode() + np.ascontiguousarray(v[order]).tobytes()
        for k, v in sorted(arrays.items())
    ]
    owners = json.dumps(examples.columns["client"][order].tolist()).encode()
    return atomic.sha256_bytes(b"".join([*parts, owners]))


def last_round(run: Path) -> int:
    """Of an interrupted run; 0 for a new one."""
    return max((int(p.name.removeprefix("round-")) for p in run.glob("round-*")), default=0)


def this_application_version(name: str) -> str:
    return application_version(name) or ""
