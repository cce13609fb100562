"""Random streams keyed by what they are for, never by rank, worker or order of arrival."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import numpy.typing as npt


def key(*parts: int | str) -> int:
    """A 63-bit key from (seed, purpose, round, client, ...): equal on every machine."""
    digest = hashlib.sha256(json.dumps(parts).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator(*parts: int | str) -> np.random.Generator:
    return np.random.default_rng(key(*parts))


def example_keys(base: int, index: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
    """(N,) uint64: one key for each example index, by the SplitMix64 finaliser (Steele et al., OOPSLA 2014)."""
    z = index.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(base)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    result: npt.NDArray[np.uint64] = z ^ (z >> np.uint64(31))
    return result


def uniform(keys: npt.NDArray[np.uint64], stream: int) -> npt.NDArray[np.float64]:
    """(N,) in [0, 1): draw number ``stream`` of each key, for augmentation without a generator an example."""
    z = keys + np.uint64((stream + 1) * 0x9E3779B97F4A7C15 % 2**64)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z = z ^ (z >> np.uint64(31))
    return (z >> np.uint64(11)).astype(np.float64) * 2.0**-53
