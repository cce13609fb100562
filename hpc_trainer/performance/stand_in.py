"""Examples of ones, of an application's own shapes: what a step costs does not ask what is in them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fl_core.learning.application import Application
from fl_core.learning.examples import Examples


def stand_in(app: Application, config: Any, target_shape: Sequence[int], target_dtype: str) -> Examples:
    """As many as the global batch; ``target_shape`` is that of one example's target, which is zeros."""
    count = config.pretrain.batch_size
    names = np.array([str(n) for n in range(count)])
    inputs = {s.name: np.ones((count, *s.shape[1:]), s.dtype) for s in app.inputs(config)}
    columns = {"example_id": names, "client": np.array(["client"] * count), "group": names}
    return Examples(inputs, np.zeros((count, *target_shape), target_dtype), columns)
