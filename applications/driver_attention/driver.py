"""What a driver's eyes do: glances and eyelids over time, and the state that follows from them. SI units.

The states are those of the field: an off-road glance of more than 1.6 s (NHTSA's visual-manual guidelines, 2013, count 2 s)
is distraction; eyes shut for a large share of the time (PERCLOS, Wierwille et al. 1994) is drowsiness.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from applications.driver_attention.pipeline import STATES

Array = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]
STEP_S = 0.1
ATTENTIVE, DISTRACTED, DROWSY = range(len(STATES))
AWAY = 0.35  # of the gaze, from straight ahead (0) to as far as the head turns (1)
SHUT = 0.25  # of the eyelids' opening; below, nothing is seen and PERCLOS counts
LONG_GLANCE_S, SHORT_GLANCE_S = 1.6, 1.0
PERCLOS_DROWSY, PERCLOS_AWAKE = 0.4, 0.2


@dataclass(frozen=True)
class Eyes:
    """(n, S) each. across: gaze, -1 right to 1 left; down: 0 ahead to 1 lap; lids: 0 shut to 1 open; nod: of the head, 0 to 1."""

    across: Array
    down: Array
    lids: Array
    nod: Array

    @property
    def on_road(self) -> Mask:
        """Whether the road ahead is seen."""
        return (np.abs(self.across) < AWAY) & (self.down < AWAY) & (self.lids > SHUT)

    def mirror_seen(self, first: npt.NDArray[np.int64], steps: int) -> Mask:
        """(n,): whether the left mirror is looked at in the ``steps`` before step ``first``."""
        at = np.arange(self.across.shape[1])
        window = (at >= first[:, None] - steps) & (at < first[:, None])
        return np.asarray(((self.across > AWAY) & (self.lids > SHUT) & window).any(axis=1))


def draw(rng: np.random.Generator, kind: npt.NDArray[np.int64], steps: int, event: npt.NDArray[np.int64]) -> Eyes:
    """kind: (n,) of ``STATES``; event: (n,) the step around which distracted drivers look away."""
    n = len(kind)
    across, down, nod = (np.zeros((n, steps)) for _ in range(3))
    lids = np.ones((n, steps))
    for i in range(n):
        _blinks(rng, lids[i])
        if kind[i] == DROWSY:
            _microsleeps(rng, lids[i], nod[i])
        for _ in range(rng.poisson(steps * STEP_S / 4.0)):  # mirrors and instruments, in any state
            first = int(rng.integers(steps))
            part = slice(first, first + int(rng.integers(3, 8)))
            across[i, part], down[i, part] = [(0.75, 0.1), (-0.7, 0.0), (0.0, 0.6)][rng.choice(3, p=[0.4, 0.3, 0.3])]
        if kind[i] == DISTRACTED:
            first = int(event[i] - rng.integers(0, 18))
            part = slice(max(0, first), max(0, first) + int(rng.integers(20, 42)))
            across[i, part], down[i, part] = [(0.1, 0.95), (-0.95, 0.3), (-0.3, 0.85)][rng.integers(3)]
    return Eyes(_turning(across), _turning(down), lids, _turning(nod))


def glance_left(eyes: Eyes, row: int, step: int, steps: int) -> None:
    """A look into the left mirror, in place."""
    part = slice(max(0, step), max(0, step) + steps)
    eyes.across[row, part] = 0.8
    eyes.down[row, part] = 0.1


def _blinks(rng: np.random.Generator, lids: Array) -> None:
    for _ in range(rng.poisson(len(lids) * STEP_S / 3.5)):
        first = int(rng.integers(len(lids)))
        lids[first : first + int(rng.integers(1, 3))] = 0.05


def _microsleeps(rng: np.random.Generator, lids: Array, nod: Array) -> None:
    """Eyes that droop, and fall shut again and again."""
    lids *= rng.uniform(0.45, 0.75)
    at = int(rng.integers(0, 12))
    while at < len(lids):
        shut = int(rng.integers(9, 24))
        lids[at : at + shut] = 0.05
        nod[at : at + shut] = rng.uniform(0.2, 1.0)
        at += shut + int(rng.integers(5, 16))


def _turning(x: Array) -> Array:
    """A head and eyes take two or three steps to turn."""
    padded = np.concatenate([x[:, :1], x[:, :1], x], axis=1)
    made: Array = (padded[:, 2:] + padded[:, 1:-1] + padded[:, :-2]) / 3
    return made


def state(eyes: Eyes, first: npt.NDArray[np.int64], last: npt.NDArray[np.int64]) -> Array:
    """(n,): the state over the steps first..last (both counted), as numbers of ``STATES``; NaN where it is between two."""
    found = np.full(len(first), np.nan)
    for i, (a, b) in enumerate(zip(first, last, strict=True)):
        part = slice(int(a), int(b) + 1)
        perclos = float((eyes.lids[i, part] < SHUT).mean())
        away = (np.abs(eyes.across[i, part]) >= AWAY) | (eyes.down[i, part] >= AWAY)
        longest = longest_run(away) * STEP_S
        if perclos >= PERCLOS_DROWSY:
            found[i] = DROWSY
        elif perclos < PERCLOS_AWAKE and longest >= LONG_GLANCE_S:
            found[i] = DISTRACTED
        elif perclos < PERCLOS_AWAKE and longest <= SHORT_GLANCE_S:
            found[i] = ATTENTIVE
    return found


def longest_run(x: Mask) -> int:
    """Steps of the longest unbroken stretch that is true."""
    edges = np.flatnonzero(np.diff(np.concatenate(([0], x.astype(np.int8), [0]))))
    return int((edges[1::2] - edges[::2]).max(initial=0))
