"""How long a device lets the server hold its question: long polls are cheap, until something on the way cuts them off."""

from __future__ import annotations

from dataclasses import dataclass

FIRST_POLL_S, SHORTEST_S, LONGEST_S = 240.0, 45.0, 600.0
GROWTH, CAUTION = 1.5, 0.7
QUICK_S = 15.0  # an outage is noticed at once; a middle box forgets a quiet connection after a while


@dataclass
class PollInterval:
    """``seconds`` of the next long poll; a constant where it begins below ``SHORTEST_S``. No I/O."""

    seconds: float = FIRST_POLL_S
    limit: float = LONGEST_S

    def lasted(self, waited: float) -> None:
        """A poll came to its end without a message: the way there bears that length."""
        if SHORTEST_S <= self.seconds <= waited + 1.0:
            self.seconds = min(self.seconds * GROWTH, self.limit)

    def broke(self, waited: float) -> None:
        """The connection was lost in the middle of a poll."""
        if waited > QUICK_S and self.seconds >= SHORTEST_S:
            self.seconds = max(SHORTEST_S, min(self.seconds, waited * CAUTION))
            self.limit = max(self.seconds, min(self.limit, waited))
