"""Pre- and post-processing, torch-free: what the model takes and gives, and what users read of it.

The model gives four maps a pixel: the foreground's logit, the way to the centre of the pixel's plant (rows, columns, in units
of OFFSET pixels), and the logit of a seed, high near a centre. Instances are grouped from them outside the graph
(``grouping``).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from applications.plant_segmentation import grouping
from applications.plant_segmentation.config import Config
from fl_core.learning.application import Outputs, TensorSpec

MAPS = 4
UNLABELLED = 65535  # of a label image: pixels that count neither in the loss nor in a metric


def inputs(config: Config) -> tuple[TensorSpec, ...]:
    side = config.data.image_size
    return (TensorSpec(name="image", dtype="uint8", shape=(-1, side, side, 3)),)


def outputs(config: Config) -> tuple[TensorSpec, ...]:
    side = config.data.image_size
    return (TensorSpec(name="maps", dtype="float32", shape=(-1, MAPS, side, side)),)


def labels(config: Config) -> tuple[str, ...]:
    return ()


def postprocess(config: Config, outputs: Outputs) -> dict[str, npt.NDArray[Any]]:
    """One row a tile. prediction: the number of plants; cover: the share of the ground under them."""
    maps = np.asarray(outputs["maps"])
    count, cover = np.zeros(len(maps), np.int64), np.zeros(len(maps))
    for i, one in enumerate(maps):
        count[i] = len(grouping.instances(one, config.model).scores)
        cover[i] = grouping.sigmoid(one[0]).mean()
    return {"prediction": count, "cover": cover}
