"""Experiments: the plan, one cell, kill -9, trackers, report and replay."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fieldfleet.__main__ import main as command
from fl_core.contracts import checkpoint as checkpoints
from fl_core.contracts.config import to_table
from fl_core.contracts.errors import EnvironmentFault, InputError, IntegrityError
from fl_server.history import read_history
from simulations.experiments import report
from simulations.experiments.cell import RUN, run_cell
from simulations.experiments.plan import RESULT, Cell, parse_sweeps, read_cell, settings_of
from simulations.experiments.run import prepare
from simulations.experiments.trackers import Tracking
from tests.helpers import ROOT, eventually, small_config

OPTIONS = {"workers": 1, "engine": "sequential"}


def cell(*overrides: str, **change: Any) -> Cell:
    app, config = small_config("toy_regression", *overrides)
    base = Cell(
        application=app.name, application_version="", config=to_table(config), settings={}, seed=0, rounds=3,
        data="generated", options=OPTIONS,
    )  # fmt: skip
    return replace(base, **change)


# the plan


def test_sweeps_are_toml_values_or_words() -> None:
    items = ["optimizer.lr=0.01,0.1", "algorithm.name=fedavg,fedprox", "selection.groups=['a'],['b']"]
    found = parse_sweeps(items)
    assert found["optimizer.lr"] == [0.01, 0.1]
    assert found["algorithm.name"] == ["fedavg", "fedprox"]
    assert found["selection.groups"] == [["a"], ["b"]]
    assert len(settings_of(found)) == 8
    assert settings_of({}) == [{}]


@pytest.mark.parametrize(
    "items", [["lr=1"], ["optimizer.lr"], ["optimizer.lr="], ["a.b=1,1"], ["a.b=1", "a.b=2"], ["a b.c=1"]]
)
def test_malformed_sweeps_are_refused(items: list[str]) -> None:
    with pytest.raises(InputError, match="--sweep"):
        parse_sweeps(items)


def test_names_are_folders_that_tell_the_setting_and_never_collide() -> None:
    assert cell(settings={"optimizer.lr": 0.1}, seed=2).name == "optimizer.lr=0.1,seed=2"
    odd = [cell(settings={"a.b": "../" * 80 + x}) for x in "xy"]
    assert odd[0].name != odd[1].name
    assert all("/" not in c.name and len(c.name) < 200 for c in odd)


def test_a_manifest_is_read_as_it_was_written(tmp_path: Path) -> None:
    written = cell(settings={"optimizer.lr": 0.1, "algorithm.name": "fedavg"}, options={**OPTIONS, "round_s": 5.0})
    written.write(tmp_path)
    assert read_cell(tmp_path) == read_cell(tmp_path / "manifest.json") == written
    for text, words in (("{", "not a manifest"), ('{"format_version": 9}', "9 is not readable"), ("[]", "None")):
        (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(IntegrityError, match=words):
            read_cell(tmp_path)


def test_a_folder_of_another_experiment_is_refused_and_workers_are_no_difference(tmp_path: Path) -> None:
    cells = [cell(seed=s) for s in range(2)]
    assert prepare(tmp_path, cells) == cells
    (tmp_path / cells[0].name / RESULT).write_text("{}")
    assert prepare(tmp_path, cells) == cells[1:]
    assert prepare(tmp_path, [replace(c, options={**OPTIONS, "workers": 7}) for c in cells])
    for other in (replace(cells[1], rounds=9), cell("optimizer.lr=0.5", seed=1), replace(cells[1], data="/data")):
        with pytest.raises(InputError, match="seed=1 is another simulation there"):
            prepare(tmp_path, [other])


def test_intervals_are_students() -> None:
    found = report.interval([1.0, 2.0, 3.0])
    assert (found.mean, found.count) == (2.0, 3)
    assert found.half == pytest.approx(4.303 / 3**0.5)
    assert report.interval([5.0]) == report.Interval(5.0, 0.0, 1)
    assert report.interval([0.0, 1.0] * 40).half == pytest.approx(0.1103, abs=1e-3)


# a cell


def test_a_cell_is_tracked_resumed_in_its_round_and_never_run_twice(tmp_path: Path) -> None:
    import pyarrow.parquet
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracking = Tracking(parquet=True, tensorboard=True)
    for name in ("calm", "again"):
        cell().write(tmp_path / name)
    run_cell(tmp_path / "calm", tracking)

    def stop(record: Any) -> None:
        if record.round == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_cell(tmp_path / "again", tracking, on_round=stop)
    seen: list[int] = []
    run_cell(tmp_path / "again", tracking, on_round=lambda r: seen.append(r.round))
    assert seen == list(range(seen[0], 4)), "at most the rounds since its last checkpoint are done again"
    calm, again = (read_cell(tmp_path / n) for n in ("calm", "again"))
    assert calm == again
    assert calm.model_sha256 == checkpoints.load(tmp_path / "calm" / RUN).manifest.model_sha256
    assert (len(calm.examples_sha256), calm.engine["name"]) == (64, "sequential")
    run_cell(tmp_path / "calm", tracking, on_round=lambda r: pytest.fail("a finished cell ran again"))

    table = pyarrow.parquet.read_table(tmp_path / "again" / "clients.parquet").to_pylist()
    history = read_history(tmp_path / "again" / RUN)
    assert {(r["round"], r["client"]) for r in table} == {(h.round, c) for h in history for c in h.clients}
    for row in table:
        record = history[row["round"] - 1]
        assert row["train_loss"] == record.clients[row["client"]]["loss"]
        assert row["evaluate_r2"] == record.client_evaluation[row["client"]]["r2"]
        assert row["num_examples"] == record.num_examples[row["client"]]
        assert row["refused"] is None
    events = EventAccumulator(str(tmp_path / "again" / "tensorboard")).Reload()
    points = events.Scalars("held_out/r2")
    assert [p.step for p in points] == [1, 2, 3]
    assert [p.value for p in points] == pytest.approx([h.held_out["r2"] for h in history], rel=1e-6)


@pytest.mark.slow
def test_mlflow_has_one_run_a_cell_whatever_interrupts_it(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    store = f"sqlite:///{tmp_path / 'mlflow.db'}"
    tracking = Tracking(mlflow=store, experiment="trial")
    cell().write(tmp_path / "cell")

    def stop(record: Any) -> None:
        if record.round == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_cell(tmp_path / "cell", tracking, on_round=stop)
    run_cell(tmp_path / "cell", tracking)
    client = MlflowClient(tracking_uri=store)
    (run,) = client.search_runs([client.get_experiment_by_name("trial").experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params["optimizer.lr"] == str(cell().config["optimizer"]["lr"])
    history = read_history(tmp_path / "cell" / RUN)
    points = client.get_metric_history(run.info.run_id, "held_out/r2")
    assert [(p.step, p.value) for p in points] == [(h.round, h.held_out["r2"]) for h in history]
    assert run.data.metrics["final/r2"] == json.loads((tmp_path / "cell" / RESULT).read_text())["metrics"]["r2"]


def test_trackers_that_cannot_work_are_refused_before_any_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="must be a local store"):
        Tracking(mlflow="http://elsewhere").check()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(EnvironmentFault, match="--parquet needs the package 'pyarrow'") as refused:
        Tracking(parquet=True).check()
    assert refused.value.remedy == "pip install 'fieldfleet[tracking]'"


def test_other_data_than_the_manifests_are_refused(tmp_path: Path) -> None:
    replace(cell(), examples_sha256="0" * 64).write(tmp_path)
    with pytest.raises(IntegrityError, match="other data than those of seed=0"):
        run_cell(tmp_path, Tracking())


# the command


def test_killed_at_any_moment_the_command_goes_on_and_finished_cells_stay(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "experiment"
    words = ["simulate", "toy_regression", "--rounds", "60", "--seeds", "1", "--workers", "1", "--json"]
    words += ["--sweep", "optimizer.lr=0.01,0.02", "--set", "data.clients=4", "--out", str(out), "--data", "generated"]
    names = ["optimizer.lr=0.01,seed=0", "optimizer.lr=0.02,seed=0"]
    running = subprocess.Popen([sys.executable, "-m", "fieldfleet", *words], cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        eventually(lambda: len(read_history(out / names[1] / RUN)) > 3, 200)
    finally:
        os.kill(running.pid, signal.SIGKILL)
        running.wait()
    assert not (out / names[1] / RESULT).exists()
    before = (out / names[0] / RESULT).stat()
    assert command(words) == 0
    document = json.loads(capsys.readouterr().out)
    assert (out / names[0] / RESULT).stat().st_ino == before.st_ino, "a finished cell is not run again"
    assert [c["cell"] for c in document["cells"]] == names
    assert document["failed"] == {}
    assert (out / "report.html").read_text().count("optimizer.lr=0.02") >= 2
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")

    calm = tmp_path / "calm"
    replace(read_cell(out / names[1]), model_sha256="", engine={}).write(calm)
    run_cell(calm, Tracking())
    assert read_cell(calm).model_sha256 == document["cells"][1]["model_sha256"], "as undisturbed, to the bit"
    assert command(["simulate", "--replay", str(out / names[0] / "manifest.json"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["equal"] is True
    wrong = replace(read_cell(out / names[0]), model_sha256="0" * 64)
    wrong.write(tmp_path / "wrong")
    assert command(["simulate", "--replay", str(tmp_path / "wrong")]) == 1
    assert "not the one of the manifest" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seeds", "0"], "--seeds 0"),
        (["--sweep", "optimizer.lr=fast"], "optimizer.lr must be a number"),
        (["--sweep", "optimizer.speed=1"], "unknown key 'optimizer.speed'"),
        (["--sweep", "algorithm.name=nonsense"], "unknown algorithm.name"),
        (["--seeds", "1", "--jobs", "0"], "--jobs 0"),
        (["--mlflow", "http://elsewhere"], "must be a local store"),
        (["--mlflow", "sqlite:///missing/store.db"], "missing is no folder"),
    ],
)
def test_a_wrong_experiment_is_refused_before_any_cell_runs(
    tmp_path: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert command(["simulate", "toy_regression", "--rounds", "1", "--out", str(out), *words]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()
