"""A circuit breaker for the training worker: a run whose work keeps killing it is not tried for ever.

After ``LIMIT`` crashes of the worker on one run without a success in between, further messages of that run are answered
with an error at once. Another run (another model or configuration), another version of fieldfleet or an operator's word
closes the circuit again; a restart of the agent does not, since a crash may have been what ended it.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from fl_core.storage import atomic

log = logging.getLogger(__name__)
LIMIT = 3
FIRST_PAUSE_S, LAST_PAUSE_S = 1.0, 60.0


@dataclass(frozen=True, kw_only=True)
class Circuit:
    """No I/O. crashes: of the worker in a row, all on ``run_id``. version: of fieldfleet when they happened."""

    version: str
    run_id: int = 0
    crashes: int = 0
    reason: str = ""

    def crashed(self, run_id: int, reason: str) -> Circuit:
        before = self.crashes if run_id == self.run_id else 0
        return replace(self, run_id=run_id, crashes=before + 1, reason=reason[:500])

    def succeeded(self) -> Circuit:
        return Circuit(version=self.version)

    def open_for(self, run_id: int) -> bool:
        return run_id == self.run_id and self.crashes >= LIMIT

    def pause(self, run_id: int) -> float:
        """Seconds before the worker is started again for this run."""
        if run_id != self.run_id or not self.crashes:
            return 0.0
        return float(min(FIRST_PAUSE_S * 2 ** (self.crashes - 1), LAST_PAUSE_S))

    @property
    def disabled(self) -> str:
        """Why nothing is trained for the present run; "" while it is."""
        return f"the worker ended {self.crashes} times in a row: {self.reason}" if self.crashes >= LIMIT else ""


class Breaker:
    """A circuit on disk, so that it outlives the agent."""

    def __init__(self, file: Path, version: str) -> None:
        self._file = file
        self.circuit = self._read(version)

    def crashed(self, run_id: int, reason: str) -> None:
        self._set(self.circuit.crashed(run_id, reason))

    def succeeded(self) -> None:
        if self.circuit.crashes:
            self._set(self.circuit.succeeded())

    reset = succeeded

    def _set(self, circuit: Circuit) -> None:
        self.circuit = circuit
        try:
            atomic.write_json(self._file, asdict(circuit))
        except OSError as error:  # a full disk: it holds until the agent ends
            log.warning("%s: not written: %s", self._file, error)

    def _read(self, version: str) -> Circuit:
        fresh = Circuit(version=version)
        try:
            table = json.loads(self._file.read_text(encoding="utf-8"))
            found = Circuit(
                version=str(table["version"]),
                run_id=int(table["run_id"]),
                crashes=int(table["crashes"]),
                reason=str(table["reason"])[:500],
            )
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return fresh
        return found if found.version == version else fresh
