"""One suite for every transport that this machine can run: the same promises, whatever carries a call."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from cluster.core import Deadline, LayerCall, Priority
from cluster.errors import DeadlineExceeded, ExpertMeshError, InternalError, LinkBroken, LinkRefused, MissingExperts
from cluster.transport.base import LayerRows, PendingReply, Transport
from tests.echo import (
    BLOCKED,
    FAILING,
    LACKING,
    SOON,
    EchoGroup,
    EchoProcess,
    call,
    connect,
    rows,
    soon,
)

NO_GPUS = "NCCL between two processes wants two GPUs; this machine has fewer, so the nccl transport was NOT tested"
NCCL = pytest.param("nccl", marks=[pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason=NO_GPUS)])
REMOTE = ["shm", "grpc", "gloo", NCCL]
EVERY = ["inproc", *REMOTE]


@pytest.fixture
def group() -> Iterator[EchoGroup]:
    group = EchoGroup()
    yield group
    group.close()


@pytest.fixture
def process() -> Iterator[EchoProcess]:
    process = EchoProcess()
    yield process
    process.close()


@pytest.fixture(params=EVERY)
def link(request: pytest.FixtureRequest, group: EchoGroup) -> Iterator[Transport]:
    link = connect(request.param, group)
    yield link
    group.compute.open.set()
    link.close()


def answer(link: Transport, number: int, given: LayerRows, layer: int = 0) -> torch.Tensor:
    return link.submit(call(number, layer), given, soon()).wait(soon()).partial_TH


def wait_until(condition: Callable[[], bool]) -> None:
    limit = soon()
    while not condition():
        assert not limit.expired()
        time.sleep(0.01)


def read_by_compute(link: Transport) -> bool:
    """What was sent lies in a socket that the group's compute thread reads before its next call."""
    return link.kind == "shm"


# -- payloads ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_rows_of_every_size_come_back_bit_by_bit(link: Transport, dtype: torch.dtype) -> None:
    for number, (tokens, hidden) in enumerate(
        [(1, 1), (1, 7), (3, 5), (8, 64), (64, 33), (512, 64), (8192, 96), (0, 8), (1, 1)], 1
    ):
        given = rows(tokens, hidden, dtype)
        got = answer(link, number, given)
        assert got.dtype is torch.float32
        assert torch.equal(got, given.hidden_TH.float() + 1), (tokens, hidden)


def test_a_payload_of_32_mib_comes_back_bit_by_bit(link: Transport) -> None:
    given = rows(8192, 1024)
    assert torch.equal(answer(link, 1, given), given.hidden_TH + 1)


def test_pairs_and_header_arrive_as_they_were_sent(link: Transport, group: EchoGroup) -> None:
    seen: list[tuple[LayerCall, LayerRows]] = []
    submit = group.host.submit

    def watch(got: LayerCall, its: LayerRows, pending: PendingReply, *lend: Callable[[], object] | None) -> None:
        seen.append((got, LayerRows(its.hidden_TH.clone(), its.pairs_3P.copy())))
        submit(got, its, pending, *lend)

    group.host.submit = watch  # type: ignore[method-assign]
    sent, given = LayerCall(9, 8, 0, 6, 5, Priority.PREFILL, 4000, "00-" + "a" * 32 + "-" + "b" * 16 + "-01"), rows(37)
    link.submit(sent, given, soon()).wait(soon())
    assert [got for got, _ in seen] == [sent]
    assert (seen[0][1].pairs_3P == given.pairs_3P).all()


def test_an_answer_that_is_kept_is_not_written_over(link: Transport) -> None:
    given = [rows(4, 16) for _ in range(60)]
    kept = [answer(link, number, its) for number, its in enumerate(given, 1)]
    link.close()
    for got, its in zip(kept, given, strict=True):
        assert torch.equal(got, its.hidden_TH + 1)


# -- order ---------------------------------------------------------------------------------------------------------


def test_calls_are_computed_in_order_and_prefill_after_the_rest(link: Transport, group: EchoGroup) -> None:
    def send(number: int, layer: int = 0, priority: Priority = Priority.DECODE) -> PendingReply:
        given = LayerRows.of(torch.full((1, 4), float(number)), [0], [0], 1.0)
        return link.submit(call(number, layer, priority), given, soon())

    first = send(1, BLOCKED)
    assert group.compute.entered.wait(SOON)
    priorities = [Priority.PREFILL, Priority.DECODE, Priority.PREFILL, Priority.DECODE, Priority.RESENT]
    waiting = [send(number, 0, priority) for number, priority in enumerate(priorities, 2)]
    wait_until(lambda: read_by_compute(link) or len(group.host._heap) == len(waiting))
    group.compute.open.set()
    for pending in [first, *waiting]:
        pending.wait(soon())
    order = group.compute.order
    assert order[0] == 1
    assert set(order[1:4]) == {3, 5, 6}, "resent and decode calls go before prefill calls"
    assert order.index(3) < order.index(5), "order is kept among equals"
    assert order[4:] == [2, 4]


def test_many_calls_are_in_flight_and_matched_by_id(link: Transport) -> None:
    def one(number: int) -> bool:
        given = rows(number % 9 + 1, 4 * (number % 7) + 1)
        return torch.equal(answer(link, number, given), given.hidden_TH + 1)

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(one, range(1, 400)))


def test_hundreds_of_calls_wait_in_the_group_and_all_are_answered(link: Transport, group: EchoGroup) -> None:
    first = link.submit(call(1, BLOCKED), rows(1), soon())
    assert group.compute.entered.wait(SOON)
    given = rows(2, 4)
    threading.Timer(0.5, group.compute.open.set).start()  # senders may have to wait for it
    waiting = [link.submit(call(number), given, soon()) for number in range(2, 900)]
    first.wait(soon())
    for pending in waiting:
        assert torch.equal(pending.wait(soon()).partial_TH, given.hidden_TH + 1)


# -- errors, deadlines, cancellation -------------------------------------------------------------------------------


def test_errors_of_the_group_arrive_typed_and_the_link_goes_on(link: Transport) -> None:
    with pytest.raises(MissingExperts) as caught:
        answer(link, 1, rows(1), LACKING)
    assert caught.value.experts == (7, 9)
    with pytest.raises(InternalError, match="ValueError"):
        answer(link, 2, rows(1), FAILING)
    assert len(answer(link, 3, rows(5))) == 5


def test_a_call_without_an_answer_ends_at_its_deadline_and_can_be_cancelled(link: Transport, group: EchoGroup) -> None:
    stuck = link.submit(call(1, BLOCKED), rows(1), soon())
    assert group.compute.entered.wait(SOON)
    queued = link.submit(call(2), LayerRows.of(torch.full((1, 8), 77.0), [0], [0], 1.0), soon())
    with pytest.raises(DeadlineExceeded):
        queued.wait(Deadline.after(0.05))
    link.cancel(queued)
    with pytest.raises(ExpertMeshError):
        queued.wait(soon())
    wait_until(lambda: read_by_compute(link) or all(entry[-1].done() for entry in group.host._heap))
    group.compute.open.set()
    stuck.wait(soon())
    answer(link, 3, rows(1))
    assert 77.0 not in group.compute.order, "a cancelled call is not computed"


def test_a_deadline_between_two_waiters_holds_nobody_up(link: Transport, group: EchoGroup) -> None:
    """Several threads wait on one link; those that give up must not take the answers of the others with them."""
    stuck = link.submit(call(1, BLOCKED), rows(1), soon())
    assert group.compute.entered.wait(SOON)
    pending = [link.submit(call(number), rows(1), soon()) for number in range(2, 12)]

    def wait(index: int) -> bool:
        try:
            pending[index].wait(Deadline.after(0.05) if index % 2 else soon())
        except DeadlineExceeded:
            return False
        return True

    with ThreadPoolExecutor(10) as pool:
        results = [pool.submit(wait, index) for index in range(10)]
        assert not any(results[index].result(SOON) for index in range(1, 10, 2))
        group.compute.open.set()
        assert all(results[index].result(SOON) for index in range(0, 10, 2))
    stuck.wait(soon())


def test_a_closed_link_fails_calls_in_flight_and_later_ones(link: Transport, group: EchoGroup) -> None:
    pending = link.submit(call(1, BLOCKED), rows(1), soon())
    assert group.compute.entered.wait(SOON)
    link.close()
    link.close()
    with pytest.raises(LinkBroken):
        pending.wait(soon())
    with pytest.raises(LinkBroken):
        link.submit(call(2), rows(1), soon())
    assert not link.healthy()


# -- a peer that dies, hangs, or is another ------------------------------------------------------------------------


def submit_until_broken(link: Transport, given: LayerRows) -> list[PendingReply]:
    """Keeps the link full of payloads until it breaks."""
    pending: list[PendingReply] = []
    limit = soon()
    while not limit.expired():
        try:
            pending.append(link.submit(call(len(pending) + 1), given, Deadline.after(1.0)))
            if len(pending) > 4:
                pending[-4].wait(Deadline.after(1.0))
        except ExpertMeshError:
            return pending
    raise AssertionError("the link did not break")


@pytest.mark.parametrize("kind", REMOTE)
def test_death_of_the_peer_in_the_middle_of_payloads_breaks_every_call(kind: str, process: EchoProcess) -> None:
    link = connect(kind, process, payload_timeout_s=5.0)

    def die() -> None:
        process.process.send_signal(signal.SIGSTOP)  # a quick peer might have answered everything when it dies
        time.sleep(0.3)
        process.process.kill()

    threading.Timer(0.5, die).start()
    pending = submit_until_broken(link, rows(1024, 4096))
    process.process.wait(SOON)
    outcomes = []
    for its in pending:
        try:
            its.wait(soon())
            outcomes.append("answered")
        except LinkBroken:
            outcomes.append("broken")
    assert outcomes[-1] == "broken"
    wait_until(lambda: not link.healthy())
    with pytest.raises(LinkBroken):
        link.submit(call(10**6), rows(1), soon())
    link.close()


@pytest.mark.parametrize("kind", REMOTE)
def test_a_peer_that_never_answers_costs_the_deadline_and_no_more(kind: str, process: EchoProcess) -> None:
    link = connect(kind, process)
    answer(link, 1, rows(2))
    process.process.send_signal(signal.SIGSTOP)
    tasks = Path(f"/proc/{process.process.pid}/task")
    wait_until(lambda: all(") T" in (task / "stat").read_text() for task in tasks.iterdir()))
    began_s = time.monotonic()
    pending = link.submit(call(2), rows(2), soon())
    with pytest.raises(DeadlineExceeded):
        pending.wait(Deadline.after(0.3))
    link.cancel(pending)
    assert time.monotonic() - began_s < SOON / 2
    process.process.send_signal(signal.SIGCONT)
    assert len(answer(link, 3, rows(2))) == 2, "a slow peer is no dead one"
    link.close()


@pytest.mark.parametrize("kind", REMOTE)
def test_a_link_that_was_dropped_can_be_made_again(kind: str, group: EchoGroup) -> None:
    link = connect(kind, group)
    answer(link, 1, rows(2))
    group.drop(kind)
    wait_until(lambda: not link.healthy())
    again = connect(kind, group)
    given = rows(3)
    assert torch.equal(answer(again, 1, given), given.hidden_TH + 1)
    again.close()
    link.close()


@pytest.mark.parametrize("kind", ["shm", "grpc", "gloo"])
@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"fingerprint": "other"}, "model other"),
        ({"dtype": "bf16"}, "dtype bf16"),
        ({"secret": "guess"}, "secret"),
        ({"secret": "ключ"}, "secret"),
    ],
)
def test_what_does_not_belong_together_is_refused(
    kind: str, group: EchoGroup, fields: dict[str, object], word: str
) -> None:
    with pytest.raises(LinkRefused, match=word):
        connect(kind, group, **fields)


@pytest.mark.parametrize("kind", ["shm", "grpc", "gloo"])
def test_nobody_at_the_address_is_a_broken_link_at_once(kind: str, group: EchoGroup) -> None:
    group.server.close(0)
    group.shm.close()
    with pytest.raises(LinkBroken):
        connect(kind, group)


def test_decode_calls_over_grpc_are_computed_by_the_streams_threads_unless_the_group_is_busy(group: EchoGroup) -> None:
    threads: list[str] = []
    compute = group.host._compute

    def watch(layer: int, given: LayerRows) -> torch.Tensor:
        threads.append(threading.current_thread().name)
        return compute(layer, given)

    group.host._compute, group.host._lends = watch, True
    link = connect("grpc", group)
    for number in range(1, 30):
        wait_until(lambda: group.host._asleep)
        answer(link, number, rows(number))
    assert all("data-plane" in name or name == "layer-calls" for name in threads)
    stuck = link.submit(call(100, BLOCKED), rows(1), soon())
    assert group.compute.entered.wait(SOON)
    others = [link.submit(call(number), rows(2), soon()) for number in range(101, 110)]
    wait_until(lambda: len(group.host._heap) == len(others))  # read, though the reading thread computes
    group.compute.open.set()
    for pending in [stuck, *others]:
        pending.wait(soon())
    link.close()


def test_links_work_where_grpc_has_no_handlers_that_send_from_any_thread(
    monkeypatch: pytest.MonkeyPatch, group: EchoGroup
) -> None:
    monkeypatch.setattr("cluster.experts.server._NON_BLOCKING", "of_another_version")
    link = connect("grpc", group)
    for number in range(1, 10):
        answer(link, number, rows(number))
    pending = [link.submit(call(number), rows(2), soon()) for number in range(20, 40)]
    for one in pending:
        one.wait(soon())
    link.close()
