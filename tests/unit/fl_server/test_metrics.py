"""The text of /metrics, and the bundle that stock devices get."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

from flwr.cli.install import install_from_fab

from fl_core.flower.adapter import stock
from fl_server.history import RoundRecord
from fl_server.metrics import Rounds, family, sample


def test_samples_are_written_as_prometheus_reads_them() -> None:
    assert sample("a", 3) == "fieldfleet_a 3"
    assert sample("a", 0.5, (("run", 'x"y\\z\n'),)) == 'fieldfleet_a{run="x\\"y\\\\z\\n"} 0.5'
    assert list(family("a", "gauge", "What.", [((), 1)])) == [
        "# HELP fieldfleet_a What.",
        "# TYPE fieldfleet_a gauge",
        "fieldfleet_a 1",
    ]


def test_rounds_are_counted_once_in_every_bucket_above_them() -> None:
    rounds = Rounds()
    rounds.count("r", RoundRecord(round=1, clients={"a": {}, "b": {}}, applied=True, seconds=0.2))
    rounds.count("r", RoundRecord(round=2, late=["a"], refused={"b": "why"}, seconds=70.0))
    lines = list(rounds.lines())
    for line in (
        'fieldfleet_rounds_total{run="r",result="applied"} 1',
        'fieldfleet_rounds_total{run="r",result="failed"} 1',
        'fieldfleet_replies_total{run="r",outcome="counted"} 2',
        'fieldfleet_replies_total{run="r",outcome="late"} 1',
        'fieldfleet_replies_total{run="r",outcome="refused"} 1',
        'fieldfleet_round_seconds_bucket{run="r",le="0.1"} 0',
        'fieldfleet_round_seconds_bucket{run="r",le="0.25"} 1',
        'fieldfleet_round_seconds_bucket{run="r",le="300"} 2',
        'fieldfleet_round_seconds_bucket{run="r",le="+Inf"} 2',
        'fieldfleet_round_seconds_sum{run="r"} 70.2',
        'fieldfleet_round_seconds_count{run="r"} 2',
    ):
        assert line in lines


def test_the_bundle_of_stock_devices_is_always_the_same_and_holds_no_code(tmp_path: Path) -> None:
    made = stock.bundle()
    assert made == stock.bundle()
    with zipfile.ZipFile(io.BytesIO(made)) as archive:
        assert archive.namelist() == ["pyproject.toml", ".info/CONTENT"]
        assert archive.read("pyproject.toml").decode().count(stock.CLIENT_APP) == 2
    installed = install_from_fab(made, install_dir=tmp_path, skip_prompt=True)  # as a SuperNode does
    assert sorted(p.name for p in installed.rglob("*")) == ["pyproject.toml"]
