"""Every application's model becomes ONNX that says what torch says, with every normalisation and any batch size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from edge_export.onnx_file import write_onnx
from fl_core.learning.torch_arrays import predict, tensors
from fl_core.runtime.parity import compare
from fl_core.runtime.session import Session
from tests.helpers import APPLICATIONS, NORMS, small_config


def often(name: str, norm: str) -> bool:
    """Whether CI runs it: every application with its usual norm, and the small ones with the other norms."""
    return norm == "group" or (norm != "none" and name in ("toy_regression", "driver_conflict", "plant_disease"))


@pytest.mark.parametrize(
    ("name", "norm"),
    [
        pytest.param(name, norm, marks=[] if often(name, norm) else [pytest.mark.slow])
        for name in APPLICATIONS
        for norm in NORMS
    ],
)
def test_onnx_parity(name: str, norm: str, tmp_path: Path) -> None:
    app, config = small_config(name, f"model.norm={norm}")
    examples = app.generate(config, 0).examples(config).take(slice(0, 9))
    torch.set_num_threads(1)
    model = app.build_model(config).train()
    for _ in range(3):  # batch norm: statistics that are not those of a fresh model
        model(*tensors(app, config, examples))
    write_onnx(model, app, config, examples, tmp_path / "model.onnx", opset=config.export.opset)
    session = Session(tmp_path / "model.onnx")
    assert tuple(session.inputs) == app.inputs(config)
    assert tuple(session.outputs) == app.outputs(config)
    expected = predict(model, app, config, examples)
    for batch_size in (1, 2, 9):
        report = compare(expected, session.run(examples.inputs, batch_size=batch_size))
        assert report.relative_max <= config.export.parity_tolerance
    columns = app.postprocess(config, session.run(examples.inputs))
    for key, value in app.postprocess(config, expected).items():
        if value.dtype.kind == "f":
            np.testing.assert_allclose(columns[key], value, rtol=1e-3, atol=1e-4, err_msg=key)
