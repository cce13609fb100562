"""Native format: a folder with ``rows.csv`` (client, target, x0, x1, ...)."""

from __future__ import annotations

import csv
import io
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from applications.toy_regression.config import Config
from fl_core.contracts.errors import DataError
from fl_core.learning.examples import Examples
from fl_core.storage import atomic, tables

FILE_NAME = "rows.csv"


@dataclass(frozen=True)
class Rows:
    """client: (N,) str; x: (N, F) float32; y: (N,) float32."""

    client: npt.NDArray[np.str_]
    x: npt.NDArray[np.float32]
    y: npt.NDArray[np.float32]

    def client_ids(self) -> tuple[str, ...]:
        return tuple(sorted(set(self.client.tolist())))

    def select(self, clients: Collection[str]) -> Self:
        keep = np.isin(self.client, sorted(clients))
        return type(self)(self.client[keep], self.x[keep], self.y[keep])

    def write(self, folder: Path) -> None:
        with atomic.new_folder(folder) as temporary:
            write_rows(self, temporary)

    def examples(self, config: Any) -> Examples:
        cfg: Config = config
        if self.x.shape[1] != cfg.data.features:
            raise DataError(
                f"{FILE_NAME} has {self.x.shape[1]} feature columns, data.features is {cfg.data.features}",
                remedy=f"--set data.features={self.x.shape[1]}",
            )
        ids = np.array([f"{c}/{i}" for c, i in zip(self.client, positions(self.client), strict=True)])
        return Examples({"features": self.x}, self.y, {"example_id": ids, "client": self.client, "group": ids})


def write_rows(rows: Rows, folder: Path) -> None:
    """Into a folder that exists."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["client", "target", *(f"x{i}" for i in range(rows.x.shape[1]))])
    for client, target, row in zip(rows.client, rows.y, rows.x, strict=True):
        writer.writerow([client, repr(float(target)), *(repr(float(v)) for v in row)])
    (folder / FILE_NAME).write_text(out.getvalue(), encoding="utf-8")


def positions(client: npt.NDArray[np.str_]) -> list[int]:
    """Each row's number among its client's rows: an id must not depend on which other clients are present."""
    seen: dict[str, int] = {}
    result = []
    for name in client.tolist():
        result.append(seen.get(name, 0))
        seen[name] = result[-1] + 1
    return result


def read(path: Path) -> Rows:
    """Raises DataError naming the file, the column or the line."""
    file = path / FILE_NAME
    table = tables.read_csv(file, required=("client", "target", "x0"))
    names = [n for n in table[0] if n.startswith("x") and n[1:].isdigit()]
    try:
        x = np.array([[float(row[n]) for n in names] for row in table], np.float32)
        y = np.array([float(row["target"]) for row in table], np.float32)
    except ValueError as error:
        raise DataError(f"{file}: {error}") from None
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise DataError(f"{file}: holds values that are not finite")
    return Rows(np.array([row["client"] for row in table]), x, y)
