"""The rules by which a model is shipped, and which nodes stay in float."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edge_export import gates, quantize
from edge_export.gates import Cost
from edge_export.samples import draw, halves
from edge_export.target import EdgeTarget, edge_target, known_targets
from edge_export.targets.x86 import TARGET as X86
from fl_core.contracts.errors import DataError, GoalMissed, InputError
from fl_core.learning.application import application
from fl_core.learning.examples import Examples
from fl_core.runtime.parity import compare
from tests.bundles import TOY


def test_known_targets_and_an_unknown_one() -> None:
    assert known_targets() == ["arm64", "x86"]
    assert [(t.activation_type, t.weight_type) for t in map(edge_target, known_targets())] == [
        ("int8", "int8"),
        ("uint8", "int8"),
    ]
    with pytest.raises(InputError, match=r"(?s)unknown edge target 'gpu'.*known: arm64, x86"):
        edge_target("gpu")


@pytest.mark.parametrize(
    "change", [{"activation_type": "int4"}, {"weight_bits": 4}, {"precisions": ("int8",)}, {"precisions": ()}]
)
def test_a_target_that_makes_no_sense_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must"):
        dataclasses.replace(X86, **change)
    assert isinstance(X86, EdgeTarget)


def test_fp32_must_match_torch() -> None:
    gates.check_fp32(compare({"y": np.ones(3)}, {"y": np.ones(3) + 1e-6}), 1e-4)
    with pytest.raises(GoalMissed, match="parity"):
        gates.check_fp32(compare({"y": np.ones(3)}, {"y": np.ones(3) + 1e-2}), 1e-4)


def reading(columns: Any) -> Any:
    """toy_regression with another read-out."""
    return dataclasses.replace(application(TOY), postprocess=columns)


def test_score_drift_is_in_units_of_the_score() -> None:
    scores = reading(lambda config, outputs: {"score": outputs["y"], "prediction": outputs["y"] > 0.5})
    a, b = {"y": np.array([0.4, 0.6])}, {"y": np.array([0.5, 0.5])}
    assert gates.score_drift(scores, None, a, b) == pytest.approx(0.1)
    values = reading(lambda config, outputs: {"prediction": outputs["y"]})
    wide = {"y": np.array([-10.0, 10.0])}
    assert gates.score_drift(values, None, wide, {"y": np.array([-9.0, 10.0])}) == pytest.approx(0.05)
    assert gates.score_drift(values, None, wide, {"y": np.array([np.nan, 10.0])}) == np.inf
    labels = reading(lambda config, outputs: {"prediction": np.where(outputs["y"] > 0.5, "a", "b")})
    assert gates.score_drift(labels, None, a, b) == 0.5


def test_metric_loss_follows_the_metric() -> None:
    higher = application(TOY)
    lower = dataclasses.replace(higher, higher_is_better=False)
    assert gates.metric_loss(higher, 0.9, 0.89) == pytest.approx(0.01)
    assert gates.metric_loss(higher, 0.9, 0.91) == pytest.approx(-0.01)
    assert gates.metric_loss(lower, 2.0, 2.1) == pytest.approx(0.05)
    assert gates.metric_loss(higher, None, 0.9) is None


@pytest.mark.parametrize(
    ("size", "latency", "pays"),
    [
        (500, 1.0, True),  # smaller
        (500, 1.2, True),
        (500, 1.5, False),  # smaller, but much slower
        (1000, 0.5, True),  # faster
        (1000, 1.0, False),
        (2000, 0.5, False),  # faster, but twice as large
        (500, None, True),  # another machine's
        (1000, None, False),
    ],
)
def test_int8_must_pay(size: int, latency: float | None, pays: bool) -> None:
    reason = gates.why_not_cheaper(Cost(bytes=1000, latency_ms=1.0), Cost(bytes=size, latency_ms=latency))
    assert (reason == "") == pays


def test_nodes_before_the_first_multiplication_are_preprocessing() -> None:
    nodes = [
        helper.make_node("IsNaN", ["x"], ["nan"], "is_nan"),
        helper.make_node("Where", ["nan", "zero", "x"], ["clean"], "where"),
        helper.make_node("MatMul", ["clean", "w"], ["h"], "matmul"),
        helper.make_node("Relu", ["h"], ["r"], "relu"),
        helper.make_node("Mul", ["x", "two"], ["scaled"], "side"),
        helper.make_node("Add", ["r", "scaled"], ["y"], "add"),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 2])],
        [numpy_helper.from_array(np.zeros((2, 2), np.float32), n) for n in ("zero", "w", "two")],
    )
    assert quantize.preprocessing_nodes(helper.make_model(graph)) == {"is_nan", "where", "side"}


@pytest.mark.parametrize(("share", "late"), [(1.0, set()), (0.9, {"c"}), (0.4, {"b", "c"}), (0.1, {"b", "c"})])
def test_what_lies_behind_a_share_of_the_weights_stays_in_float(share: float, late: set[str], tmp_path: Path) -> None:
    sizes = {"a": (4, 5), "b": (5, 6), "c": (6, 1)}  # 20, 30 and 6 weights
    steps = [helper.make_node("MatMul", ["x", "wa"], ["ha"], "a"), helper.make_node("Relu", ["ha"], ["r"], "relu")]
    steps += [
        helper.make_node("MatMul", ["r", "wb"], ["hb"], "b"),
        helper.make_node("MatMul", ["hb", "wc"], ["y"], "c"),
    ]
    rng = np.random.default_rng(0)
    graph = helper.make_graph(
        steps,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 1])],
        [numpy_helper.from_array(rng.normal(size=s).astype(np.float32), f"w{n}") for n, s in sizes.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    assert quantize.behind(model, share) == late
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    recipe = dataclasses.replace(quantize.RECIPES[1], share=share)
    columns = {name: np.array(["1", "2", "3"]) for name in ("example_id", "client", "group")}
    calibration = Examples({"x": rng.normal(size=(3, 4)).astype(np.float32)}, np.zeros(3), columns)
    session = quantize.quantize(tmp_path / "m.onnx", tmp_path / "q.onnx", recipe, X86, calibration)
    assert session is not None
    kept = {
        t.name
        for t in onnx.load(str(tmp_path / "q.onnx")).graph.initializer
        if t.data_type == TensorProto.FLOAT and t.dims and len(t.dims) == 2
    }
    assert kept == {f"w{n}" for n in late}


def test_recipes_follow_the_graph(tmp_path: Path) -> None:
    def first(kind: str) -> quantize.Recipe:
        node = helper.make_node(kind, ["x"], ["y"])
        path = tmp_path / "m.onnx"
        path.write_bytes(helper.make_model(helper.make_graph([node], "g", [], [])).SerializeToString())
        onnx.load(str(path))
        found = quantize.recipes(path)
        assert set(found) == set(quantize.RECIPES)
        assert [r.share for r in found] == sorted((r.share for r in found), reverse=True)
        return found[0]

    assert first("Relu").operators != quantize.COMPUTE
    assert first("InstanceNormalization").operators == quantize.COMPUTE


def examples(clients: list[int], groups: list[int]) -> Examples:
    ids = np.arange(len(clients)).astype(str)
    columns = {"example_id": ids, "client": np.array(clients).astype(str), "group": np.array(groups).astype(str)}
    return Examples({"x": np.arange(len(clients))}, np.zeros(len(clients)), columns)


def test_samples_are_drawn_from_each_client_in_turn() -> None:
    drawn = draw(examples([0] * 50 + [1] * 3 + [2] * 3, list(range(56))), 9, "k")
    _, counts = np.unique(drawn.columns["client"], return_counts=True)
    assert counts.tolist() == [3, 3, 3]
    assert len(set(drawn.columns["example_id"])) == 9
    assert len(draw(examples([], []), 5, "k")) == 0


def test_halves_share_no_client_or_else_no_group() -> None:
    first, second = halves(examples([0, 0, 1, 1, 2, 2], [0, 1, 2, 3, 4, 5]), 1)
    assert not set(first.columns["client"]) & set(second.columns["client"])
    first, second = halves(examples([0] * 6, [0, 0, 1, 1, 2, 2]), 1)
    assert not set(first.columns["group"]) & set(second.columns["group"])
    assert len(first) + len(second) == 6
    with pytest.raises(DataError, match="single group"):
        halves(examples([0, 0], [0, 0]), 1)
