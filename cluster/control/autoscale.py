"""Whether groups are so busy that one more is needed, or so idle that one can go. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from cluster.core import GroupId

BUSY, IDLE = 0.7, 0.3
"""Shares of time that compute threads compute, above which a group is added, and below which one goes if the others
would stay below `BUSY` without it."""
TIMES = 3
"""Looks in a row that must say the same."""


class Autoscaler:
    """Looks at seconds that the groups have computed, every now and then."""

    def __init__(self, least: int, most: int) -> None:
        self.least, self.most = least, most
        self._busy: dict[tuple[GroupId, str], float] = {}
        self._at_s: float | None = None
        self._up = self._down = 0
        self.share: float | None = None
        """Of time that groups computed, between the last two looks: the mean of all groups."""

    def look(self, now_s: float, busy_s: Mapping[tuple[GroupId, str], float]) -> int:
        """The number of groups that there should be. ``busy_s`` by group and incarnation."""
        count = max(1, len(busy_s))
        wanted = min(max(count, self.least), self.most)
        before, self._busy = self._busy, dict(busy_s)
        since_s, self._at_s = self._at_s, now_s
        if wanted != count:
            return wanted
        known = [busy_s[key] - before[key] for key in busy_s if key in before]
        if since_s is None or now_s <= since_s or len(known) < count:
            self._up = self._down = 0  # some group is new: look again later
            return count
        self.share = sum(known) / count / (now_s - since_s)
        fewer = self.share * count / max(1, count - 1)
        self._up = self._up + 1 if self.share > BUSY else 0
        self._down = self._down + 1 if self.share < IDLE and fewer < BUSY else 0
        if self._up >= TIMES and count < self.most:
            self._up = 0
            return count + 1
        if self._down >= TIMES and count > self.least:
            self._down = 0
            return count - 1
        return count
