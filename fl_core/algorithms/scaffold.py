"""SCAFFOLD (Karimireddy et al., ICML 2020), option II: control variates take the clients' drift out of local updates.

    client:  y <- y - lr (g(y) - c_i + c)  for K steps;    c_i+ = c_i - c + (x - y) / (lr K)
    server:  x <- x + global_lr * mean(y - x);             c = sum over all clients of p_i c_i, those never heard at 0

The objective here is the example-weighted one, as everywhere in this package: p_i = n_i / sum n. The paper weighs all
clients alike; with equal n_i both are the same. With momentum, K becomes the steps that it amounts to (see fednova).

The server sends c; the client sends n_i+ c_i+ - n_i c_i, of which the server keeps the sum. c_i+ holds from the moment the
server has counted the update (``ClientStates``): a reply that is lost, late or refused changes neither side.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from fl_core.algorithms.base import (
    Algorithm,
    ClientUpdate,
    GradientTerms,
    LocalEnd,
    LocalStart,
    LocalWork,
    MeanAggregator,
    State,
    Update,
    add_scaled,
    cast_like,
    stepped_names,
)
from fl_core.algorithms.fednova import check_sgd, effective_steps
from fl_core.contracts.arrays import Arrays, check_like
from fl_core.contracts.errors import IntegrityError
from fl_core.contracts.sections import AlgorithmConfig, OptimizerConfig

VARIATE, EXAMPLES = "c/", "examples"
MEMORY_SUM, MEMORY_EXAMPLES, MEMORY_HEARD = "sum/c/", "sum/examples", "sum/heard"
Table = dict[str, npt.NDArray[Any]]


class ControlledUpdate(ClientUpdate):
    stateful = True

    def check(self, optimizer: OptimizerConfig) -> None:
        check_sgd("scaffold", optimizer)

    def begin(self, start: LocalStart) -> ClientUpdate:
        return ControlledRound(start)


class ControlledRound(ClientUpdate):
    """One client in one round; its state: c_i by parameter, and the number of examples that it was sent with."""

    def __init__(self, start: LocalStart) -> None:
        self._start, self._names = start, [n for n in stepped_names(start.reference) if n not in start.personal]
        wanted = {VARIATE + name: start.reference[name] for name in self._names}
        check_like(start.extra, wanted, origin="the server's control variate")
        self._own: Table = {k: start.state.get(k, np.zeros_like(v)) for k, v in wanted.items()}
        check_like(self._own, wanted, origin="this client's control variate")

    def terms(self) -> GradientTerms:
        own, sent, reference = self._own, self._start.extra, self._start.reference
        correction = tuple(
            np.subtract(sent[VARIATE + n], own[VARIATE + n]) if VARIATE + n in own else np.zeros_like(reference[n])
            for n in self._start.parameters
        )
        return GradientTerms(correction=correction)

    def finish(self, work: LocalWork) -> LocalEnd:
        distance = work.lr * effective_steps(work.steps, lr=work.lr, momentum=work.momentum)
        before, now = float(self._start.state.get(EXAMPLES, np.zeros(()))), float(work.num_examples)
        trained, state, change = set(self._start.parameters), Table(), Table()
        for name in self._names:
            key, reference = VARIATE + name, self._start.reference[name]
            own = self._own[key].astype(np.float64)
            moved = own
            if name in trained and distance > 0:
                went = (reference.astype(np.float64) - work.arrays[name].astype(np.float64)) / distance
                moved = own - self._start.extra[key].astype(np.float64) + went
            state[key] = moved.astype(reference.dtype)
            change[key] = (now * state[key].astype(np.float64) - before * own).astype(reference.dtype)
        return LocalEnd(
            extra={**change, EXAMPLES: np.array([before, now])}, state={**state, EXAMPLES: np.array(now, np.float64)}
        )


class ControlledAggregator(MeanAggregator):
    """Memory: the sum of n_i c_i, the sum of n_i and the number of clients, of those heard so far, in float64."""

    def __init__(self, config: AlgorithmConfig) -> None:
        super().__init__()
        self.global_lr = config.global_lr

    def outgoing(self, reference: Arrays) -> Arrays:
        """c. The examples of clients never heard are taken to be as many as the others', on average."""
        heard = float(self.memory.get(MEMORY_HEARD, np.zeros(())))
        examples = float(self.memory.get(MEMORY_EXAMPLES, np.zeros(())))
        share = heard / (max(self.population, heard) * examples) if examples > 0 else 0.0
        return {
            VARIATE + name: cast_like(
                share * self.memory.get(MEMORY_SUM + name, np.zeros(reference[name].shape)), reference[name]
            )
            for name in stepped_names(reference)
        }

    def expected(self, reference: Arrays) -> Arrays:
        variates = {VARIATE + name: reference[name] for name in stepped_names(reference)}
        return {**variates, EXAMPLES: np.zeros(2, np.float64)}

    def screen(self, extra: Arrays, reference: Arrays, *, origin: str) -> None:
        super().screen(extra, reference, origin=origin)
        before, now = (float(v) for v in extra[EXAMPLES])
        if before < 0 or now <= 0 or not before.is_integer() or not now.is_integer():
            raise IntegrityError(f"{origin}: beside the model: examples = {before:g}, {now:g} are out of range")

    def add(self, state: State, update: Update) -> None:
        super().add(state, update)
        before, now = (float(v) for v in update.extra[EXAMPLES])
        told = {MEMORY_EXAMPLES: np.array(now - before), MEMORY_HEARD: np.array(float(before == 0))}
        told |= {MEMORY_SUM + name: update.extra[VARIATE + name] for name in stepped_names(state.reference)}
        for key, value in told.items():
            if key not in state.sums:
                state.sums[key] = np.zeros(value.shape, np.float64)
            add_scaled(state.sums[key], value, 1.0)

    def finish(self, state: State) -> dict[str, npt.NDArray[Any]]:
        result = super().finish(state)
        if state.weight <= 0:
            return result
        for key in (MEMORY_EXAMPLES, MEMORY_HEARD, *(MEMORY_SUM + name for name in stepped_names(state.reference))):
            self.memory[key] = self.memory.get(key, np.zeros(state.sums[key].shape)) + state.sums[key]
        return moved_by(result, state, self.global_lr)


def moved_by(mean: Table, state: State, global_lr: float) -> Table:
    """x + global_lr (mean - x) where gradients change x; at 1 the mean itself, to the bit."""
    if global_lr == 1.0:
        return mean
    for name in stepped_names(state.reference):
        start = state.reference[name].astype(np.float64)
        middle = state.sums[name] / state.weight
        mean[name] = cast_like(start + global_lr * (middle - start), state.reference[name])
    return mean


def build(config: AlgorithmConfig) -> Algorithm:
    return Algorithm(ControlledAggregator(config), ControlledUpdate())
