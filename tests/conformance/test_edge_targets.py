"""Every edge target converts a model whose files, hashes and golden samples agree."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from edge_export import onnx_file, quantize, samples
from edge_export.target import edge_target, known_targets
from fl_core.learning.torch_arrays import predict
from fl_core.runtime.parity import compare
from fl_core.runtime.session import Session
from tests.helpers import small_config


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    """A small net of toy_regression in fp32, ready to be quantised, with its samples."""
    work = tmp_path_factory.mktemp("targets")
    app, config = small_config("toy_regression", "model.hidden=64", "model.norm=none", "data.examples_per_client=64")
    torch.manual_seed(1)
    model = app.build_model(config)
    drawn = samples.collect(app, config, None)
    path = work / "model.fp32.onnx"
    onnx_file.write_onnx(model, app, config, drawn.check, path, opset=config.export.opset)
    ready = work / "prepared.onnx"
    quantize.prepare(path, ready)
    return ready, drawn, predict(model, app, config, drawn.check)


@pytest.mark.parametrize("name", known_targets())
def test_the_target_is_named_after_its_file_and_ends_in_fp32(name: str) -> None:
    target = edge_target(name)
    assert target.name == name
    assert target.precisions[-1] == "fp32"
    assert target.description
    assert all(machine == machine.lower() for machine in target.machines)


@pytest.mark.parametrize("recipe", quantize.RECIPES, ids=lambda recipe: recipe.name)
@pytest.mark.parametrize("name", known_targets())
def test_its_int8_model_loads_runs_and_is_close(name: str, recipe: quantize.Recipe, prepared, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    ready, drawn, expected = prepared
    target = edge_target(name)
    path = tmp_path / f"model.{name}.onnx"
    session = quantize.quantize(ready, path, recipe, target, drawn.calibration)
    assert session is not None
    report = compare(expected, session.run(drawn.check.inputs))
    assert report.relative_l2 < 0.1
    again = Session(path, target.session_options()).run(drawn.check.inputs)
    for output, value in session.run(drawn.check.inputs).items():
        np.testing.assert_array_equal(again[output], value)
    weights = [
        numpy_helper.to_array(t)
        for t in onnx.load(str(path)).graph.initializer
        if t.data_type == onnx.TensorProto.INT8 and len(t.dims) == 2
    ]
    assert weights
    bound = 2 ** (target.weight_bits - 1)
    assert all(np.abs(w.astype(int)).max() <= bound for w in weights)
