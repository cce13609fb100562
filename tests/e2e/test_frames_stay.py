"""What a vehicle with cameras sends in a real federated round, byte by byte: its model's update and declared numbers, no frame."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fl_core.contracts.arrays import Arrays
from fl_core.flower.messages import Reply
from fl_core.identity import keys
from fl_core.learning.application import application
from fl_core.learning.torch_arrays import get_arrays
from fl_server.engine import RoundEngine
from tests.federation import DeviceProcess, new_home, running

OVERRIDES = [
    *("data.clients=2", "data.clips_per_client=8", "data.holdout_fraction=0.0", "data.validation_fraction=0.25"),
    *("algorithm.evaluate_every=1", "algorithm.clients_per_round=0", "algorithm.local_epochs=1"),
]
DECLARED = {
    "train": {"num-examples", "loss"},
    "evaluate": {"num-examples", "loss", "roc_auc", "average_precision", "state_f1_macro", "state_accuracy"},
}
PIECE = 24  # bytes of a frame's row: with sensor noise in them no two rows are alike
ENVELOPE = 40_000  # bytes of one exchange beside the arrays: messages, signatures, polls


class Recorded:
    """An ASGI application in front of another one that keeps every byte that comes in."""

    def __init__(self, app: Any) -> None:
        self.app, self.bodies, self.headers = app, list[bytes](), list[bytes]()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def kept() -> Any:
            message = await receive()
            self.bodies.append(message.get("body", b""))
            return message

        self.headers += [part for pair in scope.get("headers", ()) for part in pair] + [scope.get("query_string", b"")]
        await self.app(scope, kept, send)


def test_frames_never_leave_the_vehicle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    app = application("driver_attention")
    config = app.configure(OVERRIDES)
    raw = app.generate(config, 0)
    client = raw.client_ids()[0]
    own = raw.select([client])
    own.write(tmp_path / "data")
    replies: list[Any] = []
    read = Reply.from_record.__func__  # type: ignore[attr-defined]

    def noted(cls: type[Reply], record: Any, *, origin: str) -> Reply:
        replies.append(record)
        return read(cls, record, origin=origin)  # type: ignore[no-any-return]

    monkeypatch.setattr(Reply, "from_record", classmethod(noted))
    initial = get_arrays(app.build_model(config))
    with running(new_home(tmp_path / "home")) as superlink:
        recorded = superlink.traffic._app = Recorded(superlink.traffic._app)
        worker = [
            sys.executable,
            "-m",
            "fl_clients.training.worker",
            "--name",
            client,
            "--data",
            str(tmp_path / "data"),
        ]
        agent = DeviceProcess(superlink.url, superlink.home.ca_file, tmp_path, client, worker)
        superlink.registry.register(client, keys.public_pem(agent.key))
        agent.start()
        grid = superlink.grid()
        try:
            grid.wait_devices(1, 60)
            engine = RoundEngine(
                grid=grid, application=app, config=config, start=None, initial=initial, num_rounds=1, seed=0,
                out=tmp_path / "out", stage="federated",
            )  # fmt: skip
            engine.run()
            grid.close(completed=True)
        finally:
            agent.stop()
    assert [sorted(record.clients) for record in engine.history.records] == [[client]]
    trained, evaluated = replies
    check_records(trained, evaluated, initial)
    sent = b"".join(recorded.bodies) + b"\0".join(recorded.headers)
    frames = [stream.source for stream in own.recordings[own.clips[0].recording].views.values()]
    pieces = [row.tobytes()[:PIECE] for stack in frames for row in np.asarray(stack).reshape(-1, config.data.width)]
    assert len(set(pieces)) > 0.9 * len(pieces), "the search below needs rows that are like no other"
    update = trained.array_records["arrays"]
    assert all(np.asarray(a.numpy()).tobytes() in sent for a in update.values()), "what is sent can be searched"
    assert not [piece for piece in set(pieces) if piece in sent]
    model = sum(a.nbytes for a in initial.values())
    pixels = sum(np.asarray(stack).nbytes for stack in frames)
    assert len(sent) < model + ENVELOPE, "beside the model there is"
    assert pixels > 10 * ENVELOPE, "no room for frames, however they were packed"


def check_records(trained: Any, evaluated: Any, initial: Arrays) -> None:
    """The replies hold the arrays of the model, of its shapes, and numbers by declared names: nothing else."""
    assert set(trained) == {"arrays", "metrics"}
    update = trained.array_records["arrays"]
    assert {k: (a.numpy().shape, a.numpy().dtype) for k, a in update.items()} == {
        k: (a.shape, a.dtype) for k, a in initial.items()
    }
    assert any(not np.array_equal(a.numpy(), initial[k]) for k, a in update.items())
    assert set(evaluated) == {"metrics"}
    for kind, record in (("train", trained), ("evaluate", evaluated)):
        numbers = dict(record.metric_records["metrics"])
        assert set(numbers) <= DECLARED[kind], kind
        assert all(isinstance(value, int | float) for value in numbers.values())
