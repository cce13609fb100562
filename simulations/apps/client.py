"""One message through a ClientApp, as Flower's own simulation does it: its errors become error replies, never ours."""

from __future__ import annotations

import random
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from fl_core.flower.adapter import apps as adapter
from fl_core.learning import seeding

REASON_LIMIT = 2_000


@dataclass(frozen=True, kw_only=True)
class Client:
    """Who answers a message: its node, its share of the data, and the key of its random streams for this message."""

    node: int
    partition: int
    count: int
    run: int
    run_config: dict[str, Any]
    seed: int


def answer(app: ClientApp, message: Message, client: Client, state: bytes) -> tuple[Message, bytes]:
    """(reply, what the client keeps). After an error the client keeps what it had."""
    own = adapter.node_config(client.partition, client.count)
    context = Context(
        run_id=client.run,
        node_id=client.node,
        node_config=dict(own),
        state=RecordDict(),
        run_config=dict(client.run_config),
    )
    if state:
        adapter.restore(context, state)
    seed_everything(client.seed)
    try:
        reply = app(message, context)
        if context.run_config != client.run_config:
            raise ValueError("the `run_config` of a Context cannot be changed")
        if not isinstance(reply, Message) or reply.metadata.reply_to_message_id != message.metadata.message_id:
            raise TypeError(f"the ClientApp returned {_shown(reply)}, not a reply to its message")
        kept = b"" if not context.state and context.node_config == own else adapter.kept_of(context)
    except Exception as error:
        traceback.print_exc()
        reason = f"{type(error).__name__}: {error}"[:REASON_LIMIT]
        return failed(message, adapter.RAISED, f"partition {client.partition}: {reason}"), state
    return reply, kept


def failed(message: Message, code: int, reason: str) -> Message:
    return Message(Error(code, reason), reply_to=message)


def _shown(reply: Any) -> str:
    return "a Message that replies to another one" if isinstance(reply, Message) else f"a {type(reply).__name__}"


def seed_everything(seed: int) -> None:
    """The process-wide generators, keyed by run, client and message: a result does not depend on where it was computed."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    if (torch := sys.modules.get("torch")) is not None:
        torch.manual_seed(seed)


@contextmanager
def generators_kept() -> Iterator[None]:
    """For a client in the ServerApp's own process: what the ServerApp draws next does not depend on it."""
    torch = sys.modules.get("torch")
    kept = random.getstate(), np.random.get_state(), torch.get_rng_state() if torch is not None else None
    try:
        yield
    finally:
        random.setstate(kept[0])
        np.random.set_state(kept[1])
        if torch is not None:
            torch.set_rng_state(kept[2])


def message_seed(seed: int, partition: int, number: int) -> int:
    """Of a client's ``number``-th message in this run."""
    return seeding.key(seed, "flower app", partition, number)
