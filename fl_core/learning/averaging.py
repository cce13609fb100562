"""The running mean of a model over its last rounds or epochs (Polyak & Juditsky 1992; Izmailov et al. 2018)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from fl_core.algorithms.base import cast_like
from fl_core.contracts.arrays import Arrays

COUNT, SUMS = "average/count", "average/sums/"


class ModelAverage:
    """Averages the models of the last ``fraction`` of ``steps``; empty (``result`` is the last model) at fraction 0."""

    def __init__(self, fraction: float, steps: int) -> None:
        self.first = steps - math.ceil(fraction * steps) + 1 if fraction > 0 else steps + 1
        self.count, self.sums = 0, dict[str, npt.NDArray[np.float64]]()

    def add(self, step: int, arrays: Arrays) -> None:
        if step < self.first:
            return
        self.count += 1
        for name, a in arrays.items():
            self.sums[name] = self.sums.get(name, 0.0) + a.astype(np.float64)

    def result(self, last: Arrays) -> dict[str, npt.NDArray[Any]]:
        if self.count == 0:
            return {k: np.array(v) for k, v in last.items()}
        return {k: cast_like(self.sums[k] / self.count, v) for k, v in last.items()}

    def save(self) -> dict[str, npt.NDArray[Any]]:
        return {COUNT: np.array([self.count], np.int64), **{SUMS + k: v for k, v in self.sums.items()}}

    def load(self, table: Arrays) -> None:
        self.count = int(table[COUNT][0]) if COUNT in table else 0
        self.sums = {k.removeprefix(SUMS): np.array(v, np.float64) for k, v in table.items() if k.startswith(SUMS)}
