from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest
import torch

from cluster.core import Deadline, LayerCall
from cluster.errors import LinkBroken, LinkRefused
from cluster.transport import link as link_module
from cluster.transport.base import LayerReply, LayerRows, PendingReply, Transport
from cluster.transport.choice import Candidate
from cluster.transport.link import Link

SOON = 10.0


class Fake:
    """A transport that answers at once, until it is broken."""

    address = "here"

    def __init__(self, kind: str) -> None:
        self.kind, self.group, self.up, self.closed = kind, 3, True, False
        self.calls = 0
        self.cancelled: list[int] = []

    def room(self, *_: object) -> None:
        return None

    def submit(self, call: LayerCall, rows: LayerRows, deadline: Deadline) -> PendingReply:
        if not self.up:
            raise LinkBroken(f"{self.kind} is down")
        self.calls += 1
        pending = PendingReply(self.group, call)
        pending.resolve(LayerReply(rows.hidden_TH))
        return pending

    def cancel(self, pending: PendingReply) -> None:
        self.cancelled.append(pending.call.call_id)

    def healthy(self) -> bool:
        return self.up and not self.closed

    def close(self) -> None:
        self.closed = True


class Maker:
    """Makes fakes, or fails as it is told to."""

    def __init__(self) -> None:
        self.made: list[Fake] = []
        self.fail: dict[str, Exception] = {}

    def __call__(self, kind: str, _deadline: Deadline) -> Transport:
        if kind in self.fail:
            raise self.fail[kind]
        self.made.append(Fake(kind))
        return self.made[-1]


def rows() -> LayerRows:
    return LayerRows.of(torch.ones(1, 2), [0], [0], 1.0)


def submit(link: Link, number: int = 1) -> None:
    link.submit(LayerCall(number, 1, 0, 1, 1), rows(), Deadline.after(SOON)).wait(Deadline.after(SOON))


def wait_for(condition: Callable[[], bool]) -> None:
    limit = time.monotonic() + SOON
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.005)


@pytest.fixture(autouse=True)
def _quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_module, "CHECK_PERIOD_S", 0.01)
    monkeypatch.setattr(link_module, "FIRST_PAUSE_S", 0.02)


@pytest.fixture
def make() -> Maker:
    return Maker()


@pytest.fixture
def base() -> Fake:
    return Fake("grpc")


@pytest.fixture
def link(base: Fake, make: Maker) -> Iterator[Link]:
    link = Link(base, "auto", [Candidate("nccl", "two GPUs"), Candidate("shm", "same host")], ["gloo: no"], make)
    yield link
    link.close()


def test_the_first_candidate_that_can_be_made_carries_the_calls(link: Link, base: Fake, make: Maker) -> None:
    submit(link)
    assert (link.kind, base.calls, make.made[0].calls) == ("nccl", 0, 1)
    assert link.status().why == "two GPUs; gloo: no"


def test_a_candidate_that_fails_leaves_its_reason_and_the_next_is_taken(base: Fake, make: Maker) -> None:
    make.fail["nccl"] = LinkBroken("no peer access")
    link = Link(base, "auto", [Candidate("nccl", "x"), Candidate("shm", "same host")], [], make)
    assert link.kind == "shm"
    assert link.status().why == "same host; nccl: no peer access"
    link.close()


def test_a_break_that_a_call_meets_costs_nothing_but_a_fallback(link: Link, base: Fake, make: Maker) -> None:
    make.fail = {"nccl": LinkBroken("still"), "shm": LinkRefused("still")}
    make.made[0].up = False
    submit(link)
    assert base.calls == 1
    assert make.made[0].closed
    status = link.status()
    assert (status.kind, status.healthy, status.fallbacks, status.returns) == ("grpc", True, 1, 0)
    assert "fell back from nccl" in status.why
    assert status.failure.startswith("nccl")


def test_a_break_that_nobody_meets_is_found_and_the_better_transport_returns(link: Link, make: Maker) -> None:
    make.fail = {"nccl": LinkBroken("not yet"), "shm": LinkBroken("not yet")}
    make.made[0].up = False
    wait_for(lambda: link.kind == "grpc")
    make.fail = {}
    wait_for(lambda: link.kind == "nccl")
    status = link.status()
    assert (status.fallbacks, status.returns) == (1, 1)
    submit(link)
    assert make.made[-1].calls == 1


def test_grpc_is_restored_behind_a_better_transport_and_calls_go_on(link: Link, base: Fake, make: Maker) -> None:
    base.up = False
    assert link.healthy()
    submit(link)
    wait_for(lambda: make.made[-1].kind == "grpc")
    wait_for(lambda: base.closed)
    make.fail = {"nccl": LinkBroken("gone"), "shm": LinkBroken("gone")}
    make.made[0].up = False
    submit(link)
    assert make.made[-1].calls == 1


def test_a_link_without_any_transport_is_unhealthy_and_says_so(link: Link, base: Fake, make: Maker) -> None:
    make.fail = dict.fromkeys(("nccl", "shm", "grpc"), LinkBroken("gone"))
    base.up = make.made[0].up = False
    with pytest.raises(LinkBroken):
        submit(link)
    assert not link.healthy()


def test_cancel_reaches_whoever_may_carry_the_call(link: Link, base: Fake, make: Maker) -> None:
    link.cancel(PendingReply(3, LayerCall(7, 1, 0, 1, 1)))
    assert base.cancelled == make.made[0].cancelled == [7]


def test_the_keeper_tells_its_age_and_ends_with_the_link(link: Link, make: Maker) -> None:
    wait_for(lambda: link.status().progress_age_s < 1.0)
    link.close()
    assert make.made[0].closed
    assert not link.healthy()
    assert not link._keeper.is_alive()
