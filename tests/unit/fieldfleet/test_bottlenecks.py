"""What measurements say is slow is named, with a remedy; what is no measurement is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fieldfleet.bottlenecks import bottlenecks
from fl_core.contracts.errors import InputError
from tests.helpers import fieldfleet


def profile(seconds: dict[str, float]) -> dict[str, Any]:
    stages = {name: {"seconds": {"values": [1.0, value]}} for name, value in seconds.items()}
    return {"scans": [{"dimension": "edge", "sizes": [16, 32], "stages": stages}]}


def test_the_largest_stage_at_the_largest_size(tmp_path: Path) -> None:
    seconds = {"input": 6.0, "forward": 1.0, "backward": 2.0, "optimizer": 1.0, "checkpoint": 50.0}
    (tmp_path / "profile.json").write_text(json.dumps(profile(seconds)))
    (tmp_path / "scaling.json").write_text(
        json.dumps({"bottleneck": "straggling: 30 % of a step with 2 processes; bind processes"})
    )
    scaling, step = bottlenecks(tmp_path)
    assert (scaling.detail, scaling.remedy) == ("straggling: 30 % of a step with 2 processes", "bind processes")
    assert step.detail == "input: 60 % of a step at edge 32"
    assert "data pack" in step.remedy


def test_the_command_and_what_it_refuses(tmp_path: Path) -> None:
    (tmp_path / "profile.json").write_text(json.dumps(profile({"backward": 2.0, "forward": 1.0})))
    done = fieldfleet("doctor", "--json", "--run", tmp_path)
    found = [f for f in json.loads(done.stdout)["findings"] if f["check"] == "bottleneck of a step"]
    assert [f["detail"] for f in found] == ["backward: 67 % of a step at edge 32"]
    with pytest.raises(InputError, match=r"neither scaling\.json nor profile\.json"):
        list(bottlenecks(tmp_path / "none"))
    (tmp_path / "profile.json").write_text('{"scans": [{}]}')
    with pytest.raises(InputError, match="not as this release writes it"):
        list(bottlenecks(tmp_path))
