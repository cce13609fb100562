"""The soak, for half a minute: real processes, random faults, and the proof of every round at the end."""

from __future__ import annotations

import json

import pytest

from benchmarks import soak


@pytest.mark.slow
def test_half_a_minute_of_random_faults(capsys: pytest.CaptureFixture[str]) -> None:
    assert soak.main(["--minutes", "0.5", "--seed", "7", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["wrong"] == []
    assert found["rounds"] > 5
    assert sum(found["faults"].values()) >= 2
