"""Whether one more group would help, or one can go. Pure.

A group computes only while some router runs a step and waits for it, so a lone router never keeps groups busy for all
of the time. What says that more groups would help is: routers run steps nearly all the time, and groups take a good
part of that; or groups compute nearly all the time, as with many routers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

STEPPING, PART = 0.85, 0.2
"""Share of time that routers run steps, and share of that time that groups compute, from which on a group is added;"""
BUSY = 0.7
"""or share of all time that groups compute;"""
QUIET = 0.35
"""and share of time that routers run steps, below which one goes, if the others then stay below `BUSY`."""
TIMES = 3
"""Looks in a row that must say the same."""


class Autoscaler:
    """Looks at seconds that groups have computed and that routers have run steps, every now and then."""

    def __init__(self, least: int, most: int) -> None:
        self.least, self.most = least, most
        self._busy = _Shares()
        self._stepping = _Shares()
        self._up = self._down = 0
        self.why = ""
        """What the last advice rests on."""

    def look(self, now_s: float, busy_s: Mapping[Any, float], stepping_s: Mapping[Any, float]) -> int:
        """The number of groups that there should be: one more, one less or as many as ``busy_s`` has. Both are seconds
        since each process's start, ``busy_s`` by group and ``stepping_s`` by router; keys are new for new processes."""
        count = max(1, len(busy_s))
        wanted = min(max(count, self.least), self.most)
        busy, stepping = self._busy.since(now_s, busy_s), self._stepping.since(now_s, stepping_s)
        if wanted != count:
            self.why = f"{self.least} to {self.most} groups are allowed"
            return wanted
        if busy is None or stepping is None:
            self._up = self._down = 0  # somebody is new: look again later
            return count
        self.why = f"routers run steps {stepping:.0%} of the time, groups compute {busy:.0%}"
        needed = busy > BUSY or (stepping > STEPPING and busy > PART * stepping)
        self._up = self._up + 1 if needed else 0
        fewer = busy * count / max(1, count - 1)
        self._down = self._down + 1 if stepping < QUIET and fewer < BUSY else 0
        if self._up >= TIMES and count < self.most:
            self._up = 0
            return count + 1
        if self._down >= TIMES and count > self.least:
            self._down = 0
            return count - 1
        return count


class _Shares:
    """Of time that counters of seconds grew by, between two looks: the mean of all of them."""

    def __init__(self) -> None:
        self._at_s: float | None = None
        self._before: dict[Any, float] = {}

    def since(self, now_s: float, seconds: Mapping[Any, float]) -> float | None:
        """None where a counter is new, or there is none."""
        before, self._before = self._before, dict(seconds)
        since_s, self._at_s = self._at_s, now_s
        grown = [value - before[key] for key, value in seconds.items() if key in before]
        if since_s is None or now_s <= since_s or not seconds or len(grown) < len(seconds):
            return None
        return sum(grown) / len(grown) / (now_s - since_s)
