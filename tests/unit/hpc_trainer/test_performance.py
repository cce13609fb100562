"""Laws recovered from data made by them, the split of a step, and the commands as their users run them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from fl_core.contracts.errors import InputError
from fl_core.learning.application import application
from hpc_trainer import phases
from hpc_trainer.performance import fits, node, probe, profile, scaling
from hpc_trainer.performance.phase_clock import GRADIENTS_WAIT, EnoughSteps, PhaseClock
from tests.helpers import fieldfleet, small_overrides


@pytest.mark.parametrize("freedom", [1, 2, 5, 10, 11, 20, 100, 10_000])
def test_quantiles_of_students_t(freedom: int) -> None:
    assert fits.t_975(freedom) == pytest.approx(float(scipy.stats.t.ppf(0.975, freedom)), rel=1e-3)


@given(st.floats(0.0, 0.9), st.floats(0.01, 100), st.lists(st.integers(1, 512), min_size=3, max_size=8, unique=True))
def test_amdahl_and_karp_flatt_recover_the_serial_fraction(s: float, one: float, counts: list[int]) -> None:
    counts = sorted({1, *counts})
    seconds = [one * (s + (1 - s) / p) for p in counts]
    fitted = fits.amdahl(counts, seconds)
    assert fitted is not None
    assert fitted.value == pytest.approx(s, abs=1e-6)
    for p, t in zip(counts[1:], seconds[1:], strict=True):
        found = fits.karp_flatt(one / t, p)
        assert found == pytest.approx(s, abs=1e-9)


@given(st.floats(0.0, 0.9), st.lists(st.integers(2, 512), min_size=2, max_size=8, unique=True))
def test_gustafson_recovers_the_serial_fraction(s: float, counts: list[int]) -> None:
    counts = [1, *sorted(counts)]
    seconds = [p / (p - s * (p - 1)) for p in counts]
    fitted = fits.gustafson(counts, seconds)
    assert fitted is not None
    assert fitted.value == pytest.approx(s, abs=1e-9)


@given(st.floats(1e-6, 1e-2), st.floats(1e-11, 1e-7))
def test_messages_recover_latency_and_bandwidth(alpha: float, beta: float) -> None:
    sizes = list(probe.MESSAGE_SIZES)
    fitted = fits.line(sizes, [alpha + beta * n for n in sizes])
    assert fitted is not None
    assert fitted[0].value == pytest.approx(alpha, rel=1e-6)
    assert fitted[1].value == pytest.approx(beta, rel=1e-6)


@given(st.floats(-3, 4), st.floats(0.01, 100))
def test_exponents(power: float, factor: float) -> None:
    sizes = [1.0, 2.0, 4.0, 8.0]
    found = fits.exponent(sizes, [factor * s**power for s in sizes])
    assert found is not None
    assert found.value == pytest.approx(power, abs=1e-9)
    assert found.low <= found.value <= found.high


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    generator = np.random.default_rng(0)
    counts, hits = [1, 2, 4, 8, 16], 0
    for _ in range(300):
        seconds = [(0.1 + 0.9 / p) * (1 + 0.02 * generator.standard_normal()) for p in counts]
        fitted = fits.amdahl(counts, seconds)
        assert fitted is not None
        hits += fitted.low <= 0.1 <= fitted.high
    assert 0.90 <= hits / 300 <= 0.99


def test_too_few_points_are_refused() -> None:
    assert fits.amdahl([1, 2], [1.0, 0.5]) is None
    assert fits.gustafson([1, 2, 2], [1.0, 1.0, 1.0]) is None
    assert fits.line([1024, 1024, 2048], [1.0, 1.0, 1.0]) is None
    assert fits.exponent([1, 2], [1.0, 2.0]) is None


def rank(input_s: float, forward: float, backward: float, wait: float, gradients: float) -> dict[str, Any]:
    stages = {
        phases.INPUT: input_s,
        phases.FORWARD: forward,
        phases.COMMUNICATION: wait,
        phases.BACKWARD: backward,
        GRADIENTS_WAIT: gradients,
        phases.OPTIMIZER: 1.0,
    }
    return {"steps": [sum(stages.values())] * 5, "stages": {k: [v] * 5 for k, v in stages.items()}, "losses": [1.0]}


def test_waiting_is_split_into_straggling_and_communication() -> None:
    """One rank is slower by 2 in the forward and by 4 in the backward pass; each message takes 0.5."""
    parts = scaling.split([rank(1, 3, 6, 2.5, 4.5), rank(1, 5, 10, 0.5, 0.5)])
    assert parts["data"] == pytest.approx(1)
    assert parts["forward"] == pytest.approx(4)
    assert parts["backward"] == pytest.approx(8)
    assert parts["straggling"] == pytest.approx(1 + 2)
    assert parts["communication"] == pytest.approx(0.5 + 0.5)
    assert sum(parts.values()) == pytest.approx(rank(1, 3, 6, 2.5, 4.5)["steps"][0])


def test_a_clock_stops_after_its_steps_and_writes_a_trace(tmp_path: Path) -> None:
    clock = PhaseClock(2)
    for _ in range(2):
        for name in phases.NAMES[:-1]:
            with clock(name):
                pass
    with pytest.raises(EnoughSteps), clock(phases.INPUT):
        raise AssertionError
    document = clock.document(1)
    assert len(document["steps"]) == 1
    assert set(document["stages"]) == set(phases.NAMES[:-1])
    clock.write_trace(tmp_path / "trace.json", 3)
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    spans = [e for e in events if e["ph"] == "X"]
    assert len(spans) == 2 * len(phases.NAMES[:-1])
    assert all(e["pid"] == 3 and e["dur"] >= 0 and math.isfinite(e["ts"]) for e in spans)


def test_what_a_node_is() -> None:
    facts = node.facts()
    assert facts["memory_bytes"] > 1 << 28
    assert 1 <= facts["processor"]["physical"] <= facts["processor"]["logical"]
    assert 1 <= node.usable_cores() <= facts["processor"]["logical"]


@pytest.mark.slow
def test_a_probe_measures_and_leaves_nothing_behind(tmp_path: Path) -> None:
    done = fieldfleet("probe", "--quick", "--json", "--path", tmp_path, "--out", tmp_path / "probe.json", timeout=200)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document == json.loads((tmp_path / "probe.json").read_text())
    assert [p.name for p in tmp_path.iterdir()] == ["probe.json"]
    assert document["memory"]["copy"]["value"] > 1e6
    assert all(document["matrix_product"][d]["value"] > 1e6 for d in probe.DTYPES)
    assert document["file_system"]["sequential_cold"]["bytes_per_second"] > 1e3
    reduce = document["all_reduce"]
    assert reduce["processes"] == 2
    assert reduce["sizes"][0]["bytes"] == 1024
    assert reduce["beta_seconds_per_byte"]["value"] > 0


def test_scaling_reports_speed_beside_the_loss_deviation(tmp_path: Path) -> None:
    overrides = [part for o in small_overrides(application("toy_regression")) for part in ("--set", o)]
    out = tmp_path / "scaling"
    done = fieldfleet(
        "scaling", "--app", "toy_regression", "--procs", "1,2", "--steps", "5", "--mode", "strong", "--dtype", "float64",
        "--data", "generated", "--json", "--out", out, *overrides, "--set", "pretrain.batch_size=7",
        timeout=250,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    rows = document["modes"]["strong"]["rows"]
    assert [r["processes"] for r in rows] == [1, 2]
    assert rows[0]["speedup"] == 1
    assert rows[1]["loss_deviation"] < 1e-12
    assert "refused" in document["modes"]["strong"]["law"]
    for row in rows:
        assert 0 < sum(row["parts"].values()) < 2 * row["seconds"]["high"]
    assert {"report.html", "scaling.json", "strong-parts.png", "strong-speedup.png"} <= {p.name for p in out.iterdir()}
    assert len(list(out.glob("procs-2-*/trace-rank-*.json"))) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["scaling", "--app", "toy_regression", "--procs", "1,x"], "--procs 1,x"),
        (["scaling", "--app", "toy_regression", "--steps", "2"], "--steps 2"),
        (["scaling", "--app", "toy_regression", "--probe", "nowhere.json"], "nowhere.json"),
    ],
)
def test_wrong_arguments_are_named(options: list[str], message: str, tmp_path: Path) -> None:
    done = fieldfleet(*options, "--out", tmp_path / "out", timeout=60)
    assert done.returncode == 2
    assert message in done.stderr


def test_the_memory_of_a_stage_is_its_peak_above_the_step(tmp_path: Path) -> None:
    clock = PhaseClock(2, memory=True)
    for _ in range(2):
        with clock(phases.INPUT):
            pass
        with clock(phases.FORWARD):
            gone = np.ones(80_000_000 // 8)  # beyond 32 MB the allocator gives everything back
            del gone
        kept = np.ones(40_000_000 // 8)
        with clock(phases.OPTIMIZER):
            pass
        del kept
    found = clock.steps[1].memory
    assert found[phases.INPUT] < 3e6
    assert 79e6 < found[phases.FORWARD] < 84e6
    assert 39e6 < found[phases.OPTIMIZER] < 44e6


def _profiled(size: int, axes: int) -> dict[str, Any]:
    """A machine on which everything costs what the formula says, and each message half a second."""
    places = float(size**axes)
    stages = {
        "input": [places] * 3,
        "forward": [2.0 * places] * 3,
        "communication": [0.0] * 3,
        "gradients_wait": [0.5] * 3,
    }
    memory = {"forward": [int(1e6 * places)], "input": [5]}
    rank = {"stages": stages, "memory": memory}
    counted = {
        "flops": {"forward": 7 * places, "backward": 14 * places},
        "parameters": 11,
        "memory_bytes": {"activations": 3 * places},
    }
    return {"ranks": [rank, rank], "counted": counted, "dense": True}


def test_powers_of_stages_are_recovered_beside_the_formula() -> None:
    scan = profile.Scan(dimension="edge", keys=("data.crop",), sizes=(8, 16, 24, 32))
    stages = profile._scan(scan, [_profiled(size, 3) for size in scan.sizes], 3)["stages"]
    forward = stages["forward"]
    assert forward["seconds"]["exponent"]["value"] == pytest.approx(3)
    assert (forward["seconds"]["formula"], forward["memory_bytes"]["formula"]) == (3, 3)
    assert forward["seconds"]["counted"] == pytest.approx(3)
    assert forward["memory_bytes"]["exponent"]["value"] == pytest.approx(3)
    assert stages["input"]["memory_bytes"]["exponent"] is None  # below the allocator's pages
    assert stages["communication"]["seconds"]["values"] == [0.5] * 4
    assert stages["communication"]["seconds"]["exponent"]["value"] == pytest.approx(0)
    assert stages["communication"]["seconds"]["formula"] == 0


def test_scans_are_found_in_the_configuration_or_named() -> None:
    app = application("seismic_facies")
    found = {s.dimension: s for s in profile.scans_of(app, "default", [], [])}
    assert found["edge"].keys == ("data.crop", "data.stride")
    assert found["edge"].sizes == (16, 32, 48, 64)
    assert found["channels"].keys == ("model.width",)
    for scan in found.values():
        for size in scan.sizes:
            app.configure(scan.overrides(size))
    (asked,) = profile.scans_of(app, "default", [], ["model.levels=2,3,4,5"])
    assert (asked.dimension, asked.sizes) == ("model.levels", (2, 3, 4, 5))
    assert profile.formula("forward", asked.dimension, 3, True, False) is None
    with pytest.raises(InputError, match="at least 4 different sizes"):
        profile.scans_of(app, "default", [], ["model.width=4,8,8,4"])


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_profile_writes_its_report(tmp_path: Path) -> None:
    done = fieldfleet(
        "profile", "--app", "toy_regression", "--scan", "pretrain.batch_size=64,256,1024,4096", "--steps", "3", "--json",
        "--procs", "2", "--out", tmp_path / "out", timeout=250,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    (scan,) = document["scans"]
    assert set(scan["stages"]) == {"input", "forward", "loss", "communication", "backward", "optimizer", "checkpoint"}
    assert all(v > 0 for stage in scan["stages"].values() for v in stage["seconds"]["values"])
    assert {p.name for p in (tmp_path / "out").iterdir() if p.is_file()} == {"profile.json", "report.html", "batch.png"}
