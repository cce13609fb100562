"""Models of over 100 million parameters really train, cut over two processes, in about the memory that was foretold."""

from __future__ import annotations

import pytest

from benchmarks.large_presets import CASES, Case, result


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.application)
def test_a_large_preset_trains_under_fsdp(case: Case) -> None:
    found = result(case, "large", procs=2, steps=20)
    print(case.application, found)
    assert found.parameters > 100e6
    assert len(found.losses) == 20
    assert found.falls
    assert found.predicted == pytest.approx(found.peak, rel=0.1)
