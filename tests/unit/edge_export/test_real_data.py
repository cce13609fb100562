"""On real driving data: int8, calibrated on generated data, loses next to nothing on vehicles never seen."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from edge_export.export import export_checkpoint
from fl_core.contracts import checkpoint as checkpoints
from fl_core.contracts.bundle import open_bundle
from fl_core.learning.application import application
from fl_core.learning.torch_arrays import predict as predict_torch
from fl_core.learning.torch_arrays import set_arrays
from fl_core.runtime.session import predict
from tests.helpers import fieldfleet

ROOT = os.environ.get("FIELDFLEET_DATA", "")
DATA = Path(ROOT) / "driving_100car"


@pytest.mark.slow
@pytest.mark.real_data
@pytest.mark.skipif(not ROOT or not DATA.is_dir(), reason="FIELDFLEET_DATA holds no driving_100car")
def test_int8_loses_at_most_half_a_percent_on_unseen_vehicles(tmp_path: Path) -> None:
    trained = fieldfleet("pretrain", "driver_conflict", "--data", DATA, "--out", tmp_path / "run", timeout=280)
    assert trained.returncode == 0, trained.stderr
    export_checkpoint(tmp_path / "run", tmp_path / "bundle", overrides=['export.targets=["x86", "arm64"]'])
    source, bundle = checkpoints.load(tmp_path / "run"), open_bundle(tmp_path / "bundle")
    app = application("driver_conflict")
    config = app.configure_from(bundle.manifest.config, origin="bundle")
    examples = app.read(DATA).examples(config)
    unseen = examples.of_clients(set(examples.clients()) - set(source.manifest.clients_seen))
    assert len(unseen) > 500
    model = app.build_model(config)
    set_arrays(model, source.arrays, origin="checkpoint")
    before = app.metrics(config, predict_torch(model, app, config, unseen), unseen)["roc_auc"]
    for target, facts in bundle.manifest.targets.items():
        after = app.metrics(config, predict(app, config, bundle, unseen, target=target), unseen)["roc_auc"]
        assert after > before - 0.005, (target, facts["precision"])
