"""One device with two applications: models, data, predictions and training of each, one agent, one gRPC port."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from typing import Any

import pytest
from flwr.app import MessageType

from fl_core.contracts.config import to_table
from fl_core.delivery.publication import publish_bundle
from fl_core.flower.messages import Reply, Request
from fl_core.learning.application import application
from fl_core.learning.torch_arrays import get_arrays
from tests.bundles import TOY, mean_bundle
from tests.field import NAME, Field
from tests.helpers import eventually, fieldfleet

DRIVER = "driver_conflict"


@pytest.fixture(scope="module")
def field(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Field]:
    found = Field(tmp_path_factory.mktemp("field"), applications=(TOY, DRIVER))
    found.register()
    yield found
    found.stop()


def test_each_has_its_model_its_data_and_its_predictions(field: Field) -> None:
    field.publish(0)
    publish_bundle(mean_bundle(field.work / "driver", DRIVER), field.home.repository)
    with field.running("--no-train", "--serve", "0"):
        state = eventually(lambda: _both_inferred(field), 90)
        assert {name: model["version"] for name, model in state["models"].items()} == {TOY: 1, DRIVER: 1}
        assert set(state["capabilities"]["applications"]) == {TOY, DRIVER}
        for name in (TOY, DRIVER):
            (file,) = (field.agent / "applications" / name / "predictions").glob("*.csv")
            with file.open(newline="") as rows:
                assert len(list(csv.DictReader(rows))) > 0
        _serves_both(state["roles"]["serve"])
        publish_bundle(mean_bundle(field.work / "driver-2", DRIVER, seed=1), field.home.repository)
        assert field.ask("update", application=TOY)["model"]["version"] == 1
        assert field.ask("update", application=DRIVER)["model"]["version"] == 2
        both = field.ask("infer")
        assert {name: body["model"]["version"] for name, body in both["applications"].items()} == {TOY: 1, DRIVER: 2}
        one = ("server", "command", NAME, "infer", "--home", field.home.path, "--application", DRIVER, "--json")
        assert json.loads(fieldfleet(*one).stdout)["reply"]["model"]["application"] == DRIVER
        assert f"{TOY} 1, {DRIVER} 2" in fieldfleet("server", "status", "--home", field.home.path).stdout
        odd = field.ask("infer", application="tetris")
        assert odd["ok"] is False
        assert DRIVER in odd["error"]
    back = fieldfleet("agent", "roll-back", field.agent)
    assert back.returncode == 2
    assert DRIVER in back.stderr
    assert fieldfleet("agent", "roll-back", field.agent, "--application", DRIVER).returncode == 0


def _both_inferred(field: Field) -> dict[str, Any] | None:
    if len(field.bridge.table.reports(NAME, "inference")) < 2:
        return None
    state: dict[str, Any] = field.device()["state"]
    return state if all(state["models"].values()) else None


def _serves_both(port: int) -> None:
    import tritonclient.grpc as triton

    with triton.InferenceServerClient(f"127.0.0.1:{port}") as client:
        assert client.is_server_ready()
        for name in (TOY, DRIVER):
            assert client.is_model_ready(name)
            assert client.get_model_metadata(name).name == name
        assert not client.is_model_ready("tetris")


def test_one_worker_trains_whatever_is_asked_of_them(field: Field) -> None:
    with field.running("--no-infer"):
        field.superlink.bell.on_push(lambda nodes: field.service.wake([NAME]))
        grid = field.superlink.grid()
        grid.wait_devices(1, 60)
        for round, name in enumerate((TOY, DRIVER, "plant_disease"), start=1):
            reply = _train(grid, name, round)
            if name == "plant_disease":
                assert "not enabled" in reply.error.reason
            else:
                assert Reply.from_record(reply.content, origin=name).num_examples > 0


def _train(grid: Any, name: str, round: int) -> Any:
    app = application(name)
    config = app.configure()
    request = Request(
        application=name,
        config=to_table(config),
        round=round,
        num_rounds=3,
        seed=0,
        arrays=get_arrays(app.build_model(config)),
    )
    (node,) = grid.device_names()
    message = grid.create_message(request.to_record(), MessageType.TRAIN, node, f"train-{round}")
    (message_id,) = grid.push_messages([message])
    assert grid.wait_ready({message_id}, 120) == {message_id}
    return grid.pull_messages([message_id])[0]
