"""What a group holds changes while it computes: exact before, meanwhile and afterwards."""

from __future__ import annotations

import dataclasses
import random
import threading
from typing import Any

import pytest
import torch

from cluster.errors import ConfigError, InvalidArgument, MissingExperts
from cluster.experts.bank import ExpertBank
from cluster.experts.compute import Compute
from cluster.experts.group import ExpertGroup, how_to_compute
from cluster.experts.reduced import RoundedExperts
from cluster.weights.zoo import architectures
from tests.conftest import MakeTiny
from tests.systems import config_for
from tests.unit.test_bank import bank, pairs, table

WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tiled": {"table": table(256)},
    "int8": {"expert_dtype": "int8"},
    "bf16": {"expert_dtype": "bf16"},
}


def answers(ours: ExpertBank, layer: int, experts: list[int], hidden_TH: torch.Tensor) -> torch.Tensor:
    found = []
    for expert in experts:  # each alone: a wrong slot shows
        alone = pairs(torch.full((len(hidden_TH), 1), expert), torch.ones(len(hidden_TH), 1), hidden_TH)
        found.append(ours.compute(layer, alone).cpu())
    return torch.stack(found)


@pytest.mark.parametrize("way", [*WAYS, "int8, packed", "bf16, packed"])
@pytest.mark.parametrize("arch", architectures())
def test_a_layer_that_grew_and_shrank_computes_what_a_fresh_one_does(
    arch: str, way: str, tiny: MakeTiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    way, _, packed = way.partition(", ")
    if packed:
        monkeypatch.setattr(RoundedExperts, "can_tile", False)
    path = tiny(arch)
    whole = bank(path, **WAYS[way])
    layers = len(whole.holdings)
    ours = bank(path, [[0, 2]] + [[1]] * (layers - 1), **WAYS[way])
    hidden_TH = torch.randn(5, 64)
    read = ours.hold(0, [3, 2, 1])
    assert read > 0
    assert ours.holdings[0] == (1, 2, 3)
    fresh = bank(path, [[1, 2, 3]] + [[1]] * (layers - 1), **WAYS[way])
    assert ours.num_bytes == fresh.num_bytes
    for expert in (1, 2, 3):
        wanted = answers(whole, 0, [expert], hidden_TH)
        assert torch.allclose(answers(ours, 0, [expert], hidden_TH), wanted, atol=1e-6, rtol=1e-5)
    with pytest.raises(MissingExperts, match=r"\[0\]"):
        answers(ours, 0, [0], hidden_TH)
    assert ours.hold(0, [3, 2, 1]) == 0, "held already"
    ours.hold(0, [])
    assert ours.holdings[0] == ()
    ours.hold(0, [0])
    assert torch.allclose(answers(ours, 0, [0], hidden_TH), answers(whole, 0, [0], hidden_TH), atol=1e-6, rtol=1e-5)
    for each in (whole, ours, fresh):
        each.close()


def test_what_does_not_exist_or_does_not_fit_is_refused_and_changes_nothing(tiny: MakeTiny) -> None:
    path = tiny("mixtral")
    whole = bank(path)
    each = whole.num_bytes // sum(len(held) for held in whole.holdings)
    ours = bank(path, [[0], [1], [0]], memory_bytes=4 * each)
    assert ours.store is None
    for layer, experts in ((9, [0]), (0, [999]), (0, [-1])):
        with pytest.raises(InvalidArgument):
            ours.hold(layer, experts)
    with pytest.raises(ConfigError, match="expert_memory"):
        ours.hold(0, [0, 1, 2, 3])
    assert ours.holdings[0] == (0,)
    ours.hold(0, [0, 1])
    assert ours.holdings[0] == (0, 1)


@pytest.mark.parametrize(("memory", "from_host"), [("all", False), ("200K", False), ("200K", True)])
def test_calls_go_on_right_while_experts_come_and_go(
    memory: str, from_host: bool, tiny: MakeTiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    def how(*args: Any) -> Compute:
        return dataclasses.replace(how_to_compute(*args), from_host=from_host)  # as beside a GPU

    monkeypatch.setattr("cluster.experts.group.how_to_compute", how)
    path = tiny("qwen3_moe")
    config = config_for(path, expert_memory=memory)
    whole = bank(path)
    held = tuple(tuple(range(0, len(layer), 2)) for layer in whole.holdings)
    group = ExpertGroup(0, held, config, threads=1, listen=False)
    assert (group.bank.store is not None) == (memory != "all")
    hidden_TH = torch.randn(4, 64)
    wanted = answers(whole, 0, [0], hidden_TH)
    wrong: list[float] = []
    stop = threading.Event()

    def calls() -> None:
        while not stop.is_set():
            wrong.append(float((answers(group.bank, 0, [0], hidden_TH) - wanted).abs().max()))

    caller = threading.Thread(target=calls)
    caller.start()
    try:
        every = list(whole.holdings[0])
        for _ in range(30):
            group.hold(0, [0, *random.sample(every, 3)]).result(timeout=20)
    finally:
        stop.set()
        caller.join()
    assert len(wrong) > 5
    assert max(wrong) < 1e-5
    group.hold(0, [0, every[-1]]).result(timeout=20)
    last = answers(whole, 0, [every[-1]], hidden_TH)
    assert torch.allclose(answers(group.bank, 0, [every[-1]], hidden_TH), last, atol=1e-6, rtol=1e-5)
    assert group.info().holdings[0] == (0, every[-1])
    group.close()
    whole.close()
