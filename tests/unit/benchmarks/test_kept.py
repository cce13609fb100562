"""What a benchmark keeps is taken up only under the settings that made it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from applications.toy_regression import APPLICATION
from benchmarks import _kept as kept
from benchmarks import quality
from fl_core.contracts.errors import InputError


def test_results_of_other_settings_are_refused_by_the_key_that_changed(tmp_path: Path) -> None:
    record = tmp_path / "settings.json"
    first = {"default": APPLICATION.configure()}
    with pytest.raises(InputError, match="settings not known"):
        kept.check(record, first, kept=True, remove="remove it")
    kept.check(record, first, kept=False, remove="remove it")
    kept.check(record, first, kept=True, remove="remove it")
    before = record.read_bytes()
    other = {"default": APPLICATION.configure(["pretrain.epochs=3"])}
    with pytest.raises(InputError, match=r"default\.pretrain\.epochs = \d+, which is 3 now") as refused:
        kept.check(record, other, kept=True, remove="remove that folder")
    assert refused.value.remedy == "remove that folder"
    with pytest.raises(InputError, match=r"twin\.\S+ = nothing"):
        kept.check(record, {**first, "twin": APPLICATION.configure()}, kept=True, remove="remove it")
    assert record.read_bytes() == before


def test_quality_refuses_cells_of_another_preset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality, "RESULTS", tmp_path)
    monkeypatch.setattr(quality, "run_cell", lambda *given, **named: None)
    monkeypatch.setattr(quality, "print_table", lambda *given, **named: None)
    assert quality.main(["--quick", "--apps", "toy_regression"]) == 0
    record = tmp_path / "toy_regression-quick.settings.json"
    cell = tmp_path / "toy_regression-quick-floor-0.json"
    assert record.is_file()
    cell.write_text("{}")
    assert quality.main(["--quick", "--apps", "toy_regression"]) == 0
    table = json.loads(record.read_text())
    table["default"]["pretrain"]["epochs"] += 1
    record.write_text(json.dumps(table))
    with pytest.raises(InputError, match=r"default\.pretrain\.epochs"):
        quality.main(["--quick", "--apps", "toy_regression"])
    record.unlink()
    with pytest.raises(InputError, match="not known"):
        quality.main(["--quick", "--apps", "toy_regression"])
