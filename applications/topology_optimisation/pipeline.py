"""Pre- and post-processing, torch-free: from a design problem to the model's fields, and what is read from a design.

Compliance minimisation does not depend on the size of the load, so forces are scaled by the largest one. ``response`` is one
linear analysis of the solid box, on the grid itself or on one half as fine: the physics that a network need not learn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from applications.topology_optimisation.config import Config
from applications.topology_optimisation.problems import Problem
from fl_core.contracts.errors import EnvironmentFault
from fl_core.learning.application import Outputs, TensorSpec

Field = npt.NDArray[Any]
RESPONSE_CHANNELS = 7  # log of the strain energy, then the strains xx yy zz xy yz xz
RESPONSE_TOLERANCE = 0.08  # two cycles; strains are then right to some 2 %
ENERGY_RANGE = 4.0  # decades below and above the mean
SOLID = 0.5  # densities from here on count as material where a cell must be one or the other


def response_size(config: Config) -> int:
    """Elements along each side of the grid on which ``response`` is computed; 0 where there is none."""
    size = config.data.size
    if config.data.response == "none":
        return 0
    return size // 2 if config.data.response == "coarse" and size % 2 == 0 else size


def inputs(config: Config) -> tuple[TensorSpec, ...]:
    nodes = (config.data.size + 1,) * 3
    found = [
        TensorSpec(name="force", dtype="float32", shape=(-1, 3, *nodes)),
        TensorSpec(name="fixed", dtype="uint8", shape=(-1, 3, *nodes)),
        TensorSpec(name="volume_fraction", dtype="float32", shape=(-1,)),
    ]
    if side := response_size(config):
        found.append(TensorSpec(name="response", dtype="float32", shape=(-1, RESPONSE_CHANNELS, side, side, side)))
    return tuple(found)


def outputs(config: Config) -> tuple[TensorSpec, ...]:
    return (TensorSpec(name="density", dtype="float32", shape=(-1, *(config.data.size,) * 3)),)


def labels(config: Config) -> tuple[str, ...]:
    return ()


def postprocess(config: Config, outputs: Outputs) -> dict[str, Field]:
    """score: binarity of the design; volume: the share that it fills. The design itself is the model's output."""
    density = np.asarray(outputs["density"], np.float64)
    axes = tuple(range(1, density.ndim))
    return {"score": binarity(density), "volume": density.mean(axis=axes)}


def binarity(density: Field) -> Field:
    """(N,): 1 where every cell is void or solid, 0 where all are half full (one minus the M_nd of Sigmund 2007)."""
    result: Field = 1 - (4 * density * (1 - density)).mean(axis=tuple(range(1, density.ndim)))
    return result


def load_scale(problem: Problem) -> float:
    """The largest force at a node that may move."""
    free = np.where(problem.fixed, 0.0, problem.force)
    return float(np.sqrt((free**2).sum(axis=0)).max())


def scaled(problem: Problem) -> Problem:
    """The same problem with a largest force of 1, and no force where it cannot act."""
    force = np.where(problem.fixed, 0.0, problem.force / load_scale(problem)).astype(np.float32)
    return Problem(shape=problem.shape, force=force, fixed=problem.fixed, volume_fraction=problem.volume_fraction)


def prepared(problems: Sequence[Problem], config: Config) -> dict[str, Field]:
    """The model's inputs, by name."""
    those = [scaled(p) for p in problems]
    found: dict[str, Field] = {
        "force": np.stack([p.force for p in those]),
        "fixed": np.stack([p.fixed for p in those]).astype(np.uint8),
        "volume_fraction": np.array([p.volume_fraction for p in those], np.float32),
    }
    if side := response_size(config):
        found["response"] = np.stack([response(p, side) for p in those])
    return found


def problem_of(inputs: dict[str, Field], index: int) -> Problem:
    """The problem back from the model's inputs, with its load as scaled there."""
    force = np.asarray(inputs["force"][index])
    return Problem(
        shape=tuple(n - 1 for n in force.shape[1:]),
        force=force,
        fixed=np.asarray(inputs["fixed"][index]) > 0,
        volume_fraction=float(inputs["volume_fraction"][index]),
    )


def response(problem: Problem, side: int) -> npt.NDArray[np.float32]:
    """(7, side, side, side): what the solid box does under the load."""
    try:
        from applications.topology_optimisation import multigrid
    except ModuleNotFoundError as error:
        raise EnvironmentFault(
            f"{error.name} is not installed, and the analysis of the solid box needs it",
            remedy="pip install 'fieldfleet[design]', or set data.response=none",
        ) from None
    from applications.topology_optimisation.operator import Stiffness

    force, fixed = problem.force.astype(np.float64), problem.fixed
    if side != problem.shape[0]:
        force, fixed = multigrid.restrict(force), _coarse_supports(fixed)
    shape = (side,) * len(problem.shape)
    free = (~fixed).astype(np.float64)
    stiffness, preconditioner = Stiffness(shape, free), multigrid.Multigrid(shape, free)
    solid = np.ones(shape)
    stiffness.update(solid)
    preconditioner.update(solid)
    u = multigrid.solve(stiffness, preconditioner, force, tolerance=RESPONSE_TOLERANCE).u
    energy = stiffness.energy(u)
    mean = float(energy.mean()) or 1.0
    level = np.clip(np.log10(energy / mean + 10**-ENERGY_RANGE), -ENERGY_RANGE, ENERGY_RANGE)
    strains = stiffness.strains(u)
    strains /= float(np.sqrt((strains**2).mean())) or 1.0
    return np.concatenate([level[None], np.arcsinh(strains)]).astype(np.float32)


def _coarse_supports(fixed: Field) -> Field:
    """A node of the coarse grid is held where it or a neighbour on the fine grid is."""
    for axis in range(1, fixed.ndim):
        kept = np.take(fixed, np.arange(0, fixed.shape[axis], 2), axis)
        between = np.take(fixed, np.arange(1, fixed.shape[axis], 2), axis)
        low, high = [slice(None)] * fixed.ndim, [slice(None)] * fixed.ndim
        low[axis], high[axis] = slice(None, -1), slice(1, None)
        kept = kept.copy()
        kept[tuple(low)] |= between
        kept[tuple(high)] |= between
        fixed = kept
    return fixed


def packed_targets(densities: Field, inputs: dict[str, Field]) -> Field:
    """(N, 7, nodes...): density padded by a layer, force, fixed; for a loss that analyses the design."""
    padded = np.pad(densities, [(0, 0), *[(0, 1)] * (densities.ndim - 1)])
    return np.concatenate([padded[:, None], inputs["force"], inputs["fixed"].astype(np.float32)], axis=1)


def target_density(targets: Field) -> Field:
    """(N, elements...) of either form of targets."""
    targets = np.asarray(targets)  # they may lie on disk
    return targets[:, 0, :-1, :-1, :-1] if targets.ndim == 5 else targets
