"""An augmentation that changes the targets too: a mirrored volume has mirrored labels. Torch-free."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Keys = npt.NDArray[np.uint64]


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """``augment`` of an Application may name one. Both functions draw from the same keys, so that they agree.

    inputs(inputs, seeds, config) -> inputs; targets(targets, seeds, config) -> targets.
    """

    inputs: Callable[[dict[str, Array], Keys, Any], dict[str, Array]]
    targets: Callable[[Array, Keys, Any], Array]

    def __call__(self, inputs: dict[str, Array], seeds: Keys, config: Any) -> dict[str, Array]:
        return self.inputs(inputs, seeds, config)
