"""What happened in each round: a record in memory, and a line in ``history.jsonl`` of the run folder."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from fl_core.contracts.errors import GoalMissed
from fl_core.storage.log import AppendLog, read_log

FILE_NAME = "history.jsonl"


@dataclass
class RoundRecord:
    """clients: device -> metrics of its training reply; refused: device -> reason; late: no reply before the deadline;
    skipped: not asked, for a reason of the selection policy; late_counted: device -> the earlier round that it was
    asked in; failed: why the round changed nothing, "" when it did. staleness: device -> how many models came
    since the one that it trained, where there were some (asynchronous mode). bytes_down: of the arrays that each device asked was
    sent; bytes_up: device -> of the arrays that it sent. seconds: of the grid's time, virtual ones in a simulation with a
    clock of its own.

    ``evaluation``: example-weighted means over the clients' validation data; ``held_out``: the server's own evaluation.
    """

    round: int
    clients: dict[str, dict[str, float]] = field(default_factory=dict)
    num_examples: dict[str, int] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    late: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    late_counted: dict[str, int] = field(default_factory=dict)
    applied: bool = False
    failed: str = ""
    loss: float | None = None
    evaluation: dict[str, float] = field(default_factory=dict)
    client_evaluation: dict[str, dict[str, float]] = field(default_factory=dict)
    held_out: dict[str, float] = field(default_factory=dict)
    staleness: dict[str, int] = field(default_factory=dict)
    bytes_down: int = 0
    bytes_up: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    model_sha256: str = ""

    @property
    def named(self) -> int:
        """Clients that it says something of, one by one."""
        return len(self.clients) + len(self.refused) + len(self.skipped) + len(self.client_evaluation)


class History:
    """Append-only; after a resume the lines of rounds that are done again are superseded by later ones.

    In memory older records lose what they say of single clients, once all records together name more than
    ``IN_MEMORY`` of them; the file keeps everything.
    """

    IN_MEMORY = 100_000

    def __init__(self, folder: Path, *, resumed_round: int = 0) -> None:
        self.records = [r for r in read_history(folder) if r.round <= resumed_round]
        self._log = AppendLog(folder / FILE_NAME)
        self._named, self._whole = 0, 0  # clients in memory; the first record that still names its own
        for record in self.records:
            self._bound(record)

    def append(self, record: RoundRecord, *, durable: bool = True) -> None:
        self.records.append(record)
        self._log.append({f.name: getattr(record, f.name) for f in fields(record)}, durable=durable)
        self._bound(record)

    def _bound(self, record: RoundRecord) -> None:
        self._named += record.named
        while self._named > self.IN_MEMORY and self.records[self._whole] is not record:
            old = self.records[self._whole]
            self._named -= old.named
            for table in (old.clients, old.num_examples, old.refused, old.skipped, old.client_evaluation, old.bytes_up):
                table.clear()
            self._whole += 1

    def close(self) -> None:
        self._log.close()


def read_history(folder: Path) -> list[RoundRecord]:
    """One record a round, the last written of each, in order of rounds."""
    found: dict[int, dict[str, Any]] = {}
    for entry in read_log(folder / FILE_NAME):
        if isinstance(entry.get("round"), int):
            found[entry["round"]] = entry
    known = set(RoundRecord.__dataclass_fields__)
    return [RoundRecord(**{k: v for k, v in found[r].items() if k in known}) for r in sorted(found)]


def weighted_mean(values: dict[str, dict[str, float]], weights: dict[str, int]) -> dict[str, float]:
    """Per metric over the clients that report it, weighted by their examples."""
    names = sorted({name for v in values.values() for name in v})
    result = {}
    for name in names:
        holders = [c for c in sorted(values) if name in values[c] and weights.get(c, 0) > 0]
        total = sum(weights[c] for c in holders)
        if total:
            result[name] = sum(weights[c] * values[c][name] for c in holders) / total
    return result


def check_applied(records: list[RoundRecord]) -> None:
    """Raises GoalMissed, with the first reason, when not one round changed the model."""
    if records and not any(record.applied for record in records):
        reasons = [reason for record in records for reason in record.refused.values()]
        raise GoalMissed(
            f"none of {len(records)} rounds changed the model",
            remedy=reasons[0]
            if reasons
            else "too few clients replied: see history.jsonl, algorithm.min_clients and algorithm.deadline_s",
        )
