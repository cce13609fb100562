"""No reply is trusted: misshapen, non-finite, empty or oversized updates never reach the aggregator."""

from __future__ import annotations

import numpy as np
from flwr.app import Message

from fl_core.contracts.arrays import Arrays, check_like
from fl_core.contracts.errors import IntegrityError
from fl_core.flower.messages import Reply

MAX_EXAMPLES = 1 << 40


def read_reply(message: Message, device: str) -> Reply:
    """Raises IntegrityError naming the device and what is wrong."""
    if message.has_error():
        raise IntegrityError(message.error.reason or f"{device}: error {message.error.code}")
    reply = Reply.from_record(message.content, origin=device)
    if reply.num_examples > MAX_EXAMPLES:
        raise IntegrityError(f"{device}: claims {reply.num_examples:,} examples")
    return reply


def screen_update(reply: Reply, reference: Arrays, device: str, *, max_norm: float = 0.0) -> None:
    """An update counts only with examples, the model's own names, shapes and dtypes, finite values and a bounded change.

    Raises IntegrityError naming the device and the array.
    """
    if reply.num_examples == 0:
        raise IntegrityError(f"{device}: trained on no examples")
    check_like(reply.arrays, reference, origin=device)
    if max_norm > 0:
        norm = update_norm(reply.arrays, reference)
        if norm > max_norm:
            raise IntegrityError(f"{device}: update norm {norm:.4g} is over algorithm.max_update_norm = {max_norm:g}")


def update_norm(arrays: Arrays, reference: Arrays) -> float:
    """Euclidean norm of the change over all floating-point arrays, in float64."""
    total = sum(
        float(np.sum((arrays[k].astype(np.float64) - v.astype(np.float64)) ** 2))
        for k, v in reference.items()
        if v.dtype.kind == "f"
    )
    return float(total**0.5)
