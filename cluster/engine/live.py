"""A request while the engine has it: its sequence, its text so far, and its account."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from cluster.core import ExpertId, FinishReason, Request
from cluster.engine.events import Listener, TokenEvent
from cluster.engine.sampler import Sampled
from cluster.engine.scheduler import Scheduled
from cluster.engine.text import TextStream
from cluster.telemetry.account import RequestAccount


@dataclass(slots=True, eq=False)
class Live:
    """One request."""

    request: Request
    listener: Listener
    sequence: Scheduled
    text: TextStream
    account: RequestAccount
    cancelled_at_step: int | None = None

    def next_event(self, sampled: Sampled, logits_V: torch.Tensor) -> TokenEvent:
        """The event of one more token; it says whether the sequence ends with it."""
        stop = self.request.stop
        finish: FinishReason | None = None
        text = ""
        if sampled.token in stop.stop_ids:
            finish, text = FinishReason.STOP_ID, self.text.finish()
        else:
            text, stopped = self.text.push(sampled.token)
            if stopped:
                finish = FinishReason.STOP_STRING
            elif self.sequence.num_generated + 1 >= stop.max_new_tokens:
                finish, text = FinishReason.LENGTH, text + self.text.finish()
        logits = logits_V.numpy().tobytes() if self.request.want_logits else b""
        return TokenEvent(text, sampled, logits, finish)

    def miss(self, experts: Sequence[ExpertId]) -> None:
        """A step of its was computed without some experts."""
        self.account.missing.update((expert.layer, expert.expert) for expert in experts)
        self.sequence.degraded = True

    def close(self) -> None:
        """Puts what its sequence went through into its account."""
        account, sequence = self.account, self.sequence
        account.preemptions, account.cached_tokens = sequence.preemptions, sequence.cached_tokens
        account.cold_bytes = sequence.cold_bytes
