"""One application's model on this device's own data: predictions stay in a file, a summary is returned."""

from __future__ import annotations

import csv
import datetime
import io
import statistics
import time
from pathlib import Path
from typing import Any

from fl_clients.edge.inference import InferenceEngine, Loaded
from fl_clients.edge.samples.store import open_data
from fl_clients.edge.summary import summarize
from fl_core.contracts.errors import EnvironmentFault
from fl_core.learning.examples import RawData
from fl_core.storage import atomic

KEEP_PREDICTIONS = 10
LATENCY_RUNS = 25
PRIVATE_COLUMNS = ("group",)


def infer(engine: InferenceEngine, data: Path, predictions: Path) -> dict[str, Any]:
    """Raises EnvironmentFault (no model, no data) or DataError (the data are not readable)."""
    model = engine.model()
    if not data.is_dir():
        raise EnvironmentFault(f"{data}: no data on this device", remedy="name its folder with --data or in agent.toml")
    with open_data(model.application, model.config, data, labelled=False, client="device") as raw:
        return _infer(engine, model, raw, predictions)


def _infer(engine: InferenceEngine, model: Loaded, raw: RawData, predictions: Path) -> dict[str, Any]:
    began = time.perf_counter()
    columns = engine.infer(raw)
    count = len(columns["example_id"])
    milliseconds = 1000 * (time.perf_counter() - began) / count
    _write(columns, model.version, predictions)
    return {
        **summarize(columns),
        "num_examples": count,
        "ms_per_example": round(milliseconds, 3),
        "latency_ms_p50": _latency(model, raw),
        "model": model.facts(),
    }


def _latency(model: Loaded, raw: RawData) -> float | None:
    """Median milliseconds of the model on one example, without preprocessing; None where no client has examples."""
    for client in raw.client_ids():
        examples = raw.select([client]).examples(model.config)
        if len(examples) == 0:
            continue
        times = []
        for number in range(LATENCY_RUNS):
            one = examples.take([number % len(examples)])
            began = time.perf_counter()
            model.session.run(one.inputs)
            times.append(1000 * (time.perf_counter() - began))
        return round(statistics.median(times), 3)
    return None


def _write(columns: dict[str, Any], version: int, folder: Path) -> None:
    """TIME-vVERSION.csv; the newest files are kept."""
    stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%S%f")
    names = [name for name in columns if name not in PRIVATE_COLUMNS]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(names)
    writer.writerows(zip(*(columns[name] for name in names), strict=True))
    atomic.write_bytes(folder / f"{stamp}-v{version}.csv", out.getvalue().encode(), mode=0o600)
    for old in sorted(folder.glob("*.csv"))[:-KEEP_PREDICTIONS]:
        old.unlink()
