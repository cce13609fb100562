"""Static int8 in the QDQ form: calibration, and which nodes stay in float."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from edge_export.onnx_file import quiet
from edge_export.target import EdgeTarget
from fl_core.contracts.errors import FieldfleetError
from fl_core.learning.examples import Examples
from fl_core.runtime.session import Session

log = logging.getLogger(__name__)

COMPUTE = ("Conv", "ConvTranspose", "Gemm", "MatMul")
# Operators that keep their input's range or have an int8 kernel, so that int8 can run on between two convolutions.
CARRIERS = ("Relu", "Clip", "HardSwish", "LeakyRelu", "Add", "Concat", "MaxPool", "AveragePool", "GlobalAveragePool")
LAYOUT = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Resize")
TYPES = {"uint8": QuantType.QUInt8, "int8": QuantType.QInt8}


@dataclass(frozen=True)
class Recipe:
    """operators: node types to quantise; method: how a tensor's range follows from its calibration values.

    share: of the weights, counted from the input on; the multiplications behind them stay in float.
    """

    name: str
    operators: tuple[str, ...]
    method: CalibrationMethod
    options: tuple[tuple[str, Any], ...] = ()
    share: float = 1.0


PERCENTILE = (("CalibPercentile", 99.99),)
RECIPES = (
    Recipe("whole graph, min-max", COMPUTE + CARRIERS + LAYOUT, CalibrationMethod.MinMax),
    Recipe("multiplications, min-max", COMPUTE, CalibrationMethod.MinMax),
    Recipe("whole graph, percentile", COMPUTE + CARRIERS + LAYOUT, CalibrationMethod.Percentile, PERCENTILE),
    Recipe("multiplications, percentile", COMPUTE, CalibrationMethod.Percentile, PERCENTILE),
    Recipe("multiplications, entropy", COMPUTE, CalibrationMethod.Entropy),
    # For outputs that add up what many pixels have in common, such as an autoencoder's error: there rounding does not even out.
    Recipe("first half of the weights, min-max", COMPUTE, CalibrationMethod.MinMax, share=0.5),
)
# Normalisations that no convolution absorbs stay in float; int8 on the small operators between them and the
# convolutions then costs more than it saves (measured: group-norm nets run a fifth faster without).
FLOAT_NORMS = {"InstanceNormalization", "GroupNormalization", "LayerNormalization"}


def recipes(prepared: Path) -> tuple[Recipe, ...]:
    """All recipes, the most promising for this graph first, those that leave a part of the weights in float last."""
    present = {node.op_type for node in onnx.load(str(prepared)).graph.node}
    if not present & FLOAT_NORMS:
        return RECIPES
    return tuple(sorted(RECIPES, key=lambda recipe: (recipe.share < 1, recipe.operators != COMPUTE)))


class Reader(CalibrationDataReader):  # type: ignore[misc]
    """Feeds calibration examples in batches, once."""

    def __init__(self, examples: Examples, batch_size: int = 32) -> None:
        self._batches = self._make(examples, batch_size)

    @staticmethod
    def _make(examples: Examples, size: int) -> Iterator[dict[str, Any]]:
        whole = len(examples) - len(examples) % size if len(examples) >= size else len(examples)
        for start in range(0, whole, size):
            yield dict(examples.take(slice(start, min(start + size, whole))).inputs)

    def get_next(self) -> dict[str, Any] | None:
        return next(self._batches, None)


def preprocessing_nodes(model: onnx.ModelProto) -> set[str]:
    """Names of the nodes on no path behind a multiplication: scaling, masks and NaN handling, which stay in float."""
    learned: set[str] = set()
    early: set[str] = set()
    for node in model.graph.node:  # in topological order, as ONNX demands
        if node.op_type in (*COMPUTE, "GRU", "LSTM", "RNN") or any(name in learned for name in node.input):
            learned.update(node.output)
        else:
            early.add(node.name)
    return early


def behind(model: onnx.ModelProto, share: float) -> set[str]:
    """Names of the multiplications behind the first ``share`` of the weights, in topological order; never of the first one."""
    sizes = {tensor.name: math.prod(tensor.dims) for tensor in model.graph.initializer}
    found = [(n.name, sum(sizes.get(i, 0) for i in n.input)) for n in model.graph.node if n.op_type in COMPUTE]
    limit, counted, late = share * sum(size for _, size in found), 0, set[str]()
    for number, (name, size) in enumerate(found):
        counted += size
        if number and counted > limit:
            late.add(name)
    return late


def name_nodes(model: onnx.ModelProto) -> None:
    """quantize_static excludes by name: every node needs its own."""
    seen: set[str] = set()
    for i, node in enumerate(model.graph.node):
        if not node.name or node.name in seen:
            node.name = f"{node.op_type}_{i}"
        seen.add(node.name)


def prepare(fp32: Path, out: Path) -> None:
    """Shapes inferred and batch norms folded, as quantize_static wants it; nodes named."""
    with quiet():
        try:
            quant_pre_process(str(fp32), str(out), skip_symbolic_shape=False)
        except Exception:  # symbolic shape inference does not know every operator
            log.debug("symbolic shape inference failed: plain shape inference instead")
            quant_pre_process(str(fp32), str(out), skip_symbolic_shape=True)
    model = onnx.load(str(out))
    name_nodes(model)
    out.write_bytes(model.SerializeToString())


def quantize(prepared: Path, out: Path, recipe: Recipe, target: EdgeTarget, calibration: Examples) -> Session | None:
    """Write the int8 model and run it once; None (with a debug message) where it cannot be made or does not load."""
    model = onnx.load(str(prepared))
    present = {node.op_type for node in model.graph.node}
    try:
        with quiet():
            quantize_static(
                str(prepared),
                str(out),
                Reader(calibration),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=[name for name in recipe.operators if name in present],
                per_channel=True,
                reduce_range=target.weight_bits == 7,
                activation_type=TYPES[target.activation_type],
                weight_type=TYPES[target.weight_type],
                nodes_to_exclude=sorted(preprocessing_nodes(model) | behind(model, recipe.share)),
                calibrate_method=recipe.method,
                extra_options=dict(recipe.options),
            )
        session = Session(out, target.session_options())
        session.run(calibration.take(slice(0, 2)).inputs)
        session.run(calibration.take(slice(0, 1)).inputs)
    except FieldfleetError as error:
        log.debug("%s: %s", recipe.name, error.message)
    except Exception:  # the quantiser raises many kinds
        log.debug("%s: quantisation failed", recipe.name, exc_info=True)
    else:
        return session
    out.unlink(missing_ok=True)
    return None
