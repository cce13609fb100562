"""A torch module as an ONNX file with a dynamic batch, trimmed by onnxslim where that helps."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import nn

from fl_core.contracts.errors import InputError
from fl_core.learning.application import Application
from fl_core.learning.examples import Examples
from fl_core.learning.torch_arrays import tensors

NOISY = ("torch.onnx", "torch.export", "torch.fx", "torch._dynamo", "onnxscript", "onnx_ir", "onnxslim", "root")
MAX_BATCH = 4096


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No warnings, log lines or prints of the exporter and the optimisers: their advice is not for our users."""
    loggers = {name: logging.getLogger(name) for name in NOISY}
    levels = {name: logger.level for name, logger in loggers.items()}
    sink = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
        warnings.simplefilter("ignore")
        for logger in loggers.values():
            logger.setLevel(logging.ERROR + 1)
        try:
            yield
        finally:
            for name, logger in loggers.items():
                logger.setLevel(levels[name])


def write_onnx(
    model: nn.Module, application: Application, config: Any, examples: Examples, path: Path, *, opset: int
) -> None:
    """Export ``model`` with the application's names and a dynamic batch; ``examples`` holds at least two.

    The example batch has two members: with one, the exporter takes the batch for a constant.
    Raises InputError where the exporter cannot express the model.
    """
    inputs, outputs = application.inputs(config), application.outputs(config)
    arguments = tensors(application, config, examples.take(slice(0, 2)))
    batch = torch.export.Dim("batch", min=1, max=MAX_BATCH)
    model.eval()
    try:
        with quiet(), torch.inference_mode():
            torch.onnx.export(
                model,
                arguments,
                str(path),
                dynamo=True,
                input_names=[spec.name for spec in inputs],
                output_names=[spec.name for spec in outputs],
                dynamic_shapes=tuple({0: batch} for _ in inputs),
                opset_version=opset,
                external_data=False,
                verbose=False,
            )
    except Exception as error:  # the exporter raises many kinds, none of them public
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"{application.name}: the model cannot be exported to ONNX: {reason[:300]}",
            remedy="keep to operators that torch.onnx.export(dynamo=True) knows, or change export.opset",
        ) from None
    slim(path)
    strip_metadata(path)


def slim(path: Path) -> None:
    """Fold and fuse with onnxslim; the file stays as it was where that fails or makes it larger."""
    import onnxslim

    with quiet():
        try:
            slimmed = onnxslim.slim(onnx.load(str(path)))
            onnx.checker.check_model(slimmed)
            data = slimmed.SerializeToString()
        except Exception:  # an optimiser's failure is no reason to fail the export
            logging.getLogger(__name__).debug("onnxslim left %s unchanged", path.name, exc_info=True)
            return
    if len(data) < os.path.getsize(path):
        path.write_bytes(data)


def strip_metadata(path: Path) -> None:
    """Drop source paths, stack traces and doc strings, which the exporter writes into every node."""
    model = onnx.load(str(path))
    del model.metadata_props[:]
    graph = model.graph
    for item in (graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        del item.metadata_props[:]
        item.doc_string = ""
    for function in model.functions:
        del function.metadata_props[:]
        function.doc_string = ""
    path.write_bytes(model.SerializeToString())
