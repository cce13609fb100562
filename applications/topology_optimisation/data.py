"""Native format: a folder with one ``NAME.npz`` for each solved problem; see README.md."""

from __future__ import annotations

import io
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from applications.topology_optimisation import pipeline
from applications.topology_optimisation.problems import Problem, checked, first_cell
from applications.topology_optimisation.shards import gathered
from fl_core.contracts.errors import DataError, InputError
from fl_core.contracts.names import checked_name
from fl_core.learning.examples import Examples
from fl_core.storage import archive, atomic

REQUIRED = ("density", "force", "fixed", "volume_fraction", "client")
LIMIT = 1 << 30  # bytes of one file once unpacked
VOLUME_SLACK = 0.02


@dataclass(frozen=True, eq=False)
class Example:
    """density: (elements...) float32 in [0, 1]; compliance: of the solver's own analysis, 0 where it is not known;
    seconds: of processor that the solver took."""

    problem: Problem
    density: npt.NDArray[np.float32]
    compliance: float
    seconds: float
    client: str
    name: str

    @property
    def shape(self) -> tuple[int, ...]:
        return self.problem.shape

    def load(self) -> Example:
        return self

    def to_bytes(self) -> bytes:
        out = io.BytesIO()
        np.savez_compressed(
            out,
            allow_pickle=False,
            density=self.density,
            force=self.problem.force,
            fixed=self.problem.fixed,
            volume_fraction=np.float64(self.problem.volume_fraction),
            client=np.array(self.client),
            compliance=np.float64(self.compliance),
            seconds=np.float64(self.seconds),
        )
        return out.getvalue()


@dataclass(frozen=True)
class Stored:
    """A solved problem that was checked and stays in its file until it is used."""

    file: Path
    shape: tuple[int, ...]
    client: str

    def load(self) -> Example:
        return read_one(self.file)


@dataclass(frozen=True)
class Designs:
    """A data set of solved problems on grids of one size or of several."""

    items: tuple[Example | Stored, ...]

    def client_ids(self) -> tuple[str, ...]:
        return tuple(sorted({e.client for e in self.items}))

    def select(self, clients: Collection[str]) -> Self:
        wanted = set(clients)
        return type(self)(tuple(e for e in self.items if e.client in wanted))

    def write(self, folder: Path) -> None:
        with atomic.new_folder(folder) as temporary:
            for item in (i.load() for i in self.items):
                (temporary / f"{item.name}.npz").write_bytes(item.to_bytes())

    def examples(self, config: Any) -> Examples:
        """The problems whose grid is a cube of data.size; raises DataError where there is none of that size.

        In memory up to ``data.in_memory_mb``; else ``Windows`` over memory-mapped files, read when they are used.
        """
        wanted = (config.data.size,) * 3
        items = [e for e in self.items if e.shape == wanted]
        if not items:
            sizes = sorted({e.shape for e in self.items})
            raise DataError(
                f"no problem on a grid of {list(wanted)}; there are {[list(s) for s in sizes]}",
                remedy="--set data.size=N",
            )
        facts: list[tuple[str, str, float, float]] = []

        def rows() -> Iterator[dict[str, npt.NDArray[Any]]]:
            for item in items:
                one = item.load()
                compliance = one.compliance / pipeline.load_scale(one.problem) ** 2
                facts.append((one.name, one.client, compliance, one.seconds))
                yield _row(one, config)

        inputs = gathered(rows(), len(items), config.data.in_memory_mb * 2**20)
        targets = inputs.pop("targets")
        names, clients, compliance, seconds = (np.array(column) for column in zip(*facts, strict=True))
        columns = {
            "example_id": names,
            "client": clients,
            "group": names,
            "compliance": compliance,
            "solver_seconds": seconds,
        }
        inputs["volume_fraction"] = np.asarray(inputs["volume_fraction"])
        return Examples(inputs, targets, columns)


def _row(example: Example, config: Any) -> dict[str, npt.NDArray[Any]]:
    """The model's inputs of one problem, and ``targets``: what the loss compares with."""
    inputs = pipeline.prepared([example.problem], config)
    targets = example.density[None]
    if config.model.compliance_weight > 0:
        targets = pipeline.packed_targets(targets, inputs)
    return {name: array[0] for name, array in inputs.items()} | {"targets": targets[0]}


def read(path: Path) -> Designs:
    """Raises DataError naming the file and the array, node or cell at fault."""
    files = sorted(p for p in path.glob("*.npz") if not p.name.startswith("."))
    if not files:
        raise DataError(f"{path}: holds no .npz file", remedy="each solved problem is one NAME.npz")
    return Designs(tuple(_checked(file) for file in files))


def _checked(file: Path) -> Stored:
    found = read_one(file)
    return Stored(file, found.shape, found.client)


def read_one(file: Path) -> Example:
    arrays = archive.read_npz(file, required=REQUIRED, limit=LIMIT)
    density: npt.NDArray[Any] = arrays["density"]
    if density.ndim != 3 or density.dtype.kind != "f":
        raise DataError(
            f"{file}: density is {density.dtype}{list(density.shape)}, expected floats on a grid of three axes"
        )
    if (bad := first_cell(~np.isfinite(density))) is not None:
        raise DataError(f"{file}: density is not finite at cell {bad}")
    if (bad := first_cell((density < 0) | (density > 1))) is not None:
        raise DataError(f"{file}: density is {density[bad]} at cell {bad}, expected 0 to 1")
    scalars = {
        name: _scalar(file, name, arrays.get(name, np.float64(0)))
        for name in ("volume_fraction", "compliance", "seconds")
    }
    force, fixed = arrays["force"], arrays["fixed"]
    problem = Problem(
        shape=density.shape,
        force=force.astype(np.float32) if force.dtype.kind == "f" else force,  # type: ignore[arg-type]
        fixed=fixed,  # type: ignore[arg-type]
        volume_fraction=scalars["volume_fraction"],
    )
    checked(problem, str(file))
    if abs(float(density.mean()) - problem.volume_fraction) > VOLUME_SLACK:
        raise DataError(f"{file}: the design fills {density.mean():.4f}, volume_fraction is {problem.volume_fraction}")
    try:
        client = checked_name(str(arrays["client"]), "client")
    except InputError as error:
        raise DataError(f"{file}: {error.message}", remedy=error.remedy) from None
    return Example(problem, density.astype(np.float32), scalars["compliance"], scalars["seconds"], client, file.stem)


def _scalar(file: Path, name: str, value: npt.NDArray[Any] | np.generic) -> float:
    if value.shape != () or value.dtype.kind not in "fiu" or not np.isfinite(value):
        raise DataError(f"{file}: {name} is {value.dtype}{list(value.shape)}, expected one finite number")
    return float(value)
