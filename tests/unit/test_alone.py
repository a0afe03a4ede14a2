"""One group in this process: its layers are computed where they are called, and everything else as ever."""

from __future__ import annotations

import time

import pytest
import torch

from cluster.core import GroupInfo, LayerCall, Priority
from cluster.errors import InternalError, MissingExperts
from cluster.experts.inline import InlineHost
from cluster.routing.step import StepContext
from cluster.telemetry.ledger import Stage
from cluster.transport.base import CallHandler, LayerRows, PendingReply
from cluster.transport.inproc import InprocTransport
from tests.unit.test_dispatcher import E, FakeLink, World, batch, compute, wanted


class InlineLink(InprocTransport):
    """Counts what came which way."""

    def __init__(self, group: int, handler: CallHandler) -> None:
        super().__init__(group, handler)
        self.submitted = 0

    def submit(self, *args: object) -> PendingReply:
        self.submitted += 1
        return super().submit(*args)  # type: ignore[arg-type]


class InlineWorld(World):
    """Groups in this process; ``errors`` are raised by the next computations."""

    def __init__(self, num_groups: int, copies: int = 1) -> None:
        self.errors: list[Exception] = []
        self.computed: list[tuple[int, LayerRows]] = []
        super().__init__(num_groups, copies=copies)

    def connect(self, info: GroupInfo) -> FakeLink:
        return InlineLink(info.group, InlineHost(self._compute))  # type: ignore[return-value]

    def _compute(self, layer: int, rows: LayerRows) -> torch.Tensor:
        if self.errors:
            raise self.errors.pop(0)
        self.computed.append((layer, rows))
        return compute(rows)

    def link(self, group: int = 0) -> InlineLink:
        found = self.fabric.link(group)
        assert isinstance(found, InlineLink)
        return found


@pytest.mark.parametrize(("groups", "copies"), [(1, 1), (3, 1), (2, 2)])
@pytest.mark.parametrize("priority", [Priority.DECODE, Priority.PREFILL])
def test_the_sum_is_right_and_only_who_is_alone_is_asked_at_once(groups: int, copies: int, priority: Priority) -> None:
    world, given, step = InlineWorld(groups, copies), batch(5), StepContext(1, priority)
    links = [world.link(group) for group in range(groups)]
    own: list[int] = []
    began_s = time.monotonic()
    got = world.dispatcher()(step, 0, *given, lambda: own.append(len(world.computed)))
    assert torch.allclose(got, wanted(*given), atol=1e-5)
    assert sum(rows.pair_expert_P.numel() for _, rows in world.computed) == given[1].numel()
    assert (sum(link.submitted for link in links) == 0) == (groups == 1 and priority is Priority.DECODE)
    assert len(own) == 1, "the router's own work is done, and once"
    assert step.ledger.seconds(Stage.GROUP_COMPUTE) > 0
    assert step.ledger.seconds(Stage.TRUNK) > 0
    assert step.ledger.total_s() <= time.monotonic() - began_s, "something is booked twice"
    assert world.caller.speeds.calls == len(world.computed)
    assert sum(spent.calls for spent in step.ledger.groups()) == len(world.computed)


def test_a_group_that_is_not_there_yet_is_reached_as_ever_and_at_once_afterwards() -> None:
    world, given = InlineWorld(1), batch(3)
    dispatcher = world.dispatcher()
    for submitted in (1, 1):
        assert torch.allclose(dispatcher(StepContext(1), 0, *given), wanted(*given), atol=1e-5)
        assert world.link().submitted == submitted


def test_what_fails_at_once_is_asked_again_with_patience() -> None:
    world, given = InlineWorld(1), batch(3)
    world.link()
    world.errors = [MissingExperts(0, 0, [1]), MissingExperts(0, 0, [1])]
    assert torch.allclose(world.dispatcher()(StepContext(1), 0, *given), wanted(*given), atol=1e-5)
    assert world.caller.resent_calls == 1
    world.errors = [ValueError("boom")]
    with pytest.raises(InternalError, match="ValueError"):
        world.dispatcher()(StepContext(2), 0, *given)
    world.link().close()
    assert torch.allclose(world.dispatcher()(StepContext(3), 0, *given), wanted(*given), atol=1e-5), "a new link"


def test_a_table_with_holes_is_for_who_has_patience() -> None:
    world, (hidden_TH, index_TK, weight_TK) = InlineWorld(1), batch(3)
    world.link()
    info = world.infos[0]
    world.infos[0] = GroupInfo(0, "", info.incarnation, (tuple(range(E - 1)),), "f", "fp32")
    world.fabric.refresh()
    index_TK[index_TK == E - 1] = 0
    got = world.dispatcher()(StepContext(1), 0, hidden_TH, index_TK, weight_TK)
    assert torch.allclose(got, wanted(hidden_TH, index_TK, weight_TK), atol=1e-5)
    assert world.link().submitted == 1


def test_the_call_says_what_it_is_part_of() -> None:
    world, given = InlineWorld(1), batch(2)
    calls: list[LayerCall] = []
    link = world.link()
    at_once = link.at_once

    def note(call: LayerCall, rows: LayerRows) -> object:
        calls.append(call)
        return at_once(call, rows)

    link.at_once = note  # type: ignore[method-assign, assignment]
    world.dispatcher()(StepContext(7), 0, *given)
    assert [(call.step_id, call.layer, call.priority) for call in calls] == [(7, 0, Priority.DECODE)]
