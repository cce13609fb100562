"""Companies with design problems of their own, solved by SIMP: data without data. Needs scipy (extra ``design``)."""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import asdict

import numpy as np

from applications.topology_optimisation import families
from applications.topology_optimisation.config import Config
from applications.topology_optimisation.data import Designs, Example
from fl_core.contracts.errors import EnvironmentFault
from fl_core.learning import seeding

RADIUS_SHARE = 0.05  # the filter's radius as a share of the side, so that finer grids show the same design more finely
COARSEST_START = 16  # finer grids begin from the design of the grid half as fine


def generate(config: Config, seed: int) -> Designs:
    """data.clients x data.problems_per_client designs of data.size elements a side; company k is the same whatever their number."""
    d = config.data
    return Designs(
        tuple(
            make(seed, client, number, d.size, d.iterations)
            for client in range(d.clients)
            for number in range(d.problems_per_client)
        )
    )


def spec_of(seed: int, client: int, number: int) -> families.Spec:
    family = families.FAMILIES[client % len(families.FAMILIES)]
    return families.draw(family, seeding.generator(seed, "topology problem", client, number))


@functools.lru_cache(maxsize=2048)
def make(seed: int, client: int, number: int, size: int, iterations: int) -> Example:
    """One solved problem of one company; kept, since one process asks for the same ones again and again."""
    return solved(spec_of(seed, client, number), size, iterations, f"company-{client:04d}", f"{seed}-{number:05d}")


def solved(
    spec: families.Spec, size: int, iterations: int, client: str, number: str, *, coarse: Example | None = None
) -> Example:
    """SIMP in ``iterations`` steps with penalisation continued from 1 to 3; fine grids start from the coarser design.

    coarse: that design of the same problem, where it is known already. Its seconds count in those of the finer one.
    """
    try:
        from applications.topology_optimisation.simp import Settings, optimise
    except ModuleNotFoundError as error:
        raise EnvironmentFault(
            f"{error.name} is not installed, and the design solver needs it", remedy="pip install 'fieldfleet[design]'"
        ) from None
    start, first, seconds = None, 1.0, 0.0
    steps = iterations
    if size % 2 == 0 and size > COARSEST_START:
        coarse = coarse or solved(spec, size // 2, iterations, client, number)
        start = coarse.density.astype(np.float64)
        for axis in range(start.ndim):
            start = np.repeat(start, 2, axis=axis)
        first, seconds, steps = 3.0, coarse.seconds, max(1, iterations // 2)
    settings = Settings(
        radius=max(1.5, RADIUS_SHARE * size), penalty_start=first, limit=steps, change=0.02, tolerance=2e-3
    )
    problem = spec.problem(size)
    design = optimise(problem, settings, start=start)
    return Example(
        problem=problem,
        density=design.density.astype(np.float32),
        compliance=design.compliance,
        seconds=seconds + design.seconds,
        client=client,
        name=f"{client}-{number}-{_digest(spec)}",
    )


def _digest(spec: families.Spec) -> str:
    return hashlib.sha256(json.dumps(asdict(spec), sort_keys=True).encode()).hexdigest()[:8]
