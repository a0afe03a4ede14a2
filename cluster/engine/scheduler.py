"""The scheduler: which tokens of which sequences make the next step. Pure Python; no torch, no clock of its own.

Decode tokens of running sequences come first, then prefill chunks in order of arrival within the step's token budget.
A sequence joins when there is a place in the batch and room for its key-value cache, and leaves between steps.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from cluster.core import Request
from cluster.errors import Overloaded


@dataclass(slots=True, eq=False)
class Scheduled:
    """A sequence as the scheduler sees it. ``pending`` are tokens that have not been through the model yet: what is
    left of the prompt, or the one token sampled last."""

    request: Request
    pending: list[int] = field(default_factory=list)
    decoding: bool = False

    @property
    def max_tokens(self) -> int:
        """Tokens that the sequence may grow to."""
        return len(self.request.prompt_ids) + self.request.stop.max_new_tokens


@dataclass(frozen=True, slots=True)
class Share:
    """One sequence's part of a step. ``samples`` is False for a prefill chunk that is not the prompt's last."""

    sequence: Scheduled
    ids: tuple[int, ...]
    samples: bool


class Scheduler:
    """Waiting and running sequences.

    ``max_kv_tokens`` bounds the tokens that running sequences may grow to together; no sequence may need more alone.
    """

    def __init__(self, max_running: int, max_waiting: int, step_token_budget: int, max_kv_tokens: int) -> None:
        self._max_running = min(max_running, step_token_budget)
        self._max_waiting, self._budget, self._max_kv_tokens = max_waiting, step_token_budget, max_kv_tokens
        self._waiting: deque[Scheduled] = deque()
        self._running: list[Scheduled] = []
        self._kv_tokens = 0

    @property
    def num_waiting(self) -> int:
        """Requests without a place in the batch."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Sequences in the batch."""
        return len(self._running)

    def add(self, sequence: Scheduled) -> None:
        """Queues a sequence.

        Raises:
            Overloaded: ``max_waiting`` requests wait already.
        """
        if len(self._waiting) >= self._max_waiting:
            raise Overloaded(
                f"the queue is full: {len(self._waiting)} requests wait (engine.max_waiting); retry later or elsewhere"
            )
        sequence.pending = list(sequence.request.prompt_ids)
        self._waiting.append(sequence)

    def remove(self, sequence: Scheduled) -> None:
        """Forgets a sequence, wherever it is."""
        if sequence in self._running:
            self._running.remove(sequence)
            self._kv_tokens -= sequence.max_tokens
        elif sequence in self._waiting:
            self._waiting.remove(sequence)

    def sampled(self, sequence: Scheduled, token: int) -> None:
        """The token that the next step of the sequence starts from."""
        sequence.pending, sequence.decoding = [token], True

    def next_step(self) -> list[Share]:
        """The next step's shares, and moves what they take out of ``pending``; empty when there is nothing to do."""
        while self._waiting and len(self._running) < self._max_running:
            need = self._waiting[0].max_tokens
            if self._running and self._kv_tokens + need > self._max_kv_tokens:
                break
            self._running.append(self._waiting.popleft())
            self._kv_tokens += need
        budget = self._budget
        shares: list[Share] = []
        for sequence in self._running:
            if sequence.decoding and sequence.pending and budget > 0:
                shares.append(Share(sequence, tuple(sequence.pending), True))
                sequence.pending = []
                budget -= 1
        for sequence in self._running:
            if not sequence.decoding and sequence.pending and budget > 0:
                taken, sequence.pending = sequence.pending[:budget], sequence.pending[budget:]
                shares.append(Share(sequence, tuple(taken), not sequence.pending))
                budget -= len(taken)
        return shares
