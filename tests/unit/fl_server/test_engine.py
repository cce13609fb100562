"""The round engine over a scripted grid: late, failing and lying devices, any order of arrival, interruptions."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import MessageType
from hypothesis import given, settings
from hypothesis import strategies as st

from fl_core.contracts import checkpoint as checkpoints
from fl_core.contracts.arrays import fingerprint
from fl_core.contracts.checkpoint import Checkpoint
from fl_core.contracts.errors import IntegrityError
from fl_core.contracts.manifests import CheckpointManifest
from fl_core.flower.messages import Reply, Request
from fl_server import engine as engine_module
from fl_server import history
from fl_server import tally as tally_module
from tests.scripted_grid import (
    INITIAL,
    NAMES,
    NEVER,
    Answer,
    ScriptedGrid,
    Start,
    final,
    honest,
    only,
    start,
)

__all__ = ["start"]


def test_one_round_by_hand(tmp_path: Path, start: Start) -> None:
    found = start(tmp_path, ScriptedGrid())
    arrays = final(found)
    request = Request(application="", config={}, round=1, num_rounds=1, seed=0, arrays=INITIAL)
    replies: list[Any] = [honest(n, MessageType.TRAIN, request) for n in NAMES]
    total = sum(r.num_examples for r in replies)
    expected = sum(r.num_examples * r.arrays["w"] for r in replies) / total
    np.testing.assert_allclose(arrays["w"], expected, rtol=1e-14)
    assert arrays["n"] == 1
    record = found.history.records[0]
    assert record.loss == pytest.approx(sum(r.num_examples * r.metrics["loss"] for r in replies) / total)
    assert record.evaluation == {"mean": pytest.approx(expected.mean())}
    assert list(record.clients) == list(NAMES)


@settings(max_examples=10)
@given(order=st.permutations(NAMES))
def test_any_order_of_arrival_gives_the_same_bits(
    tmp_path_factory: pytest.TempPathFactory, start: Start, order: list[str]
) -> None:
    shas = []
    for arrival in (sorted, lambda names: sorted(names, key=order.index)):
        grid = ScriptedGrid(arrival=arrival)
        found = start(tmp_path_factory.mktemp("run"), grid, rounds=2)
        shas.append(fingerprint(final(found)))
        assert list(found.history.records[0].clients) == list(NAMES)
        assert grid.largest_pull == 1, "one reply is held at a time"
        assert not grid.ready
        assert not grid.sent
    assert shas[0] == shas[1]


@pytest.mark.parametrize("late", [("van-0",), ("van-4",), ("van-1", "van-3")])
def test_late_devices_cost_one_deadline_and_the_others_count(
    tmp_path: Path, start: Start, late: tuple[str, ...]
) -> None:
    def answer(name: str, kind: str, request: Request) -> Answer:
        return NEVER if name in late else honest(name, kind, request)

    grid = ScriptedGrid(answer)
    found = start(tmp_path / "late", grid)
    arrays = final(found)
    record = found.history.records[0]
    assert record.late == list(late)
    assert record.applied
    assert grid.clock == record.seconds == 30, "one deadline, none for the evaluation of those already late"
    assert not [a for a in grid.asked if a[1] == MessageType.EVALUATE and a[2] in late]
    assert {f"m{i + 1}" for i, n in enumerate(NAMES) if n in late} <= grid.forgotten
    expected = final(start(tmp_path / "only", ScriptedGrid(only(*(n for n in NAMES if n not in late)))))
    assert fingerprint(arrays) == fingerprint(expected)


def test_replies_that_came_while_others_were_counted_are_not_late(
    tmp_path: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counting van-0 takes longer than the deadline; all the other replies lie there already."""
    grid = ScriptedGrid()
    screen = tally_module.screen_update

    def slow(*args: Any, **options: Any) -> None:
        grid.clock += 100
        screen(*args, **options)

    monkeypatch.setattr(tally_module, "screen_update", slow)
    found = start(tmp_path, grid)
    found.run()
    assert found.history.records[0].late == []
    assert len(found.history.records[0].clients) == len(NAMES)


def spoil(**change: Any) -> Callable[..., Answer]:
    def answer(name: str, kind: str, request: Request) -> Answer:
        reply: Any = honest(name, kind, request)
        if name != "van-2" or kind != MessageType.TRAIN:
            return reply  # type: ignore[no-any-return]
        values = {"num_examples": reply.num_examples, "metrics": reply.metrics, "arrays": reply.arrays}
        return Reply(**{**values, **change})

    return answer


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (only(*(n for n in NAMES if n != "van-2")), "absent"),
        (spoil(arrays={"w": np.full((2, 3), np.nan), "n": np.array(1)}), "'w' holds values that are not finite"),
        (spoil(arrays={"w": np.zeros((3, 2)), "n": np.array(1)}), "expected float64(2, 3)"),
        (spoil(arrays={"w": np.zeros((2, 3), np.float32), "n": np.array(1)}), "expected float64(2, 3)"),
        (spoil(arrays={"w": np.zeros((2, 3))}), "'n' is missing"),
        (spoil(arrays={}), "is missing"),
        (spoil(arrays={"w": np.zeros((2, 3)), "n": np.array(1), "x": np.zeros(1)}), "'x' is unexpected"),
        (spoil(arrays={"w": np.full((2, 3), 1e9), "n": np.array(1)}), "max_update_norm"),
        (spoil(metrics={"loss": float("nan")}), "'loss' is not finite"),
        (spoil(num_examples=0), "no examples"),
        (spoil(num_examples=2**62), "claims"),
    ],
)
def test_bad_replies_are_refused_with_their_reason(
    tmp_path: Path, start: Start, answer: Callable[..., Answer], reason: str
) -> None:
    norm = "algorithm.max_update_norm=1000"
    found = start(tmp_path / "bad", ScriptedGrid(answer), norm)
    arrays = final(found)
    record = found.history.records[0]
    assert list(record.refused) == ["van-2"]
    assert reason in record.refused["van-2"]
    assert "van-2" not in record.clients
    assert checkpoints.load(tmp_path / "bad").manifest.clients_seen == [n for n in NAMES if n != "van-2"]
    expected = final(start(tmp_path / "only", ScriptedGrid(only(*(n for n in NAMES if n != "van-2"))), norm))
    assert fingerprint(arrays) == fingerprint(expected)


def test_a_device_that_cannot_be_reached_is_refused_not_waited_for(tmp_path: Path, start: Start) -> None:
    grid = ScriptedGrid(gone=frozenset({"van-0"}))
    found = start(tmp_path, grid)
    found.run()
    assert found.history.records[0].refused == {"van-0": "van-0: no readable reply"}
    assert grid.clock == 0


@pytest.mark.parametrize("algorithm", ["fedavg", "fedadam"])
def test_too_few_usable_replies_change_nothing(tmp_path: Path, start: Start, algorithm: str) -> None:
    def answer(name: str, kind: str, request: Request) -> Answer:
        return honest(name, kind, request) if request.round == 2 or name in NAMES[:2] else "out of memory"

    settings = (f"algorithm.name={algorithm}", "algorithm.min_clients=3")
    found = start(tmp_path / "few", ScriptedGrid(answer), *settings, rounds=1)
    assert fingerprint(final(found)) == fingerprint(INITIAL)
    record = found.history.records[0]
    assert (record.applied, sorted(record.clients), len(record.refused)) == (False, list(NAMES[:2]), 3)
    assert checkpoints.load(tmp_path / "few").manifest.clients_seen == []


def test_no_device_at_all_is_said_clearly(tmp_path: Path, start: Start) -> None:
    """Silence is a failed round, not the end of the run."""
    found = start(tmp_path, ScriptedGrid(names=()), "algorithm.min_clients=2", rounds=2)
    assert fingerprint(final(found)) == fingerprint(INITIAL)
    assert [(r.applied, r.failed) for r in found.history.records] == [(False, "0 clients, 2 needed")] * 2


def test_all_refused_leaves_no_loss_and_no_evaluation(tmp_path: Path, start: Start) -> None:
    found = start(tmp_path, ScriptedGrid(only()))
    assert fingerprint(final(found)) == fingerprint(INITIAL)
    assert found.history.records[0].loss is None
    assert found.history.records[0].evaluation == {}


def test_a_part_of_the_devices_takes_part_by_seed_and_round(tmp_path: Path, start: Start) -> None:
    grids = [ScriptedGrid(names=NAMES), ScriptedGrid(names=NAMES[::-1])]
    runs = [start(tmp_path / str(i), g, "algorithm.clients_per_round=2", rounds=6) for i, g in enumerate(grids)]
    assert fingerprint(final(runs[0])) == fingerprint(final(runs[1]))
    chosen = [tuple(r.clients) for r in runs[0].history.records]
    assert all(len(c) == 2 for c in chosen)
    assert len(set(chosen)) > 2
    evaluated = {(r, n) for r, kind, n in grids[0].asked if kind == MessageType.EVALUATE}
    assert evaluated == {(i, n) for i, c in enumerate(chosen, 1) for n in c}


@pytest.mark.parametrize(("every", "rounds"), [(0, []), (2, [2, 4, 5]), (1, [1, 2, 3, 4, 5])])
def test_evaluation_every_few_rounds_and_after_the_last(
    tmp_path: Path, start: Start, every: int, rounds: list[int]
) -> None:
    found = start(
        tmp_path, ScriptedGrid(), f"algorithm.evaluate_every={every}", rounds=5,
        evaluate_global=lambda arrays: {"mean": float(arrays["w"].mean())},
    )  # fmt: skip
    found.run()
    assert [r.round for r in found.history.records if r.evaluation] == rounds
    assert [r.round for r in found.history.records if r.held_out] == rounds
    assert checkpoints.load(tmp_path).manifest.metrics["mean"] == float(found.arrays["w"].mean())


class Killed(Exception):
    pass


def interrupt_in_round(number: int, after: int) -> Callable[..., Answer]:
    """The server dies once ``after`` devices of that round have answered."""
    count = itertools.count()

    def answer(name: str, kind: str, request: Request) -> Answer:
        if request.round == number and kind == MessageType.TRAIN and next(count) == after:
            raise Killed
        return honest(name, kind, request)

    return answer


@pytest.mark.parametrize("algorithm", ["fedavg", "fedyogi", "fedmedian"])
def test_resume_at_any_round_equals_undisturbed(tmp_path: Path, start: Start, algorithm: str) -> None:
    settings = (f"algorithm.name={algorithm}", "algorithm.average_last=0.6", "algorithm.clients_per_round=4")
    calm = start(tmp_path / "calm", ScriptedGrid(), *settings, rounds=4)
    expected = checkpoints.load(calm.run()).manifest
    for number, after in itertools.product(range(1, 5), (0, 3)):
        out = tmp_path / f"{number}-{after}"
        with pytest.raises(Killed):
            start(out, ScriptedGrid(interrupt_in_round(number, after)), *settings, rounds=4).run()
        resumed = start(out, ScriptedGrid(), *settings, rounds=4)
        assert resumed.done == number - 1
        found = checkpoints.load(resumed.run()).manifest
        assert found.model_sha256 == expected.model_sha256
        assert (found.clients_seen, found.metrics, found.step) == (expected.clients_seen, expected.metrics, 4)
        assert [(r.round, r.model_sha256) for r in resumed.history.records] == [
            (r.round, r.model_sha256) for r in calm.history.records
        ]
        assert [r.round for r in history.read_history(out)] == [1, 2, 3, 4]


def test_a_crash_while_the_round_is_saved_loses_nothing(
    tmp_path: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each step of writing round 2 in turn: the log, the checkpoint, the link."""
    calm = start(tmp_path / "calm", ScriptedGrid(), rounds=3)
    expected = checkpoints.load(calm.run()).manifest.model_sha256
    targets = [
        (history.History, "append"),
        (Checkpoint, "save"),
        (engine_module.atomic, "point_to"),
    ]
    for place, name in targets:
        out = tmp_path / name
        calls = itertools.count(1)
        real = getattr(place, name)

        def dies(*args: Any, real: Any = real, calls: Any = calls, **options: Any) -> Any:
            if next(calls) == 2:
                raise Killed
            return real(*args, **options)

        with monkeypatch.context() as patch:
            patch.setattr(place, name, dies)
            with pytest.raises(Killed):
                start(out, ScriptedGrid(), rounds=3).run()
        resumed = start(out, ScriptedGrid(), rounds=3)
        assert checkpoints.load(resumed.run()).manifest.model_sha256 == expected
        assert [r.round for r in resumed.history.records] == [1, 2, 3]
        assert [r.round for r in history.read_history(out)] == [1, 2, 3]


def test_a_finished_run_can_be_finished_again_or_prolonged(tmp_path: Path, start: Start) -> None:
    first = final(start(tmp_path, ScriptedGrid(), rounds=2))
    grid = ScriptedGrid()
    assert fingerprint(final(start(tmp_path, grid, rounds=2))) == fingerprint(first)
    assert grid.asked == []
    calm = final(start(tmp_path.with_name("calm"), ScriptedGrid(), rounds=3))
    assert fingerprint(final(start(tmp_path, ScriptedGrid(), rounds=3))) == fingerprint(calm)


def parent() -> Checkpoint:
    manifest = CheckpointManifest(
        application="toy_regression", config={}, stage="pretrain", model_sha256="ab", step=7, clients_seen=["old"]
    )
    return Checkpoint(manifest, INITIAL)


def test_lineage_and_clients_of_the_parent_are_kept(tmp_path: Path, start: Start) -> None:
    found = checkpoints.load(start(tmp_path, ScriptedGrid(), start=parent(), rounds=2).run()).manifest
    assert found.parent_sha256 == "ab"
    assert [(e["stage"], e["step"], e["model_sha256"]) for e in found.lineage] == [("pretrain", 7, "ab")]
    assert found.clients_seen == ["old", *NAMES]
    assert (found.stage, found.step) == ("federation", 2)


@pytest.mark.parametrize(
    ("overrides", "options"),
    [(["algorithm.name=fedadam"], {}), ([], {"seed": 1}), ([], {"start": parent()})],
    ids=["config", "seed", "parent"],
)
def test_another_run_in_the_same_folder_is_refused(
    tmp_path: Path, start: Start, overrides: list[str], options: dict[str, Any]
) -> None:
    start(tmp_path, ScriptedGrid(), rounds=1).run()
    with pytest.raises(IntegrityError, match=r"another configuration, seed or starting model\n.*--out"):
        start(tmp_path, ScriptedGrid(), *overrides, rounds=2, **options)


def test_a_run_of_an_older_version_goes_on_after_an_upgrade(tmp_path: Path, start: Start) -> None:
    """Its manifest lacks the keys that came since; whoever sets one of them has another run."""
    start(tmp_path / "run", ScriptedGrid(), rounds=1).run()
    for path in (tmp_path / "run").rglob("manifest.json"):
        manifest = json.loads(path.read_text())
        del manifest["config"]["algorithm"]["server_lr"], manifest["config"]["selection"]
        path.write_text(json.dumps(manifest))
    with pytest.raises(IntegrityError, match="another configuration"):
        start(tmp_path / "run", ScriptedGrid(), "algorithm.server_lr=0.5", rounds=2)
    calm = final(start(tmp_path / "calm", ScriptedGrid(), rounds=2))
    assert fingerprint(final(start(tmp_path / "run", ScriptedGrid(), rounds=2))) == fingerprint(calm)


def test_devices_are_told_which_settings_are_defaults(tmp_path: Path, start: Start) -> None:
    told: list[Request] = []

    def answer(name: str, kind: str, request: Request) -> Answer:
        told.append(request)
        return honest(name, kind, request)

    start(tmp_path, ScriptedGrid(answer), "algorithm.name=fedadam", rounds=1).run()
    assert "algorithm.tau" in told[0].defaults
    assert "algorithm.name" not in told[0].defaults


def test_old_rounds_are_removed_and_latest_points_to_the_end(tmp_path: Path, start: Start) -> None:
    start(tmp_path, ScriptedGrid(), rounds=5).run()
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["final", "history.jsonl", "latest", "round-00003", "round-00004", "round-00005"]
    assert (tmp_path / "latest").readlink() == Path("final")
