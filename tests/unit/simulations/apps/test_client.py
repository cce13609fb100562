"""What a client of a Flower project keeps between its messages: Flower's wire format, nothing that could run code."""

from __future__ import annotations

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, MetricRecord, RecordDict

from fl_core.flower.adapter import apps as adapter


def context() -> Context:
    return Context(11, 7, dict(adapter.node_config(3, 5)), RecordDict(), {"rate": 0.5})


def test_state_and_node_configuration_come_back_as_they_were() -> None:
    kept, fresh = context(), context()
    weights = np.arange(6, dtype=np.float32).reshape(2, 3)
    kept.state["layers"] = ArrayRecord({"head": Array(weights)})
    kept.state["numbers"] = MetricRecord({"loss": 0.25, "counts": [1, 2]})
    kept.state["words"] = ConfigRecord({"name": "é", "raw": b"\x00\xff", "on": True})
    kept.node_config["site"] = "north"
    data = adapter.kept_of(kept)
    adapter.restore(fresh, data)
    assert fresh.node_config == kept.node_config
    assert fresh.state == kept.state
    np.testing.assert_array_equal(fresh.state["layers"]["head"].numpy(), weights)  # type: ignore[index, union-attr, call-overload]


def test_what_flower_cannot_hold_is_refused() -> None:
    wrong = context()
    wrong.node_config["object"] = object()  # type: ignore[assignment]
    with pytest.raises((TypeError, ValueError)):
        adapter.kept_of(wrong)
