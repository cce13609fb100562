"""A Flower Grid over workers: the round engine gets partial sums from it, any Flower strategy whole replies."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence

from flwr.app import Error, Message, MessageType

from fl_clients.training.client import CLIENT_ERROR
from fl_core.algorithms.base import State
from fl_core.flower.messages import Reply, Request
from fl_server.cohort import CohortGrid, CohortResult
from simulations.engine.conductor import Conductor
from simulations.engine.placement import blocks
from simulations.engine.population import Names
from simulations.engine.summation import Merge
from simulations.engine.work import EVALUATION, REPLIES, Facts
from simulations.grid import FIRST_NODE, LocalGrid

BATCH = 4  # messages a worker that are answered together: so many whole replies are in memory at a time


class NodeNames(Mapping[int, str]):
    """node id -> name of every client, without a table of them in memory."""

    def __init__(self, names: Names) -> None:
        self._names = names

    def __getitem__(self, node: int) -> str:
        if not 0 <= node - FIRST_NODE < len(self._names):
            raise KeyError(node)
        return self._names[node - FIRST_NODE]

    def __iter__(self) -> Iterator[int]:
        return iter(range(FIRST_NODE, FIRST_NODE + len(self._names)))

    def __len__(self) -> int:
        return len(self._names)


class WorkerGrid(LocalGrid, CohortGrid):
    """The clients of a population, trained by workers.

    merge: of the aggregator whose partial states the workers make.
    """

    def __init__(self, conductor: Conductor, merge: Merge) -> None:
        super().__init__()
        self._conductor, self._merge = conductor, merge
        self._names = Names(conductor.population)

    # a round's clients together

    def client_names(self) -> Names:
        return self._names

    def train_cohort(self, request: Request, names: Sequence[str], stop: threading.Event | None) -> CohortResult:
        state, facts = self._conductor.sums(request, self._numbers(names), self._merge, stop)
        return self._result(state, facts)

    def evaluate_cohort(self, request: Request, names: Sequence[str], stop: threading.Event | None) -> CohortResult:
        leaves, facts = blocks(self._numbers(names), self._conductor.block), Facts()
        for result in self._conductor.results(EVALUATION, request, leaves, stop):
            facts.extend(result.facts)
        return self._result(None, facts)

    def _numbers(self, names: Sequence[str]) -> list[int]:
        return [self._conductor.population.find(name) for name in names]

    def _result(self, state: State | None, facts: Facts) -> CohortResult:
        """In the order of names; after an evaluation (no state) without the clients that have nothing to evaluate on."""
        result, name = CohortResult(state), self._conductor.population.name
        counts = facts.num_examples
        for at in sorted(range(len(counts)), key=facts.clients.__getitem__):
            if counts[at] or state is not None:
                client = name(facts.clients[at])
                result.clients[client], result.num_examples[client] = dict(facts.metrics[at]), counts[at]
        result.refused = {name(client): facts.refused[client] for client in sorted(facts.refused)}
        return result

    # Flower's Grid: message by message

    def get_node_ids(self) -> Iterable[int]:
        return range(FIRST_NODE, FIRST_NODE + len(self._names))

    def device_names(self) -> Mapping[int, str]:
        return NodeNames(self._names)

    def knows(self, name: str) -> bool:
        return name in self._names

    def _answer(self, message_ids: set[str], stop: threading.Event | None) -> dict[str, Message]:
        """The next few of these messages that ask for the same."""
        batch: dict[str, Message] = {}
        for message_id, message in self._sent.items():
            if message_id not in message_ids:
                continue
            first = next(iter(batch.values()), message)
            if message.content is not first.content or message.metadata.message_type != first.metadata.message_type:
                break
            batch[message_id] = message
            if len(batch) == BATCH * self._conductor.workers.count:
                break
        for message_id in batch:
            del self._sent[message_id]
        return self._answers(batch, stop)

    def _answers(self, batch: Mapping[str, Message], stop: threading.Event | None) -> dict[str, Message]:
        if not batch:
            return {}
        first = next(iter(batch.values()))
        request = Request.from_record(first.content, origin="the server")
        kind = EVALUATION if first.metadata.message_type == MessageType.EVALUATE else REPLIES
        asked = {m.metadata.dst_node_id - FIRST_NODE: i for i, m in batch.items()}
        answers: dict[str, Message] = {}
        for result in self._conductor.results(kind, request, [(client,) for client in asked], stop):
            for client, reply in result.replies.items():
                answers[asked[client]] = Message(reply.to_record(), reply_to=batch[asked[client]])
            facts = result.facts
            for client, why in facts.refused.items():
                answers[asked[client]] = Message(Error(CLIENT_ERROR, why), reply_to=batch[asked[client]])
            for client, count, metrics in zip(facts.clients, facts.num_examples, facts.metrics, strict=True):
                found = Reply(num_examples=count, metrics=metrics)
                answers[asked[client]] = Message(found.to_record(), reply_to=batch[asked[client]])
        return answers
