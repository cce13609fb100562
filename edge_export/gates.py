"""What a model must hold to be shipped: fp32 against torch (hard), int8 against fp32 (or fp32 is shipped instead)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fl_core.contracts.errors import GoalMissed
from fl_core.learning.application import Application
from fl_core.learning.examples import Examples
from fl_core.runtime.parity import ParityReport

Outputs = Mapping[str, npt.NDArray[Any]]
MAX_METRIC_LOSS = 0.005
# int8 pays where it saves a tenth of the bytes without being much slower, or of the time without being larger.
SMALLER, FASTER, SLACK = 0.9, 0.9, 1.25


def check_fp32(report: ParityReport, tolerance: float) -> None:
    """Raises GoalMissed when onnxruntime differs from torch by more than ``tolerance`` of the output's scale."""
    if not report.relative_max <= tolerance:
        raise GoalMissed(
            f"parity: onnxruntime differs from torch by {report.relative_max:.3g} of the output's scale, "
            f"{tolerance:.3g} is allowed (export.parity_tolerance)",
            remedy="nothing was written; look for an operator that the exporter renders differently, such as a random one",
        )


def score_drift(application: Application, config: Any, reference: Outputs, candidate: Outputs) -> float:
    """Mean |difference| of the scores that users read, the worst over the float columns of ``postprocess``.

    In units of the score where the reference lies in [0, 1], else of its standard deviation. Where there is no float
    column, the share of examples that differ; decisions beside scores are the metric's business.
    """
    a, b = application.postprocess(config, reference), application.postprocess(config, candidate)
    scores = [name for name, column in a.items() if column.dtype.kind == "f"]
    if scores:
        return max(_mean_shift(a[name], b[name]) for name in scores)
    return max((float(np.mean(a[name] != b[name])) for name in a), default=0.0)


def _mean_shift(expected: npt.NDArray[Any], got: npt.NDArray[Any]) -> float:
    if not expected.size:
        return 0.0
    inside = expected.min() >= 0 and expected.max() <= 1
    scale = 1.0 if inside else max(float(np.std(expected)), 1e-12)
    drift = float(np.mean(np.abs(expected - got))) / scale
    return drift if np.isfinite(drift) else float("inf")


def primary_metric(application: Application, config: Any, outputs: Outputs, examples: Examples) -> float | None:
    """None where the metric is undefined on these examples."""
    return application.metrics(config, outputs, examples).get(application.primary_metric)


def metric_loss(application: Application, before: float | None, after: float | None) -> float | None:
    """How much worse ``after`` is: absolute where higher is better, relative where lower is; None where undefined."""
    if before is None or after is None:
        return None
    if application.higher_is_better:
        return before - after
    return (after - before) / max(abs(before), 1e-12)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """``latency_ms``: median processor time of single queries; None where the target is another machine's."""

    bytes: int
    latency_ms: float | None


def why_not_cheaper(fp32: Cost, int8: Cost) -> str:
    """Empty where int8 pays; else the reason for which it is thrown away."""
    smaller = int8.bytes / fp32.bytes
    slower = int8.latency_ms / fp32.latency_ms if int8.latency_ms and fp32.latency_ms else None
    if smaller <= SMALLER and (slower is None or slower <= SLACK):
        return ""
    if slower is not None and slower <= FASTER and smaller <= SLACK:
        return ""
    time = "its latency was not measured here" if slower is None else f"{slower:.2f} times its latency"
    return f"int8 does not pay: {smaller:.2f} times the bytes of fp32, {time}"
