"""How far a candidate model's outputs are from the reference model's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fl_core.contracts.errors import InputError

Arrays = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True, kw_only=True)
class ParityReport:
    """max_abs: largest |difference|; relative_max: that over the largest |reference| (at least 1e-12);
    relative_l2: norm of the difference over the norm of the reference; agreement: share of examples with the same
    top-1 class (outputs (N, K>1), classes on the axis 1) or the same sign (one value an example)."""

    max_abs: float
    relative_max: float
    relative_l2: float
    agreement: float
    num_examples: int

    def to_json(self) -> dict[str, float | int]:
        return asdict(self)


def compare(reference: Arrays, candidate: Arrays) -> ParityReport:
    """The worst over the outputs of ``reference``; every output is (N, ...).

    Raises InputError when an output is missing, or differs in shape or in where it is not finite.
    """
    worst = ParityReport(max_abs=0.0, relative_max=0.0, relative_l2=0.0, agreement=1.0, num_examples=0)
    for name, expected in reference.items():
        if name not in candidate:
            raise InputError(f"output {name!r} is missing", remedy=f"outputs: {', '.join(candidate) or 'none'}")
        one = _compare_one(name, np.asarray(expected), np.asarray(candidate[name]))
        worst = ParityReport(
            max_abs=max(worst.max_abs, one.max_abs),
            relative_max=max(worst.relative_max, one.relative_max),
            relative_l2=max(worst.relative_l2, one.relative_l2),
            agreement=min(worst.agreement, one.agreement),
            num_examples=one.num_examples,
        )
    return worst


def _compare_one(name: str, expected: npt.NDArray[Any], got: npt.NDArray[Any]) -> ParityReport:
    if expected.shape != got.shape:
        raise InputError(f"output {name!r} is {list(got.shape)}, the reference is {list(expected.shape)}")
    a, b = expected.astype(np.float64), got.astype(np.float64)
    finite = np.isfinite(a)
    if not np.array_equal(finite, np.isfinite(b)):
        raise InputError(f"output {name!r} is not finite in the same places as the reference")
    a, b = np.where(finite, a, 0.0), np.where(finite, b, 0.0)
    max_abs = float(np.abs(a - b).max(initial=0.0))
    scale = float(np.abs(a).max(initial=0.0))
    norm = float(np.linalg.norm(a))
    return ParityReport(
        max_abs=max_abs,
        relative_max=max_abs / max(scale, 1e-12) if max_abs else 0.0,
        relative_l2=float(np.linalg.norm(a - b)) / max(norm, 1e-12) if max_abs else 0.0,
        agreement=float(np.mean(_decision(a) == _decision(b))) if a.size else 1.0,
        num_examples=len(a),
    )


def _decision(values: npt.NDArray[np.float64]) -> npt.NDArray[Any]:
    if values.ndim >= 2 and values.shape[1] > 1:
        decided: npt.NDArray[Any] = values.argmax(axis=1)
        return decided
    return values > 0
