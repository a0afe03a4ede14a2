"""Whole answers over real links: every kind, a mix of kinds, and links that are killed in the middle of streams."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from cluster.api.router import Router
from cluster.bench.reference import Reference
from cluster.bench.verify import Load, ask, compare, link_problems, problems
from cluster.core import Deadline, Request, SamplingParams, StopParams
from cluster.engine.events import TokenEvent
from cluster.errors import ConfigError
from cluster.experts.group import ExpertGroup
from cluster.rpc.v1 import control_pb2
from tests.conftest import MakeTiny
from tests.door import Door
from tests.systems import linked_router

SOON = 30.0


@pytest.fixture(scope="module")
def path(tiny: MakeTiny) -> Path:
    return tiny("deepseek_v3")


@pytest.fixture(scope="module")
def reference(path: Path) -> Reference:
    return Reference(path, torch.float32)


def wait_for(condition: Callable[[], bool]) -> None:
    limit = time.monotonic() + SOON
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.02)


def exact(router: Router, reference: Reference, load: Load) -> control_pb2.StatusReply:
    """Asks through the client port, compares with transformers; the status afterwards."""
    door = Door()
    try:
        door.open(router)
        answers, status = ask(door.address, load, lambda _message: None)
    finally:
        door.close()
    report = compare(reference, answers, load.tokens)
    assert not problems({**report, "max_batch": status.engine.max_batch}, load)
    assert status.engine.failed == 0
    return status


@pytest.mark.parametrize("transports", ["shm", "grpc", "gloo", "auto", "shm,grpc,gloo"])
def test_answers_are_exact_over_every_link_and_status_says_which_and_why(
    transports: str, path: Path, reference: Reference
) -> None:
    with linked_router(path, transports, 3) as (router, _):
        status = exact(router, reference, Load(prompts=4, tokens=12, in_flight=3, seed=11))
    kinds = ["shm"] * 3 if transports == "auto" else (transports.split(",") * 3)[:3]
    assert [group.transport for group in status.groups] == kinds
    assert not link_problems((transports.split(",") * 3)[:3], status)
    assert all(group.link.why for group in status.groups)
    assert {f"link-{index}" for index in range(3)} <= {loop.name for loop in status.loops}
    if transports == "auto":
        assert "nonce" in status.groups[0].link.why
        assert "nccl: router and group on CPU" in status.groups[0].link.why


@contextmanager
def killing(groups: list[ExpertGroup], period_s: float) -> Iterator[list[int]]:
    """Ends every link of every group over and over; the list counts."""
    stop, count = threading.Event(), [0]

    def run() -> None:
        while not stop.wait(period_s):
            for group in groups:
                assert group.server is not None
                assert group.shm_server is not None
                group.shm_server.drop_links()
                group.server.drop_links()
            count[0] += 1

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield count
    finally:
        stop.set()
        thread.join(SOON)


@pytest.mark.parametrize("transports", ["shm", "grpc", "gloo", "shm,grpc,gloo"])
def test_links_killed_in_the_middle_of_streams_leave_every_answer_right(
    transports: str, path: Path, reference: Reference
) -> None:
    with linked_router(path, transports, 3) as (router, groups):
        with killing(groups, 0.4) as kills:
            seed = 12
            status = exact(router, reference, Load(prompts=6, tokens=40, in_flight=3, seed=seed))
            while kills[0] < 2:  # a machine that is quick has to ask for longer
                seed += 1
                status = exact(router, reference, Load(prompts=6, tokens=40, in_flight=3, seed=seed))

        def settled() -> bool:
            kinds = [group.transport for group in router.status().groups]
            return kinds == (transports.split(",") * 3)[:3] and all(g.healthy for g in router.status().groups)

        wait_for(settled)
        status = router.status()
    for group in status.groups:
        assert group.link.fallbacks + group.link.reconnects >= 1, "status tells what happened"


@pytest.mark.parametrize("kind", ["shm", "gloo"])
def test_status_shows_the_fallback_and_the_return(kind: str, path: Path, reference: Reference) -> None:
    with linked_router(path, kind, 2) as (router, groups):
        link = router.fabric.link(0)
        best = link._best  # type: ignore[attr-defined]
        assert best.kind == kind
        if kind == "shm":
            assert groups[0].shm_server is not None
            groups[0].shm_server.drop_links()  # only this one: gRPC carries on
        else:
            best._stream.cancel()
        wait_for(lambda: router.status().groups[0].link.fallbacks == 1)
        exact(router, reference, Load(prompts=2, tokens=8, in_flight=2, seed=13))
        wait_for(lambda: router.status().groups[0].transport == kind)
        report = router.status().groups[0].link
        assert (report.fallbacks, report.returns, report.reconnects) == (1, 1, 0)
        assert report.last_failure.startswith(kind)
        assert report.last_failure_age_s >= 0
        assert router.fabric.link(0) is link, "the link outlives its transports"


def test_a_transport_that_cannot_be_had_is_refused_with_the_reason(path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("NCCL may be had here")
    with pytest.raises(ConfigError, match=r"nccl.*router and group on CPU.*use auto"):
        with linked_router(path, "nccl", 2):
            pass


@pytest.mark.parametrize("transports", ["shm,grpc", "gloo"])
def test_orders_reach_groups_with_a_budget_over_every_link_and_tokens_stay_the_same(
    transports: str, tiny: MakeTiny
) -> None:
    path = tiny("qwen3_moe")
    answers = []
    for memory, predict in (("all", "true"), ("150K", "true"), ("150K", "false")):
        with linked_router(path, transports, 2, expert_memory=memory, predict_experts=predict) as (router, groups):
            answers.append(_greedy(router, [7, 8, 9, 10], 24))
            stores = [group.bank.store for group in groups if group.bank.store is not None]
            if memory == "all":
                assert not stores
            else:
                assert len(stores) == 2
                assert all(sum(layer.stalls for layer in store.layers) > 0 for store in stores)
                assert (sum(store.stats.ahead for store in stores) > 0) == (predict == "true")
    assert answers[0] == answers[1] == answers[2]


def _greedy(router: Router, prompt: list[int], new: int) -> list[int]:
    events: queue.Queue[TokenEvent] = queue.Queue()
    request = Request("r", tuple(prompt), SamplingParams(), StopParams(new), Deadline.after(60))
    router.engine.submit(request, events.put)
    tokens = []
    while True:
        event = events.get(timeout=60)
        assert event.error is None
        if event.token is not None:
            tokens.append(event.token.token)
        if event.last:
            return tokens
