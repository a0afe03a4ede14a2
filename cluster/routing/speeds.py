"""How fast groups have answered lately, and what follows from it: whom to prefer, when to doubt, when to give up. Pure.

What a call should take is its group's usual time for such calls: a fixed part and a part for each token row, both
exponential averages. Decode calls are judged by activated experts, prefill calls by rows.
"""

from __future__ import annotations

from dataclasses import dataclass

from cluster.core import GroupId

_MEMORY = 1 / 16
_MIN_DEADLINE_S = 1.0
_DEADLINE_TIMES = 10.0
"""A call is lost after so many times what it should take, and never before a second."""
_MIN_HEDGE_S = 0.01
_HEDGE_TIMES, _HEDGE_DEVIATIONS = 3.0, 6.0
_FASTER = 1 / 4
"""Weight of an answer that took less than half of what was usual: whoever was slow and is not any more is soon trusted
again, although it is hardly asked."""
_LATE_TIMES, _LATE_S = 3.0, 0.004
"""A group whose calls take so much longer beside its computing than those of the quickest one has a handicap. Less is
what processes that share cores do to each other all the time."""
_LOOKS = 4
"""Answers of a group between two looks at handicaps, and at what is usual."""
_WARM = 8
"""Answers after which a group is known."""
_BEATEN = 4
"""Hedges that a group may lose in a row, without an answer of its own, before it is doubted."""
_FORGIVES = 1024
"""One choice in so many knows no prices: a group that nobody asks could not show that it is fast again."""
_MOST_CREDIT = 20.0
HEDGED_SHARE = 0.05
"""Of all calls at most are sent twice."""


@dataclass(slots=True)
class _Pace:
    """One group's: seconds of its own computing an expert (decode) and a row (prefill), of whole round trips, and of
    these beside its computing."""

    answers: int = 0
    beaten: int = 0
    expert_s: float = 0.0
    beside_s: float = 0.0
    row_s: float = 0.0
    trip_s: float = 0.0
    deviation_s: float = 0.0


class Speeds:
    """All groups'. One thread, the engine's."""

    def __init__(self) -> None:
        self._paces: dict[GroupId, _Pace] = {}
        self.calls = self.hedges = self._asked = 0
        self._credit = 0.0
        self._cost: dict[GroupId, float] | None = None
        self._handicaps: dict[GroupId, float] | None = None
        self._usual: tuple[float, float] | None = None
        self._forgives = False

    def answered(self, group: GroupId, decode: bool, rows: int, experts: int, compute_s: float, trip_s: float) -> None:
        """A call was answered: by the group's clock after ``compute_s``, by ours after ``trip_s``."""
        pace = self._paces.setdefault(group, _Pace())
        if decode:
            weight = max(_MEMORY if trip_s > pace.trip_s / 2 else _FASTER, 1 / (1 + pace.answers))
            pace.answers, pace.beaten = pace.answers + 1, 0
            pace.expert_s += (compute_s / max(1, experts) - pace.expert_s) * weight
            pace.deviation_s += (abs(trip_s - pace.trip_s) - pace.deviation_s) * weight
            pace.trip_s += (trip_s - pace.trip_s) * weight
            pace.beside_s += (max(0.0, trip_s - compute_s) - pace.beside_s) * weight
            if pace.answers % _LOOKS == 0:
                self._cost = self._handicaps = self._usual = None
        else:
            pace.row_s += (compute_s / max(1, rows) - pace.row_s) * (_MEMORY if pace.row_s else 1.0)

    def beaten(self, group: GroupId) -> bool:
        """A call to it was answered by another copy first; whether that has been so too often in a row."""
        pace = self._paces.setdefault(group, _Pace())
        pace.beaten += 1
        return pace.beaten >= _BEATEN

    def sent(self) -> None:
        """A call was sent."""
        self.calls += 1
        self._credit = min(_MOST_CREDIT, self._credit + HEDGED_SHARE)

    def hedged(self, calls: int) -> None:
        """So many of them were sent because another one took long."""
        self.hedges += calls
        self._credit -= calls

    def gone(self, group: GroupId) -> None:
        """Whoever comes back under this number is somebody else."""
        self._paces.pop(group, None)
        self._cost = self._handicaps = self._usual = None

    def cost(self) -> dict[GroupId, float]:
        """What an expert costs each group relative to the cheapest one, in steps of a half: below that it is noise, and
        choices would differ from step to step for nothing. Empty where all cost the same."""
        self._asked += 1
        self._forgives = self._asked % _FORGIVES == 0
        if self._forgives:
            return {}
        if self._cost is None:
            self._cost = {}
            known = {group: pace.expert_s for group, pace in self._paces.items() if pace.answers >= _WARM}
            least = min((each for each in known.values() if each > 0), default=0.0)
            if least and len(known) > 1:
                steps = {group: round(2 * each / least) / 2 for group, each in known.items()}
                if max(steps.values()) > 1.5:
                    self._cost = {group: max(1.0, step) if step > 1.5 else 1.0 for group, step in steps.items()}
        return self._cost

    def uneven(self) -> bool:
        """Whether `cost` or `handicaps` would say anything. To be asked instead of them."""
        return bool(self.cost()) or bool(self.handicaps())

    def handicaps(self) -> dict[GroupId, float]:
        """Experts' worth of time that a decode call to a group takes longer than one to the quickest, whatever it
        computes: a process that hardly runs, or a slow way. To be asked after `cost`, which forgives now and then."""
        if self._forgives:
            return {}
        if self._handicaps is None:
            known = {group: pace for group, pace in self._paces.items() if pace.answers >= _WARM}
            least_s = min((pace.beside_s for pace in known.values()), default=0.0)
            expert_s = min((pace.expert_s for pace in known.values() if pace.expert_s > 0), default=0.0)
            limit_s = _LATE_TIMES * least_s + _LATE_S
            late = {g: pace.beside_s - least_s for g, pace in known.items() if expert_s and pace.beside_s > limit_s}
            self._handicaps = {group: extra_s / expert_s for group, extra_s in late.items()}
        return self._handicaps

    def lost_after_s(self, group: GroupId, rows: int) -> float:
        """Seconds after which a call without an answer counts as lost."""
        pace = self._paces.get(group)
        if pace is None or pace.answers < _WARM:
            return 10 * _MIN_DEADLINE_S
        return max(_MIN_DEADLINE_S, _DEADLINE_TIMES * (pace.trip_s + rows * pace.row_s))

    def hedge_after_s(self, group: GroupId, decode: bool) -> float | None:
        """Seconds after which a decode call is worth sending to another copy too; None where there is nothing to go by,
        or enough calls have been sent twice."""
        pace = self._paces.get(group)
        if not decode or pace is None or pace.answers < _WARM or self._credit < 1.0:
            return None
        if self._usual is None:
            known = [other for other in self._paces.values() if other.answers >= _WARM]
            self._usual = min(other.trip_s for other in known), min(other.deviation_s for other in known)
        usual_s, deviation_s = self._usual
        return max(_MIN_HEDGE_S, _HEDGE_TIMES * usual_s, usual_s + _HEDGE_DEVIATIONS * deviation_s)
