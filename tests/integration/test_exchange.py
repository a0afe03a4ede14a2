"""Layers sent and answered by an exchange over real links: the same sums as call by call, whatever fails."""

from __future__ import annotations

import contextlib
import gc
import random
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch

from cluster.core import Deadline, LayerCall, Order, Priority
from cluster.errors import ExpertMeshError, InternalError, MissingExperts, Overloaded
from cluster.routing import exchange as exchanges
from cluster.routing.dispatcher import Dispatcher
from cluster.routing.step import StepContext
from cluster.telemetry.ledger import Stage
from cluster.transport.base import LayerRows, PendingReply
from cluster.transport.shm import ShmTransport
from tests.shm_world import SOON, Group, ShmWorld, right, trust_again
from tests.unit.test_dispatcher import batch, compute, wanted


@pytest.fixture
def submitted(monkeypatch: pytest.MonkeyPatch) -> list[LayerCall]:
    """Calls that were sent one by one."""
    calls: list[LayerCall] = []
    submit = ShmTransport.submit

    def counted(self: ShmTransport, call: LayerCall, rows: LayerRows, deadline: Deadline) -> PendingReply:
        calls.append(call)
        return submit(self, call, rows, deadline)

    monkeypatch.setattr(ShmTransport, "submit", counted)
    return calls


@pytest.fixture
def world_of() -> Iterator[Callable[..., ShmWorld]]:
    with contextlib.ExitStack() as stack:

        def make(*args: int, **options: int) -> ShmWorld:
            world = ShmWorld(*args, **options)
            stack.callback(world.fabric.close)
            for group in world.groups.values():
                stack.callback(group.close)
            return world

        yield make


Make = Callable[..., ShmWorld]


@pytest.mark.parametrize("priority", [Priority.DECODE, Priority.PREFILL])
@pytest.mark.parametrize("copies", [1, 2])
@pytest.mark.parametrize("num_groups", [1, 2, 5])
def test_the_sum_is_right_and_each_group_is_asked_once(
    num_groups: int, copies: int, priority: Priority, world_of: Make, submitted: list[LayerCall]
) -> None:
    world = world_of(num_groups, copies=min(copies, num_groups))
    dispatcher = world.dispatcher()
    for number in range(12):
        given = batch(random.randint(1, 9))
        world.asked.clear()
        got = dispatcher(StepContext(number, priority), 0, *given)
        assert torch.allclose(got, wanted(*given), atol=1e-5)
        groups = [group for group, *_ in world.asked]
        assert len(groups) == len(set(groups))
        assert sum(pairs for *_, pairs in world.asked) == given[1].numel()
    assert not submitted, "every layer was exchanged"


def test_rows_of_a_prefill_are_exchanged_too_up_to_a_limit(
    world_of: Make, submitted: list[LayerCall], monkeypatch: pytest.MonkeyPatch
) -> None:
    world = world_of(3, copies=2)
    dispatcher, given = world.dispatcher(), batch(11_000)
    got = dispatcher(StepContext(1, Priority.PREFILL), 0, *given)
    assert torch.allclose(got, wanted(*given), atol=1e-5)
    assert not submitted
    monkeypatch.setattr(exchanges, "MANY", 8 * given[0].shape[1])
    right(world, dispatcher, StepContext(2, Priority.PREFILL), 8)
    assert not submitted
    right(world, dispatcher, StepContext(3, Priority.PREFILL), 9)
    assert submitted


def test_the_result_does_not_depend_on_who_answers_first(world_of: Make) -> None:
    given, results = batch(9), []
    for late in (0, 1, 2):
        world = world_of(3)
        world.groups[late].open.clear()
        threading.Timer(0.05, world.groups[late].open.set).start()
        results.append(world.dispatcher()(StepContext(1), 0, *given))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_a_group_without_pairs_hears_nothing(world_of: Make) -> None:
    world, given = world_of(3), batch(2)
    held = world.infos[1].holdings[0]
    given[1][:] = torch.tensor(held[: given[1].shape[1]])
    assert torch.allclose(world.dispatcher()(StepContext(1), 0, *given), wanted(*given), atol=1e-5)
    assert {group for group, *_ in world.asked} == {1}


@pytest.mark.parametrize("error", [lambda: MissingExperts(1, 0, [3]), lambda: Overloaded("much to do")])
def test_what_a_group_refuses_is_sent_again(error: Callable[[], ExpertMeshError], world_of: Make) -> None:
    world = world_of(2, copies=2)
    dispatcher = world.dispatcher()
    for _ in range(3):
        world.groups[1].errors = [error()]
        right(world, dispatcher, StepContext(1), 8)
    assert world.caller.resent_calls >= 3


def test_a_group_that_cannot_compute_fails_the_layer_and_the_next_is_right(world_of: Make) -> None:
    world = world_of(2)
    dispatcher = world.dispatcher()
    world.groups[0].errors = [InternalError("boom")]
    with pytest.raises(InternalError, match="boom"):
        dispatcher(StepContext(1), 0, *batch(8))
    for number in range(5):
        right(world, dispatcher, StepContext(number), 8)


@pytest.mark.parametrize("copies", [1, 2])
def test_a_link_that_ends_in_the_middle_leaves_the_result_right(copies: int, world_of: Make) -> None:
    world = world_of(2, copies=copies)
    dispatcher = world.dispatcher(group_wait_s=SOON)
    for _ in range(3):
        group = world.groups[1]
        group.entered.clear()
        group.open.clear()

        def cut(group: Group = group) -> None:
            group.entered.wait(SOON)
            group.server.drop_links()
            group.open.set()

        cutter = threading.Thread(target=cut)
        cutter.start()
        right(world, dispatcher, StepContext(1), 8)
        cutter.join()
        world.fabric.link(1)
        trust_again(world)
        gc.collect()
        assert world.link(0).seats.num_taken() <= 1, "seats of exchanges with the old link are given back"
    assert world.caller.resent_calls > 0


def test_late_answers_do_not_touch_what_comes_after_them(world_of: Make, submitted: list[LayerCall]) -> None:
    """The memory of a call that nobody waits for any more is its own until the group has answered."""
    world = world_of(2, copies=2)
    dispatcher = world.dispatcher(call_timeout_s=0.2)
    right(world, dispatcher, StepContext(0), 8)
    world.groups[1].open.clear()
    right(world, dispatcher, StepContext(1), 8)
    assert world.fabric.suspects() == [1]
    assert submitted, "the other one was asked"
    trust_again(world)
    timer = threading.Timer(0.05, world.groups[1].open.set)
    timer.start()
    for number in range(100):
        right(world, dispatcher, StepContext(number), 8)
        trust_again(world)
    timer.join()
    gc.collect()
    assert world.link(1).seats.num_taken() == 1, "that of the exchange that is kept"
    assert len(world.groups[1].server._peers) == 1, "the link is the same"


def test_while_somebody_reads_calls_go_one_by_one(world_of: Make, submitted: list[LayerCall]) -> None:
    world = world_of(2)
    dispatcher = world.dispatcher()
    right(world, dispatcher, StepContext(0), 4)
    assert not submitted
    assert world.link(1).enter()
    threading.Timer(0.05, world.link(1).leave).start()
    right(world, dispatcher, StepContext(1), 4)
    assert len(submitted) == 2
    right(world, dispatcher, StepContext(2), 4)
    assert len(submitted) == 2


def test_an_answer_to_somebody_else_reaches_them(world_of: Make) -> None:
    world = world_of(2)
    dispatcher = world.dispatcher()
    for number in range(5):
        hidden_TH, *_ = given = batch(3)
        rows = LayerRows.of(hidden_TH[:1], [0], [world.infos[0].holdings[0][0]], 1.0)
        probe = world.link(0).submit(LayerCall((1 << 62) + number, 0, 0, 0, 0), rows, Deadline.after(SOON))
        assert torch.allclose(dispatcher(StepContext(1), 0, *given), wanted(*given), atol=1e-5)
        assert torch.equal(probe.wait(Deadline.after(SOON)).partial_TH, compute(rows))


def test_a_socket_that_takes_no_more_is_waited_for(world_of: Make) -> None:
    world = world_of(2)
    dispatcher, link, group = world.dispatcher(), world.link(1), world.groups[1]
    right(world, dispatcher, StepContext(0), 4)
    group.entered.clear()
    group.open.clear()
    rows = LayerRows.of(torch.zeros(1, 6), [0], [world.infos[1].holdings[0][0]], 0.0)
    stuck = link.submit(LayerCall(1 << 62, 0, 0, 0, 0), rows, Deadline.after(SOON))
    assert group.entered.wait(SOON)
    with contextlib.suppress(BlockingIOError):
        while True:
            link._socket.send(b"\4" + bytes(8), 0x40)  # cancels call 0, of which nobody knows
    threading.Timer(0.1, group.open.set).start()
    right(world, dispatcher, StepContext(1), 4)
    assert stuck.wait(Deadline.after(SOON)).partial_TH.shape == (1, 6)
    right(world, dispatcher, StepContext(2), 4)


def test_a_socket_that_never_takes_more_is_left_for_the_other_copy_in_time(world_of: Make) -> None:
    world = world_of(2, copies=2)
    dispatcher, link, group = world.dispatcher(call_timeout_s=SOON), world.link(1), world.groups[1]
    for number in range(20):  # until both are known
        right(world, dispatcher, StepContext(number), 4)
    group.entered.clear()
    group.open.clear()
    rows = LayerRows.of(torch.zeros(1, 6), [0], [world.infos[1].holdings[0][0]], 0.0)
    link.submit(LayerCall(1 << 62, 0, 0, 0, 0), rows, Deadline.after(SOON))
    assert group.entered.wait(SOON)
    with contextlib.suppress(BlockingIOError):
        while True:
            link._socket.send(b"\4" + bytes(8), 0x40)
    began_s = time.monotonic()
    right(world, dispatcher, StepContext(1), 4)
    assert time.monotonic() - began_s < SOON / 2, "a call that has another copy is lost after a second"


def test_orders_go_in_front_of_the_call_or_alone(world_of: Make, submitted: list[LayerCall]) -> None:
    world = world_of(2, layers=3)
    dispatcher = world.dispatcher()
    for number in range(1, 5):
        for layer in range(3):
            if layer < 2:
                world.link(1).order(Order(number, layer + 1, bytes([layer, 7])))
            given = batch(2)
            if number % 2:  # group 1 is not called
                held = world.infos[0].holdings[layer]
                given[1][:] = torch.tensor(held[: given[1].shape[1]])
            assert torch.allclose(dispatcher(StepContext(number), layer, *given), wanted(*given), atol=1e-5)
            right_ones = [Order(number, at, bytes([at - 1, 7])) for at in range(1, min(layer + 2, 3))]
            limit = Deadline.after(SOON)
            while [order for order in world.groups[1].orders if order.step_id == number] != right_ones:
                assert not limit.expired(), world.groups[1].orders
                time.sleep(0.001)
    assert not world.groups[0].orders
    assert not submitted


def test_a_choice_of_an_expert_that_does_not_exist_sends_nothing(world_of: Make) -> None:
    world = world_of(2)
    dispatcher, given = world.dispatcher(), batch(3)
    given[1][1, 1] = 99
    with pytest.raises(IndexError):
        dispatcher(StepContext(1), 0, *given)
    assert not world.asked
    right(world, dispatcher, StepContext(2), 3)


def test_without_memory_for_a_seat_calls_go_one_by_one(
    world_of: Make, submitted: list[LayerCall], monkeypatch: pytest.MonkeyPatch
) -> None:
    world = world_of(2)
    monkeypatch.setattr(world.link(1).seats, "take", lambda *_: None)
    right(world, world.dispatcher(), StepContext(1), 3)
    assert len(submitted) == 2
    assert world.link(0).seats.num_taken() == 0


def test_work_of_the_router_that_fails_leaves_no_call_behind(world_of: Make) -> None:
    world = world_of(2)
    dispatcher = world.dispatcher()

    def fails() -> None:
        raise ValueError("boom")

    for group in world.groups.values():
        group.open.clear()
    with pytest.raises(ValueError, match="boom"):
        dispatcher(StepContext(1), 0, *batch(4), fails)
    for group in world.groups.values():
        assert group.entered.wait(SOON)
        group.open.set()
    for number in range(20):
        right(world, dispatcher, StepContext(number), 4)
    gc.collect()
    assert world.link(0).seats.num_taken() == 1, "that of the new exchange, and not the old one's"
    done = []
    dispatcher(StepContext(1), 0, *batch(4), lambda: done.append(1))
    assert done == [1]


def test_memory_of_sizes_that_are_not_used_any_more_comes_back(world_of: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchanges, "MAX_KEPT", 2)
    world = world_of(2)
    dispatcher = world.dispatcher()
    for num_tokens in (1, 2, 4, 8, 16, 32, 1, 2, 4, 8, 16, 32):
        right(world, dispatcher, StepContext(1), num_tokens)
        gc.collect()
        assert world.link(0).seats.num_taken() <= 2
    assert world.link(0)._memory.num_taken() == 0


def test_layers_of_about_one_size_share_a_seat_and_none_is_larger_than_the_largest_layer(
    world_of: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = world_of(2)
    dispatcher, width = world.dispatcher(), batch(1)[0].shape[1]
    for num_tokens in (5, 6, 7, 8, 5):
        right(world, dispatcher, StepContext(1), num_tokens)
    assert world.link(0).seats.num_taken() == 1
    monkeypatch.setattr(exchanges, "MANY", 10 * width)
    takes, take = [], world.link(0).seats.take
    monkeypatch.setattr(world.link(0).seats, "take", lambda shape, pairs: takes.append(shape) or take(shape, pairs))
    right(world, dispatcher, StepContext(1), 9)
    assert takes == [(10, width)]


def test_times_and_calls_are_booked_by_the_end_of_a_step(world_of: Make, submitted: list[LayerCall]) -> None:
    world = world_of(2, layers=3, copies=2)
    dispatcher, step = world.dispatcher(), StepContext(1)
    began_s = time.monotonic()
    right(world, dispatcher, step, 8)
    took_s = time.monotonic() - began_s
    items = dict(step.ledger.items())
    assert all(items[f"{stage.value}"] > 0 for stage in (Stage.DISPATCH, Stage.COMBINE, Stage.GROUP_COMPUTE)), items
    assert sum(items.values()) <= took_s
    assert world.caller.speeds.calls == len(world.asked) == 6
    assert not submitted


@pytest.mark.parametrize("slow", [0, 1])
def test_who_is_slow_is_told_from_who_was_read_late(slow: int, world_of: Make, submitted: list[LayerCall]) -> None:
    """Answers are read in the order of links; one that lay in a socket meanwhile came when its group says."""
    world = world_of(2)
    dispatcher, step = world.dispatcher(), StepContext(1)
    for _ in range(5):
        given = batch(8)
        world.groups[slow].open.clear()
        threading.Timer(0.05, world.groups[slow].open.set).start()
        assert torch.allclose(dispatcher(step, 0, *given), wanted(*given), atol=1e-5)
    spent = {group.group: group.seconds for group in step.ledger.groups()}
    assert spent[slow].get(Stage.STRAGGLER.value, 0.0) > 0.15, spent
    assert sum(spent[1 - slow].values()) < 0.1, spent
    assert not submitted


def test_of_calls_that_are_taken_apart_who_answered_in_time_is_not_slow(world_of: Make) -> None:
    world = world_of(2, copies=2)
    dispatcher = world.dispatcher(call_timeout_s=0.2)
    for number in range(20):
        right(world, dispatcher, StepContext(number), 8)
    world.caller.speeds._credit = 0.0  # nobody is asked twice
    before_s = world.caller.speeds._paces[0].trip_s
    world.groups[1].open.clear()
    right(world, dispatcher, StepContext(1), 8)
    world.groups[1].open.set()
    assert world.fabric.suspects() == [1]
    assert world.caller.speeds._paces[0].trip_s < before_s + 0.005, "not the 0.2 s that the other one was waited for"


def test_a_count_that_fails_leaves_the_links_to_others(world_of: Make, submitted: list[LayerCall]) -> None:
    world = world_of(2)
    failures = [ValueError("boom")]

    def count(*_: object) -> None:
        if failures:
            raise failures.pop()

    world.dispatcher()
    dispatcher = Dispatcher(world.fabric, torch.float32, world.caller, count=count)
    with pytest.raises(ValueError, match="boom"):
        dispatcher(StepContext(1), 0, *batch(4))
    for number in range(5):
        right(world, dispatcher, StepContext(number), 4)
    assert not submitted


def test_a_long_wait_does_not_keep_others_from_reading(world_of: Make) -> None:
    world = world_of(2)
    dispatcher, given = world.dispatcher(), batch(4)
    right(world, dispatcher, StepContext(0), 4)
    for group in world.groups.values():
        group.entered.clear()
    world.groups[0].open.clear()
    threading.Timer(1.5, world.groups[0].open.set).start()
    asked = threading.Thread(target=dispatcher, args=(StepContext(1), 0, *given))
    asked.start()
    assert world.groups[1].entered.wait(SOON)
    rows = LayerRows.of(torch.ones(1, 6), [0], [world.infos[1].holdings[0][0]], 1.0)
    probe = world.link(1).submit(LayerCall(1 << 62, 0, 0, 0, 0), rows, Deadline.after(SOON))
    assert torch.equal(probe.wait(Deadline.after(1.0)).partial_TH, compute(rows))
    assert asked.is_alive()
    asked.join(SOON)
