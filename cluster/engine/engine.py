"""The engine: one thread that takes requests, runs steps, and tells each request's listener of its tokens.

Nothing here knows gRPC or Ray. ``forward`` is the trunk (or, in tests, anything with its signature); the keys and
values that it stores lie in blocks that `BlockPool` keeps the accounts of. Events of a step are handed out together,
after its state is settled and outside the lock: listeners never see half a step, and keep nobody waiting.
"""

from __future__ import annotations

import contextlib
import heapq
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch

from cluster.config import EngineConfig
from cluster.core import Clock, FinishReason, Priority, Request
from cluster.engine.blocks import BlockPool, num_blocks_of
from cluster.engine.sampler import Sampled, sample
from cluster.engine.scheduler import Scheduled, Scheduler, Share
from cluster.engine.text import TextStream, Tokenizer
from cluster.errors import (
    Cancelled,
    DeadlineExceeded,
    ExpertMeshError,
    InternalError,
    InvalidArgument,
    Unavailable,
)
from cluster.model.packed import Chunk
from cluster.routing.dispatcher import StepContext
from cluster.telemetry.ledger import Ledger, Stage

log = logging.getLogger(__name__)

Forward = Callable[[Sequence[Chunk], StepContext], torch.Tensor]


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """What a listener hears: a token, the end, or an error (the last one is the last event).

    ``logits`` are fp32 little-endian bytes, only where the request wants them.
    """

    text: str = ""
    token: Sampled | None = None
    logits: bytes = b""
    finish: FinishReason | None = None
    error: ExpertMeshError | None = None
    ledger: Ledger | None = None

    @property
    def last(self) -> bool:
        """No event follows."""
        return self.finish is not None or self.error is not None


Listener = Callable[[TokenEvent], None]
"""Called in the engine thread; must neither block nor raise."""


@dataclass(slots=True, eq=False)
class _Live:
    """A request in the engine."""

    request: Request
    listener: Listener
    sequence: Scheduled
    text: TextStream
    idle_s: float
    """Since when it is in no step: its arrival or the end of its last step."""
    ledger: Ledger = field(default_factory=Ledger)
    last_step: int = -1
    cancelled_at_step: int | None = None


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


class Engine:
    """Step loop over ``forward``. Every request that `submit` accepts ends with exactly one last event.

    ``kv_bytes_per_token`` is what one token takes in all layers together.

    Raises:
        ConfigError: engine.kv_cache_bytes is less than one block.
    """

    def __init__(
        self,
        forward: Forward,
        tokenizer: Tokenizer | None,
        config: EngineConfig,
        kv_bytes_per_token: int,
        threads: int = 0,
        clock: Clock = time.monotonic,
    ) -> None:
        self._forward, self._tokenizer, self._clock, self._threads = forward, tokenizer, clock, threads
        self._block_bytes = max(1, kv_bytes_per_token) * config.block_size
        self._pool = BlockPool(num_blocks_of(config, kv_bytes_per_token), config.block_size, config.prefix_caching)
        self._max_kv_tokens = self._pool.num_blocks * config.block_size
        self._scheduler = Scheduler(config, self._pool, clock)
        self._lock = threading.Condition()
        self._live: dict[str, _Live] = {}
        self._by_sequence: dict[Scheduled, _Live] = {}
        self._cancelled: set[str] = set()
        self._deadlines: list[tuple[float, str]] = []  # a heap; may name requests that have ended
        self._outbox: list[tuple[Listener, TokenEvent]] = []  # the engine thread's own
        self._closed = False
        self._stats = EngineStats()
        self._spent = Ledger()
        self._progress_s = clock()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    # -- called from other threads -----------------------------------------------------------------------------------

    def submit(self, request: Request, listener: Listener) -> None:
        """Takes a request; its events go to ``listener``.

        Raises:
            InvalidArgument: the key-value cache could never hold prompt and answer.
            Overloaded: too many requests wait.
            Unavailable: the engine has been closed.
        """
        sequence = Scheduled(request)
        if sequence.max_tokens > self._max_kv_tokens:
            raise InvalidArgument(
                "max_new_tokens",
                request.stop.max_new_tokens,
                f"with the prompt that makes {sequence.max_tokens} tokens, and the key-value cache holds "
                f"{self._max_kv_tokens} (engine.kv_cache_bytes)",
            )
        text = TextStream(self._tokenizer, request.stop.stop_strings)
        live = _Live(request, listener, sequence, text, self._clock())
        with self._lock:
            if self._closed:
                raise Unavailable("the router is shutting down; retry elsewhere")
            self._scheduler.add(sequence)
            self._live[request.request_id] = live
            self._by_sequence[sequence] = live
            heapq.heappush(self._deadlines, (request.deadline.at_s, request.request_id))
            self._lock.notify()

    def cancel(self, request_id: str) -> None:
        """Frees the request before the next step. Unknown ids are ignored: it may just have ended."""
        with self._lock:
            live = self._live.get(request_id)
            if live is not None and live.cancelled_at_step is None:
                live.cancelled_at_step = self._stats.steps
                self._cancelled.add(request_id)
                self._lock.notify()

    def spent(self) -> dict[str, float]:
        """Seconds by stage of all steps so far, each step once."""
        with self._lock:
            return dict(self._spent.items())

    def stats(self) -> EngineStats:
        """A copy of the counters. The lock is held for a few reads only."""
        with self._lock:
            pool = self._pool
            return replace(
                self._stats,
                running=self._scheduler.num_running,
                waiting=self._scheduler.num_waiting,
                kv_used_bytes=pool.num_used * self._block_bytes,
                kv_cached_bytes=pool.num_cached * self._block_bytes,
                kv_blocks=pool.num_blocks,
                kv_blocks_used=pool.num_used,
                kv_blocks_free=pool.num_free,
                preemptions=self._scheduler.preemptions,
                prefix_hit_tokens=pool.hit_tokens,
                prompt_tokens=pool.asked_tokens,
            )

    def num_live(self) -> int:
        """Requests that have not ended."""
        with self._lock:
            return len(self._live)

    def progress_age_s(self) -> float:
        """Seconds since the thread last finished a step or had nothing to do."""
        with self._lock:
            return self._clock() - self._progress_s if self._live else 0.0

    def close(self) -> None:
        """Ends the thread; requests that still run fail with Unavailable."""
        with self._lock:
            self._closed = True
            self._lock.notify()
        self._thread.join(timeout=30)

    # -- the engine thread ---------------------------------------------------------------------------------------------

    def _run(self) -> None:
        if self._threads:
            torch.set_num_threads(self._threads)
        while not self._closed_and_told():
            with self._lock:
                started_s = self._progress_s = self._clock()
                again = self._closed or bool(self._cancelled)  # came while events were handed out
                shares = [] if again else self._scheduler.next_step()
                if shares:
                    self._stats.steps += 1
                    self._stats.max_batch = max(self._stats.max_batch, len(shares))
                    step = StepContext(self._stats.steps)
                    lives = [self._by_sequence[share.sequence] for share in shares]
                elif not again:
                    self._lock.wait(0.5)
            if shares:
                self._step(step, shares, lives, started_s)

    def _closed_and_told(self) -> bool:
        """Ends what was cancelled or has expired, all of it once the engine is closed, and hands out the events."""
        with self._lock:
            self._drop_cancelled_and_expired()
            closed = self._closed
            if closed:
                for live in list(self._live.values()):
                    self._end(live, error=Unavailable("the router is shutting down; retry elsewhere"))
        self._hand_out()
        return closed

    def _drop_cancelled_and_expired(self) -> None:
        for request_id in self._cancelled:
            live = self._live.get(request_id)
            if live is not None and live.cancelled_at_step is not None:
                late = self._stats.steps - live.cancelled_at_step
                self._stats.max_steps_after_cancel = max(self._stats.max_steps_after_cancel, late)
                self._end(live, error=Cancelled("the client left"))
        self._cancelled.clear()
        while self._deadlines:
            live = self._live.get(self._deadlines[0][1])
            if live is not None:
                if not live.request.deadline.expired():
                    break
                self._end(live, error=DeadlineExceeded("the deadline of the request has passed"))
            heapq.heappop(self._deadlines)
        if len(self._deadlines) > 2 * len(self._live) + 1000:  # most have ended long before their deadlines
            self._deadlines = [entry for entry in self._deadlines if entry[1] in self._live]
            heapq.heapify(self._deadlines)

    def _step(self, step: StepContext, shares: list[Share], lives: list[_Live], started_s: float) -> None:
        for live in lives:
            if live.last_step != step.step_id - 1:  # waited: for a place, for its turn, or to start over
                live.ledger.add(Stage.QUEUE, started_s - live.idle_s)
            live.last_step = step.step_id
        step.priority = Priority.DECODE if all(share.decoding for share in shares) else Priority.PREFILL
        chunks = [Chunk(share.ids, share.start, share.blocks) for share in shares]
        step.ledger.add(Stage.SCHEDULE, self._clock() - started_s)
        try:
            logits_NV = self._forward(chunks, step)
            chosen = self._sample(step, shares, lives, logits_NV)
            emit_s = self._clock()
            events = [
                self._advance(live, token, logits_NV[row]) if token is not None else None
                for row, (live, token) in enumerate(zip(lives, chosen, strict=True))
            ]
            ended_s = self._clock()
            step.ledger.add(Stage.EMIT, ended_s - emit_s)
        except Exception as exc:
            if isinstance(exc, ExpertMeshError):
                log.error("step %d failed: %s", step.step_id, exc)
                error = exc
            else:
                log.exception("step %d failed", step.step_id)
                error = InternalError("a step failed; see the router's log")
            with self._lock:
                for live in lives:
                    self._end(live, error=error)
            return
        with self._lock:
            self._scheduler.ran(shares)
            self._spent.absorb(step.ledger)
            for live, token, event in zip(lives, chosen, events, strict=True):
                live.ledger.absorb(step.ledger)
                live.idle_s = ended_s
                if token is None or event is None:
                    continue
                if event.finish is not None:
                    self._end(live, event=event)
                else:
                    self._scheduler.sampled(live.sequence, token.token)
                    self._outbox.append((live.listener, event))

    def _sample(
        self, step: StepContext, shares: list[Share], lives: list[_Live], logits_NV: torch.Tensor
    ) -> list[Sampled | None]:
        started_s = self._clock()
        chosen: list[Sampled | None] = []
        for share, live, logits_V in zip(shares, lives, logits_NV, strict=True):
            if not share.samples:
                chosen.append(None)
                continue
            chosen.append(sample(logits_V, live.request.sampling, share.sequence.tokens))
        step.ledger.add(Stage.SAMPLE, self._clock() - started_s)
        return chosen

    def _advance(self, live: _Live, sampled: Sampled, logits_V: torch.Tensor) -> TokenEvent:
        """The event of one more token; whether the sequence ends with it."""
        stop = live.request.stop
        finish: FinishReason | None = None
        text = ""
        if sampled.token in stop.stop_ids:
            finish, text = FinishReason.STOP_ID, live.text.finish()
        else:
            text, stopped = live.text.push(sampled.token)
            if stopped:
                finish = FinishReason.STOP_STRING
            elif live.sequence.num_generated + 1 >= stop.max_new_tokens:
                finish, text = FinishReason.LENGTH, text + live.text.finish()
        logits = logits_V.numpy().tobytes() if live.request.want_logits else b""
        return TokenEvent(text, sampled, logits, finish)

    def _end(self, live: _Live, event: TokenEvent | None = None, error: ExpertMeshError | None = None) -> None:
        self._live.pop(live.request.request_id, None)
        self._by_sequence.pop(live.sequence, None)
        self._scheduler.remove(live.sequence)
        if event is not None:
            self._stats.finished += 1
            last = TokenEvent(event.text, event.token, event.logits, event.finish, None, live.ledger)
        else:
            if isinstance(error, Cancelled):
                self._stats.cancelled += 1
            else:
                self._stats.failed += 1
            last = TokenEvent(error=error, ledger=live.ledger)
        self._outbox.append((live.listener, last))

    def _hand_out(self) -> None:
        for listener, event in self._outbox:
            # The listener's event loop may be gone when the process shuts down; nobody is left to be told then.
            with contextlib.suppress(RuntimeError):
                listener(event)
        self._outbox.clear()
