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
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from cluster.core import Clock, Priority, Request
from cluster.engine.blocks import BlockPool, num_blocks_of
from cluster.engine.colds import ColdCosts
from cluster.engine.events import EngineStats, Listener, TokenEvent
from cluster.engine.live import Live
from cluster.engine.sampler import Sampled, sample
from cluster.engine.scheduler import Scheduled, Scheduler, Share
from cluster.engine.text import TextStream, Tokenizer
from cluster.errors import Cancelled, DeadlineExceeded, ExpertMeshError, InternalError, InvalidArgument, Unavailable
from cluster.model.packed import Chunk
from cluster.routing.step import StepContext
from cluster.settings import EngineConfig
from cluster.telemetry.account import RequestAccount, StepEvent
from cluster.telemetry.gaps import GapCounts
from cluster.telemetry.ledger import Ledger, Stage
from cluster.telemetry.records import Observer, SpanRef, StepRecord
from cluster.telemetry.steps import StepDetail

log = logging.getLogger(__name__)

NOTED_EVENTS = 4
"""Of a step, that its requests are told of one by one: a cold store has some in every layer."""

Forward = Callable[[Sequence[Chunk], StepContext], torch.Tensor]


class Engine:
    """Step loop over ``forward``. Every request that `submit` accepts ends with exactly one last event.

    ``kv_bytes_per_token`` is what one token takes in all layers together. ``observer`` is told of every step;
    the first ``detail_steps`` of a request that wants it are timed layer by layer. ``colds`` knows what prompts will
    make groups load.

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
        observer: Observer | None = None,
        detail_steps: int = 8,
        colds: ColdCosts | None = None,
    ) -> None:
        self._forward, self._tokenizer, self._clock, self._threads = forward, tokenizer, clock, threads
        self._observer, self._detail_steps = observer, detail_steps
        self._block_bytes = max(1, kv_bytes_per_token) * config.block_size
        self._pool = BlockPool(num_blocks_of(config, kv_bytes_per_token), config.block_size, config.prefix_caching)
        self._max_kv_tokens = self._pool.num_blocks * config.block_size
        self._scheduler = Scheduler(config, self._pool, clock, colds)
        self._colds = colds
        self._fresh: deque[Scheduled] = deque()
        self._lock = threading.Condition()
        self._live: dict[str, Live] = {}
        self._by_sequence: dict[Scheduled, Live] = {}
        self._cancelled: set[str] = set()
        self._deadlines: list[tuple[float, str]] = []  # a heap; may name requests that have ended
        self._outbox: list[tuple[Listener, TokenEvent]] = []  # the engine thread's own
        self._closed = False
        self._stats = EngineStats()
        self.gaps = GapCounts()
        self._ledger = Ledger()
        self._previous: list[Live] = []  # in the step before
        self._ended_s = self._settled_s = self._told_s = clock()
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
        for token in request.received_ids:  # their text has been sent
            text.push(token)
        live = Live(request, listener, sequence, text, RequestAccount(self._clock()))
        with self._lock:
            if self._closed:
                raise Unavailable("the router is shutting down; retry elsewhere")
            self._scheduler.add(sequence)
            self._fresh.append(sequence)
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
        return dict(self._ledger.copy().items())

    def totals(self) -> Ledger:
        """A copy of the ledger of all steps so far, without layers."""
        return self._ledger.brief()

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
        going = True
        while going:
            try:
                going = self._turn()
            except Exception:
                log.exception("the engine failed between two steps")
                going = self._end_all(InternalError("the engine failed; see the router's log"))

    def _turn(self) -> bool:
        """One step, or a wait for something to do; False once the engine is closed."""
        if self._closed_and_told():
            return False
        self._foresee()
        with self._lock:
            started_s = self._progress_s = self._clock()
            again = self._closed or bool(self._cancelled)  # came while events were handed out
            shares = [] if again else self._scheduler.next_step()
            if shares:
                self._stats.steps += 1
                self._stats.max_batch = max(self._stats.max_batch, len(shares))
                step = StepContext(self._stats.steps, ledger=self._ledger)
                lives = [self._by_sequence[share.sequence] for share in shares]
            elif not again:
                self._lock.wait(0.5)
        if shares:
            self._step(step, shares, lives, started_s)
        elif not again:
            self._leave_all()
        return True

    def _end_all(self, error: ExpertMeshError) -> bool:
        """All requests end with this; False if the engine is closed."""
        with self._lock:
            for live in list(self._live.values()):
                self._end(live, error=error)
            return not self._closed

    def _foresee(self) -> None:
        """What new prompts will want. Not under the lock: it asks a gate."""
        while self._fresh:
            sequence = self._fresh.popleft()
            if self._colds is not None:
                sequence.need = self._colds.need(sequence.request.prompt_ids)

    def _leave_all(self) -> None:
        """Nothing follows the last step at once."""
        for live in self._previous:
            live.account.leave(self._ledger, self._ended_s)
        self._previous = []

    def _closed_and_told(self) -> bool:
        """Ends what was cancelled or has expired, all of it once the engine is closed, and hands out the events."""
        with self._lock:
            self._drop_cancelled_and_expired()
            if closed := self._closed:
                self._end_all(Unavailable("the router is shutting down; retry elsewhere"))
        self._settled_s = self._clock()
        self._hand_out()
        self._told_s = self._clock()
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

    def _step(self, step: StepContext, shares: list[Share], lives: list[Live], started_s: float) -> None:
        self._enter(lives, started_s)
        observer = self._observer
        before = self._ledger.brief() if observer is not None else self._ledger
        trace: StepDetail | None = None
        if observer is not None:
            trace = observer.begin_step(any(self._wants_detail(live) for live in lives))
            step.detail = trace if trace is not None and trace.by_layer else None
        step.priority = Priority.DECODE if all(share.decoding for share in shares) else Priority.PREFILL
        chunks = [Chunk(share.ids, share.start, share.blocks) for share in shares]
        step.ledger.add(Stage.SCHEDULE, self._clock() - started_s)
        try:
            logits_NV = self._forward(chunks, step)
            chosen = self._sample(step, shares, lives, logits_NV)
            emit_s = self._clock()
            events = [
                live.next_event(token, logits_NV[row]) if token is not None else None
                for row, (live, token) in enumerate(zip(lives, chosen, strict=True))
            ]
            ended_s = self._clock()
            step.ledger.add(Stage.EMIT, ended_s - emit_s)
        except Exception as exc:
            self._ended_s = self._clock()
            self._note(step.events)
            if observer is not None:
                observer.step(self._record(step, trace, shares, lives, started_s, before))
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
        self._ended_s = ended_s
        for live in lives if step.missing else ():
            live.miss(step.missing)
        self._note(step.events)
        if observer is not None:
            observer.step(self._record(step, trace, shares, lives, started_s, before))
        with self._lock:
            self._scheduler.ran(shares, ended_s - started_s)
            for live, token, event in zip(lives, chosen, events, strict=True):
                if token is not None:
                    if live.account.tokens:
                        self.gaps.add(ended_s - live.account.tokens[-1])
                    live.account.token(self._ledger, ended_s)
                if token is None or event is None:
                    continue
                if event.finish is not None:
                    self._end(live, event=event)
                else:
                    self._scheduler.sampled(live.sequence, token.token)
                    self._outbox.append((live.listener, event))

    def _enter(self, lives: list[Live], started_s: float) -> None:
        """Books the time since the last step, for those who are in both, and lets the others leave or enter."""
        now = set(lives)
        for live in self._previous:
            if live not in now:
                live.account.leave(self._ledger, self._ended_s)
        if self._previous:
            self._ledger.add(Stage.SCHEDULE, self._settled_s - self._ended_s + started_s - self._told_s)
            self._ledger.add(Stage.EMIT, self._told_s - self._settled_s)
        for live in lives:
            account = live.account
            if not account.inside:
                account.enter(self._ledger, started_s)
            account.steps += 1
        self._previous = lives

    def _note(self, events: Sequence[StepEvent]) -> None:
        """Tells all requests of what held this step up: those in it, and those that waited behind it."""
        if not events:
            return
        worst = heapq.nlargest(NOTED_EVENTS, events, key=lambda event: event.seconds)
        worst.sort(key=lambda event: event.start_s)
        with self._lock:
            for live in self._live.values():
                for event in worst:
                    live.account.note(event)

    def _wants_detail(self, live: Live) -> bool:
        return live.request.trace_detail and live.account.steps <= self._detail_steps

    def _record(
        self,
        step: StepContext,
        trace: StepDetail | None,
        shares: list[Share],
        lives: list[Live],
        started_s: float,
        before: Ledger,
    ) -> StepRecord:
        members: list[SpanRef] = []
        if trace is not None:
            for live in lives:
                members.append(SpanRef(live.request.trace_id, live.request.span_id))
                if trace.by_layer and self._wants_detail(live):
                    live.account.step_links.append(trace.trace_id)
        return StepRecord(
            step.step_id,
            started_s,
            self._ended_s,
            len(lives),
            sum(len(share.ids) for share in shares if not share.decoding),
            sum(share.decoding for share in shares),
            before,
            self._ledger.brief(),
            members,
            tuple(step.events),
            trace,
        )

    def _sample(
        self, step: StepContext, shares: list[Share], lives: list[Live], logits_NV: torch.Tensor
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

    def _end(self, live: Live, event: TokenEvent | None = None, error: ExpertMeshError | None = None) -> None:
        self._live.pop(live.request.request_id, None)
        self._by_sequence.pop(live.sequence, None)
        self._scheduler.remove(live.sequence)
        live.account.end(self._ledger, self._ended_s if live.account.inside else self._clock())
        live.close()
        if event is not None:
            self._stats.finished += 1
            last = replace(event, account=live.account)
        else:
            if isinstance(error, Cancelled):
                self._stats.cancelled += 1
            else:
                self._stats.failed += 1
            last = TokenEvent(error=error, account=live.account)
        self._outbox.append((live.listener, last))

    def _hand_out(self) -> None:
        for listener, event in self._outbox:
            # The listener's event loop may be gone when the process shuts down; nobody is left to be told then.
            with contextlib.suppress(RuntimeError):
                listener(event)
        self._outbox.clear()
