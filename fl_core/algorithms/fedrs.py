"""FedRS (Li and Zhan, KDD 2021): in training, each client's scores of classes that it has no example of are held back.

Under label skew a client's cross-entropy pushes the absent classes' weights away from every one of its features, and the mean over clients
forgets them. Here the scores (logits) of absent classes are multiplied by ``algorithm.restriction`` before the loss (the paper's alpha, 0.5 there): 1 is
FedAvg, 0 leaves those weights without a gradient. The server averages. For classifiers: integer targets, one score a class.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fl_core.algorithms.base import Algorithm, ClientUpdate, LocalStart, MeanAggregator
from fl_core.contracts.errors import InputError
from fl_core.contracts.sections import AlgorithmConfig

if TYPE_CHECKING:
    from torch import Tensor


class RestrictedUpdate(ClientUpdate):
    def __init__(self, restriction: float) -> None:
        self.restriction = restriction
        self._present: npt.NDArray[np.int64] | None = None

    def begin(self, start: LocalStart) -> ClientUpdate:
        return RestrictedUpdate(self.restriction)

    def prepare(self, targets: npt.NDArray[Any]) -> None:
        if targets.ndim != 1 or targets.dtype.kind not in "iu":
            raise InputError(
                f"algorithm.name = 'fedrs' is for classifiers: targets {targets.dtype}{list(targets.shape)} are no classes",
                remedy="another algorithm, such as fedprox or scaffold",
            )
        if targets.min(initial=0) < 0:
            raise InputError("algorithm.name = 'fedrs': a target below 0 is no class")
        self._present = np.unique(targets).astype(np.int64)

    def restrict(self, outputs: Any) -> Any:
        if self._present is None or not hasattr(outputs, "ndim") or outputs.ndim != 2:
            raise InputError("algorithm.name = 'fedrs' is for models of one output, a score a class")
        scores: Tensor = outputs
        if self._present.max(initial=0) >= scores.shape[1]:
            raise InputError(f"algorithm.name = 'fedrs': a target above {scores.shape[1] - 1} has no score")
        scale = scores.new_full((scores.shape[1],), self.restriction)
        scale[self._present.tolist()] = 1.0
        return scores * scale


def build(config: AlgorithmConfig) -> Algorithm:
    return Algorithm(MeanAggregator(), RestrictedUpdate(config.restriction))
