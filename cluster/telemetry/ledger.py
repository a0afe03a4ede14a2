"""The ledger: seconds by stage, for one step and for one request. Pure Python, clock reads only.

A step counts whole for every request in it: a request waits for all of its step, whoever caused it.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable


class Stage(enum.Enum):
    """Where time can go. The value is the name that users see; ARCHITECTURE.md says what each covers."""

    QUEUE = "queue"
    TOKENIZE = "tokenize"
    SCHEDULE = "schedule"
    TRUNK = "trunk"
    DISPATCH = "dispatch"
    WIRE = "wire"
    GROUP_QUEUE = "expert.queue"
    GROUP_COMPUTE = "expert.compute"
    STRAGGLER = "expert.straggler"
    COMBINE = "combine"
    SAMPLE = "sample"
    EMIT = "emit"


_STAGES = tuple(Stage)
_INDEX = {stage: index for index, stage in enumerate(_STAGES)}


class Ledger:
    """Seconds by stage; one float a stage, allocated once."""

    __slots__ = ("_seconds",)

    def __init__(self) -> None:
        self._seconds = [0.0] * len(_STAGES)

    def add(self, stage: Stage, seconds: float) -> None:
        """Adds ``seconds`` (negative ones count as 0: clocks are read in different threads)."""
        if seconds > 0:
            self._seconds[_INDEX[stage]] += seconds

    def absorb(self, other: Ledger) -> None:
        """Adds another ledger stage by stage."""
        self._seconds = [mine + theirs for mine, theirs in zip(self._seconds, other._seconds, strict=True)]

    def clear(self) -> None:
        """All stages to zero."""
        self._seconds = [0.0] * len(_STAGES)

    def items(self) -> Iterable[tuple[str, float]]:
        """(name, seconds) of every stage, in the order a request meets them."""
        return ((stage.value, seconds) for stage, seconds in zip(_STAGES, self._seconds, strict=True))

    def total_s(self) -> float:
        """Sum over all stages."""
        return sum(self._seconds)
