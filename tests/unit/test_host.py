from __future__ import annotations

import os
import threading
import time

import pytest
import torch

from cluster.core import Deadline, LayerCall, Priority
from cluster.errors import DeadlineExceeded, InternalError, Overloaded, Unavailable
from cluster.experts.host import ExpertHost
from cluster.transport.base import LayerRows, PendingReply

SOON = 10.0


def rows(tag: float = 0.0) -> LayerRows:
    return LayerRows.of(torch.full((1, 4), tag), [0], [0], 1.0)


class Gate:
    """A compute function that waits until it is opened, and notes the order of calls."""

    def __init__(self) -> None:
        self.entered, self.open, self.order = threading.Event(), threading.Event(), []

    def __call__(self, layer: int, given: LayerRows) -> torch.Tensor:
        self.order.append(float(given.hidden_TH[0, 0]))
        self.entered.set()
        assert self.open.wait(SOON)
        if layer == 9:
            raise ValueError("boom")
        return given.hidden_TH + 1


def submit(host: ExpertHost, tag: float, priority: Priority = Priority.DECODE, **fields: int) -> PendingReply:
    call = LayerCall(int(tag), 1, fields.pop("layer", 0), 1, 1, priority, **fields)
    pending = PendingReply(0, call)
    host.submit(call, rows(tag), pending)
    return pending


def test_decode_goes_before_prefill_and_order_is_kept_within_each() -> None:
    gate = Gate()
    host = ExpertHost(gate)
    first = submit(host, 0)
    assert gate.entered.wait(SOON)
    waiting = [submit(host, tag, Priority.PREFILL) for tag in (1, 2)] + [submit(host, tag) for tag in (3, 4)]
    gate.open.set()
    for pending in [first, *waiting]:
        pending.wait(Deadline.after(SOON))
    assert gate.order == [0, 3, 4, 1, 2]
    assert host.calls == 5
    host.close()


def test_a_full_queue_a_cancelled_call_a_late_call_and_a_failure_all_get_typed_answers() -> None:
    gate = Gate()
    clock = [0.0]
    host = ExpertHost(gate, max_queued_bytes=40, clock=lambda: clock[0])
    running = submit(host, 0)
    assert gate.entered.wait(SOON)
    late, cancelled = submit(host, 1, timeout_ms=5), submit(host, 2)
    with pytest.raises(Overloaded):
        submit(host, 3).wait(Deadline.after(SOON))
    host.cancel(cancelled)
    clock[0] = 1.0
    gate.open.set()
    assert float(running.wait(Deadline.after(SOON)).partial_TH[0, 0]) == 1
    with pytest.raises(DeadlineExceeded, match="5 ms"):
        late.wait(Deadline.after(SOON))
    with pytest.raises(InternalError, match="ValueError"):
        submit(host, 5, layer=9).wait(Deadline.after(SOON))
    assert 2 not in gate.order
    assert 1 not in gate.order
    assert submit(host, 6).wait(Deadline.after(SOON)), "the thread goes on after a failure"
    host.close()
    with pytest.raises(Unavailable, match="shutting down"):
        submit(host, 7).wait(Deadline.after(SOON))


def test_progress_age_grows_while_a_call_runs_or_waits() -> None:
    gate = Gate()
    clock = [0.0]
    host = ExpertHost(gate, clock=lambda: clock[0])
    submit(host, 0)
    assert gate.entered.wait(SOON)
    clock[0] = 5.0
    assert host.progress_age_s() == 5.0, "a call that never ends is no progress"
    last = submit(host, 1)
    assert host.progress_age_s() >= 5.0
    gate.open.set()
    last.wait(Deadline.after(SOON))
    assert host.progress_age_s() == 0.0
    host.close()


@pytest.mark.skipif(not hasattr(os, "SCHED_BATCH"), reason="no such scheduling here")
def test_the_compute_thread_does_not_push_away_who_wakes_it() -> None:
    policies = []

    def compute(_layer: int, given: LayerRows) -> torch.Tensor:
        policies.append(os.sched_getscheduler(0))
        return given.hidden_TH

    host = ExpertHost(compute)
    submit(host, 0).wait(Deadline.after(SOON))
    host.close()
    assert policies == [os.SCHED_BATCH]
    assert os.sched_getscheduler(0) != os.SCHED_BATCH, "and nobody else's"


class Lender:
    """A thread that is lent: computes in the thread that calls `work` here."""

    def __init__(self) -> None:
        self.asked = 0

    def __call__(self) -> None:
        self.asked += 1


def lent(host: ExpertHost, tag: float, lend: Lender, priority: Priority = Priority.DECODE) -> PendingReply:
    pending = PendingReply(0, LayerCall(int(tag), 1, 0, 1, 1, priority))
    host.submit(pending.call, rows(tag), pending, lend)
    return pending


def when_idle(host: ExpertHost) -> None:
    ends_s = time.monotonic() + SOON
    while not host._asleep:
        assert time.monotonic() < ends_s
        time.sleep(0.001)


def test_a_decode_call_that_finds_the_group_idle_is_computed_by_the_thread_that_is_lent() -> None:
    threads = []

    def compute(_layer: int, given: LayerRows) -> torch.Tensor:
        threads.append(threading.get_ident())
        return given.hidden_TH + 1

    host, lend = ExpertHost(compute, threads=1), Lender()
    when_idle(host)
    pending = lent(host, 3, lend)
    assert not pending.done()
    host.work()
    assert float(pending.wait(Deadline.after(SOON)).partial_TH[0, 0]) == 4
    assert (threads, lend.asked, host.calls) == ([threading.get_ident()], 1, 1)
    assert host.busy_s > 0
    host.work()
    assert host.calls == 1, "nothing was left to do"
    when_idle(host)
    lent(host, 1, lend, Priority.PREFILL).wait(Deadline.after(SOON))
    assert lend.asked == 1
    assert threads[-1] != threading.get_ident()
    host.close()


def test_a_lent_thread_is_not_asked_while_a_call_runs_or_weights_may_have_to_be_waited_for() -> None:
    gate, lend = Gate(), Lender()
    host = ExpertHost(gate, threads=1)
    when_idle(host)
    mine = lent(host, 1, lend)
    computing = threading.Thread(target=host.work)
    computing.start()
    assert gate.entered.wait(SOON)
    other = lent(host, 2, lend)
    host.work()
    assert lend.asked == 1
    assert not other.done(), "one thread computes at a time"
    gate.open.set()
    for pending in (mine, other):
        pending.wait(Deadline.after(SOON))
    computing.join(SOON)
    host.close()
    host = ExpertHost(gate, threads=1, on_order=lambda _order: None)
    when_idle(host)
    lent(host, 3, lend).wait(Deadline.after(SOON))
    assert lend.asked == 1
    host.close()


def test_a_call_whose_lent_thread_never_comes_is_computed_all_the_same() -> None:
    gate = Gate()
    gate.open.set()
    host = ExpertHost(gate, threads=1)
    when_idle(host)
    lost = lent(host, 1, Lender())
    next_one = lent(host, 2, Lender())
    for pending in (lost, next_one):
        pending.wait(Deadline.after(SOON))
    assert gate.order == [1, 2]
    when_idle(host)
    lent(host, 3, Lender()).wait(Deadline.after(SOON))
    host.close()


@pytest.mark.skipif(not hasattr(os, "SCHED_BATCH"), reason="no such scheduling here")
def test_a_lent_thread_does_not_push_away_who_wakes_it_and_keeps_its_threads() -> None:
    seen = []

    def compute(_layer: int, given: LayerRows) -> torch.Tensor:
        seen.append((os.sched_getscheduler(0), torch.get_num_threads()))
        return given.hidden_TH

    host = ExpertHost(compute, threads=1)
    when_idle(host)
    pending = lent(host, 1, Lender())
    worker = threading.Thread(target=host.work)
    worker.start()
    worker.join(SOON)
    assert pending.done()
    assert seen == [(os.SCHED_BATCH, 1)]
    host.close()


def test_a_lent_thread_leaves_other_calls_to_the_compute_thread_and_wakes_it() -> None:
    gate = Gate()
    gate.open.set()
    host = ExpertHost(gate, threads=1)
    when_idle(host)
    with host._computes:  # another lent thread, which has had its call and is about to end
        mine = lent(host, 1, Lender())
        host.work()
        assert not host._asleep
        assert not mine.done()
    mine.wait(Deadline.after(SOON))
    when_idle(host)
    with host._computes:
        later = submit(host, 2, Priority.PREFILL)
        host._compute_next(lent=True)
        assert not later.done()
    later.wait(Deadline.after(SOON))
    host.close()
