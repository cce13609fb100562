"""The two halves of a federated algorithm.

``Aggregator`` streams: begin -> add, add, ... (or merge of partial states) -> finish. Sums accumulate in float64.
``ClientUpdate`` is what the algorithm changes in a client's local update; plain SGD needs nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fl_core.contracts.arrays import Arrays, check_like
from fl_core.contracts.sections import OptimizerConfig

if TYPE_CHECKING:
    from torch import Tensor, nn

Float64 = npt.NDArray[np.float64]
ROWS = 16  # updates that are made float64 at a time, where many are counted at once
BLOCK = 1 << 18  # elements: 2 MB of float64; smaller blocks cost more in calls than they save in cache misses


@dataclass(frozen=True, kw_only=True)
class Update:
    """One client's result. ``weight`` is its number of training examples, above 0.

    extra: what the client's half sends beside the model, screened. base: the global model that it was trained from,
    where that is not the round's reference (asynchronous modes); staleness: how many models came since.
    """

    arrays: Arrays
    weight: float
    extra: Arrays = field(default_factory=dict)
    base: Arrays | None = None
    staleness: int = 0


@dataclass
class State:
    """The partial result of one round. ``sums``: float64 by array name; ``held``: whole updates, for order statistics."""

    round: int
    reference: Arrays
    sums: dict[str, Float64] = field(default_factory=dict)
    weight: float = 0.0
    count: int = 0
    held: list[Arrays] = field(default_factory=list)


class Aggregator(ABC):
    """The server's half. ``memory`` is what it carries from round to round (moments); it is checkpointed.

    asynchronous: takes updates that were trained from older models. population: how many clients the federation has,
    told by the engine before each round.
    """

    asynchronous = False

    def __init__(self) -> None:
        self.memory: dict[str, npt.NDArray[Any]] = {}
        self.population = 1

    def outgoing(self, reference: Arrays) -> Arrays:
        """What clients need beside the model (a control variate), by name."""
        return {}

    def expected(self, reference: Arrays) -> Arrays:
        """An example of the ``extra`` that each update must bring: its names, shapes and dtypes; {} = none is read."""
        return {}

    def screen(self, extra: Arrays, reference: Arrays, *, origin: str) -> None:
        """Raises IntegrityError naming ``origin`` where ``extra`` is misshapen, not finite or out of range."""
        if wanted := self.expected(reference):
            check_like(extra, wanted, origin=f"{origin}: beside the model")

    def solved(self, reference: Arrays) -> frozenset[str]:
        """Arrays that are computed from what clients send beside the model, not averaged."""
        return frozenset()

    def begin(self, round: int, reference: Arrays) -> State:
        return State(round=round, reference=reference)

    @abstractmethod
    def add(self, state: State, update: Update) -> None:
        """Count one update; its arrays have the names, shapes and dtypes of the reference."""

    def add_many(self, state: State, arrays: Arrays, weights: Sequence[float], extra: Sequence[Arrays] = ()) -> None:
        """Count K updates at once; ``arrays``: (K, ...) of each name, ``extra``: of each update, or none."""
        for i, weight in enumerate(weights):
            one = {name: array[i] for name, array in arrays.items()}
            self.add(state, Update(arrays=one, weight=weight, extra=extra[i] if extra else {}))

    @abstractmethod
    def merge(self, state: State, other: State) -> None:
        """Count all that ``other`` has counted."""

    @abstractmethod
    def finish(self, state: State) -> dict[str, npt.NDArray[Any]]:
        """The new global model; the reference itself when nothing was counted."""

    def save(self, state: State | None = None) -> dict[str, npt.NDArray[Any]]:
        """The memory and, in mid-round, the partial state, as arrays for safetensors."""
        table = {f"memory/{k}": v for k, v in self.memory.items()}
        if state is not None:
            table["state/scalars"] = np.array([state.round, state.weight, state.count], np.float64)
            table.update({f"state/sums/{k}": v for k, v in state.sums.items()})
            for i, arrays in enumerate(state.held):
                table.update({f"state/held/{i}/{k}": np.asarray(v) for k, v in arrays.items()})
        return table

    def load(self, table: Arrays, reference: Arrays) -> State | None:
        """The inverse of ``save``: restores the memory, returns the partial state if there was one."""
        self.memory = {k.removeprefix("memory/"): np.array(v) for k, v in table.items() if k.startswith("memory/")}
        if "state/scalars" not in table:
            return None
        round_, weight, count = (float(v) for v in table["state/scalars"])
        state = State(round=int(round_), reference=reference, weight=weight, count=int(count))
        state.sums = {
            k.removeprefix("state/sums/"): np.array(v) for k, v in table.items() if k.startswith("state/sums/")
        }
        held: dict[int, dict[str, npt.NDArray[Any]]] = {}
        for k, v in table.items():
            if k.startswith("state/held/"):
                index, _, name = k.removeprefix("state/held/").partition("/")
                held.setdefault(int(index), {})[name] = np.array(v)
        state.held = [held[i] for i in sorted(held)]
        return state


class MeanAggregator(Aggregator):
    """Weighted mean of the updates, in float64; subclasses change what is made of the mean (``step``)."""

    def add(self, state: State, update: Update) -> None:
        for name, array in update.arrays.items():
            first = name not in state.sums
            if first:
                state.sums[name] = np.empty(array.shape, np.float64)
            add_scaled(state.sums[name], array, update.weight, first=first)
        state.weight += update.weight
        state.count += 1

    def add_many(self, state: State, arrays: Arrays, weights: Sequence[float], extra: Sequence[Arrays] = ()) -> None:
        """One product a name. The same sums as one after the other, up to the rounding of float64."""
        if len(weights) == 1 or type(self).add is not MeanAggregator.add:
            super().add_many(state, arrays, weights, extra)
            return
        factors = np.array(weights, np.float64)
        for name, array in arrays.items():
            flat = array.reshape(len(factors), -1)
            total = np.zeros(flat.shape[1])
            for start in range(0, len(factors), ROWS):
                total += factors[start : start + ROWS] @ flat[start : start + ROWS].astype(np.float64)
            shaped = total.reshape(array.shape[1:])
            state.sums[name] = state.sums[name] + shaped if name in state.sums else shaped
        state.weight += float(factors.sum())
        state.count += len(factors)

    def merge(self, state: State, other: State) -> None:
        for name, value in other.sums.items():
            mine = state.sums.get(name)
            if mine is None:
                state.sums[name] = value.copy()
            elif mine.flags.writeable:
                mine += value
            else:  # as it came from another process
                state.sums[name] = mine + value
        state.weight += other.weight
        state.count += other.count

    def finish(self, state: State) -> dict[str, npt.NDArray[Any]]:
        if state.weight <= 0:
            return {k: np.array(v) for k, v in state.reference.items()}
        mean = {name: value / state.weight for name, value in state.sums.items()}
        stepped = self.step(state.reference, mean)
        return {name: cast_like(stepped[name], ref) for name, ref in state.reference.items()}

    def step(self, reference: Arrays, mean: Mapping[str, Float64]) -> Mapping[str, Float64]:
        return mean


def add_scaled(total: Float64, array: npt.NDArray[Any], weight: float, *, first: bool = False) -> None:
    """``total += weight * array`` in float64, in place, block by block: no temporary is larger than a cache.

    Element by element the same arithmetic as the plain expression, so the same bits. ``total`` is C-contiguous; ``first``:
    it holds nothing yet, and counts as zeros.
    """
    flat, values = total.reshape(-1), np.asarray(array, order="C").reshape(-1)
    scratch = np.empty(min(BLOCK, values.size), np.float64)
    for start in range(0, values.size, BLOCK):
        part = values[start : start + BLOCK]
        scaled = scratch[: part.size]
        scaled[:] = part
        scaled *= weight
        if first:
            np.add(scaled, 0.0, out=flat[start : start + BLOCK])
        else:
            flat[start : start + BLOCK] += scaled


def cast_like(value: npt.NDArray[Any], reference: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """To the reference's dtype; integers (counters of batch norm) are rounded."""
    if reference.dtype.kind in "iub":
        value = np.rint(value)
    return value.astype(reference.dtype).reshape(reference.shape)


def stepped_names(reference: Arrays) -> list[str]:
    """The arrays that gradients change: floating point, and no running statistics."""
    return [name for name, array in reference.items() if array.dtype.kind == "f" and not is_statistic(name)]


def is_statistic(name: str) -> bool:
    """Running statistics of batch norm: averaged, never stepped by a server optimiser."""
    return name.endswith(("running_mean", "running_var", "num_batches_tracked"))


@dataclass(frozen=True, kw_only=True)
class GradientTerms:
    """What an algorithm adds to the gradient of each parameter w: ``proximal * (w - w_global) + correction``.

    correction: one array for each trainable parameter, of its shape, in the order of the parameters; constant over
    the whole local update; () = none. Fused and stacked local updates read this instead of calling into the algorithm.
    shared: which parameters the terms apply to, in the same order; () = all. Personal layers have no part in them.
    """

    proximal: float = 0.0
    correction: tuple[npt.NDArray[Any], ...] = ()
    shared: tuple[bool, ...] = ()


@dataclass(frozen=True, kw_only=True)
class LocalStart:
    """One client before its local update. parameters: names of the trainable ones, in the order of the model's.

    reference: the model it starts from. extra: the server's ``outgoing``. state: what ``finish`` returned for the update
    that the server counted last; {} where there is none. personal: arrays that stay on the client, of which the server
    knows nothing.
    """

    parameters: tuple[str, ...]
    reference: Arrays
    extra: Arrays = field(default_factory=dict)
    state: Arrays = field(default_factory=dict)
    personal: frozenset[str] = frozenset()


@dataclass(frozen=True, kw_only=True)
class LocalWork:
    """One client after its local update: its model, and how it got there. steps: of the optimiser, at ``lr``."""

    arrays: Arrays
    num_examples: int
    steps: int
    lr: float
    momentum: float = 0.0


@dataclass(frozen=True, kw_only=True)
class LocalEnd:
    """extra: sent beside the model. state: stays on the client, and holds once the server has counted the update."""

    extra: Arrays = field(default_factory=dict)
    state: Arrays = field(default_factory=dict)


class ClientUpdate:
    """The client's half; the default leaves the local update as it is. stateful: keeps something from round to round.

    frozen: takes no step; ``observe`` is called instead.
    """

    stateful = False
    frozen = False

    def check(self, optimizer: OptimizerConfig) -> None:
        """Raises InputError for an optimiser that the algorithm is not defined for."""

    def begin(self, start: LocalStart) -> ClientUpdate:
        """What one client does in one round. Raises IntegrityError where what the server sent does not fit."""
        return self

    def observe(self, model: nn.Module, batches: Iterable[tuple[tuple[Tensor, ...], Tensor]]) -> None:
        """Where ``frozen``, on what ``begin`` returned: the global model in evaluation mode, and the client's training examples once
        as (inputs, targets), neither shuffled nor augmented. No gradients are recorded."""

    def prepare(self, targets: npt.NDArray[Any]) -> None:
        """Before the first step, on what ``begin`` returned: the targets of all of the client's training examples. Raises InputError
        where the algorithm is not defined for them."""

    def restrict(self, outputs: Any) -> Any:
        """What the loss is given of the model's outputs in training; the model itself stays as it is."""
        return outputs

    def finish(self, work: LocalWork) -> LocalEnd:
        """Called once, on what ``begin`` returned, after at least one step (where ``frozen``, after ``observe``)."""
        return LocalEnd()

    def terms(self) -> GradientTerms | None:
        """What is added to the gradients; None when only ``adjust_gradients`` or ``restrict`` knows, which the sequential path calls."""
        kind = type(self)
        own = kind.adjust_gradients is not ClientUpdate.adjust_gradients or kind.restrict is not ClientUpdate.restrict
        return None if own else GradientTerms()

    def adjust_gradients(self, parameters: Sequence[Tensor], reference: Sequence[Tensor]) -> None:
        """Called after ``backward``; ``reference`` are the global model's parameters, in the same order.

        Adds what ``terms`` says. An algorithm whose terms are of another kind overrides this method.
        """
        terms = self.terms()
        if terms is None or (not terms.proximal and not terms.correction):
            return
        for i, (parameter, origin) in enumerate(zip(parameters, reference, strict=True)):
            if parameter.grad is None or (terms.shared and not terms.shared[i]):
                continue
            if terms.proximal:
                parameter.grad.add_(parameter.detach() - origin, alpha=terms.proximal)
            if terms.correction:
                parameter.grad.add_(parameter.new_tensor(terms.correction[i]))


@dataclass(frozen=True)
class Algorithm:
    aggregator: Aggregator
    client_update: ClientUpdate
