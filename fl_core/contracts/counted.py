"""Which update of a client the server counted last: told to the clients of a round, so that their states agree with it.

Travels beside the model as two arrays, by a hash of the client's name: clients do not learn each other's names.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np

from fl_core.contracts.arrays import Arrays
from fl_core.contracts.errors import IntegrityError

CLIENTS, ROUNDS = "counted/clients", "counted/rounds"


def client_key(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little", signed=True)


def to_arrays(rounds: Mapping[str, int]) -> Arrays:
    """rounds: client -> the round of its update that was counted last; 0 = none was."""
    found = sorted((client_key(name), number) for name, number in rounds.items())
    return {
        CLIENTS: np.array([key for key, _ in found], np.int64),
        ROUNDS: np.array([number for _, number in found], np.int64),
    }


def counted_round(extra: Arrays, client: str, *, origin: str) -> int:
    """The inverse, for one client. Raises IntegrityError where the server does not say."""
    keys, rounds = extra.get(CLIENTS), extra.get(ROUNDS)
    if keys is None or rounds is None or keys.ndim != 1 or keys.shape != rounds.shape:
        raise IntegrityError(f"{origin}: does not say which update of {client} was counted last")
    if keys.dtype != np.int64 or rounds.dtype != np.int64:
        raise IntegrityError(f"{origin}: {CLIENTS} and {ROUNDS} must be int64")
    found = np.flatnonzero(keys == client_key(client))
    if len(found) != 1 or int(rounds[found[0]]) < 0:  # type: ignore[call-overload]
        raise IntegrityError(f"{origin}: does not say which update of {client} was counted last")
    return int(rounds[found[0]])  # type: ignore[call-overload]


def without_counted(extra: Arrays) -> Arrays:
    """What the algorithm sent."""
    return {name: array for name, array in extra.items() if name not in (CLIENTS, ROUNDS)}
