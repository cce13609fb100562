"""The design solver: one SIMP design on one core, and its equation solver against two peers on the same equations.

    python -m benchmarks topology_solver [--sizes 16 32] [--direct 16] [--quick]

The peers: conjugate gradients with the diagonal as preconditioner over the assembled matrix, and scipy's sparse factorisation
(up to ``--direct`` elements a side; it fills fast). The equations are those of a design half-way and at its end. Processor
seconds of one core, median of three.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy.sparse import linalg as sparse_linalg

from applications.topology_optimisation import families, multigrid
from applications.topology_optimisation.simp import Analysis, Settings, Step, optimise

TOLERANCE = 1e-5


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks topology_solver")
    parser.add_argument("--sizes", type=int, nargs="*", default=[16, 32])
    parser.add_argument("--direct", type=int, default=16, help="largest side that is factorised")
    parser.add_argument("--quick", action="store_true", help="8^3 only")
    args = parser.parse_args(arguments)
    for size in [8] if args.quick else args.sizes:
        one_size(size, direct=size <= args.direct)
    return 0


def one_size(size: int, *, direct: bool) -> None:
    problem = families.draw("cantilever", np.random.default_rng(0)).problem(size)
    settings = Settings(radius=max(1.5, 0.05 * size), penalty_start=1.0, limit=40, change=0.02, tolerance=2e-3)
    kept: dict[int, Any] = {}

    def on_step(number: int, step: Step, density: Any) -> bool:
        kept[number] = density.copy()
        return False

    wall, began = time.perf_counter(), time.process_time()
    design = optimise(problem, settings, on_step=on_step)
    cpu, wall = time.process_time() - began, time.perf_counter() - wall
    solves = [s.solver_iterations for s in design.steps]
    print(
        f"{size}^3 design: {len(design.steps)} iterations, compliance {design.steps[0].compliance:.4g} -> "
        f"{design.compliance:.4g}, {cpu:.1f} s of processor ({wall:.1f} s of clock), "
        f"{statistics.mean(solves):.1f} cycles an analysis, at most {max(solves)}",
        flush=True,
    )
    for name, density in (("half-way", kept[len(kept) // 2]), ("at the end", design.density)):
        compare(problem, density, name, direct=direct)


def compare(problem: Any, density: Any, name: str, *, direct: bool) -> None:
    analysis = Analysis(problem, tolerance=TOLERANCE)
    modulus = analysis.modulus(density, 3.0)
    free = (~problem.fixed).astype(np.float64)
    force = (problem.force * free).ravel().astype(np.float64)
    matrix = multigrid.assembled(problem.shape, modulus, free)
    scale = matrix.diagonal()
    inverse = sparse_linalg.LinearOperator(matrix.shape, matvec=lambda r: r / scale)
    counted: list[int] = []

    def ours() -> Any:
        analysis.solution = None
        analysis(density)
        return analysis.solution

    def diagonal() -> Any:
        counted.clear()
        return sparse_linalg.cg(
            matrix, force, rtol=TOLERANCE, maxiter=20_000, M=inverse, callback=lambda x: counted.append(1)
        )

    base, found = timed(ours)
    print(f"  {name}: multigrid {base:.3f} s, {found.iterations} cycles", flush=True)
    other, _ = timed(diagonal, 1)
    print(f"  {name}: diagonal {other:.3f} s, {len(counted)} iterations: {other / base:.1f} times ours", flush=True)
    if direct:
        other, exact = timed(lambda: sparse_linalg.splu(matrix.tocsc()).solve(force), 1)
        error = abs(np.vdot(force, exact) / analysis(density)[0] - 1)
        print(f"  {name}: factorised {other:.3f} s: {other / base:.1f} times ours; compliances differ by {error:.1e}")


def timed(call: Callable[[], Any], times: int = 3) -> tuple[float, Any]:
    seconds, result = [], None
    for _ in range(times):
        began = time.process_time()
        result = call()
        seconds.append(time.process_time() - began)
    return statistics.median(seconds), result


if __name__ == "__main__":
    sys.exit(main())
