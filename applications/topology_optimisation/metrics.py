"""What a design is worth: compliance against SIMP's, volume, binarity, floating material. Torch-free; compliance needs scipy."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from applications.topology_optimisation import pipeline
from applications.topology_optimisation.config import Config
from applications.topology_optimisation.problems import Problem
from fl_core.learning.application import Outputs
from fl_core.learning.examples import Examples
from fl_core.learning.seeding import generator

Field = npt.NDArray[np.float64]
FAILED = 1.0  # a design of twice the compliance does not carry its load
ANALYSIS_TOLERANCE, ANALYSIS_LIMIT = 1e-4, 200


def metrics(config: Config, outputs: Outputs, examples: Examples) -> dict[str, float]:
    """compliance_error: mean of c / c_SIMP - 1 over at most data.judged examples; failed: share of them above 1.

    Both compliances are of densities as they are, with the penalty, so that grey material is paid for. floating: share of
    the solid cells that no solid cell joins to a support. Of no example there is nothing to say.
    """
    density = np.asarray(outputs["density"], np.float64)
    if not len(density):
        return {}
    truth = pipeline.target_density(examples.targets).astype(np.float64)
    fraction = np.asarray(examples.inputs["volume_fraction"], np.float64)
    found = {
        "volume_error": float(np.abs(density.mean(axis=(1, 2, 3)) - fraction).mean()),
        "binarity": float(pipeline.binarity(density).mean()),
        "floating": float(np.mean([floating(d, examples.inputs["fixed"][i]) for i, d in enumerate(density)])),
        "density_error": float(np.abs(density - truth).mean()),
    }
    chosen = judged(config, examples)
    if len(chosen):
        errors = np.array([compliance_error(density[i], examples, int(i)) for i in chosen])
        found |= {
            "compliance_error": float(errors.mean()),
            "compliance_error_median": float(np.median(errors)),
            "failed": float(np.mean(errors > FAILED)),
        }
    return found


def judged(config: Config, examples: Examples) -> npt.NDArray[np.int64]:
    """The examples whose compliance is computed: drawn by their number, the same in every call."""
    count = min(config.data.judged, len(examples))
    order = generator("judged designs", len(examples)).permutation(len(examples))
    return np.sort(order[:count])


def compliance_error(density: Field, examples: Examples, index: int) -> float:
    problem = pipeline.problem_of(dict(examples.inputs), index)
    reference = float(examples.columns["compliance"][index])
    if reference <= 0:
        truth = pipeline.target_density(examples.targets)[index].astype(np.float64)
        reference = compliance(problem, truth)
    return compliance(problem, density) / reference - 1


def solid_compliance(problem: Problem, density: npt.NDArray[np.floating[Any]]) -> float:
    """Of the design made of its fullest cells alone, as many as the volume allows: so compared, no design has grey to pay for,
    nor gains by being crisper than a filtered one can be."""
    return compliance(problem, solid(density, problem.volume_fraction))


def solid(density: npt.NDArray[np.floating[Any]], fraction: float) -> Field:
    """1 in the fullest ``fraction`` of the cells, 0 in the others."""
    found = np.zeros(density.size)
    found[np.argsort(-density, axis=None, kind="stable")[: round(fraction * density.size)]] = 1.0
    return found.reshape(density.shape)


def compliance(problem: Problem, density: Field) -> float:
    """f.u; of a design that falls apart, a lower bound."""
    from applications.topology_optimisation.simp import Analysis

    return Analysis(problem, tolerance=ANALYSIS_TOLERANCE, limit=ANALYSIS_LIMIT)(density)[0]


def floating(density: Field, fixed: npt.NDArray[np.generic]) -> float:
    """Share of the solid cells in pieces that touch no support (face neighbours)."""
    solid = density >= pipeline.SOLID
    total = int(solid.sum())
    if not total:
        return 0.0
    held = np.asarray(fixed).astype(bool).any(axis=0)
    for axis in range(held.ndim):  # a cell is held by any of its nodes
        count = held.shape[axis] - 1
        held = np.take(held, np.arange(count), axis) | np.take(held, np.arange(1, count + 1), axis)
    reached = solid & held
    while True:
        grown = reached.copy()
        for axis in range(solid.ndim):
            low, high = [slice(None)] * solid.ndim, [slice(None)] * solid.ndim
            low[axis], high[axis] = slice(None, -1), slice(1, None)
            grown[tuple(low)] |= reached[tuple(high)]
            grown[tuple(high)] |= reached[tuple(low)]
        grown &= solid
        if (grown == reached).all():
            return 1 - float(reached.sum()) / total
        reached = grown


def groups(config: Config, examples: Examples) -> dict[str, npt.NDArray[np.bool_]]:
    return {}
