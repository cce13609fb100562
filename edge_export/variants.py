"""One edge target's model: int8 where it passes its gates, else fp32, with the reason."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy.typing as npt

from edge_export import gates, quantize
from edge_export.samples import Samples
from edge_export.target import EdgeTarget
from fl_core.learning.application import Application
from fl_core.runtime.golden import TOLERANCE
from fl_core.runtime.parity import ParityReport, compare
from fl_core.runtime.session import Session
from fl_core.runtime.timing import Timing, measure, measure_side_by_side

log = logging.getLogger(__name__)
Outputs = Mapping[str, npt.NDArray[Any]]
# A recipe this far inside the tolerances ends the search: another could hardly serve the user better.
GOOD_ENOUGH = 0.2

SHORT_ROUNDS, LONG_ROUNDS = 7, 40


@dataclass(frozen=True)
class Reference:
    """The fp32 model, its outputs on the check samples, and what it costs."""

    path: Path
    session: Session
    outputs: Outputs
    metric: float | None
    timing: Timing


@dataclass(frozen=True)
class Variant:
    """``golden``: outputs on the golden samples; ``note``: why fp32 was shipped where int8 was wanted."""

    target: EdgeTarget
    path: Path
    precision: str
    recipe: str
    parity: ParityReport
    drift: float
    metric: float | None
    timing: Timing | None
    golden: Outputs
    note: str = ""

    def facts(self) -> dict[str, Any]:
        """The target's entry in the bundle's manifest, less file, sha256 and bytes."""
        quantized = self.precision == "int8"
        return {
            "precision": self.precision,
            "activation_type": self.target.activation_type if quantized else "float32",
            "weight_type": self.target.weight_type if quantized else "float32",
            "weight_bits": self.target.weight_bits if quantized else 32,
            "recipe": self.recipe,
            "parity": self.parity.to_json(),
            "score_drift": self.drift,
            "metric": self.metric,
            "latency_ms": self.timing.to_json() if self.timing else None,
            "golden_tolerance": TOLERANCE[self.precision],
            "note": self.note,
        }


@dataclass(frozen=True)
class Candidate:
    path: Path
    recipe: str
    session: Session
    outputs: Outputs
    drift: float
    metric: float | None
    loss: float | None


def build_variant(
    application: Application, config: Any, target: EdgeTarget, reference: Reference, samples: Samples, work: Path
) -> Variant:
    """Model files are written to ``work``; the variant's is ``work/model.TARGET.onnx``."""
    final = work / f"model.{target.name}.onnx"
    note = ""
    if target.precisions[0] == "int8":
        best = find_int8(application, config, target, reference, samples, work)
        note = "int8 could not be made of this model" if best is None else refuse(config, best)
        if best is not None and not note:
            variant, note = try_int8(target, best, reference, samples, final)
            if variant is not None:
                return variant
    shutil.copyfile(reference.path, final)
    golden = reference.session.run(samples.golden.inputs)
    same = compare(reference.outputs, reference.outputs)
    timing = reference.timing if target.runs_here() else None
    return Variant(target, final, "fp32", "", same, 0.0, reference.metric, timing, golden, note)


def try_int8(
    target: EdgeTarget, best: Candidate, reference: Reference, samples: Samples, final: Path
) -> tuple[Variant | None, str]:
    """(variant, "") where it also pays, else (None, the reason)."""
    one = samples.golden.take(slice(0, 1)).inputs
    sizes = (reference.path.stat().st_size, best.path.stat().st_size)
    reason = ""
    # A bout of other load can outlast the short comparison: only the long one may throw a model away.
    for rounds in (SHORT_ROUNDS, LONG_ROUNDS) if target.runs_here() else (0,):
        costs: list[float] | list[None] = [None, None]
        if rounds:
            costs = measure_side_by_side([reference.session, best.session], one, rounds=rounds)
        fp32, int8 = (gates.Cost(bytes=size, latency_ms=cost) for size, cost in zip(sizes, costs, strict=True))
        reason = gates.why_not_cheaper(fp32, int8)
        if not reason:
            break
    if reason:
        return None, reason
    shutil.copyfile(best.path, final)
    parity = compare(reference.outputs, best.outputs)
    golden = best.session.run(samples.golden.inputs)
    timing = measure(best.session, one) if target.runs_here() else None
    return Variant(target, final, "int8", best.recipe, parity, best.drift, best.metric, timing, golden), ""


def find_int8(
    application: Application, config: Any, target: EdgeTarget, reference: Reference, samples: Samples, work: Path
) -> Candidate | None:
    """The recipe that holds the gates with the least score drift on the check samples; None where none can be made.

    One that leaves a part of the weights in float drifts less and weighs more: it counts only where no other holds the gates.
    """
    prepared = work / "prepared.onnx"
    try:
        quantize.prepare(reference.path, prepared)
    except Exception:  # the quantiser raises many kinds; fp32 is shipped then
        log.debug("the model cannot be prepared for quantisation", exc_info=True)
        return None
    best: Candidate | None = None
    for number, recipe in enumerate(quantize.recipes(prepared)):
        if recipe.share < 1 and best is not None and not refuse(config, best):
            break
        path = work / f"{target.name}.{number}.onnx"
        session = quantize.quantize(prepared, path, recipe, target, samples.calibration)
        if session is None:
            continue
        outputs = session.run(samples.check.inputs)
        drift = gates.score_drift(application, config, reference.outputs, outputs)
        metric = gates.primary_metric(application, config, outputs, samples.check)
        loss = gates.metric_loss(application, reference.metric, metric)
        log.debug("%s, %s: score drift %.4g, metric %s", target.name, recipe.name, drift, metric)
        candidate = Candidate(path, recipe.name, session, outputs, drift, metric, loss)
        if best is None or rank(config, candidate) < rank(config, best):
            best = candidate
        if drift <= GOOD_ENOUGH * config.export.int8_tolerance and (loss or 0.0) <= GOOD_ENOUGH * gates.MAX_METRIC_LOSS:
            break
    return best


def rank(config: Any, candidate: Candidate) -> tuple[bool, float]:
    return bool(refuse(config, candidate)), candidate.drift


def refuse(config: Any, candidate: Candidate) -> str:
    """Empty where the candidate holds the accuracy gates; else the reason."""
    if not candidate.drift <= config.export.int8_tolerance:
        return f"int8 moves the scores by {candidate.drift:.3g}, {config.export.int8_tolerance:.3g} is allowed"
    if candidate.loss is not None and not candidate.loss <= gates.MAX_METRIC_LOSS:
        return f"int8 loses {candidate.loss:.4f} of the primary metric, {gates.MAX_METRIC_LOSS} is allowed"
    return ""
