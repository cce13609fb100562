"""What the server says of its repository, and which applications so have something to fetch. No I/O, nothing trusted:
a false word costs one look at the signed repository, and a missing one costs waiting for the next regular look."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

GENERATION_LIMIT = 2**53
LONGEST_SPREAD_S = 900.0


@dataclass(frozen=True)
class Offer:
    """generation grows with each publication. versions: application -> channel -> version, {} = not said."""

    generation: int
    versions: Mapping[str, Any] = field(default_factory=dict)
    spread_s: float = 0.0

    @staticmethod
    def from_body(body: Mapping[str, Any]) -> Offer | None:
        """Of a ``desired`` message; None where it says nothing of models."""
        generation, versions, spread = body.get("repository"), body.get("models"), body.get("spread_s", 0.0)
        if type(generation) is not int or not 0 < generation < GENERATION_LIMIT:
            return None
        good = type(spread) in (int, float) and 0 <= spread <= LONGEST_SPREAD_S
        return Offer(
            generation, versions if isinstance(versions, dict) else {}, float(spread) if good else LONGEST_SPREAD_S
        )


@dataclass
class Offers:
    """channels: application -> the channel that it follows here. seen: the generation at its last look."""

    channels: Mapping[str, str]
    latest: Offer | None = None
    seen: dict[str, int] = field(default_factory=dict)

    def hear(self, offer: Offer, installed: Mapping[str, int | None]) -> list[str]:
        """The applications to update now. ``installed``: their versions."""
        self.latest = offer
        wanted = []
        for name in self._behind(offer):
            of_application = offer.versions.get(name)
            version = of_application.get(self.channels[name]) if isinstance(of_application, dict) else None
            if type(version) is int and version == installed.get(name):
                self.seen[name] = offer.generation  # what was published is for others
            else:
                wanted.append(name)
        return wanted

    def looked(self, name: str, generation: int | None) -> bool:
        """After an update that went well; True when something newer was announced meanwhile."""
        if generation is not None:
            self.seen[name] = generation
        return self.latest is not None and generation is not None and name in self._behind(self.latest)

    def _behind(self, offer: Offer) -> Iterable[str]:
        return [name for name in self.channels if self.seen.get(name, 0) < offer.generation]
