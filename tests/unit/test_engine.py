from __future__ import annotations

import queue
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import cast

import pytest
import torch

from cluster.core import Deadline, FinishReason, Request, SamplingParams, StopParams
from cluster.engine.engine import Engine
from cluster.engine.events import EngineStats, TokenEvent
from cluster.engine.text import Tokenizer
from cluster.errors import (
    Cancelled,
    ConfigError,
    DeadlineExceeded,
    InternalError,
    InvalidArgument,
    Overloaded,
    Unavailable,
)
from cluster.model.packed import Chunk
from cluster.routing.step import StepContext
from cluster.settings import EngineConfig
from cluster.telemetry.account import StepEvent
from cluster.telemetry.ledger import Stage
from cluster.telemetry.records import StepRecord
from cluster.telemetry.steps import StepDetail

V, SOON = 50, 10.0


class Model:
    """The next token is the last one plus one, or, ``by_history``, follows from all that the blocks hold of the
    sequence. ``gate`` holds steps back."""

    def __init__(self, by_history: bool = False, block_size: int = 16) -> None:
        self.by_history, self.size = by_history, block_size
        self.blocks: dict[int, list[int]] = defaultdict(lambda: [0] * block_size)
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
            end = chunk.start + len(chunk.ids)
            for position, token in enumerate(chunk.ids, chunk.start):
                self.blocks[chunk.blocks[position // self.size]][position % self.size] = token
            past = [self.blocks[chunk.blocks[i // self.size]][i % self.size] for i in range(end)]
            logits[row, (chunk.ids[-1] + 1) % V] = 10.0
            if self.by_history:
                logits[row] = torch.tensor([(sum(past) * 7 + end * 3 + i * 11) % 29 / 9 for i in range(V)])
        return logits


class Letters:
    """A tokenizer in which each token is a letter."""

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        return "".join(chr(97 + i % 26) for i in ids)


def engine(model: Model, **config: int) -> Engine:
    return Engine(model, None, EngineConfig(**config).sized(False), kv_bytes_per_token=1)


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
        assert last.account is not None
    stats = target.stats()
    assert (stats.max_batch, stats.finished, stats.running, stats.waiting) == (4, 4, 0, 0)
    target.close()


@pytest.mark.parametrize("broken", ["ran", "next_step"])
def test_an_error_between_two_steps_ends_what_runs_and_not_the_engine(
    broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Model()
    target = engine(model)
    own, failures = getattr(target._scheduler, broken), [RuntimeError("boom")] * 2

    def fails_twice(*given: object) -> object:
        if failures and target._live:
            raise failures.pop()
        return own(*given)

    monkeypatch.setattr(target._scheduler, broken, fails_twice)
    for first in (1, 2):
        assert isinstance(collect(ask(target, first)[1])[1].error, InternalError)
    assert collect(ask(target, 5)[1])[0] == [6, 7, 8]
    assert (target.stats().running, target.stats().waiting) == (0, 0)
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
    target = engine(Model(), kv_cache_bytes=47, block_size=8)
    with pytest.raises(InvalidArgument, match=r"max_new_tokens: got 40.*makes 41 tokens.*holds 40"):
        ask(target, 1, new=40)
    assert collect(ask(target, 1, new=39)[1])[0] == [i % V for i in range(2, 41)]
    target.close()


def test_a_cache_of_less_than_a_block_is_refused_at_start() -> None:
    with pytest.raises(ConfigError, match=r"engine\.kv_cache_bytes: got 15"):
        engine(Model(), kv_cache_bytes=15)


def generate(kv_cache_bytes: int, prefix_caching: bool) -> tuple[list[tuple[list[int], str]], EngineStats]:
    """Tokens and text of ten requests, half of them with a common prompt, that come all at once."""
    model = Model(by_history=True, block_size=4)
    model.gate = threading.Semaphore(0)
    config = EngineConfig(kv_cache_bytes=kv_cache_bytes, block_size=4, prefix_caching=prefix_caching).sized(False)
    target = Engine(model, cast(Tokenizer, Letters()), config, kv_bytes_per_token=1)
    heard: list[queue.Queue[TokenEvent]] = []
    for number in range(10):
        prompt = (*range(9), number) if number % 2 else (number, *range(number))
        sampling = SamplingParams(temperature=number % 3, seed=number, repetition_penalty=1.0 + 999 * (number % 2))
        stop = StopParams(20 + number, ("abc",))
        heard.append(queue.Queue())
        target.submit(Request(str(number), prompt, sampling, stop, Deadline(float("inf"))), heard[-1].put)
    model.gate.release(100_000)
    answers = []
    for events in heard:
        tokens, texts = [], []
        last = False
        while not last:
            event = events.get(timeout=SOON)
            assert event.token is not None
            tokens.append(event.token.token)
            texts.append(event.text)
            last = event.last
        answers.append((tokens, "".join(texts)))
        assert events.empty()
    stats = target.stats()
    target.close()
    return answers, stats


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_preempted_requests_get_the_same_tokens_and_text(prefix_caching: bool) -> None:
    wanted, roomy = generate(10_000, prefix_caching=False)
    answers, stats = generate(60, prefix_caching)
    assert answers == wanted
    for number in (3, 9):  # greedy, with a penalty that lets nothing come again that the sampler knows of
        tokens, _ = answers[number]
        assert len({*range(9), *tokens}) == 9 + len(tokens)
    assert roomy.preemptions == 0
    assert stats.preemptions > 0
    assert (stats.finished, stats.kv_blocks, stats.kv_blocks_used, stats.kv_used_bytes) == (10, 15, 0, 0)
    assert stats.kv_cached_bytes == 4 * (15 - stats.kv_blocks_free)
    assert (stats.kv_cached_bytes > 0) == prefix_caching


def test_a_prompt_that_came_before_is_not_computed_again() -> None:
    model = Model(by_history=True)
    target = engine(model)
    prompt = tuple(range(40))
    answers = []
    for name in ("a", "b"):
        events: queue.Queue[TokenEvent] = queue.Queue()
        target.submit(Request(name, prompt, SamplingParams(), StopParams(3), Deadline(float("inf"))), events.put)
        answers.append(collect(events)[0])
    assert answers[0] == answers[1]
    stats = target.stats()
    assert (stats.prompt_tokens, stats.prefix_hit_tokens, stats.kv_cached_bytes) == (80, 32, 32)
    target.close()


def test_what_a_failed_step_computed_is_not_taken_for_a_prefix() -> None:
    model = Model()
    target = engine(model, block_size=1)
    for model.fail in (ValueError("broken"), None, None):
        events: queue.Queue[TokenEvent] = queue.Queue()
        request = Request("r", tuple(range(5)), SamplingParams(), StopParams(1), Deadline(float("inf")))
        target.submit(request, events.put)
        assert collect(events)[1].last
    assert target.stats().prefix_hit_tokens == 4, "the third request's, from the second"
    target.close()


def held_back(model: Model, target: Engine, listeners: dict[str, Callable[[TokenEvent], None]]) -> None:
    """Submits a request for each listener so that all of them start in the same step."""
    model.gate = threading.Semaphore(0)
    first = ask(target, 40, new=1)
    assert model.waiting.wait(SOON)
    for name, listener in listeners.items():
        target.submit(Request(name, (1,), SamplingParams(), StopParams(3), Deadline(float("inf"))), listener)
    model.gate.release(100)
    collect(first[1])


def test_events_come_when_the_step_is_settled_and_nobody_has_to_wait_for_the_listener() -> None:
    model = Model()
    target = engine(model)
    seen: queue.Queue[EngineStats] = queue.Queue()

    def listen(event: TokenEvent) -> None:
        if event.last:
            other = threading.Thread(target=lambda: seen.put(target.stats()))
            other.start()
            other.join(SOON)

    held_back(model, target, {"a": listen, "b": listen})
    for _ in range(2):
        stats = seen.get(timeout=SOON)
        assert (stats.finished, stats.running, stats.kv_blocks_used) == (3, 0, 0)
    target.close()


def test_a_request_that_is_cancelled_by_a_listener_is_in_no_step_more() -> None:
    model = Model()
    target = engine(model)
    events: queue.Queue[TokenEvent] = queue.Queue()
    held_back(model, target, {"a": lambda _event: target.cancel("b"), "b": events.put})
    tokens, last = collect(events)
    assert len(tokens) == 1
    assert isinstance(last.error, Cancelled)
    assert target.stats().max_steps_after_cancel == 0
    target.close()


def test_deadlines_end_requests_whatever_their_order() -> None:
    clock = [0.0]
    model = Model()
    model.gate = threading.Semaphore(0)
    target = engine(model)
    deadlines = [9.0, 3.0, float("inf"), 5.0]
    heard = [ask(target, i, new=30, deadline=Deadline(at, lambda: clock[0])) for i, at in enumerate(deadlines)]
    assert model.waiting.wait(SOON)
    clock[0] = 6.0
    model.gate.release(1000)
    ends = [collect(events)[1] for _, events in heard]
    assert [isinstance(end.error, DeadlineExceeded) for end in ends] == [False, True, False, True]
    target.close()


class Watcher:
    """An observer that remembers."""

    def __init__(self) -> None:
        self.steps: list[StepRecord] = []

    def begin_step(self, asked: bool) -> StepDetail | None:
        return StepDetail(by_layer=True) if asked else None

    def step(self, record: StepRecord) -> None:
        self.steps.append(record)

    def request(self, record: object) -> None:
        raise AssertionError("requests are the front door's to tell of")


def test_every_step_is_told_of_even_one_that_fails() -> None:
    model, watcher = Model(), Watcher()

    def forward(chunks: Sequence[Chunk], step: StepContext) -> torch.Tensor:
        if model.fail is not None:
            step.ledger.wait(2, 1, Stage.FAILOVER, 0.5)
            step.events.append(StepEvent("failover", time.monotonic(), 0.5, group=2, layer=1, cause="planted"))
        return model(chunks, step)

    target = Engine(forward, None, EngineConfig().sized(False), 1, observer=watcher, detail_steps=1)
    _, last = collect(ask(target, 5, new=3, trace_detail=True)[1])
    assert last.account is not None
    assert [record.detail is not None for record in watcher.steps] == [True, False, False]
    assert last.account.step_links == [watcher.steps[0].detail.trace_id]  # type: ignore[union-attr]
    model.fail = Unavailable("planted")
    _, last = collect(ask(target, 6)[1])
    failed = watcher.steps[-1]
    assert [event.group for event in failed.events] == [2]
    assert failed.after.since(failed.before).seconds(Stage.FAILOVER) == pytest.approx(0.5)
    assert last.account is not None
    assert [event.kind for event in last.account.events] == ["failover"]
    assert last.account.prefill.seconds(Stage.FAILOVER) == pytest.approx(0.5)
    target.close()
