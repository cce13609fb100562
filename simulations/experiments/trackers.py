"""Where the rounds of a cell are written beside its history: Parquet, TensorBoard, MLflow. Each is an option."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from fl_core.contracts.errors import EnvironmentFault, InputError
from fl_core.storage import atomic
from fl_server.history import RoundRecord
from simulations.experiments.plan import Cell, locked

PARQUET, TENSORBOARD, MLFLOW_RUN = "clients.parquet", "tensorboard", "mlflow.json"
STORE = "sqlite:///"
LAST_OF_ROUND = "round/clients"


@dataclass(frozen=True, kw_only=True)
class Tracking:
    """mlflow: a store as sqlite:///FILE, "" = none; experiment: its name there."""

    parquet: bool = False
    tensorboard: bool = False
    mlflow: str = ""
    experiment: str = "fieldfleet"

    def check(self) -> None:
        """Raises EnvironmentFault when a package is missing, InputError for a store that is not a file."""
        needed = {"pyarrow": self.parquet, "tensorboard": self.tensorboard, "mlflow": bool(self.mlflow)}
        missing = [name for name, wanted in needed.items() if wanted and importlib.util.find_spec(name) is None]
        if missing:
            options = {"pyarrow": "--parquet", "tensorboard": "--tensorboard", "mlflow": "--mlflow"}
            raise EnvironmentFault(
                f"{options[missing[0]]} needs the package {missing[0]!r}", remedy="pip install 'fieldfleet[tracking]'"
            )
        if self.mlflow and not (self.mlflow.startswith(STORE) and len(self.mlflow) > len(STORE)):
            raise InputError(f"--mlflow {self.mlflow}: must be a local store", remedy=f"write {STORE}FILE")
        if self.mlflow and not (folder := Path(self.mlflow.removeprefix(STORE)).parent).is_dir():
            raise InputError(f"--mlflow {self.mlflow}: {folder} is no folder", remedy="create it first")


class Tracker:
    """round(record) after each round, finish once; between them the process may be killed and start again."""

    def round(self, record: RoundRecord) -> None:
        return

    def finish(self, history: Sequence[RoundRecord], metrics: Mapping[str, float]) -> None:
        return

    def close(self) -> None:
        return

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_trackers(tracking: Tracking, cell: Cell, folder: Path, done: int) -> Iterable[Tracker]:
    """done: rounds that an interrupted run has behind it."""
    if tracking.parquet:
        yield ParquetTracker(folder)
    if tracking.tensorboard:
        yield TensorBoardTracker(folder, done)
    if tracking.mlflow:
        yield MlflowTracker(tracking, cell, folder)


def scalars(record: RoundRecord) -> dict[str, float]:
    """What a round is judged by, by name."""
    found = {f"clients/{k}": v for k, v in record.evaluation.items()}
    found |= {f"held_out/{k}": v for k, v in record.held_out.items()}
    if record.loss is not None:
        found["train/loss"] = record.loss
    found["round/seconds"] = record.seconds
    found[LAST_OF_ROUND] = float(len(record.clients))
    return found


class ParquetTracker(Tracker):
    """One row a client and round: columns round, client, num_examples, refused, train_*, evaluate_*."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / PARQUET

    def finish(self, history: Sequence[RoundRecord], metrics: Mapping[str, float]) -> None:
        import pyarrow
        import pyarrow.parquet

        rows = [row for record in history for row in client_rows(record)]
        columns = dict.fromkeys(key for row in rows for key in row)
        table = pyarrow.table({key: [row.get(key) for row in rows] for key in columns})
        sink = pyarrow.BufferOutputStream()
        pyarrow.parquet.write_table(table, sink, compression="zstd")
        atomic.write_bytes(self._file, sink.getvalue().to_pybytes())


def client_rows(record: RoundRecord) -> Iterable[dict[str, Any]]:
    names = sorted({*record.clients, *record.client_evaluation, *record.refused, *record.late})
    for name in names:
        row: dict[str, Any] = {"round": record.round, "client": name}
        row["num_examples"] = record.num_examples.get(name)
        row["refused"] = record.refused.get(name, "late" if name in record.late else None)
        row |= {f"train_{k}": v for k, v in record.clients.get(name, {}).items()}
        row |= {f"evaluate_{k}": v for k, v in record.client_evaluation.get(name, {}).items()}
        yield row


class TensorBoardTracker(Tracker):
    """Event files; what an interrupted run wrote of rounds that are done again is purged."""

    def __init__(self, folder: Path, done: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / TENSORBOARD), purge_step=done + 1 if done else None)

    def round(self, record: RoundRecord) -> None:
        for name, value in scalars(record).items():
            self._writer.add_scalar(name, value, record.round)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class MlflowTracker(Tracker):
    """One MLflow run a cell, taken up again after an interruption: its id lies in the cell's folder."""

    def __init__(self, tracking: Tracking, cell: Cell, folder: Path) -> None:
        from mlflow import MlflowClient

        with locked(Path(f"{tracking.mlflow.removeprefix(STORE)}.lock")):  # two cannot make the tables at once
            self._client = MlflowClient(tracking_uri=tracking.mlflow)  # makes them
            experiment = self._experiment(tracking.experiment)
        note, self._logged = folder / MLFLOW_RUN, 0
        if note.is_file():
            self._run = str(json.loads(note.read_text(encoding="utf-8"))["run"])
            done = self._client.get_metric_history(self._run, LAST_OF_ROUND)
            self._logged = max((point.step for point in done), default=0)  # done again, to the bit: logged once
            return
        self._run = self._client.create_run(experiment, run_name=cell.name).info.run_id
        for key, value in {**flat(cell.config), "seed": cell.seed, "rounds": cell.rounds, "data": cell.data}.items():
            self._client.log_param(self._run, key, value)
        self._client.set_tag(self._run, "application", cell.application)
        atomic.write_json(note, {"run": self._run})

    def _experiment(self, name: str) -> str:
        found = self._client.get_experiment_by_name(name)
        return str(found.experiment_id if found is not None else self._client.create_experiment(name))

    def round(self, record: RoundRecord) -> None:
        if record.round <= self._logged:
            return
        for name, value in scalars(record).items():
            self._client.log_metric(self._run, name, value, step=record.round)

    def finish(self, history: Sequence[RoundRecord], metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._client.log_metric(self._run, f"final/{name}", value)
        self._client.set_terminated(self._run)


def flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in table.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found
