"""What one request spent: differences of the engine's ledger over the steps that the request was in.

Pure: no clock of its own. Between `enter` and `leave` the request is in every step; outside it waits, and that time is
its own (`wait`). Decoding is kept by windows, so that a spike can be found in a long answer.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import NamedTuple

from cluster.telemetry.ledger import Ledger, Stage

WINDOW_TOKENS, WINDOW_S, MAX_WINDOWS = 32, 0.25, 32
MAX_EVENTS = 16


class StepEvent(NamedTuple):
    """Something rare in a step that everybody in it, and behind it, waited for: "cold_load" or "failover"."""

    kind: str
    start_s: float
    seconds: float
    group: int = -1
    layer: int = -1
    expert: int = -1
    num_bytes: int = 0
    tokens: int = 0
    cause: str = ""


@dataclass(slots=True)
class Window:
    """Some consecutive tokens of an answer. ``layer`` and ``group``: where most waiting for experts was."""

    start_s: float
    end_s: float
    tokens: int
    max_gap_s: float
    seconds: dict[str, float]
    group: int = -1
    layer: int = -1
    waited_s: float = 0.0

    def join(self, later: Window) -> None:
        """Takes in the window behind it."""
        self.end_s, self.tokens = later.end_s, self.tokens + later.tokens
        self.max_gap_s = max(self.max_gap_s, later.max_gap_s)
        for name, seconds in later.seconds.items():
            self.seconds[name] = self.seconds.get(name, 0.0) + seconds
        if later.waited_s > self.waited_s:
            self.group, self.layer, self.waited_s = later.group, later.layer, later.waited_s


@dataclass(slots=True)
class RequestAccount:
    """One request's. Times are the engine's clock; ``arrived_s`` is when the engine got the request.

    ``queue`` is everything before its first step, ``prefill`` from there to its first token, ``decode`` what came
    after. ``ended_s`` is the end of its last step.
    """

    arrived_s: float
    queue: Ledger = field(default_factory=Ledger)
    prefill: Ledger = field(default_factory=Ledger)
    decode: Ledger = field(default_factory=Ledger)
    first_step_s: float | None = None
    first_token_s: float | None = None
    ended_s: float | None = None
    steps: int = 0
    preemptions: int = 0
    cached_tokens: int = 0
    cold_bytes: int = 0
    """Of experts that it would probably make groups load, when it got its place."""
    tokens: array[float] = field(default_factory=lambda: array("d"))
    windows: list[Window] = field(default_factory=list)
    events: list[StepEvent] = field(default_factory=list)
    missing: set[tuple[int, int]] = field(default_factory=set)
    """(MoE layer, expert) that were left out of a step of its: its answer is not exact."""
    step_links: list[str] = field(default_factory=list)
    """Trace ids of steps of its that were traced in detail."""
    _blocked_s: float = 0.0
    _blocked_until_s: float = 0.0
    _seen: Ledger | None = None
    _idle_s: float = 0.0
    _window_s: float = 0.0
    _window_tokens: int = 0
    _window_gap_s: float = 0.0
    _window_waits: dict[str, float] = field(default_factory=dict)
    _scale: int = 1

    def __post_init__(self) -> None:
        self._idle_s = self.arrived_s

    @property
    def inside(self) -> bool:
        """It takes part in steps now."""
        return self._seen is not None

    def enter(self, total: Ledger, now_s: float) -> None:
        """It is in steps from ``now_s`` on; it waited until then, for a place (`Stage.QUEUE`) or for its turn."""
        self._waited(now_s)
        if self.first_step_s is None:
            self.first_step_s = now_s
        self._seen = total.copy()

    def leave(self, total: Ledger, now_s: float) -> None:
        """Its last step for now ended at ``now_s``."""
        if self._seen is not None:
            self._cut(total, now_s)
            self._seen = None
            self._idle_s, self._blocked_s = now_s, 0.0

    def token(self, total: Ledger, now_s: float) -> None:
        """One of its tokens was made by the step that ended at ``now_s``."""
        if self.first_token_s is None:
            self._cut(total, now_s)
            self.first_token_s = self._window_s = now_s
        else:
            self._window_gap_s = max(self._window_gap_s, now_s - self.tokens[-1])
            self._window_tokens += 1
        self.tokens.append(now_s)
        limit = WINDOW_TOKENS * self._scale
        if self._window_tokens >= limit or (self._window_tokens and now_s - self._window_s >= WINDOW_S * self._scale):
            self._cut(total, now_s)

    def end(self, total: Ledger, now_s: float) -> None:
        """It has ended at ``now_s``; a request that was in no step then had waited until now."""
        if self._seen is None:
            self._waited(now_s)
        self.leave(total, now_s)
        self.ended_s = now_s

    def _waited(self, now_s: float) -> None:
        """Books a wait that ends now, less what was booked already as others' fault."""
        waited = Stage.QUEUE if self.first_step_s is None else Stage.TURN
        self._book(waited, now_s - self._idle_s - self._blocked_s)

    def _book(self, stage: Stage, seconds: float, group: int = -1, layer: int = 0) -> None:
        phase = self._phase()
        if stage.of_group:
            phase.wait(group, layer, stage, seconds)
        else:
            phase.add(stage, seconds)
        if phase is self.decode and seconds > 0:
            self._window_waits[stage.value] = self._window_waits.get(stage.value, 0.0) + seconds

    def note(self, event: StepEvent) -> None:
        """An event of a step that it was in, or that it waited behind: then so much of its waiting was for that.
        Events come in the order of their steps."""
        if self.inside:
            self._keep(event)
            return
        until_s = event.start_s + event.seconds
        lost_s = until_s - max(event.start_s, self._idle_s, self._blocked_until_s)
        if lost_s > 0:
            stage = Stage.COLD_LOAD if event.kind == "cold_load" else Stage.FAILOVER
            self._book(stage, lost_s, event.group, event.layer)
            self._keep(event._replace(start_s=until_s - lost_s, seconds=lost_s))
            self._blocked_s, self._blocked_until_s = self._blocked_s + lost_s, until_s

    def _keep(self, event: StepEvent) -> None:
        """Keeps an event; the longest ones where there are many."""
        self.events.append(event)
        if len(self.events) > MAX_EVENTS:
            self.events.remove(min(self.events, key=lambda item: item.seconds))

    def total(self) -> Ledger:
        """All phases together."""
        whole = self.queue.copy()
        whole.absorb(self.prefill)
        whole.absorb(self.decode)
        return whole

    def gaps_s(self) -> list[float]:
        """Between successive tokens, seconds."""
        return [self.tokens[i] - self.tokens[i - 1] for i in range(1, len(self.tokens))]

    def _phase(self) -> Ledger:
        if self.first_step_s is None:
            return self.queue
        return self.prefill if self.first_token_s is None else self.decode

    def _cut(self, total: Ledger, now_s: float) -> None:
        """Books what was added to the engine's ledger since the last look, and closes the window."""
        if self._seen is None:
            return
        spent = total.since(self._seen)
        self._phase().absorb(spent)
        self._seen = total.copy()
        if self.first_token_s is None:
            return
        if self._window_tokens:
            self._close_window(spent, now_s)
        elif self.windows:  # steps without a token of its own, as after a preemption: they belong to what came before
            rest = Window(now_s, now_s, 0, 0.0, _sum(spent.spent(), self._window_waits))
            rest.start_s, rest.end_s = self.windows[-1].start_s, now_s
            self.windows[-1].join(rest)
        self._window_s, self._window_tokens, self._window_gap_s = now_s, 0, 0.0
        self._window_waits = {}

    def _close_window(self, spent: Ledger, now_s: float) -> None:
        window = Window(self._window_s, now_s, self._window_tokens, self._window_gap_s, {})
        window.seconds = _sum(spent.spent(), self._window_waits)
        for group in spent.groups():
            if group.worst_layer_s > window.waited_s:
                window.group, window.layer, window.waited_s = group.group, group.worst_layer, group.worst_layer_s
        self.windows.append(window)
        if len(self.windows) > MAX_WINDOWS:
            pairs = list(zip(self.windows[::2], [*self.windows[1::2], None], strict=False))
            for first, second in pairs:
                if second is not None:
                    first.join(second)
            self.windows = [first for first, _ in pairs]
            self._scale *= 2


def _sum(first: dict[str, float], second: dict[str, float]) -> dict[str, float]:
    return {name: first.get(name, 0.0) + second.get(name, 0.0) for name in {**first, **second}}
