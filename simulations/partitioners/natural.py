"""By a column of the data itself: the client (the default), a site, a device, a day."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fl_core.contracts.config import text
from simulations.partitioners.base import Ids, Units


@dataclass(frozen=True, kw_only=True)
class Options:
    by: str = text("client", help="column of the examples")


def assign(units: Units, options: Options, rng: np.random.Generator) -> Ids:
    return units.column
