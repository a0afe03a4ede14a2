"""How long streams waited from one token to the next: counts by length, cheap to add to and to take apart again.

Lengths are in classes that are 3 % wide, so a quantile is right within that.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

_LEAST_S, _WIDTH = 1e-4, math.log(1.03)
_CLASSES = int(math.log(1e7) / _WIDTH) + 1
Counts = np.ndarray[Any, np.dtype[np.int64]]
"""Gaps of each class."""


class GapCounts:
    """Since the start. One thread adds, any may read."""

    def __init__(self) -> None:
        self._counts: Counts = np.zeros(_CLASSES, np.int64)

    def add(self, seconds: float) -> None:
        """A gap between two tokens of one stream."""
        place = int(math.log(max(seconds, _LEAST_S) / _LEAST_S) / _WIDTH)
        self._counts[min(place, _CLASSES - 1)] += 1

    def counts(self) -> Counts:
        """A copy."""
        return self._counts.copy()


def quantile_s(counts: Counts, share: float) -> float | None:
    """The length that ``share`` of the gaps do not exceed, seconds (upper end of its class); None without gaps."""
    total = int(counts.sum())
    if total <= 0:
        return None
    place = int(np.searchsorted(np.cumsum(counts), math.ceil(share * total)))
    return float(_LEAST_S * math.exp((place + 1) * _WIDTH))
