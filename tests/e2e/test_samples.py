"""Samples dropped into a real agent's inbox, labelled later: a training uses exactly the labelled ones, inference all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import MessageType

from fl_clients.edge.samples.index import SampleIndex
from fl_clients.training.client import ClientRuntime
from fl_clients.training.worker import device_source
from fl_core.contracts.config import to_table
from fl_core.flower.messages import Reply, Request
from fl_core.learning.application import application
from fl_core.learning.samples import npz_bytes
from fl_core.learning.torch_arrays import get_arrays
from tests.bundles import TOY
from tests.field import NAME, Field
from tests.helpers import eventually, fieldfleet, small_overrides

LEAF = "plant_disease"
TRAINED = {TOY: ["data.validation_fraction=0"], LEAF: ["data.validation_fraction=0", "model.width=8"]}


@pytest.fixture(scope="module")
def field(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Field]:
    found = Field(tmp_path_factory.mktemp("field"), applications=(TOY, LEAF))
    found.register()
    file = found.agent / "agent.toml"
    text = file.read_text().replace("[samples]", "[samples]\nsettle_s = 0.2\npoll_s = 0.1\n#").replace
    file.write_text(text("enabled = false\ninbox", "enabled = true\ninbox"))
    yield found
    found.stop()


def inbox(field: Field, name: str) -> Path:
    return field.agent / "applications" / name / "samples" / "inbox"


def drop(folder: Path, name: str, data: bytes) -> None:
    (folder / f".{name}").write_bytes(data)
    os.replace(folder / f".{name}", folder / name)


def summary(field: Field, name: str) -> dict[str, Any]:
    index = SampleIndex(inbox(field, name).parent)
    try:
        return index.summary()
    finally:
        index.close()


def wait_samples(field: Field, name: str, **wanted: int) -> None:
    def there() -> bool:
        found = summary(field, name)
        return all(found[key] == value for key, value in wanted.items())

    eventually(there, 60)


def settings_of(name: str) -> tuple[Any, Any]:
    app = application(name)
    return app, app.configure([*small_overrides(app), *TRAINED[name]])


def train(field: Field, name: str, round: int) -> tuple[Any, Request]:
    app, config = settings_of(name)
    grid = field.superlink.grid()
    grid.wait_devices(1, 60)
    request = Request(
        application=name,
        config=to_table(config),
        round=round,
        num_rounds=9,
        seed=0,
        arrays=get_arrays(app.build_model(config)),
    )
    (node,) = grid.device_names()
    message = grid.create_message(request.to_record(), MessageType.TRAIN, node, f"train-{round}")
    (message_id,) = grid.push_messages([message])
    assert grid.wait_ready({message_id}, 120) == {message_id}, field.log()
    return grid.pull_messages([message_id])[0], request


def same_as_the_snapshot(field: Field, name: str, message: Any, request: Request, count: int) -> None:
    """Bit for bit what a training on the exported snapshot gives."""
    out = field.work / f"snapshot-{name}-{count}"
    done = fieldfleet("agent", "data", field.agent, "export-snapshot", "--application", name, "--out", out, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["samples"] == count
    reply = Reply.from_record(message.content, origin=name)
    expected = ClientRuntime(NAME, device_source(str(out), "", 0)).train(request)
    assert reply.num_examples == expected.num_examples == count
    for key, array in expected.arrays.items():
        np.testing.assert_array_equal(reply.arrays[key], array, err_msg=key)


def test_1_unlabelled_samples_are_not_trained_on_labelled_ones_are(field: Field) -> None:
    _, config = settings_of(TOY)
    chance = np.random.default_rng(0)
    with field.running("--no-infer", data=False):
        field.superlink.bell.on_push(lambda nodes: field.service.wake([NAME]))
        for number in range(6):
            x = chance.normal(size=config.data.features).astype(np.float32)
            drop(inbox(field, TOY), f"s{number}.npz", npz_bytes({"x": x}))
        drop(inbox(field, TOY), "torn.npz", npz_bytes({"x": x})[:-20])
        wait_samples(field, TOY, samples=6, labelled=0, quarantined=1)
        refused, _ = train(field, TOY, 1)
        assert "no labelled samples" in refused.error.reason
        drop(inbox(field, TOY), "labels.csv", b"id,label\ns1,1.5\ns3,-2\ns5,0.5\n")
        wait_samples(field, TOY, labelled=3)
        same_as_the_snapshot(field, TOY, *train(field, TOY, 2), count=3)
        # the worker is warm: it must see what has come since
        labelled = fieldfleet("agent", "data", field.agent, "label", "s0", "3.25", "--application", TOY)
        assert labelled.returncode == 0, labelled.stderr
        same_as_the_snapshot(field, TOY, *train(field, TOY, 3), count=4)
        assert field.ask("report")["samples"][TOY]["labelled"] == 4


def test_2_photographs_and_their_labels(field: Field) -> None:
    app, config = settings_of(LEAF)
    raw: Any = app.generate(config, 0)
    raw.select(raw.client_ids()[:1]).write(field.work / "leaves")
    leaves = app.read(field.work / "leaves").leaves[:5]  # type: ignore[attr-defined]
    with field.running("--no-infer", data=False):
        field.superlink.bell.on_push(lambda nodes: field.service.wake([NAME]))
        labels = [{"id": f"leaf-{n}", "label": leaf.facts.label} for n, leaf in enumerate(leaves[:4])]
        text = "\n".join(json.dumps(row) for row in labels)
        drop(inbox(field, LEAF), "labels-1.jsonl", text.encode())
        for number, leaf in enumerate(leaves):
            drop(inbox(field, LEAF), f"leaf-{number}{leaf.source.suffix}", leaf.source.read_bytes())
        wait_samples(field, LEAF, samples=5, labelled=4)
        same_as_the_snapshot(field, LEAF, *train(field, LEAF, 4), count=4)


def test_3_inference_runs_on_all_samples(field: Field) -> None:
    field.publish(0)
    with field.running("--no-train", data=False):
        report = eventually(lambda: field.device()["state"].get("inference"), 60)
        assert report["num_examples"] == 6
        _, config = settings_of(TOY)
        drop(inbox(field, TOY), "s9.npz", npz_bytes({"x": np.ones(config.data.features, np.float32)}))
        eventually(lambda: field.device()["state"]["inference"]["num_examples"] == 7, 60)


def test_4_an_operator_looks_into_the_store(field: Field) -> None:
    done = fieldfleet("agent", "data", field.agent, "status", "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert (document[TOY]["samples"], document[TOY]["labelled"], document[TOY]["quarantined"]) == (7, 4, 1)
    aside = fieldfleet("agent", "data", field.agent, "quarantine", "--application", TOY)
    assert "torn.npz: " in aside.stdout
    for wrong in (["add", field.work / "nowhere.npz"], ["label", "s1", "red"], ["status", "--application", "tetris"]):
        application_option = [] if "tetris" in wrong else ["--application", TOY]
        refused = fieldfleet("agent", "data", field.agent, *wrong, *application_option)
        assert refused.returncode == 2
        assert "Traceback" not in refused.stderr
    assert fieldfleet("agent", "data", field.agent, "label", "s1", "1").returncode == 2, "which application?"
