"""What the routers have told: which table each of them uses, how loaded experts are, how long streams waited. Pure."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cluster.core import Clock
from cluster.placement.shape import Loads
from cluster.routing.report import RouterReport
from cluster.telemetry.gaps import Counts

FORGET_S = 10.0
"""A router that was not heard of for so long is gone: should it come back, groups tell it what they do not hold."""
MAX_WINDOWS = 12
ROWS_OF_A_READ = 8
"""So many prefill tokens weigh as much as one activation of a decode step: an assumption, that a product of so many
rows takes about as long as reading its weights. It was not measured here."""
_KEPT_GAPS = 120


@dataclass(slots=True)
class _Router:
    report: RouterReport
    seen_s: float


@dataclass(frozen=True, slots=True)
class Window:
    """Loads that all routers together saw in ``seconds``, ended at ``at_s``: [L, E], in activations of decode steps."""

    at_s: float
    seconds: float
    loads_LE: Loads


class Routers:
    """Thread-safe. ``window_s`` is the length of a load window; all routers are known after ``settle_s``."""

    def __init__(
        self,
        experts_per_layer: Sequence[int],
        window_s: float,
        clock: Clock = time.monotonic,
        settle_s: float = FORGET_S,
    ) -> None:
        self._settled_s = clock() + settle_s
        self._shape = (len(experts_per_layer), max(experts_per_layer, default=0))
        self._window_s, self._clock = window_s, clock
        self._lock = threading.Lock()
        self._routers: dict[str, _Router] = {}
        self._sums: dict[str, tuple[Any, Any]] = {}
        self._window_LE: Loads = np.zeros(self._shape)
        self._window_began_s = clock()
        self._windows: deque[Window] = deque(maxlen=MAX_WINDOWS)
        self._gaps: dict[str, Counts] = {}
        self._total_gaps: Counts | None = None
        self._gap_marks: deque[tuple[float, Counts]] = deque(maxlen=_KEPT_GAPS)

    def told(self, report: RouterReport) -> None:
        """A router asked for the table and said this."""
        now_s = self._clock()
        with self._lock:
            self._routers[report.router] = _Router(report, now_s)
            for name in [name for name, router in self._routers.items() if now_s - router.seen_s > FORGET_S]:
                for known in (self._routers, self._sums, self._gaps):
                    known.pop(name, None)
            if report.activations_LE is not None:
                self._count(report, now_s)
            if report.gaps is not None:
                before = self._gaps.get(report.router)
                grown = report.gaps - before if before is not None else report.gaps * 0
                self._gaps[report.router] = report.gaps
                self._total_gaps = grown if self._total_gaps is None else self._total_gaps + grown
                if not self._gap_marks or now_s - self._gap_marks[-1][0] >= 0.5:
                    self._gap_marks.append((now_s, self._total_gaps))

    def _count(self, report: RouterReport, now_s: float) -> None:
        now = report.activations_LE, report.prefill_LE
        before = self._sums.get(report.router)
        self._sums[report.router] = now
        if before is not None:  # the first report of a router may be of long ago
            activations_LE, prefill_LE = now[0] - before[0], now[1] - before[1]
            self._window_LE = self._window_LE + activations_LE + prefill_LE / ROWS_OF_A_READ
        if now_s - self._window_began_s >= self._window_s:
            self._windows.append(Window(now_s, now_s - self._window_began_s, self._window_LE))
            self._window_LE, self._window_began_s = np.zeros(self._shape), now_s

    def reports(self) -> list[RouterReport]:
        """The routers that were heard of lately, as they last were."""
        now_s = self._clock()
        with self._lock:
            return [r.report for r in self._routers.values() if now_s - r.seen_s <= FORGET_S]

    def behind(self, order: tuple[int, int]) -> list[str]:
        """Routers that still use an older table. Whoever has not been listening for long does not know them all."""
        if self._clock() < self._settled_s:
            return ["that were not heard of yet"]
        return [report.router for report in self.reports() if report.table < order]

    def windows(self) -> list[Window]:
        """The newest load windows, oldest first."""
        with self._lock:
            return list(self._windows)

    def recent_loads(self, count: int) -> Loads:
        """Loads of the last ``count`` windows together, and of the one that is open; [L, E]."""
        with self._lock:
            loads_LE: Loads = self._window_LE.copy()
            for window in list(self._windows)[-count:]:
                loads_LE += window.loads_LE
            return loads_LE

    def gaps(self) -> Counts | None:
        """Gaps between tokens so far; take differences. None before any report."""
        with self._lock:
            return None if self._total_gaps is None else self._total_gaps.copy()

    def gaps_ago(self, seconds: float) -> Counts | None:
        """As `gaps`, as it was so long ago or, if nothing is known of then, as early as is known."""
        since_s = self._clock() - seconds
        with self._lock:
            known = [counts for at_s, counts in self._gap_marks if at_s >= since_s]
            return known[0].copy() if known else None
