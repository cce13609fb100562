"""Kept rows of the tomato benchmark belong to one --features."""

from __future__ import annotations

from pathlib import Path

import pytest

from applications.plant_disease import APPLICATION, transfer
from benchmarks import plant_disease
from fl_core.contracts.checkpoint import Checkpoint
from fl_core.contracts.config import to_table
from fl_core.contracts.errors import InputError
from fl_core.contracts.manifests import CheckpointManifest
from fl_core.learning.torch_arrays import get_arrays


def test_rows_of_another_start_are_not_taken_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plant_disease, "RESULTS", tmp_path / "results")
    config = APPLICATION.configure(["model.width=8"])
    arrays = get_arrays(APPLICATION.build_model(config))
    models = {name: tmp_path / name for name in ("first", "second")}
    for name, path in models.items():
        moved = {k: v + (name == "second") for k, v in arrays.items()}
        Checkpoint(
            CheckpointManifest(application=APPLICATION.name, config=to_table(config), stage="untrained"), moved
        ).save(path)
    first, second = (plant_disease.Cell("tomato", 0, path, None, quick=False) for path in models.values())
    assert first.rows([]) == {}  # nothing is kept yet
    transfer.transferred(models["first"], []).save(first.work / "features")
    assert first.rows([]) == {}
    with pytest.raises(InputError, match="another model"):
        second.rows([])
