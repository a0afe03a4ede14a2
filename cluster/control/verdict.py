"""What clients felt of a change: gaps between tokens before it, while it was carried out, and after."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.control.routers import Routers
from cluster.telemetry.gaps import Counts, quantile_s

MAX_WORSE = 1.2
"""A rebalance is undone when it leaves gap p99 worse by more than this factor,"""
LEAST_GAPS = 200
"""over so many gaps at least on either side."""
BEFORE_S = 30.0


@dataclass(frozen=True, slots=True)
class Felt:
    """p99 of gaps in ms (None without gaps), and how many there were."""

    gap_p99_ms_before: float | None
    gap_p99_ms_during: float | None
    gap_p99_ms_after: float | None
    gaps_before: int
    gaps_during: int
    gaps_after: int

    @property
    def worse(self) -> bool:
        """There are enough gaps to say so."""
        before, after = self.gap_p99_ms_before, self.gap_p99_ms_after
        if min(self.gaps_before, self.gaps_after) < LEAST_GAPS or not before or not after:
            return False
        return after > MAX_WORSE * before


class GapWatch:
    """Begins with a change."""

    def __init__(self, routers: Routers) -> None:
        self._routers = routers
        self._ago, self._began = routers.gaps_ago(BEFORE_S), routers.gaps()
        self._ended: Counts | None = None

    def ended(self) -> None:
        """The change has been carried out, and routers have reported since."""
        self._ended = self._routers.gaps()

    def enough(self) -> bool:
        """There have been enough gaps since then to judge."""
        return _count(_between(self._ended, self._routers.gaps())) >= LEAST_GAPS

    def felt(self) -> Felt:
        """As it is now."""
        before, during = _between(self._ago, self._began), _between(self._began, self._ended)
        after = _between(self._ended, self._routers.gaps())
        return Felt(_ms(before), _ms(during), _ms(after), _count(before), _count(during), _count(after))


def _between(earlier: Counts | None, later: Counts | None) -> Counts | None:
    return None if earlier is None or later is None else later - earlier


def _count(counts: Counts | None) -> int:
    return 0 if counts is None else int(counts.sum())


def _ms(counts: Counts | None) -> float | None:
    seconds = None if counts is None else quantile_s(counts, 0.99)
    return None if seconds is None else seconds * 1e3
