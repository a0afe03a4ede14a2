from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from cluster.core import Deadline, GroupInfo, Membership
from cluster.experts.group import ExpertGroup
from cluster.model.ahead import AheadOfTime, shared_experts_of
from cluster.model.kv import KvStore
from cluster.model.packed import Chunk
from cluster.model.trunk import Trunk
from cluster.placement.planner import plan_blocks, table_from_groups
from cluster.routing.caller import Caller
from cluster.routing.dispatcher import Dispatcher
from cluster.routing.fabric import Fabric
from cluster.routing.step import StepContext
from cluster.transport.inproc import InprocTransport
from cluster.weights.checkpoint import Checkpoint
from tests.conftest import MakeTiny
from tests.systems import config_for, experts_per_layer


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.calls = nn.Linear(6, 6), 0

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.linear(hidden)  # type: ignore[no-any-return]


class Block(nn.Module):
    """``order`` "after" or "before"; "changed" writes to the input between."""

    def __init__(self, order: str) -> None:
        super().__init__()
        self.experts, self.shared_experts, self.order = nn.Identity(), Shared(), order

    def forward(self, hidden: torch.Tensor, asked: Any) -> torch.Tensor:
        if self.order == "before":
            shared = self.shared_experts(hidden)
            asked(hidden.view(-1, 6))
            return shared  # type: ignore[no-any-return]
        asked(hidden.view(-1, 6))
        if self.order == "changed":
            hidden.mul_(2)
        return self.shared_experts(hidden)  # type: ignore[no-any-return]


@pytest.mark.parametrize("order", ["after", "before", "changed"])
@torch.inference_mode()
def test_only_shared_experts_that_come_behind_with_the_same_input_run_ahead(order: str) -> None:
    block = Block(order)
    assert shared_experts_of(block, block.experts) is block.shared_experts
    ahead = AheadOfTime(block.shared_experts)
    for tokens in (8, 1, 5, 5):
        hidden = torch.randn(1, tokens, 6)
        wanted = block.shared_experts.linear(hidden * (2 if order == "changed" else 1))
        calls = block.shared_experts.calls
        got = block(hidden, ahead.run)
        assert torch.equal(got, wanted)
        if tokens < 8:
            assert block.shared_experts.calls == calls + 1, "once, ahead or in its own time"
    assert ahead.proven == (order == "after")


@torch.inference_mode()
def test_a_result_is_used_for_its_own_input_only() -> None:
    block = Block("after")
    ahead = AheadOfTime(block.shared_experts)
    block(torch.randn(1, 4, 6), ahead.run)
    ahead.run(torch.randn(4, 6))
    other = torch.randn(1, 4, 6)
    assert torch.equal(block.shared_experts(other), block.shared_experts.linear(other))


@pytest.mark.parametrize(("arch", "overlaps"), [("deepseek_v3", True), ("qwen2_moe", False), ("mixtral", False)])
def test_models_overlap_where_their_code_allows(arch: str, overlaps: bool, tiny: MakeTiny) -> None:
    path = tiny(arch)
    per_layer, config = experts_per_layer(path), config_for(path)
    group = ExpertGroup(0, plan_blocks(per_layer, 1)[0], config, threads=1, listen=False)
    infos = {0: group.info()}

    def link(info: GroupInfo, _deadline: Deadline) -> InprocTransport:
        return InprocTransport(info.group, group.host)

    fabric = Fabric(lambda: Membership(table_from_groups(1, 1, per_layer, infos.values()), infos), link)
    fabric.refresh()
    ahead: list[AheadOfTime] = []
    dispatcher = Dispatcher(fabric, torch.float32, Caller(fabric, 10.0, 1.0))

    def dispatch(step: StepContext, layer: int, *tensors: torch.Tensor, **_: object) -> torch.Tensor:
        *given, meanwhile = tensors
        if meanwhile is not None:
            ahead.append(meanwhile.func.__self__)  # type: ignore[attr-defined]
        return dispatcher(step, layer, *given, meanwhile)  # type: ignore[arg-type]

    trunk, _ = Trunk.load(Checkpoint(path), torch.float32, torch.device("cpu"), dispatch)
    trunk.store = KvStore(1, 8)
    for tokens in (8, 3):
        trunk.forward([Chunk(range(tokens), 0, [0])], StepContext(0))
    assert bool(ahead) == (arch != "mixtral")
    assert all(its.proven == overlaps for its in ahead)
    fabric.close()
    group.close()
