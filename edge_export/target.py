"""An edge target: what kind of processor a model file is made for. One file each in ``edge_export/targets``."""

from __future__ import annotations

import importlib
import pkgutil
import platform
from dataclasses import dataclass

from fl_core.contracts.errors import IntegrityError, unknown_name
from fl_core.runtime.session import SessionOptions

TYPES = ("uint8", "int8")
PRECISIONS = ("int8", "fp32")


@dataclass(frozen=True, kw_only=True)
class EdgeTarget:
    """``precisions``: in order of preference; the first that passes its gates is shipped, fp32 always can be.

    machines: names of ``platform.machine()`` (lower case) on which this target's latency can be measured.
    weight_bits: 8, or 7 where processors of this kind may add pairs of products in 16 bits, which 8 bits overflow.
    """

    name: str
    description: str
    activation_type: str
    weight_type: str
    machines: tuple[str, ...]
    weight_bits: int = 8
    precisions: tuple[str, ...] = PRECISIONS

    def __post_init__(self) -> None:
        if self.activation_type not in TYPES or self.weight_type not in TYPES:
            raise ValueError(f"activation_type and weight_type must be one of {', '.join(TYPES)}")
        if self.weight_bits not in (7, 8):
            raise ValueError("weight_bits must be 7 or 8")
        if not self.precisions or self.precisions[-1] != "fp32" or not set(self.precisions) <= set(PRECISIONS):
            raise ValueError("precisions must end with fp32 and hold only int8 before it")

    def runs_here(self) -> bool:
        return platform.machine().lower() in self.machines

    def session_options(self) -> SessionOptions:
        """Another target's models are run operator by operator: int8 as float, exactly.

        Fused int8 kernels may add pairs of products in 16 bits (x86 without VNNI), which 8-bit weights overflow.
        """
        return SessionOptions(optimize=self.runs_here())


def known_targets() -> list[str]:
    package = importlib.import_module("edge_export.targets")
    return sorted(module.name for module in pkgutil.iter_modules(package.__path__))


def edge_target(name: str) -> EdgeTarget:
    """By name. Raises InputError with the list of the known ones."""
    known = known_targets()
    if name not in known:
        raise unknown_name("edge target", name, known)
    found = importlib.import_module(f"edge_export.targets.{name}").TARGET
    if not isinstance(found, EdgeTarget) or found.name != name:
        raise IntegrityError(f"edge_export/targets/{name}.py must expose an EdgeTarget named {name!r} as TARGET")
    return found
