"""What is told of a request or a step when it is over; plain data, made into spans and metrics in another thread."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from cluster.telemetry.account import RequestAccount, StepEvent
from cluster.telemetry.ledger import Ledger
from cluster.telemetry.steps import StepDetail


class SpanRef(NamedTuple):
    """A span by its ids, hex."""

    trace_id: str
    span_id: str


@dataclass(slots=True)
class RequestRecord:
    """One request, seen from the front door. Times are this process's monotonic clock.

    ``ledger`` has all its parts, ``account`` what the engine says of it (None: it never got there). ``parent`` is the
    client's span where that is exported to the same place as ours.
    """

    ref: SpanRef
    request_id: str
    arrived_s: float
    ended_s: float
    ledger: Ledger
    account: RequestAccount | None = None
    parent: str = ""
    trace_state: str = ""
    sampled: bool = True
    traced: bool = True
    """Traces were switched on when it ended."""
    left_s: float = 0.0
    """When the client left, if it did."""
    tokenized_s: float = 0.0
    submitted_s: float = 0.0
    blocked_s: float = 0.0
    finish_reason: str = ""
    error_code: str = ""
    error: str = ""
    prompt_tokens: int = 0
    output_tokens: int = 0
    max_tokens: int = 0
    exact: bool = True
    prompt: str = ""
    answer: str = ""

    @property
    def wall_s(self) -> float:
        """From its arrival to its last byte."""
        return self.ended_s - self.arrived_s

    @property
    def unattributed_s(self) -> float:
        """What no part accounts for. Parts never overlap, so it is not negative but for rounding."""
        return self.wall_s - self.ledger.total_s()


@dataclass(slots=True)
class StepRecord:
    """One step. ``before`` and ``after`` are looks at the engine's ledger, without layers."""

    step_id: int
    started_s: float
    ended_s: float
    sequences: int
    prefill_tokens: int
    decode_tokens: int
    before: Ledger
    after: Ledger
    members: Sequence[SpanRef] = ()
    events: Sequence[StepEvent] = ()
    detail: StepDetail | None = None


@dataclass(slots=True)
class PhaseRecord:
    """Consecutive phases of background work, such as a start: (name, begin, end)."""

    name: str
    since_s: float
    phases: list[tuple[str, float, float]] = field(default_factory=list)
    attributes: dict[str, str | int | float] = field(default_factory=dict)

    def done(self, phase: str, now_s: float) -> None:
        """A phase, begun when the one before ended, is over."""
        begun_s = self.phases[-1][2] if self.phases else self.since_s
        self.phases.append((phase, begun_s, now_s))

    def seconds(self) -> tuple[tuple[str, float], ...]:
        """What each phase took."""
        return tuple((phase, end_s - begin_s) for phase, begin_s, end_s in self.phases)


class Observer(Protocol):
    """Whoever is told. Nothing here may block or raise: the engine and the front door call it."""

    def begin_step(self, asked: bool) -> StepDetail | None:
        """A trace for the step that begins, if it gets one; ``asked``: one of its requests wants to see layers."""
        ...

    def step(self, record: StepRecord) -> None:
        """A step is over."""
        ...

    def request(self, record: RequestRecord) -> None:
        """A request is over."""
        ...
