from __future__ import annotations

import itertools
import random
import threading
from collections.abc import Callable

import pytest
import torch

from cluster.core import Deadline, GroupInfo, LayerCall, Membership, Priority
from cluster.errors import ExpertMeshError, InternalError, LinkBroken, MissingExperts, Unavailable
from cluster.placement.planner import plan_copies, table_from_groups
from cluster.routing.caller import Caller
from cluster.routing.dispatcher import Dispatcher
from cluster.routing.fabric import Fabric
from cluster.routing.step import StepContext
from cluster.telemetry.ledger import Stage
from cluster.transport import codec
from cluster.transport.base import LayerReply, LayerRows, PendingReply

E, H, K = 12, 6, 3
TORCH = torch.manual_seed(0)
MATRICES = torch.randn(E, H, H)


def compute(rows: LayerRows) -> torch.Tensor:
    out = torch.zeros(rows.hidden_TH.shape)
    for row, expert, weight in zip(
        rows.pair_row_P.tolist(), rows.pair_expert_P.tolist(), rows.pair_weight_P.tolist(), strict=True
    ):
        out[row] += weight * (MATRICES[expert] @ rows.hidden_TH[row].float())
    return out


class FakeLink:
    """A group that answers when it is told to; ``fail`` makes the error of a call, or None."""

    kind, address = "fake", ""

    def __init__(self, group: int, world: World) -> None:
        self.group, self.world, self.closed = group, world, False

    def submit(self, call: LayerCall, rows: LayerRows, deadline: Deadline) -> PendingReply:
        if self.closed or not self.healthy():
            raise LinkBroken(f"link {self.group} is down")
        self.world.calls.append((self.group, call, rows))
        pending = PendingReply(self.group, call)
        error = self.world.fail(self.group, call)
        if error is not None:
            pending.fail(error)
        else:
            delay = self.world.delays.get(self.group, 0.0)
            timer = threading.Timer(delay, lambda: pending.resolve(LayerReply(compute(rows), 0.001, 0.002)))
            timer.daemon = True
            timer.start()
        return pending

    def cancel(self, pending: PendingReply) -> None:
        self.world.cancelled.append(pending.call.call_id)
        pending.fail(LinkBroken("cancelled"))

    def healthy(self) -> bool:
        return self.group not in self.world.dead

    def close(self) -> None:
        self.closed = True


class World:
    """Groups, their table, and what went over the links."""

    def __init__(self, num_groups: int, layers: int = 1, copies: int = 1) -> None:
        plan = plan_copies([E] * layers, num_groups, copies)
        self.infos = {g: GroupInfo(g, "", f"born-{g}", held, "f", "fp32") for g, held in enumerate(plan)}
        self.layers, self.version = layers, itertools.count(1)
        self.calls: list[tuple[int, LayerCall, LayerRows]] = []
        self.cancelled: list[int] = []
        self.dead: set[int] = set()
        self.delays: dict[int, float] = {}
        self.fail: Callable[[int, LayerCall], ExpertMeshError | None] = lambda _group, _call: None
        self.fabric = Fabric(self.membership, lambda info, _deadline: self.connect(info))
        self.fabric.refresh()

    def membership(self) -> Membership:
        alive = {g: info for g, info in self.infos.items() if g not in self.dead}
        table = table_from_groups(1, next(self.version), [E] * self.layers, alive.values())
        return Membership(table, alive)

    def connect(self, info: GroupInfo) -> FakeLink:
        if info.group in self.dead:
            raise LinkBroken("nobody there")
        return FakeLink(info.group, self)

    def dispatcher(self, call_timeout_s: float = 5.0, group_wait_s: float = 0.3, policy: str = "wait") -> Dispatcher:
        self.caller = Caller(self.fabric, call_timeout_s, group_wait_s, policy=policy)
        return Dispatcher(self.fabric, torch.float32, self.caller)


def batch(num_tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    index_TK = torch.stack([torch.randperm(E)[:K] for _ in range(num_tokens)])
    return torch.randn(num_tokens, H), index_TK, torch.rand(num_tokens, K)


def wanted(hidden_TH: torch.Tensor, index_TK: torch.Tensor, weight_TK: torch.Tensor) -> torch.Tensor:
    rows = torch.arange(len(hidden_TH)).repeat_interleave(K)
    return compute(LayerRows.of(hidden_TH, rows, index_TK.flatten(), weight_TK.flatten()))


@pytest.mark.parametrize("num_groups", [1, 2, 3, 5, 12])
def test_every_chosen_expert_is_computed_once_and_each_row_goes_to_a_group_once(num_groups: int) -> None:
    world, given = World(num_groups), batch(random.randint(1, 20))
    got = world.dispatcher()(StepContext(4), 0, *given)
    assert torch.allclose(got, wanted(*given), atol=1e-5)
    groups = [group for group, _, _ in world.calls]
    assert len(groups) == len(set(groups)), "one layer call a group"
    asked = sum(rows.pair_expert_P.numel() for _, _, rows in world.calls)
    assert asked == given[1].numel()
    for group, call, rows in world.calls:
        assert (call.layer, call.step_id, call.table_epoch) == (0, 4, 1)
        assert set(rows.pair_expert_P.tolist()) <= set(world.infos[group].holdings[0])
        assert set(rows.pair_row_P.tolist()) == set(range(len(rows.hidden_TH)))


def test_the_result_does_not_depend_on_who_answers_first() -> None:
    given = batch(9)
    results = []
    for delays in ({0: 0.05}, {2: 0.05}, {}):
        world = World(3)
        world.delays = delays
        results.append(world.dispatcher()(StepContext(1), 0, *given))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_a_call_larger_than_a_message_is_split(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec, "MAX_MESSAGE_BYTES", codec._HEADROOM_BYTES + 5 * (4 * H + 12 * K))
    world, given = World(2), batch(23)
    assert torch.allclose(world.dispatcher()(StepContext(1), 0, *given), wanted(*given), atol=1e-5)
    assert len(world.calls) > 2
    assert all(len(rows.hidden_TH) <= 5 for _, _, rows in world.calls)


@pytest.mark.parametrize("error", [LinkBroken("gone"), MissingExperts(1, 0, [5])])
def test_a_failed_call_is_sent_again_to_whoever_the_newest_table_names(error: ExpertMeshError) -> None:
    world, given = World(3), batch(8)
    failures = [0]

    def fail(group: int, _call: LayerCall) -> ExpertMeshError | None:
        if group == 1 and failures[0] < 2:
            failures[0] += 1
            # The experts of group 1 move to group 2.
            world.infos[2] = GroupInfo(2, "", "born-2", (tuple(range(4, E)),), "f", "fp32")
            world.infos[1] = GroupInfo(1, "", "born-1", ((),), "f", "fp32")
            return error
        return None

    world.fail = fail
    dispatcher = world.dispatcher()
    assert torch.allclose(dispatcher(StepContext(1), 0, *given), wanted(*given), atol=1e-5)
    assert world.caller.resent_calls >= 1


def test_a_group_that_comes_back_within_patience_is_waited_for() -> None:
    world, given = World(2), batch(8)
    world.dead = {1}
    threading.Timer(0.15, world.dead.clear).start()
    got = world.dispatcher(group_wait_s=5.0)(StepContext(1), 0, *given)
    assert torch.allclose(got, wanted(*given), atol=1e-5)


def test_a_timed_out_call_is_sent_again_also_when_patience_is_shorter_than_the_call() -> None:
    world, given = World(2), batch(8)
    world.delays = {1: 30.0}

    def hasten(_group: int, call: LayerCall) -> None:
        if call.priority is Priority.RESENT:
            world.delays = {}

    world.fail = hasten
    dispatcher = world.dispatcher(call_timeout_s=0.2, group_wait_s=0.1)
    assert torch.allclose(dispatcher(StepContext(1), 0, *given), wanted(*given), atol=1e-5)
    assert world.caller.resent_calls == 1


def test_experts_that_stay_away_end_in_unavailable_naming_them() -> None:
    world, given = World(2), batch(8)
    world.dead = {1}
    with pytest.raises(Unavailable, match=r"experts .* of MoE layer 0 did not answer for 0\.3 s"):
        world.dispatcher()(StepContext(1), 0, *given)


def test_a_call_without_an_answer_is_cancelled_and_sent_again() -> None:
    world, given = World(2), batch(8)
    world.delays = {1: 0.2}

    def hasten(_group: int, call: LayerCall) -> None:
        if call.priority is Priority.RESENT:
            world.delays = {}

    world.fail = hasten
    got = world.dispatcher(call_timeout_s=0.05, group_wait_s=5.0)(StepContext(1), 0, *given)
    assert torch.allclose(got, wanted(*given), atol=1e-5)
    assert world.cancelled


def test_a_group_that_fails_to_compute_is_not_asked_again() -> None:
    world = World(2)
    world.fail = lambda group, _call: InternalError("boom") if group == 1 else None
    with pytest.raises(InternalError, match="boom"):
        world.dispatcher()(StepContext(1), 0, *batch(8))
    assert len(world.calls) == 2


def test_time_is_attributed_from_clock_reads() -> None:
    world, step = World(2), StepContext(1)
    world.delays = {0: 0.01, 1: 0.08}
    world.dispatcher()(step, 0, *batch(8))
    spent = dict(step.ledger.items())
    assert spent[Stage.GROUP_QUEUE.value] == pytest.approx(0.001)
    assert spent[Stage.GROUP_COMPUTE.value] == pytest.approx(0.002)
    assert 0.03 < spent[Stage.STRAGGLER.value] < spent[Stage.STRAGGLER.value] + spent[Stage.WIRE.value]


def test_an_older_table_is_ignored() -> None:
    world = World(2)
    newest = world.fabric.membership
    world.version = itertools.count(0)
    world.fabric.refresh()
    assert world.fabric.membership == newest


def test_a_group_with_a_new_incarnation_gets_a_new_link() -> None:
    world = World(2)
    before = world.fabric.link(1)
    world.infos[1] = GroupInfo(1, "", "born-again", world.infos[1].holdings, "f", "fp32")
    world.fabric.refresh()
    after = world.fabric.link(1)
    assert after is not before
    assert before.closed
    (status, reconnects) = world.fabric.link_states()[1]
    assert (status.kind, status.healthy, reconnects) == ("fake", True, 1)
