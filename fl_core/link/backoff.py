"""Exponential backoff with jitter, so that a fleet does not come back in step after a broker's restart."""

from __future__ import annotations

import random
from dataclasses import dataclass, field


@dataclass
class Backoff:
    """Seconds between attempts: uniform in [delay / 2, delay], with a delay that doubles from ``first_s`` to ``limit_s``."""

    first_s: float = 0.5
    limit_s: float = 60.0
    random: random.Random = field(default_factory=random.SystemRandom, repr=False)
    attempts: int = 0

    def next(self) -> float:
        delay = min(self.limit_s, self.first_s * 2.0 ** min(self.attempts, 60))
        self.attempts += 1
        return self.random.uniform(delay / 2, delay)

    def reset(self) -> None:
        self.attempts = 0
