"""What a benchmark keeps is taken up only under the settings that made it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from applications.toy_regression import APPLICATION
from benchmarks import _kept as kept
from benchmarks import quality
from fl_core.contracts.errors import InputError


def test_results_of_other_settings_are_refused_by_the_key_that_changed(tmp_path: Path) -> None:
    folder, first = tmp_path / "results", {"default": APPLICATION.configure()}
    kept.check(folder, first)
    kept.check(folder, first)
    before = (folder / "settings.json").read_bytes()
    with pytest.raises(InputError, match=r"default: pretrain\.epochs = \d+, which is 3 now") as refused:
        kept.check(folder, {"default": APPLICATION.configure(["pretrain.epochs=3"])})
    assert str(folder) in str(refused.value.remedy)
    assert (folder / "settings.json").read_bytes() == before
    with pytest.raises(InputError, match="settings not known"):
        kept.check(tmp_path, first)


def test_a_setting_that_is_new_counts_as_its_default_and_one_that_is_gone_as_another(tmp_path: Path) -> None:
    folder, first = tmp_path / "results", {"default": APPLICATION.configure()}
    kept.check(folder, first)
    record = folder / "settings.json"
    table = json.loads(record.read_text())
    del table["default"]["pretrain"]["warmup_steps"]
    record.write_text(json.dumps(table))
    kept.check(folder, first)
    with pytest.raises(InputError, match=r"pretrain\.warmup_steps = nothing, which is 9 now"):
        kept.check(folder, {"default": APPLICATION.configure(["pretrain.warmup_steps=9"])})
    table["default"]["pretrain"]["gone"] = 1
    record.write_text(json.dumps(table))
    with pytest.raises(InputError, match=r"pretrain\.gone = 1, which is nothing now"):
        kept.check(folder, first)


def test_another_preset_beside_is_taken_in(tmp_path: Path) -> None:
    folder, first = tmp_path / "results", {"default": APPLICATION.configure()}
    kept.check(folder, first)
    kept.check(folder, {"twin": APPLICATION.configure(["pretrain.epochs=3"])})
    assert set(json.loads((folder / "settings.json").read_text())) == {"default", "twin"}
    with pytest.raises(InputError, match=r"twin: pretrain\.epochs = 3"):
        kept.check(folder, {"twin": APPLICATION.configure(["pretrain.epochs=4"])})


def test_quality_refuses_cells_of_another_preset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality, "RESULTS", tmp_path)
    monkeypatch.setattr(quality, "run_cell", lambda *given, **named: None)
    monkeypatch.setattr(quality, "print_table", lambda *given, **named: None)
    quick = ["--quick", "--apps", "toy_regression"]
    assert quality.main(quick) == 0
    assert quality.main(quick) == 0
    record = tmp_path / "toy_regression-quick" / "settings.json"
    table = json.loads(record.read_text())
    table["default"]["pretrain"]["epochs"] += 1
    record.write_text(json.dumps(table))
    with pytest.raises(InputError, match=r"default: pretrain\.epochs"):
        quality.main(quick)


def test_a_long_centre_makes_as_many_steps_as_a_training_on_all_clients() -> None:
    short, long = quality.Plan(), quality.Plan(long_centre=True)
    passes = APPLICATION.configure().pretrain.epochs
    assert quality.centre_settings("toy_regression", "default", short, quick=False) == {}
    assert quality.centre_settings("toy_regression", "default", long, quick=True) == {}
    made = quality.centre_settings("toy_regression", "default", long, quick=False)["centre_epochs"]
    assert made * quality.CENTRE_SHARE == pytest.approx(passes, abs=quality.CENTRE_SHARE / 2)


def test_federated_cells_of_other_rounds_or_another_centre_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "federated-0.json"
    path.write_text('{"rounds": 20}')
    quality.check_cell(path, {"rounds": 20})
    with pytest.raises(InputError, match=r"federated-0\.json was made with rounds = 20, which is 7 now"):
        quality.check_cell(path, {"rounds": 7})
    with pytest.raises(InputError, match=r"made with centre_epochs = the preset's, which is 17 now"):
        quality.check_cell(path, {"rounds": 20, "centre_epochs": 17})
    path.write_text('{"rounds": 20, "centre_epochs": 17}')
    quality.check_cell(path, {"rounds": 20, "centre_epochs": 17})
    with pytest.raises(InputError, match=r"made with centre_epochs = 17, which is the preset's now"):
        quality.check_cell(path, {"rounds": 20})


@pytest.mark.slow
def test_the_long_centre_is_trained_and_its_cell_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = quality.Plan(rounds=1, long_centre=True)
    monkeypatch.setattr(quality, "RESULTS", tmp_path)
    monkeypatch.delenv("FIELDFLEET_DATA", raising=False)
    trained: list[int] = []
    real = quality.call

    def call(*arguments: str) -> dict[str, object]:
        found = real(*arguments)
        if arguments[0] == "pretrain":
            history = Path(arguments[arguments.index("--out") + 1]) / "history.jsonl"
            trained.append(len(history.read_text().splitlines()))
        return found

    monkeypatch.setattr(quality, "call", call)
    quality.run_cell("toy_regression", "federated", 0, plan, quick=False)
    assert trained == [17], "5 passes in the preset, of 30 % of the clients"
    kept_by = json.loads((tmp_path / "toy_regression-generated" / "federated-0.json").read_text())
    assert (kept_by["rounds"], kept_by["centre_epochs"]) == (1, 17)
    assert {"centre only", "federated", "on the device"} <= set(kept_by["variants"])
    with pytest.raises(InputError, match="rounds = 1, which is 2 now"):
        quality.run_cell("toy_regression", "federated", 0, replace(plan, rounds=2), quick=False)
