"""Was every round of a run what its record says? The run once more, in one process, without network, store or faults."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fl_clients.training.client import ClientRuntime, Learners
from fl_core.algorithms import build_algorithm
from fl_core.algorithms.base import Update
from fl_core.contracts import arrays as array_format
from fl_core.contracts import checkpoint
from fl_core.contracts.config import to_table
from fl_core.flower.messages import Request
from fl_core.learning.application import application
from fl_core.storage import atomic
from fl_server.history import read_history


def replay(out: Path, start: Path, data: Mapping[str, Path], settings: list[str], num_rounds: int) -> list[str]:
    """What does not fit, one line each; at most a few. Each round's model must be, bit for bit, what exactly one update
    of each device in its record makes of the model before it."""
    torch.set_num_threads(1)
    first = checkpoint.load(start)
    app = application(first.manifest.application)
    config: Any = app.configure(settings)
    learners, wrong = Learners(), list[str]()
    runtimes = {name: _runtime(name, folder, learners) for name, folder in data.items()}
    aggregator, arrays = build_algorithm(config.algorithm).aggregator, first.arrays
    for expected, record in enumerate(read_history(out), 1):
        if record.round != expected:
            wrong.append(f"round {expected} is missing")
            break
        if record.applied:
            state = aggregator.begin(record.round, arrays)
            for name in sorted(record.clients):
                request = Request(
                    application=app.name,
                    config=to_table(config),
                    round=record.round,
                    num_rounds=num_rounds,
                    seed=0,
                    arrays=arrays,
                )
                reply = runtimes[name].train(request)
                aggregator.add(state, Update(arrays=reply.arrays, weight=float(reply.num_examples), extra=reply.extra))
            arrays = aggregator.finish(state)
        if atomic.sha256_bytes(array_format.to_bytes(arrays)) != record.model_sha256:
            wrong.append(f"round {record.round} ({', '.join(sorted(record.clients))}): another model than its record's")
            break
    return wrong


def _runtime(name: str, folder: Path, learners: Learners) -> ClientRuntime:
    return ClientRuntime(name, lambda app, config: app.read(folder).examples(config), learners=learners)
