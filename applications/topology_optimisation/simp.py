"""SIMP: the stiffest design of a given volume, by the optimality criteria method. Torch-free; needs scipy.

Bendsøe 1989; Sigmund, "A 99 line topology optimization code written in Matlab", 2001; Andreassen et al., "Efficient topology
optimization in MATLAB using 88 lines of code", 2011; Liu & Tovar, "An efficient 3D topology optimization code", 2014.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from applications.topology_optimisation.filters import ConeFilter
from applications.topology_optimisation.multigrid import Direct, Multigrid, Solution, solve
from applications.topology_optimisation.operator import Stiffness
from applications.topology_optimisation.problems import Problem

Field = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """radius: of the filter, in elements; penalty grows from ``penalty_start`` by ``penalty_step`` an iteration.

    change: the largest change of a design variable below which a design is finished; tolerance: of the equation solver.
    """

    filter: str = "density"
    radius: float = 1.5
    penalty: float = 3.0
    penalty_start: float = 3.0
    penalty_step: float = 0.25
    minimum: float = 1e-9
    move: float = 0.2
    change: float = 0.01
    limit: int = 200
    tolerance: float = 1e-4


@dataclass(frozen=True)
class Step:
    """One iteration: the compliance of the design that entered it, processor seconds since the start, iterations of the solver."""

    compliance: float
    penalty: float
    seconds: float
    solver_iterations: int


@dataclass(frozen=True)
class Design:
    """density: the physical densities (elements...) in [0, 1]; compliance: f.u of them, of the last analysis."""

    density: Field
    compliance: float
    converged: bool
    steps: list[Step] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        return self.steps[-1].seconds if self.steps else 0.0


class Analysis:
    """The displacements of one problem for one density after another, each solved from the last one's."""

    def __init__(self, problem: Problem, *, minimum: float = 1e-9, tolerance: float = 1e-8, limit: int = 400) -> None:
        self.problem, self.minimum, self.tolerance, self.limit = problem, minimum, tolerance, limit
        free = (~problem.fixed).astype(np.float64)
        self.stiffness = Stiffness(problem.shape, free)
        self.preconditioner = (Direct if len(problem.shape) == 2 else Multigrid)(problem.shape, free)
        self.force = problem.force.astype(np.float64)
        self.solution: Solution | None = None

    def modulus(self, density: Field, penalty: float) -> Field:
        """The modified SIMP law (Sigmund 2007)."""
        result: Field = self.minimum + density**penalty * (1 - self.minimum)
        return result

    def __call__(self, density: Field, penalty: float = 3.0) -> tuple[float, Field]:
        """(compliance, its derivative by each element's density)."""
        modulus = self.modulus(density, penalty)
        self.stiffness.update(modulus)
        self.preconditioner.update(modulus)
        start = self.solution.u if self.solution else None
        self.solution = solve(
            self.stiffness, self.preconditioner, self.force, start=start, tolerance=self.tolerance, limit=self.limit
        )
        energy = self.stiffness.energy(self.solution.u)
        # 2 f.u - u.K u: its error is the square of that of u
        compliance = float(2 * np.vdot(self.force, self.solution.u) - np.sum(modulus * energy))
        gradient = -penalty * density ** (penalty - 1) * (1 - self.minimum) * energy
        return compliance, gradient


def optimise(
    problem: Problem,
    settings: Settings | None = None,
    *,
    start: Field | None = None,
    on_step: Callable[[int, Step, Field], bool] | None = None,
) -> Design:
    """The optimised design; ``on_step(number, step, density)`` returning True ends it early."""
    s = settings or Settings()
    began = time.process_time()
    cone = ConeFilter(problem.shape, s.radius)
    analysis = Analysis(problem, minimum=s.minimum, tolerance=s.tolerance)
    x = np.full(problem.shape, problem.volume_fraction) if start is None else start.astype(np.float64)
    physical = s.filter == "density"
    volume_gradient = cone.density_transposed(np.ones(problem.shape)) if physical else np.ones(problem.shape)
    density = np.clip(cone.density(x), 0, 1) if physical else x
    steps: list[Step] = []
    penalty = min(s.penalty, s.penalty_start)
    converged = False
    for number in range(1, s.limit + 1):
        compliance, gradient = analysis(density, penalty)
        gradient = cone.density_transposed(gradient) if physical else cone.sensitivity(x, gradient)
        found = optimality_criteria(x, gradient, volume_gradient, problem.volume_fraction, s.move)
        changed = float(np.abs(found - x).max())
        x = found
        density = np.clip(cone.density(x), 0, 1) if physical else x
        iterations = analysis.solution.iterations if analysis.solution else 0
        steps.append(Step(compliance, penalty, time.process_time() - began, iterations))
        if on_step and on_step(number, steps[-1], density):
            break
        converged = changed < s.change and penalty >= s.penalty
        if converged:
            break
        penalty = min(s.penalty, penalty + s.penalty_step)
    return Design(density, analysis(density, s.penalty)[0], converged, steps)


def optimality_criteria(x: Field, gradient: Field, volume_gradient: Field, fraction: float, move: float) -> Field:
    """The multiplicative update, its multiplier found by bisection on the volume, which is linear in ``x``."""
    ratio = np.sqrt(np.maximum(0.0, -gradient) / volume_gradient)
    low_bound, high_bound = np.maximum(0.0, x - move), np.minimum(1.0, x + move)
    wanted = fraction * x.size
    low, high = 0.0, float(ratio.max()) * 1e4 + 1e-300  # of the square root of the multiplier
    low = float(ratio.max()) * 1e-6
    found = x
    while (high - low) > 1e-9 * (high + low):
        middle = np.sqrt(low * high)
        found = np.clip(x * (ratio / middle), low_bound, high_bound)
        if float(np.vdot(volume_gradient, found)) > wanted:
            low = middle
        else:
            high = middle
    return found
