"""An Aggregator as a Flower Strategy: any algorithm of this project in any Flower ServerApp, unchanged clients included.

Flower's ``Strategy.start`` hands over all replies of a round at once and keeps nothing across a restart. Where streaming,
deadlines, late replies and resuming matter, use the round engine (``fieldfleet server``), which drives the same object.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from logging import getLogger

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fl_core.algorithms.base import Aggregator, Update
from fl_core.contracts.arrays import Arrays, check_like
from fl_core.contracts.errors import InputError, IntegrityError
from fl_core.flower.messages import ARRAYS, CONFIG, NUM_EXAMPLES, Reply, array_record, read_arrays
from fl_core.learning import seeding

log = getLogger(__name__)


class AggregatorStrategy(Strategy):
    """``strategy.start(grid, initial_arrays, ...)`` as with Flower's own.

    fraction: share of the connected nodes asked in a round, at least ``min_nodes``, drawn by (seed, round).
    evaluate: whether clients evaluate each new model. Replies are screened: misshapen, non-finite and empty ones are
    left out, with a warning that names the node.
    """

    def __init__(
        self, aggregator: Aggregator, *, fraction: float = 1.0, min_nodes: int = 1, evaluate: bool = True, seed: int = 0
    ) -> None:
        if not 0 < fraction <= 1 or min_nodes < 1:
            raise InputError(f"fraction {fraction} must be over 0 and at most 1, min_nodes {min_nodes} at least 1")
        self.aggregator, self.fraction, self.min_nodes = aggregator, fraction, min_nodes
        self.evaluate, self.seed = evaluate, seed
        self._reference: Arrays = {}

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        self._reference = read_arrays(RecordDict({ARRAYS: arrays}), ARRAYS, "the global model")
        if self.aggregator.outgoing(self._reference):
            raise InputError(
                f"{type(self.aggregator).__name__} sends clients more than the model, which Flower's strategies cannot",
                remedy="run it with 'fieldfleet server' or 'fieldfleet simulate'",
            )
        return self._messages(MessageType.TRAIN, server_round, arrays, config, self._chosen(server_round, grid))

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        state = self.aggregator.begin(server_round, self._reference)
        metrics: list[tuple[Reply, int]] = []
        for reply, node in self._readable(replies):
            try:
                if reply.num_examples == 0:
                    raise IntegrityError(f"node {node}: trained on no examples")
                check_like(reply.arrays, self._reference, origin=f"node {node}")
                self.aggregator.screen(reply.extra, self._reference, origin=f"node {node}")
            except IntegrityError as error:
                log.warning("reply left out: %s", error.message)
                continue
            update = Update(arrays=reply.arrays, weight=float(reply.num_examples), extra=reply.extra)
            self.aggregator.add(state, update)
            metrics.append((reply, reply.num_examples))
        if not metrics:
            return None, None
        return array_record(self.aggregator.finish(state)), _mean(metrics)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        if not self.evaluate:
            return []
        return self._messages(MessageType.EVALUATE, server_round, arrays, config, self._chosen(server_round, grid))

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        found = [(reply, reply.num_examples) for reply, _ in self._readable(replies) if reply.num_examples]
        return _mean(found) if found else None

    def summary(self) -> None:
        log.info("%s over %.0f %% of the nodes", type(self.aggregator).__name__, 100 * self.fraction)

    def _chosen(self, number: int, grid: Grid) -> list[int]:
        nodes = sorted(grid.get_node_ids())
        count = max(self.min_nodes, round(self.fraction * len(nodes)))
        if count >= len(nodes):
            return nodes
        drawn = seeding.generator(self.seed, "selection", number).choice(len(nodes), count, replace=False)
        return [nodes[i] for i in sorted(drawn)]

    def _messages(
        self, kind: str, number: int, arrays: ArrayRecord, config: ConfigRecord, nodes: Sequence[int]
    ) -> list[Message]:
        content = RecordDict({ARRAYS: arrays, CONFIG: ConfigRecord({**config, "server-round": number})})
        return [Message(content, node, kind, group_id=f"{kind}-{number}") for node in nodes]

    def _readable(self, replies: Iterable[Message]) -> Iterable[tuple[Reply, int]]:
        """In the order of node ids, so that the result does not depend on the order of arrival."""
        for message in sorted(replies, key=lambda m: m.metadata.src_node_id):
            node = message.metadata.src_node_id
            if message.has_error():
                log.warning("node %d failed: %s", node, message.error.reason)
                continue
            try:
                yield Reply.from_record(message.content, origin=f"node {node}"), node
            except IntegrityError as error:
                log.warning("reply left out: %s", error.message)


def _mean(found: Sequence[tuple[Reply, int]]) -> MetricRecord:
    """Example-weighted mean of each metric over the replies that report it."""
    means: dict[str, int | float | list[int] | list[float]] = {}
    for name in sorted({name for reply, _ in found for name in reply.metrics}):
        holders = [(reply.metrics[name], weight) for reply, weight in found if name in reply.metrics]
        means[name] = sum(v * w for v, w in holders) / sum(w for _, w in holders)
    means[NUM_EXAMPLES] = sum(weight for _, weight in found)
    return MetricRecord(means)
