"""The seeded orders of examples of many clients at once: those of ``local_update.schedule``, drawn without a generator each.

``numpy.random.default_rng(key)`` hashes its key to a pool (O'Neill's seed_seq, as numpy documents it for SeedSequence) and
starts a PCG64 from it. Here all keys are hashed together, and one generator is put to each of the states in turn.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from simulations.engine import native

Words = npt.NDArray[np.uint32]
LOW32, LOW128 = (1 << 32) - 1, (1 << 128) - 1
POOL = 4
INIT_A, MULT_A, INIT_B, MULT_B = 0x43B0D7E5, 0x931E8875, 0x8B51F9DD, 0x58F38DED
MIX_LEFT, MIX_RIGHT, SHIFT = np.uint32(0xCA01F9DD), np.uint32(0x4973F715), np.uint32(16)
PCG_MULTIPLIER = 0x2360ED051FC65DA44385DF649FCCF645

PLAIN = re.compile(r"[A-Za-z0-9 _./:-]*")  # names that JSON writes as they are


def permutations(keys: Sequence[int], count: int) -> npt.NDArray[np.int64]:
    """(K, count): of each key, ``numpy.random.default_rng(key).permutation(count)``."""
    drawn = native.permutations(keys, count)
    return drawn_in_turn(keys, count) if drawn is None else drawn


def drawn_in_turn(keys: Sequence[int], count: int) -> npt.NDArray[np.int64]:
    """The same without the kernels."""
    bits = np.random.PCG64(0)
    draw = np.random.Generator(bits).permutation
    inner = {"state": 0, "inc": 0}
    state: Any = {"bit_generator": "PCG64", "state": inner, "has_uint32": 0, "uinteger": 0}
    found = np.empty((len(keys), count), np.int64)
    for row, (start, step) in zip(found, pcg_states(keys), strict=True):
        inner["state"], inner["inc"] = start, step
        bits.state = state
        row[:] = draw(count)
    return found


def pcg_states(keys: Sequence[int]) -> list[tuple[int, int]]:
    """(state, increment) of a PCG64 seeded with each key of up to 64 bits."""
    found = []
    for a, b, c, d in _seeds(np.array(keys, np.uint64)).tolist():
        step = ((((c << 64) | d) << 1) | 1) & LOW128
        found.append((((step + ((a << 64) | b)) * PCG_MULTIPLIER + step) & LOW128, step))
    return found


def _seeds(keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """(K, 4): SeedSequence(key).generate_state(4, uint64)."""
    constant = INIT_A

    def hashed(value: Words) -> Words:
        nonlocal constant
        value = value ^ np.uint32(constant)
        constant = constant * MULT_A & LOW32
        value = value * np.uint32(constant)
        return value ^ (value >> SHIFT)

    low, high = (keys & np.uint64(LOW32)).astype(np.uint32), (keys >> np.uint64(32)).astype(np.uint32)
    nothing = np.zeros_like(low)
    pool = [hashed(word) for word in (low, high, nothing, nothing)]
    for source in range(POOL):
        for target in range(POOL):
            if source != target:
                mixed = MIX_LEFT * pool[target] - MIX_RIGHT * hashed(pool[source])
                pool[target] = mixed ^ (mixed >> SHIFT)
    constant = INIT_B
    words = []
    for number in range(2 * POOL):
        value = pool[number % POOL] ^ np.uint32(constant)
        constant = constant * MULT_B & LOW32
        value = value * np.uint32(constant)
        words.append((value ^ (value >> SHIFT)).astype(np.uint64))
    return np.stack([words[2 * i] | (words[2 * i + 1] << np.uint64(32)) for i in range(POOL)], axis=1)


def order_keys(seed: int, round: int, names: Sequence[str], epoch: int) -> list[int]:
    """``seeding.key(seed, "order", round, name, epoch)`` of each name."""
    head, tail = f'[{seed}, "order", {round}, ', f", {epoch}]"
    sha, plain = hashlib.sha256, PLAIN.fullmatch
    quoted = (f'"{name}"' if plain(name) else json.dumps(name) for name in names)
    return [int.from_bytes(sha(f"{head}{name}{tail}".encode()).digest()[:8], "little") >> 1 for name in quoted]
