"""Federations on a virtual clock: times by hand, deadlines, partial work, drop-outs, the same weights as without a clock."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from fl_core.contracts import checkpoint as checkpoints
from fl_core.contracts.errors import ConfigError
from fl_server.history import RoundRecord
from simulations.simulate import Simulation, simulate
from simulations.virtual import results
from simulations.virtual.fleet import ClassFleet, Device, DeviceClass, open_fleet, read_fleet
from tests.helpers import fieldfleet, small_config

EXAMPLES = ("data.clients=4", "data.holdout_fraction=0", "data.examples_per_client=20", "algorithm.batch_size=4")
EXACT = ("data.validation_fraction=0", "algorithm.evaluate_every=0", "algorithm.local_epochs=2")


class Paced:
    """All devices alike: 10 examples a second, 1 kB/s both ways, no latency; but for what a test says."""

    def __init__(self, paces: dict[str, float] | None = None, silent: tuple[str, ...] = (), **kind: Any) -> None:
        self.paces, self.silent, self.kind = paces or {}, silent, DeviceClass(name="all", **{"latency_s": 0.0, **kind})

    def device(self, name: str) -> Device:
        return Device(kind=self.kind, examples_per_second=10.0, down_bytes_s=1000.0, up_bytes_s=500.0)

    def pace(self, name: str, round: int) -> float:
        return self.paces.get(name, 1.0)

    def drops_out(self, name: str, exchange: str) -> bool:
        return name in self.silent


def run(out: Path, *overrides: str, rounds: int = 2, stop_after: int = 0, **options: Any) -> Simulation:
    app, config = small_config("toy_regression", *EXAMPLES, *overrides)

    def on_round(record: RoundRecord) -> None:
        if record.round == stop_after:
            raise InterruptedError

    return simulate(
        app, config, app.generate(config, 0), start=None, num_rounds=rounds, seed=0, out=out, workers=1,
        on_round=on_round, **options,
    )  # fmt: skip


def sha(found: Simulation) -> str:
    return checkpoints.load(found.final).manifest.model_sha256


MODEL = 36  # bytes: 8 weights and a bias in fp32
FULL = MODEL / 1000 + 2 * 20 / 10 + MODEL / 500  # down, two epochs of 20 examples at 10 a second, up


def test_a_round_takes_as_long_as_its_slowest_client(tmp_path: Path) -> None:
    found = run(tmp_path, *EXACT, devices=Paced({"client-0002": 0.5}))
    assert [r.seconds for r in found.history] == [pytest.approx(FULL + 2 * 20 / 10)] * 2
    assert found.history[0].bytes_down == MODEL
    assert found.history[0].bytes_up == dict.fromkeys(found.clients, MODEL)


def test_without_a_late_client_the_weights_are_those_without_a_clock(tmp_path: Path) -> None:
    fleet = Paced({"client-0001": 0.3, "client-0003": 0.7})
    assert sha(run(tmp_path / "clock", devices=fleet)) == sha(run(tmp_path / "none"))


def test_a_straggler_is_late_or_sends_what_it_has(tmp_path: Path) -> None:
    """At half its speed, 6 s leave it 5.892 s of computing: 29 examples, 7 steps of 4."""
    slow = Paced({"client-0002": 0.5})
    dropped = run(tmp_path / "drop", *EXACT, "algorithm.deadline_s=6", devices=slow)
    assert [(r.late, r.seconds) for r in dropped.history] == [(["client-0002"], 6.0)] * 2
    partial = run(tmp_path / "partial", *EXACT, "algorithm.deadline_s=6", "algorithm.stragglers=partial", devices=slow)
    assert [sorted(r.clients) for r in partial.history] == [list(partial.clients)] * 2
    assert partial.history[0].seconds == pytest.approx(MODEL / 1000 + 7 * 4 / 5 + MODEL / 500)
    assert len({sha(dropped), sha(partial), sha(run(tmp_path / "all", *EXACT, devices=slow))}) == 3


def test_over_selection_ends_with_the_first_to_arrive(tmp_path: Path) -> None:
    fleet = Paced({"client-0000": 0.1, "client-0001": 0.8, "client-0002": 0.9})
    chosen = ("algorithm.clients_per_round=2", "algorithm.over_select=1.0")
    found = run(tmp_path, *EXACT, *chosen, devices=fleet, rounds=1)
    (record,) = found.history
    assert sorted(record.clients) == ["client-0002", "client-0003"]
    assert record.seconds == pytest.approx(MODEL / 1000 + 40 / 9 + MODEL / 500)


def test_a_device_that_drops_out_costs_the_deadline(tmp_path: Path) -> None:
    found = run(tmp_path, *EXACT, "algorithm.deadline_s=50", rounds=1, devices=Paced(silent=("client-0001",)))
    assert (found.history[0].late, found.history[0].seconds) == (["client-0001"], 50.0)


def test_a_device_without_memory_says_so(tmp_path: Path) -> None:
    found = run(tmp_path, *EXACT, rounds=1, devices=Paced(memory_mb=1e-4))
    assert "do not hold 4 copies of the model" in found.history[0].refused["client-0001"]


def test_a_late_reply_counts_in_the_next_round(tmp_path: Path) -> None:
    slow = Paced({"client-0002": 0.5})
    asked = ("algorithm.deadline_s=6", "algorithm.late=next", "algorithm.clients_per_round=3")
    found = run(tmp_path, *EXACT, *asked, rounds=4, devices=slow)
    assert any(r.late == ["client-0002"] for r in found.history)
    assert any(r.late_counted for r in found.history)


@pytest.mark.parametrize("stop", [1, 2])
def test_an_interrupted_simulation_goes_on_at_the_same_time_of_the_clock(tmp_path: Path, stop: int) -> None:
    options: dict[str, Any] = {"rounds": 3, "devices": "generated", "device_states": "generated"}
    calm = run(tmp_path / "calm", **options)
    with pytest.raises(InterruptedError):
        run(tmp_path / "again", stop_after=stop, **options)
    again = run(tmp_path / "again", **options)
    assert sha(again) == sha(calm)
    assert results.seconds(again.history) == pytest.approx(results.seconds(calm.history), rel=1e-12)


def test_training_costs_charge_and_an_offline_device_is_not_asked(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    rows = [{"time": 0, "device": "client-0001", "network": "none"}, {"time": 5, "device": "client-0001"}]
    rows += [{"time": 2, "device": "client-0003", "network": "none"}]  # gone when its reply is ready
    trace.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = run(tmp_path / "out", *EXACT, "algorithm.deadline_s=9", devices=Paced(), device_states=str(trace), rounds=2)
    assert sorted(found.history[0].clients) == ["client-0000", "client-0002"]
    assert found.history[0].late == ["client-0003"]
    assert sorted(found.history[1].clients) == ["client-0000", "client-0001", "client-0002"]


def test_generated_devices_are_of_all_classes_and_seeded() -> None:
    fleet, same = open_fleet("generated", 3), open_fleet("generated", 3)
    names = [f"van-{i}" for i in range(300)]
    kinds = [fleet.device(n).kind.name for n in names]
    assert 0.4 < kinds.count("vehicle") / 300 < 0.6
    assert [fleet.device(n) for n in names] == [same.device(n) for n in names]
    assert [fleet.pace(n, 2) for n in names] == [same.pace(n, 2) for n in names]
    assert 0 < sum(fleet.drops_out(n, "train-1") for n in names) < 30


def test_classes_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "devices.toml"
    file.write_text(
        '[[class]]\nname = "a"\n[[class]]\nname = "b"\nshare = 0\nup_mbit_s = 8\n[devices]\n"van-1" = "b"\n'
    )
    fleet = read_fleet(file, 0)
    assert isinstance(fleet, ClassFleet)
    assert (fleet.device("van-1").kind.name, fleet.device("van-1").up_bytes_s) == ("b", 1e6)
    assert fleet.device("van-2").kind.name == "a"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", r"at least one \[\[class\]\]"),
        ("[[class]]\nspeed = 3", r"unknown key 'class\[1\].speed'"),
        ("[[class]]\nexamples_per_second = 0", "out of range"),
        ('[[class]]\nname = "a"\n[devices]\nx = "b"', "no such class"),
        ("[[class]]\n[[class]]", "same name"),
        ("[[class]]\nshare = 0", "share 0"),
        ("odd = 1", "unknown key 'odd'"),
    ],
)
def test_a_wrong_file_is_refused_by_name(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "devices.toml").write_text(text)
    with pytest.raises(ConfigError, match=rf"devices\.toml.*{words}"):
        read_fleet(tmp_path / "devices.toml", 0)


def test_time_to_a_target_and_traffic_by_hand() -> None:
    history = [
        RoundRecord(round=1, clients={"a": {}, "b": {}}, bytes_down=10, bytes_up={"a": 4, "b": 6}, seconds=2.0),
        RoundRecord(round=2, clients={"a": {}}, late=["b"], bytes_down=10, bytes_up={"a": 4}, seconds=3.0),
    ]
    history = [dataclasses.replace(r, held_out={"r2": 0.4 * r.round}) for r in history]
    assert results.time_to(history, "r2", 0.8, higher_is_better=True) == 5.0
    assert results.time_to(history, "r2", 0.5, higher_is_better=False) == 2.0
    assert results.time_to(history, "r2", 0.9, higher_is_better=True) is None
    assert results.traffic(history) == {"a": (20, 8), "b": (20, 6)}


def test_the_command_tells_time_and_traffic_and_draws_them(tmp_path: Path) -> None:
    done = fieldfleet(
        "simulate", "toy_regression", "--rounds", "2", "--out", tmp_path / "out", "--devices", "generated",
        "--target", "-100", "--workers", "1", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    virtual = json.loads(done.stdout)["virtual"]
    assert 0 < virtual["seconds_to_target"] <= virtual["seconds"]
    assert (tmp_path / "out" / virtual["picture"]).read_bytes().startswith(b"\x89PNG")
