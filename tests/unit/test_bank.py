from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from cluster.errors import InvalidArgument, MissingExperts
from cluster.experts.bank import ExpertBank
from cluster.transport.base import LayerRows
from cluster.weights.checkpoint import Checkpoint
from cluster.weights.mapping import WeightMap
from cluster.weights.skeleton import build_skeleton
from cluster.weights.zoo import architectures
from tests.conftest import MakeTiny

CPU = torch.device("cpu")


def bank(path: object, holdings: list[list[int]] | None = None) -> ExpertBank:
    checkpoint = Checkpoint(str(path))
    weights = WeightMap(checkpoint, build_skeleton(checkpoint, torch.float32))
    held = holdings or [list(range(layer.num_experts)) for layer in weights.skeleton.moe_layers]
    return ExpertBank.load(7, weights, held, torch.float32, CPU)


def pairs(index_TK: torch.Tensor, weight_TK: torch.Tensor, hidden_TH: torch.Tensor) -> LayerRows:
    num_tokens, top_k = index_TK.shape
    rows = torch.arange(num_tokens, dtype=torch.int32).repeat_interleave(top_k)
    return LayerRows.of(hidden_TH, rows, index_TK.flatten(), weight_TK.flatten())


@pytest.mark.parametrize("arch", architectures())
def test_experts_compute_what_transformers_own_experts_do(arch: str, tiny: MakeTiny) -> None:
    path = tiny(arch)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, experts_implementation="eager")
    modules = [m for m in model.modules() if hasattr(m, "has_gate") and hasattr(m, "num_experts")]
    ours = bank(path)
    hidden_TH = torch.randn(20, 64)
    for layer, module in enumerate(modules):
        index_TK = torch.stack([torch.randperm(module.num_experts)[:3] for _ in range(20)])
        weight_TK = torch.rand(20, 3)
        with torch.inference_mode():
            wanted = module(hidden_TH, index_TK, weight_TK)
        got = ours.compute(layer, pairs(index_TK, weight_TK, hidden_TH))
        assert torch.allclose(got, wanted, atol=1e-5 * float(wanted.std()), rtol=1e-4)
    assert ours.num_bytes == sum(p.numel() * 4 for m in modules for p in m.parameters())


def test_a_group_never_computes_an_expert_that_it_does_not_hold(tiny: MakeTiny) -> None:
    ours = bank(tiny("mixtral"), [[0, 2], [1], [0]])
    rows = pairs(torch.tensor([[0, 2], [2, 3], [5, 0]]), torch.rand(3, 2), torch.randn(3, 64))
    with pytest.raises(MissingExperts, match=r"group 7 does not hold experts \[3, 5\] of MoE layer 0"):
        ours.compute(0, rows)


@pytest.mark.parametrize(
    ("field", "value"), [("pair_row_P", 3), ("pair_row_P", -1), ("pair_expert_P", 8), ("pair_expert_P", -1)]
)
def test_indices_are_checked_before_use(field: str, value: int, tiny: MakeTiny) -> None:
    ours = bank(tiny("mixtral"))
    rows = pairs(torch.tensor([[0, 2], [2, 3], [5, 0]]), torch.rand(3, 2), torch.randn(3, 64))
    getattr(rows, field)[1] = value
    with pytest.raises(InvalidArgument):
        ours.compute(0, rows)
    with pytest.raises(InvalidArgument, match="layer"):
        ours.compute(99, rows)


def test_a_call_without_rows_or_pairs_has_an_answer(tiny: MakeTiny) -> None:
    ours = bank(tiny("mixtral"))
    empty = pairs(torch.empty(0, 2, dtype=torch.int64), torch.empty(0, 2), torch.empty(0, 64))
    assert ours.compute(0, empty).shape == (0, 64)
