"""An export generates as many clients as its samples need, not as many as a preset learns from."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from applications.toy_regression import APPLICATION
from edge_export import samples
from fl_core.learning.examples import Examples, RawData


def counting(asked: list[int]) -> Any:
    def generate(config: Any, seed: int) -> RawData:
        asked.append(config.data.clients)
        return APPLICATION.generate(config, seed)

    return replace(APPLICATION, generate=generate)


def owners(examples: Examples) -> int:
    return len(np.unique(examples.columns["client"]))


@pytest.mark.parametrize(
    ("clients", "each", "asked", "check"),
    [
        (64, 64, [64, 64], 2048),  # no more than before
        (5000, 64, [64, 64], 2048),
        (5000, 8, [64, 64, 282], 2048),  # 512 examples of 64 clients: a tenth more than the 256 that have 2,048
        (100, 8, [64, 64, 100], 800),  # all there are
    ],
)
def test_few_of_many_generated_clients_are_made(clients: int, each: int, asked: list[int], check: int) -> None:
    config = APPLICATION.configure([f"data.clients={clients}", f"data.examples_per_client={each}"])
    made: list[int] = []
    found = samples.collect(counting(made), config, None)
    assert made == asked
    assert (len(found.check), len(found.golden)) == (check, config.export.golden_examples)
    assert len(found.calibration) == config.export.calibration_examples
    assert owners(found.calibration) == 64
