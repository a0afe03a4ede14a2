"""The ledger: seconds by part, summed over steps. Pure Python, clock reads only.

There is one for an engine, which only grows; what a request spent is the difference of two looks at it
(`cluster.telemetry.account`). A step counts whole for every request in it: a request waits for all of its step, whoever
caused it.

Parts of the router's own thread have one sum each. Time that it waits for groups is kept by group, and beside it by
group and layer, so that whoever made a layer wait can be named.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass


class Stage(enum.Enum):
    """Where time can go. The value is the name that users see; ARCHITECTURE.md says what each covers.

    ``at`` is its place in a ledger: among the router's own stages, or in a group's row. An attribute, since members of
    enumerations hash in Python, which takes longer than all the rest of booking.
    """

    at: int
    of_group: bool

    TOKENIZE = "tokenize"
    QUEUE = "queue"
    TURN = "turn"
    SCHEDULE = "schedule"
    TRUNK = "trunk"
    DISPATCH = "dispatch"
    WIRE = "wire"
    GROUP_QUEUE = "expert.queue"
    GROUP_COMPUTE = "expert.compute"
    COLD_LOAD = "expert.cold_load"
    STRAGGLER = "expert.straggler"
    FAILOVER = "failover"
    COMBINE = "combine"
    SAMPLE = "sample"
    EMIT = "emit"
    DELIVER = "deliver"
    STREAM_OUT = "stream_out"


GROUP_STAGES = (
    Stage.WIRE,
    Stage.GROUP_QUEUE,
    Stage.GROUP_COMPUTE,
    Stage.COLD_LOAD,
    Stage.STRAGGLER,
    Stage.FAILOVER,
)
"""Time that the router waits for a group."""
OWN_STAGES = tuple(stage for stage in Stage if stage not in GROUP_STAGES)

for _stages in (OWN_STAGES, GROUP_STAGES):
    for _index, _stage in enumerate(_stages):
        _stage.at, _stage.of_group = _index, _stages is GROUP_STAGES
_NAMES = tuple((stage.value, stage) for stage in Stage)
_GROUP_NAMES = tuple((stage.at, stage.value) for stage in GROUP_STAGES)
# A group's row: seconds of its stages, then what it was asked for, then seconds by layer.
_CALLS, _TOKENS, _BYTES = range(len(GROUP_STAGES), len(GROUP_STAGES) + 3)
_LAYERS = _BYTES + 1


@dataclass(frozen=True, slots=True)
class GroupSpent:
    """What the router had to do with one group: seconds waited by stage, and in which layer most of them were."""

    group: int
    seconds: dict[str, float]
    calls: int
    tokens: int
    num_bytes: int
    worst_layer: int
    worst_layer_s: float

    @property
    def total_s(self) -> float:
        """Seconds waited for it."""
        return sum(self.seconds.values())


class Ledger:
    """Seconds by stage, by group and stage, and by group and layer. Rows of groups are made when they are first met."""

    __slots__ = ("_groups", "_own")

    def __init__(self) -> None:
        self._own = [0.0] * len(OWN_STAGES)
        self._groups: list[list[float]] = []

    # -- the hot path ----------------------------------------------------------------------------------------------

    def add(self, stage: Stage, seconds: float) -> None:
        """Adds to one of the router's own stages. Negative seconds count as 0: two threads' clock reads may cross."""
        if seconds > 0:
            self._own[stage.at] += seconds

    def wait(self, group: int, layer: int, stage: Stage, seconds: float) -> None:
        """Adds time that a layer waited for a group; ``stage`` is one of `GROUP_STAGES`."""
        if seconds > 0:
            row = self._row(group)
            row[stage.at] += seconds
            at = _LAYERS + layer
            if at >= len(row):
                row.extend([0.0] * (at + 1 - len(row)))
            row[at] += seconds

    def called(self, group: int, tokens: int, num_bytes: int) -> None:
        """Counts a layer call."""
        row = self._row(group)
        row[_CALLS] += 1
        row[_TOKENS] += tokens
        row[_BYTES] += num_bytes

    def _row(self, group: int) -> list[float]:
        groups = self._groups
        while group >= len(groups):
            groups.append([0.0] * _LAYERS)
        return groups[group]

    # -- looking -----------------------------------------------------------------------------------------------------

    def brief(self) -> Ledger:
        """As it is now, without layers."""
        other = Ledger()
        other._own = self._own[:]
        other._groups = [row[:_LAYERS] for row in self._groups]
        return other

    def copy(self) -> Ledger:
        """As it is now."""
        other = Ledger()
        other._own = self._own[:]
        other._groups = [row[:] for row in self._groups]
        return other

    def since(self, earlier: Ledger) -> Ledger:
        """What was added since ``earlier``, which is a copy of this ledger."""
        other = Ledger()
        other._own = [now - then for now, then in zip(self._own, earlier._own, strict=True)]
        for number, row in enumerate(self._groups):
            then = earlier._groups[number] if number < len(earlier._groups) else []
            padded = then + [0.0] * (len(row) - len(then))
            other._groups.append([now - before for now, before in zip(row, padded, strict=True)])
        return other

    def absorb(self, other: Ledger) -> None:
        """Adds another ledger part by part."""
        self._own = [mine + theirs for mine, theirs in zip(self._own, other._own, strict=True)]
        for number, theirs in enumerate(other._groups):
            mine = self._row(number)
            mine.extend([0.0] * (len(theirs) - len(mine)))
            for index, value in enumerate(theirs):
                mine[index] += value

    def seconds(self, stage: Stage) -> float:
        """Of one stage, all groups together."""
        at = stage.at
        return sum([row[at] for row in self._groups]) if stage.of_group else self._own[at]

    def items(self) -> Iterable[tuple[str, float]]:
        """(name, seconds) of every stage, in the order a request meets them."""
        return [(name, self.seconds(stage)) for name, stage in _NAMES]

    def spent(self) -> dict[str, float]:
        """Stages that took any time."""
        return {name: seconds for name, seconds in self.items() if seconds > 0}

    def total_s(self) -> float:
        """Sum over all stages."""
        return sum(self._own) + sum(sum(row[: len(GROUP_STAGES)]) for row in self._groups)

    def groups(self) -> list[GroupSpent]:
        """Groups that were called or waited for."""
        found = []
        for number, row in enumerate(self._groups):
            if not any(row):
                continue
            layers = row[_LAYERS:]
            worst = max(range(len(layers)), key=layers.__getitem__) if any(layers) else -1
            seconds = {name: row[at] for at, name in _GROUP_NAMES if row[at] > 0}
            worst_s = layers[worst] if worst >= 0 else 0.0
            counts = (round(row[_CALLS]), round(row[_TOKENS]), round(row[_BYTES]))
            found.append(GroupSpent(number, seconds, *counts, worst, worst_s))
        return found
