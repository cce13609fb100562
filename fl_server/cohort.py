"""Clients near by: a round's clients are trained together, and what comes back is one partial state."""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

from fl_core.algorithms.base import State
from fl_core.flower.grid import StreamGrid
from fl_core.flower.messages import Request


@dataclass
class CohortResult:
    """What a set of clients came to. state: what the aggregator has counted of them (None after an evaluation);
    clients: name -> metrics; num_examples: of each; refused: name -> reason.
    """

    state: State | None = None
    clients: dict[str, dict[str, float]] = field(default_factory=dict)
    num_examples: dict[str, int] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)


class CohortGrid(StreamGrid):
    """A grid that also trains many clients at once, so that traffic grows with its workers and not with the clients."""

    @abstractmethod
    def client_names(self) -> Sequence[str]:
        """In sorted order; need not be a list in memory."""

    @abstractmethod
    def train_cohort(self, request: Request, names: Sequence[str], stop: threading.Event | None) -> CohortResult:
        """One local update of each of these clients. Raises Interrupted when ``stop`` is set."""

    @abstractmethod
    def evaluate_cohort(self, request: Request, names: Sequence[str], stop: threading.Event | None) -> CohortResult:
        """The model on each of these clients' validation examples; clients without any are left out."""
