"""Our client as a Flower ClientApp, for devices that run an unmodified ``flower-supernode``.

``--node-config 'name="van-1" data="/data/recordings"'``: name as registered (it seeds the local update), data as of
``agent run --data``; ``applications="a,b"`` allows these only; ``states="/var/lib/states"`` is needed by algorithms that
keep a state on each client.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fl_clients.training.client import ClientRuntime, Learners
from fl_clients.training.worker import data_versions, device_sources, folder_states
from fl_core.contracts.errors import InputError

app = ClientApp()
_learners, _lock = Learners(), threading.Lock()


@app.train()
def train(message: Message, context: Context) -> Message:
    return answer(message, context)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    return answer(message, context)


def answer(message: Message, context: Context) -> Message:
    """Raises InputError when the node's configuration lacks its name or its data."""
    config = context.node_config
    name, data = str(config.get("name", "")), str(config.get("data", ""))
    if not name or not data:
        raise InputError(
            "this SuperNode's configuration lacks name or data",
            remedy='flower-supernode --node-config \'name="NAME" data="FOLDER"\'',
        )
    places, allowed = [data], str(config.get("applications", ""))
    runtime = ClientRuntime(
        name,
        device_sources(places, str(config.get("client", "")), 0, name),
        learners=_learners,
        allowed=frozenset(allowed.split(",")) if allowed else None,
        version=data_versions(places),
        states=folder_states(Path(str(config["states"])) if "states" in config else None),
        clock=time.monotonic,
    )
    with _lock:
        return runtime.handle(message)
