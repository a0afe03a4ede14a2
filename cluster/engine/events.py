"""What an engine says: the events of a request, and its counters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cluster.core import FinishReason
from cluster.engine.sampler import Sampled
from cluster.errors import ExpertMeshError
from cluster.telemetry.account import RequestAccount


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """What a listener hears: a token, the end, or an error (the last one is the last event).

    ``logits`` are fp32 little-endian bytes, only where the request wants them. ``account`` comes with the last event.
    """

    text: str = ""
    token: Sampled | None = None
    logits: bytes = b""
    finish: FinishReason | None = None
    error: ExpertMeshError | None = None
    account: RequestAccount | None = None

    @property
    def last(self) -> bool:
        """No event follows."""
        return self.finish is not None or self.error is not None


Listener = Callable[[TokenEvent], None]
"""Called in the engine thread; must neither block nor raise."""


@dataclass(slots=True)
class EngineStats:
    """Counters since the start, and what is there now; see EngineStatus in control.proto.

    ``kv_used_bytes`` are blocks that some request holds, ``kv_cached_bytes`` those that only a common prefix may bring
    back. ``prefix_hit_tokens`` of ``prompt_tokens`` were found there when their requests got a place.
    """

    running: int = 0
    waiting: int = 0
    steps: int = 0
    max_batch: int = 0
    finished: int = 0
    cancelled: int = 0
    failed: int = 0
    max_steps_after_cancel: int = 0
    kv_used_bytes: int = 0
    kv_cached_bytes: int = 0
    kv_blocks: int = 0
    kv_blocks_used: int = 0
    kv_blocks_free: int = 0
    preemptions: int = 0
    prefix_hit_tokens: int = 0
    prompt_tokens: int = 0
