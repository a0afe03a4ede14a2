from __future__ import annotations

import queue
import threading
import time
from collections.abc import Sequence

import pytest
import torch

from cluster.config import EngineConfig
from cluster.core import Deadline, FinishReason, Request, SamplingParams, StopParams
from cluster.engine.engine import Engine, TokenEvent
from cluster.errors import Cancelled, DeadlineExceeded, InternalError, InvalidArgument, Overloaded, Unavailable
from cluster.model.packed import Chunk
from cluster.routing.dispatcher import StepContext

V, SOON = 50, 10.0


class Model:
    """The next token is the last one plus one; logits depend on the sequence alone. ``gate`` holds steps back."""

    def __init__(self) -> None:
        self.steps: list[list[int]] = []
        self.gate: threading.Semaphore | None = None
        self.waiting = threading.Event()
        self.fail: Exception | None = None

    def __call__(self, chunks: Sequence[Chunk], step: StepContext) -> torch.Tensor:
        if self.gate is not None:
            self.waiting.set()
            assert self.gate.acquire(timeout=SOON)
        if self.fail is not None:
            raise self.fail
        self.steps.append([chunk.ids[-1] for chunk in chunks])
        logits = torch.zeros(len(chunks), V)
        for row, chunk in enumerate(chunks):
            chunk.kv.length += len(chunk.ids)
            logits[row, (chunk.ids[-1] + 1) % V] = 10.0
        return logits


def engine(model: Model, **config: int) -> Engine:
    return Engine(model, None, EngineConfig(**config), kv_bytes_per_token=1)


def ask(target: Engine, first: int, new: int = 3, **fields: object) -> tuple[str, queue.Queue[TokenEvent]]:
    stop = StopParams(new, (), frozenset(fields.pop("stop_ids", ())))  # type: ignore[call-overload]
    deadline = fields.pop("deadline", Deadline(float("inf")))
    request = Request(f"r{first}", (first,), SamplingParams(), stop, deadline, **fields)  # type: ignore[arg-type]
    events: queue.Queue[TokenEvent] = queue.Queue()
    target.submit(request, events.put)
    return request.request_id, events


def collect(events: queue.Queue[TokenEvent]) -> tuple[list[int], TokenEvent]:
    tokens = []
    while True:
        event = events.get(timeout=SOON)
        if event.token is not None:
            tokens.append(event.token.token)
        if event.last:
            return tokens, event


def test_requests_share_steps_and_each_gets_its_own_tokens() -> None:
    model = Model()
    model.gate = threading.Semaphore(0)
    target = engine(model)
    first = ask(target, 1)
    assert model.waiting.wait(SOON)
    others = [ask(target, start, new=4) for start in (10, 20, 30)]
    for _ in range(20):
        model.gate.release()
    assert collect(first[1])[0] == [2, 3, 4]
    for start, (_, events) in zip((10, 20, 30), others, strict=True):
        tokens, last = collect(events)
        assert tokens == [start + i for i in (1, 2, 3, 4)]
        assert last.finish is FinishReason.LENGTH
        assert last.ledger is not None
    stats = target.stats()
    assert (stats.max_batch, stats.finished, stats.running, stats.waiting) == (4, 4, 0, 0)
    target.close()


def test_a_stop_id_ends_the_sequence_and_is_its_last_token() -> None:
    target = engine(Model())
    tokens, last = collect(ask(target, 5, new=20, stop_ids=(8,))[1])
    assert tokens == [6, 7, 8]
    assert last.finish is FinishReason.STOP_ID
    target.close()


def test_a_cancelled_request_is_in_no_step_after_the_one_that_runs() -> None:
    model = Model()
    model.gate = threading.Semaphore(0)
    target = engine(model)
    name, events = ask(target, 1, new=1000)
    other = ask(target, 20, new=8)
    for _ in range(3):
        model.gate.release()
    while len(model.steps) < 3:
        time.sleep(0.001)
    target.cancel(name)
    target.cancel(name)
    done = len(model.steps)
    model.gate.release(1000)
    collected = collect(other[1])[0]
    assert collected == list(range(21, 29))
    assert isinstance(collect(events)[1].error, Cancelled)
    # Step `done` + 1 may have been running already when the cancellation came.
    assert all(len(step) == 1 for step in model.steps[done + 1 :])
    assert target.stats().max_steps_after_cancel <= 1
    assert target.num_live() == 0
    target.cancel("unknown")
    target.close()


def test_a_request_past_its_deadline_ends_with_deadline_exceeded() -> None:
    clock = [0.0]
    model = Model()
    model.gate = threading.Semaphore(1)
    target = engine(model)
    _, events = ask(target, 1, new=1000, deadline=Deadline(5.0, lambda: clock[0]))
    assert events.get(timeout=SOON).token is not None
    clock[0] = 6.0
    for _ in range(3):
        model.gate.release()
    assert isinstance(collect(events)[1].error, DeadlineExceeded)
    target.close()


def test_a_failed_step_ends_its_requests_and_not_the_engine() -> None:
    model = Model()
    target = engine(model)
    model.fail = Unavailable("experts 3 of MoE layer 0 did not answer")
    error = collect(ask(target, 1)[1])[1].error
    assert isinstance(error, Unavailable)
    assert "experts 3" in str(error)
    model.fail = ValueError("secret detail")
    error = collect(ask(target, 2)[1])[1].error
    assert isinstance(error, InternalError)
    assert "secret" not in str(error)
    model.fail = None
    assert collect(ask(target, 3)[1])[0] == [4, 5, 6]
    assert target.stats().failed == 2
    target.close()


def test_over_the_bound_is_refused_at_once() -> None:
    model = Model()
    model.gate = threading.Semaphore(0)
    target = engine(model, max_running=1, max_waiting=1)
    ask(target, 1)
    assert model.waiting.wait(SOON)
    ask(target, 2)
    with pytest.raises(Overloaded):
        ask(target, 3)
    model.gate.release(1000)
    target.close()


def test_close_ends_every_request_with_an_answer() -> None:
    model = Model()
    model.gate = threading.Semaphore(0)
    target = engine(model)
    _, events = ask(target, 1, new=1000)
    assert model.waiting.wait(SOON)
    closing = threading.Thread(target=target.close)
    closing.start()
    time.sleep(0.05)
    model.gate.release(1000)
    closing.join(SOON)
    assert isinstance(collect(events)[1].error, Unavailable)
    with pytest.raises(Unavailable):
        ask(target, 2)


def test_what_the_cache_can_never_hold_is_refused_at_once() -> None:
    target = engine(Model(), kv_cache_bytes=40)
    with pytest.raises(InvalidArgument, match=r"max_new_tokens: got 40.*makes 41 tokens.*holds 40"):
        ask(target, 1, new=40)
    assert collect(ask(target, 1, new=39)[1])[0] == [i % V for i in range(2, 41)]
    target.close()
