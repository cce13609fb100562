"""The grid of clients in this process, the client behind it, and whole simulations."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Message, MessageType, RecordDict

from fieldfleet.__main__ import main as command
from fl_clients.training.client import ClientRuntime
from fl_core.contracts import checkpoint as checkpoints
from fl_core.contracts.checkpoint import Checkpoint
from fl_core.contracts.config import to_table
from fl_core.contracts.errors import DataError, FieldfleetError, IntegrityError, RefusedError
from fl_core.contracts.manifests import CheckpointManifest
from fl_core.flower import adapter
from fl_core.flower.messages import Reply, Request
from fl_core.learning.examples import Examples
from fl_core.learning.torch_arrays import get_arrays
from fl_server.history import RoundRecord
from simulations.grid import InProcessGrid
from simulations.simulate import Simulation, simulate
from tests.helpers import small_config


def echo(name: str, calls: list[str]) -> Any:
    def handle(message: Message) -> Message:
        calls.append(name)
        return Message(Reply(num_examples=len(calls), metrics={}).to_record(), reply_to=message)

    return handle


def test_grid_runs_a_client_when_its_reply_is_waited_for() -> None:
    calls: list[str] = []
    grid = InProcessGrid({n: echo(n, calls) for n in ("c", "a", "b")})
    names = dict(grid.device_names())
    assert sorted(names.values()) == ["a", "b", "c"]
    assert set(grid.get_node_ids()) == set(names)
    node = {v: k for k, v in names.items()}
    ids = grid.push_messages(grid.create_message(RecordDict(), "train", node[n], "g") for n in ("c", "a", "b"))
    assert (len(set(ids)), calls) == (3, [])
    assert list(grid.pull_messages(ids)) == []
    assert grid.wait_ready({ids[1], ids[2]}, 10) == {ids[1]}
    assert calls == ["a"]
    assert grid.wait_ready({ids[1]}, 10) == {ids[1]}, "ready until it is pulled"
    replies = list(grid.pull_messages([ids[1]]))
    assert [r.metadata.reply_to_message_id for r in replies] == [ids[1]]
    assert list(grid.pull_messages([ids[1]])) == []
    grid.forget([ids[0]])
    assert grid.wait_ready({ids[0]}, 0) == set()
    assert grid.wait_ready({ids[2]}, 0) == {ids[2]}
    assert calls == ["a", "b"]


def test_grid_serves_flowers_blocking_call_in_order() -> None:
    calls: list[str] = []
    grid = InProcessGrid({n: echo(n, calls) for n in ("a", "b", "c")})
    node = {v: k for k, v in grid.device_names().items()}
    messages = [grid.create_message(RecordDict(), "train", node[n], "g") for n in ("b", "c", "a")]
    replies = grid.send_and_receive(messages, timeout=5)
    assert calls == ["b", "c", "a"]
    assert [r.metadata.src_node_id for r in replies] == [node[n] for n in calls]
    with pytest.raises(RefusedError, match="3 clients, 4 needed"):
        grid.wait_devices(4, 0)


@dataclasses.dataclass
class Asked:
    """A client of toy_regression and how to ask it."""

    runtime: ClientRuntime
    request: Request

    def reply(self, kind: str = MessageType.TRAIN, **change: Any) -> Message:
        adapter.assume_identity(run_id=1, task_id=1, node_id=1)
        message = Message(dataclasses.replace(self.request, **change).to_record(), 7, kind)
        adapter.set_message_id(message, "m1")
        return self.runtime.handle(message)


@pytest.fixture
def asked() -> Asked:
    torch.set_num_threads(1)
    app, config = small_config("toy_regression", "data.examples_per_client=20")
    own = app.generate(config, 0).examples(config).of_clients(["client-0001"])
    request = Request(
        application=app.name, config=to_table(config), round=1, num_rounds=1, seed=0,
        arrays=get_arrays(app.build_model(config)),
    )  # fmt: skip
    return Asked(ClientRuntime("van-1", lambda a, c: own, allowed=frozenset({app.name})), request)


def test_client_trains_on_its_training_part_and_evaluates_on_the_rest(asked: Asked) -> None:
    trained = Reply.from_record(asked.reply().content, origin="van-1")
    evaluated = Reply.from_record(asked.reply(MessageType.EVALUATE).content, origin="van-1")
    assert trained.num_examples + evaluated.num_examples == 20
    assert evaluated.num_examples == 4
    assert set(evaluated.metrics) == {"loss", "mean_squared_error", "r2"}
    assert not evaluated.arrays
    assert set(trained.arrays) == set(asked.request.arrays)
    better = Reply.from_record(asked.reply(MessageType.EVALUATE, arrays=trained.arrays).content, origin="van-1")
    assert better.metrics["loss"] < evaluated.metrics["loss"]
    assert better.metrics["loss"] == pytest.approx(better.metrics["mean_squared_error"], rel=1e-5)


@pytest.mark.parametrize(
    ("kind", "change", "words"),
    [
        (MessageType.TRAIN, {"application": "no_such_app"}, "not enabled on this device"),
        (MessageType.TRAIN, {"config": {"model": {"hidden": -1}}}, "model.hidden = -1"),
        (MessageType.TRAIN, {"config": {"nonsense": 1}}, "unknown key 'nonsense'"),
        (MessageType.TRAIN, {"config": {"algorithm": {"name": "no-such"}}}, "unknown algorithm.name"),
        (MessageType.TRAIN, {"config": {"optimizer": {"name": "no-such"}}}, "unknown optimizer.name"),
        (MessageType.TRAIN, {"arrays": {"w": np.zeros(1)}}, "global model: array"),
        (MessageType.EVALUATE, {"arrays": {}}, "is missing"),
        (MessageType.TRAIN, {"config": {"data": {"features": 3}}}, "data.features is 3"),
        (MessageType.QUERY, {}, "message type 'query' is not served"),
    ],
)
def test_bad_requests_are_answered_with_their_reason(
    asked: Asked, kind: str, change: dict[str, Any], words: str
) -> None:
    if "features" in str(change):
        raw = small_config("toy_regression")[0].generate(small_config("toy_regression")[1], 0)
        asked.runtime.source = lambda app, config: raw.examples(config)
    reply = asked.reply(kind, **change)
    assert reply.has_error()
    assert words in reply.error.reason
    assert reply.error.reason.startswith("van-1: ")
    assert not asked.reply().has_error() or "features" in str(change), "a bad request leaves the client able to go on"


def test_an_unreadable_record_is_answered_too(asked: Asked) -> None:
    adapter.assume_identity(run_id=1, task_id=1, node_id=1)
    message = Message(RecordDict(), 7, MessageType.TRAIN)
    adapter.set_message_id(message, "m1")
    assert "record 'config' is missing" in asked.runtime.handle(message).error.reason


def run(out: Path, *overrides: str, rounds: int = 4, stop_after: int = 0, **options: Any) -> Simulation:
    app, config = small_config("toy_regression", "algorithm.name=fedadam", "algorithm.average_last=0.5", *overrides)

    def on_round(record: RoundRecord) -> None:
        if record.round == stop_after:
            raise InterruptedError

    raw = options.pop("raw", None) or app.generate(config, 0)
    return simulate(
        app, config, raw, num_rounds=rounds, seed=0, out=out, on_round=on_round, **{"start": None, **options}
    )


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_an_interrupted_simulation_ends_in_the_same_bits(tmp_path: Path, stop: int) -> None:
    expected = checkpoints.load(run(tmp_path / "calm").final).manifest
    with pytest.raises(InterruptedError):
        run(tmp_path / "again", stop_after=stop)
    found = checkpoints.load(run(tmp_path / "again").final).manifest
    assert (found.model_sha256, found.metrics) == (expected.model_sha256, expected.metrics)


def test_simulation_starts_from_a_checkpoint_and_keeps_held_out_clients_out(tmp_path: Path) -> None:
    first = run(tmp_path / "one", rounds=2)
    start = checkpoints.load(first.final)
    second = run(tmp_path / "two", rounds=1, start=start)
    found = checkpoints.load(second.final).manifest
    assert found.parent_sha256 == start.manifest.model_sha256
    assert [e["stage"] for e in found.lineage] == ["simulation"]
    assert not set(second.held_out) & set(found.clients_seen)
    assert set(second.clients) | set(second.held_out) == {f"client-{i:04d}" for i in range(4)}


def test_a_start_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    manifest = CheckpointManifest(application="toy_regression", config={}, stage="pretrain")
    with pytest.raises(IntegrityError, match=r"the starting checkpoint: array"):
        run(tmp_path, start=Checkpoint(manifest, {"w": np.zeros(2, np.float32)}))


@dataclasses.dataclass(frozen=True)
class Empty:
    """A data set without one usable example."""

    whole: Any

    def examples(self, config: Any) -> Examples:
        found: Examples = self.whole.examples(config).take([])
        return found


@pytest.mark.parametrize(
    ("options", "settings", "words"),
    [
        ({"devices": "missing.toml"}, [], "missing.toml"),
        ({"device_states": "missing.csv"}, [], "missing.csv"),
        ({}, ["algorithm.personal=['nothing.*']"], "fits no array of the model"),
        ({"partition": "nonsense"}, [], "unknown partitioner"),
    ],
)
def test_what_was_got_wrong_is_told_before_any_work(
    tmp_path: Path, options: dict[str, str], settings: list[str], words: str
) -> None:
    with pytest.raises(FieldfleetError, match=words):
        run(tmp_path / "out", *settings, **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--flower-app . --devices generated", "--devices has no part in --flower-app"),
        ("toy_regression --flower-app .", "APP has no part in --flower-app"),
        ("--flower-app . --set a.b=1", "--set has no part in --flower-app"),
        ("--replay . --rounds 3", "--rounds has no part in --replay"),
        ("toy_regression --rounds 1 --out {out} --in-process", "--in-process needs --flower-app"),
        ("toy_regression --rounds 1 --out {out} --target 1", "--target needs --devices"),
        ("toy_regression --rounds 1 --out {out} --jobs 2", "--jobs needs --seeds or --sweep"),
        ("toy_regression --rounds 1 --out {out} --round-seconds 9", "--round-seconds needs --device-states"),
        ("toy_regression --rounds 1 --out {out} --seeds 2 --devices generated --target 1", "no part in an experiment"),
    ],
)
def test_options_that_would_do_nothing_are_refused(
    tmp_path: Path, words: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(["simulate", *words.format(out=tmp_path / "out").split()]) == 2
    assert message in capsys.readouterr().err


def test_a_data_set_without_clients_is_refused_before_any_work(tmp_path: Path) -> None:
    app, config = small_config("toy_regression")
    with pytest.raises(DataError, match="no usable client"):
        run(tmp_path / "out", raw=Empty(app.generate(config, 0)))
    assert not (tmp_path / "out").exists()
