"""Old tables, old coordinators, groups that are not what the table says: none of them makes a wrong expert answer."""

from __future__ import annotations

import queue
import random
import uuid

import pytest
import torch

from cluster.api.router import Router
from cluster.bench.reference import Reference
from cluster.control.coordinator import Coordinator
from cluster.core import Deadline, GroupInfo, Membership, Request, SamplingParams, StopParams
from cluster.engine.events import TokenEvent
from cluster.errors import MissingExperts, Unavailable
from cluster.experts.group import ExpertGroup
from cluster.placement.planner import table_from_groups
from cluster.routing.fabric import Fabric
from cluster.transport.base import LayerRows, Transport
from cluster.transport.inproc import InprocTransport
from tests.conftest import MakeTiny
from tests.systems import config_for, experts_per_layer


def answer(router: Router, prompt: list[int], new: int) -> list[int]:
    """Greedy tokens through the engine."""
    events: queue.Queue[TokenEvent] = queue.Queue()
    stop = StopParams(max_new_tokens=new)
    router.engine.submit(
        Request(uuid.uuid4().hex, tuple(prompt), SamplingParams(), stop, Deadline.after(60)), events.put
    )
    tokens = []
    while True:
        event = events.get(timeout=60)
        if event.error is not None:
            raise event.error
        if event.token is not None:
            tokens.append(event.token.token)
        if event.finish is not None:
            return tokens


def test_of_two_coordinators_a_group_and_a_router_listen_to_the_newer_one_only(tiny: MakeTiny) -> None:
    path = tiny("qwen3_moe")
    per_layer = experts_per_layer(path)
    every = tuple(tuple(range(count)) for count in per_layer)
    group = ExpertGroup(0, every, config_for(path), threads=1, listen=False)

    def ask(epoch: int) -> GroupInfo:  # as the group's shell does
        group.told_by(epoch)
        return group.info()

    old = Coordinator(per_layer, [0], lambda _group: ask(4), epoch=4)
    new = Coordinator(per_layer, [0], lambda _group: ask(5), epoch=5)
    old.poll()
    links: list[Transport] = []

    def connect(info: GroupInfo, _deadline: Deadline) -> Transport:
        links.append(InprocTransport(info.group, group.host))
        return links[-1]

    heard = [old, new, old]  # a partition: the router hears of either, in turn
    fabric = Fabric(lambda: heard.pop(0).membership(), connect)
    fabric.refresh()
    assert fabric.membership.table.order == (4, 1)
    new.poll()
    fabric.refresh()
    assert fabric.membership.table.order == (5, 1)
    fabric.refresh()
    assert fabric.membership.table.order == (5, 1), "the old one's table is not taken"
    with pytest.raises(Unavailable, match="coordinator 4 is over"):
        group.told_by(4)
    before = old.membership().table
    for _ in range(3):
        old.poll()  # nobody answers it: its table loses its groups, and no router takes that
    assert old.membership().table.order > before.order
    assert old.membership().table.uncovered()
    fabric.close()
    old.close()
    new.close()
    group.close()


@pytest.mark.parametrize("lacking", ["first", "every"])
def test_a_group_that_lacks_what_the_table_says_costs_a_retry_and_no_wrong_token(lacking: str, tiny: MakeTiny) -> None:
    """Experts go behind the table's back, as they must not; the next table is right again."""
    path = tiny("deepseek_v3")
    per_layer = experts_per_layer(path)
    every = tuple(tuple(range(count)) for count in per_layer)
    half = tuple(tuple(range(0, count, 2)) for count in per_layer)
    config = config_for(path, verify=True)
    groups = [ExpertGroup(i, every, config, threads=1, listen=False) for i in range(2)]
    stale = Membership(
        table_from_groups(1, 1, per_layer, [g.info() for g in groups]), {g.group: g.info() for g in groups}
    )

    def fetch() -> Membership:
        if groups[0].bank.holdings == every:
            return stale
        infos = [g.info() for g in groups]
        return Membership(table_from_groups(1, 2, per_layer, infos), {info.group: info for info in infos})

    def link(info: GroupInfo, _deadline: Deadline) -> Transport:
        return InprocTransport(info.group, groups[info.group].host)

    reference = Reference(path, torch.float32)
    router = Router(config, fetch, threads=1, local_links=link)
    try:
        for layer in range(len(per_layer) if lacking == "every" else 1):
            groups[0].bank.hold(layer, half[layer])
        for _ in range(3):
            prompt = [random.randrange(512) for _ in range(9)]
            assert answer(router, prompt, 8) == reference.greedy(prompt, 8)
        assert router.fabric.membership.table.order == (1, 2)
    finally:
        router.close()
        for group in groups:
            group.close()


def test_a_group_says_which_experts_it_lacks_and_computes_nothing(tiny: MakeTiny) -> None:
    path = tiny("mixtral")
    per_layer = experts_per_layer(path)
    every = tuple(tuple(range(count)) for count in per_layer)
    group = ExpertGroup(0, every, config_for(path), threads=1, listen=False)
    group.hold(0, [1, 3]).result(20)
    rows = LayerRows.of(torch.randn(2, 64), [0, 1, 1], [1, 3, 2], 0.5)
    with pytest.raises(MissingExperts, match=r"\[2\]"):
        group.bank.compute(0, rows)
    group.close()
