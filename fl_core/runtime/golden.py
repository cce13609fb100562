"""Golden samples: inputs with the outputs that each target produced at export; a device runs them before it trusts a model.

``golden.npz`` holds ``input/NAME``, ``fp32/OUTPUT`` and, for every edge target, ``TARGET/OUTPUT``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fl_core.contracts.bundle import GOLDEN_NAME, Bundle
from fl_core.contracts.errors import GoalMissed, InputError, IntegrityError
from fl_core.runtime.parity import ParityReport, compare
from fl_core.runtime.session import Session
from fl_core.storage import archive

Array = npt.NDArray[Any]
GOLDEN_LIMIT = 256 * 2**20
INPUT = "input"
FP32 = "fp32"
# Relative to the largest |output|. Other processors round and saturate int8 differently (AVX2 without VNNI adds in
# 16 bits), so int8 has the wider bound; a wrong or damaged model misses either by far.
TOLERANCE = {"fp32": 1e-3, "int8": 0.15}


@dataclass(frozen=True)
class Golden:
    """inputs: name -> (N, ...); outputs: target (or ``fp32``) -> output name -> (N, ...)."""

    inputs: Mapping[str, Array]
    outputs: Mapping[str, Mapping[str, Array]]


def write_golden(path: Path, golden: Golden) -> None:
    arrays = {f"{INPUT}/{name}": array for name, array in golden.inputs.items()}
    for target, outputs in golden.outputs.items():
        arrays.update({f"{target}/{name}": array for name, array in outputs.items()})
    with path.open("wb") as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]


def read_golden(path: Path) -> Golden:
    """Raises DataError (not readable) or IntegrityError (an array's name is none of those above)."""
    inputs: dict[str, Array] = {}
    outputs: dict[str, dict[str, Array]] = {}
    for key, array in archive.read_npz(path, limit=GOLDEN_LIMIT).items():
        owner, _, name = key.partition("/")
        if not owner or not name:
            raise IntegrityError(f"{path}: array {key!r} is not named OWNER/NAME", remedy="fetch the bundle again")
        (inputs if owner == INPUT else outputs.setdefault(owner, {}))[name] = array
    return Golden(inputs, outputs)


def golden_check(bundle: Bundle, target: str, *, session: Session | None = None) -> ParityReport:
    """Run the golden inputs through the model of ``target``.

    Raises GoalMissed when the outputs are not the ones of the export, IntegrityError when the samples do not fit
    the model. The tolerance is the manifest's ``golden_tolerance``, at most the one of the precision.
    """
    facts = bundle.manifest.targets.get(target)
    session = session or Session(bundle.model_file(target))
    golden = read_golden(bundle.folder / GOLDEN_NAME)
    if facts is None or not golden.inputs or not golden.outputs.get(target):
        raise IntegrityError(f"{bundle.folder / GOLDEN_NAME}: holds no samples for edge target {target!r}")
    bound = TOLERANCE.get(str(facts.get("precision")), TOLERANCE["fp32"])
    stated = facts.get("golden_tolerance", bound)
    tolerance = min(float(stated), bound) if isinstance(stated, (int, float)) else bound
    try:
        report = compare(golden.outputs[target], session.run(golden.inputs))
    except InputError as error:
        raise IntegrityError(f"{bundle.folder}: the golden samples do not fit the model: {error.message}") from None
    if not report.relative_max <= tolerance:
        raise GoalMissed(
            f"{bundle.folder}: the self-test of {target!r} is off by {report.relative_max:.3g} of the output's scale, "
            f"{tolerance:.3g} is allowed",
            remedy="export for this processor, or report the processor and its onnxruntime version",
        )
    return report
