"""Gates and rotary embeddings in one compiled call compute what modules of a model do."""

from __future__ import annotations

from types import MethodType
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.gpt_oss import modeling_gpt_oss
from transformers.models.mixtral import modeling_mixtral
from transformers.models.qwen3_moe import modeling_qwen3_moe

from cluster.kernels.gate import FastGate
from cluster.kernels.rotary import FastRotary
from cluster.model.faster import speed_up_gates, speed_up_rotary


class Gate(nn.Module):
    """The gate of most models; ``kind`` makes it another one."""

    def __init__(self, experts: int, hidden: int, top_k: int, normalise: bool = True, kind: str = "") -> None:
        super().__init__()
        self.weight, self.top_k = nn.Parameter(torch.randn(experts, hidden) / hidden**0.5), top_k
        self._normalise, self._kind = normalise, kind

    def forward(self, hidden: torch.Tensor) -> Any:
        scores = hidden.reshape(-1, hidden.shape[-1]) @ self.weight.T
        shares = scores.sigmoid() if self._kind == "sigmoid" else scores.softmax(-1)
        if self._kind == "last":
            shares = 1 - shares
        values, index = shares.topk(self.top_k)
        if self._normalise:
            values = values / values.sum(-1, keepdim=True)
        if self._kind == "scaled":
            values = values * 1.5
        return (scores, values, index) if self._kind != "two" else (values, index)


@pytest.mark.parametrize("rows", [1, 2, 7, 64, 700])
@pytest.mark.parametrize(
    ("experts", "hidden", "top_k", "normalise"),
    [
        (8, 64, 2, True),
        (16, 64, 4, False),
        (32, 1024, 4, True),
        (128, 96, 8, True),
        (4, 32, 4, False),
        (256, 64, 1, False),
    ],
)
@torch.inference_mode()
def test_a_gate_chooses_as_the_module_does(rows: int, experts: int, hidden: int, top_k: int, normalise: bool) -> None:
    gate = Gate(experts, hidden, top_k, normalise)
    fast = FastGate.of(gate)
    assert fast is not None
    x = torch.randn(1, rows, hidden)
    scores, weights, index = fast(x)
    wanted_scores, wanted_weights, wanted_index = gate(x)
    assert index.dtype is torch.int64
    assert torch.allclose(scores, wanted_scores, atol=1e-5)
    assert torch.allclose(weights, wanted_weights, atol=1e-5)
    parted = (index != wanted_index).any(-1)
    assert int(parted.sum()) <= 1 + rows // 100  # near ties
    shares = wanted_scores.softmax(-1)
    assert torch.allclose(shares.gather(-1, index), shares.gather(-1, wanted_index), atol=1e-5)


@pytest.mark.parametrize("kind", ["sigmoid", "last", "scaled", "two"])
def test_another_gate_is_left_as_it_is(kind: str) -> None:
    assert FastGate.of(Gate(16, 64, 4, kind=kind)) is None
    assert FastGate.of(Gate(16, 64, 4).half()) is None
    assert FastGate.of(Gate(16, 60, 4)) is None  # not whole registers
    assert FastGate.of(nn.Linear(64, 16)) is None
    for forward in (lambda hidden, bias: hidden, lambda hidden: (hidden, None, hidden), lambda hidden: hidden + None):
        gate = Gate(16, 64, 4)
        gate.forward = forward  # type: ignore[method-assign]
        assert FastGate.of(gate) is None


@torch.inference_mode()
def test_a_gate_takes_the_first_of_equal_experts_and_survives_what_is_no_number() -> None:
    gate = Gate(8, 32, 3)
    fast = FastGate.of(gate)
    assert fast is not None
    gate.weight[:] = gate.weight[0].clone()
    x = torch.randn(4, 32)
    x[2, 5] = float("nan")
    _, weights, index = fast(x)
    assert index[0].tolist() == index[1].tolist() == index[3].tolist() == [0, 1, 2]
    assert weights[2].isnan().any()
    assert sorted(set(index[2].tolist())) == sorted(index[2].tolist()), "each expert once"
    assert int(index.min()) >= 0
    assert int(index.max()) < 8


@torch.inference_mode()
def test_rows_that_a_gate_cannot_take_are_the_modules_own() -> None:
    gate = Gate(8, 64, 2)
    fast = FastGate.of(gate)
    assert fast is not None
    apart = torch.randn(6, 128)[:, ::2]
    for got, wanted in zip(fast(apart), gate(apart), strict=True):
        assert torch.allclose(got.float(), wanted.float(), atol=1e-5)


Shape = tuple[int, int, int, int]


@pytest.mark.parametrize("shape", [(1, 4, 2, 16), (3, 4, 4, 64), (90, 16, 4, 64), (700, 2, 1, 128), (5, 3, 1, 6)])
@pytest.mark.parametrize("dense", [False, True])
@torch.inference_mode()
def test_heads_are_turned_as_the_models_file_does(shape: Shape, dense: bool) -> None:
    rows, heads, kv_heads, dim = shape
    own = modeling_qwen3_moe.apply_rotary_pos_emb
    fast = FastRotary.of(own, dim)
    assert fast is not None
    query, key = torch.randn(1, rows, heads, dim).transpose(1, 2), torch.randn(1, rows, kv_heads, dim).transpose(1, 2)
    if dense:
        query, key = query.contiguous(), key.contiguous()
    before = query.clone(), key.clone()
    cos, sin = torch.randn(1, rows, dim), torch.randn(1, rows, dim)
    for got, wanted in zip(fast(query, key, cos, sin), own(query, key, cos, sin), strict=True):
        assert got.shape == wanted.shape
        assert torch.allclose(got, wanted, rtol=1e-5, atol=1e-5)
    assert torch.equal(query, before[0])  # what was given stays as it was
    assert torch.equal(key, before[1])


@torch.inference_mode()
def test_what_a_rotary_embedding_cannot_take_is_the_functions_own() -> None:
    own = modeling_mixtral.apply_rotary_pos_emb
    fast = FastRotary.of(own, 16)
    assert fast is not None
    query, key = torch.randn(2, 4, 5, 16), torch.randn(2, 2, 5, 16)  # two at once
    cos, sin = torch.randn(2, 5, 16), torch.randn(2, 5, 16)
    for a, b in zip(fast(query, key, cos, sin), own(query, key, cos, sin), strict=True):
        assert torch.equal(a, b)
    doubles = [t[:1].double() for t in (query, key, cos, sin)]
    for a, b in zip(fast(*doubles), own(*doubles), strict=True):
        assert torch.equal(a, b)


def test_another_rotary_embedding_is_left_as_it_is() -> None:
    assert FastRotary.of(modeling_gpt_oss.apply_rotary_pos_emb, 16) is None  # its angles are half as many
    assert FastRotary.of(lambda q, k, cos, sin: (q * cos[:, None] + q * sin[:, None], k), 16) is None
    assert FastRotary.of(modeling_qwen3_moe.apply_rotary_pos_emb, 15) is None


@torch.inference_mode()
def test_a_model_computes_the_same_afterwards_and_others_are_not_touched() -> None:
    config = modeling_qwen3_moe.Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        intermediate_size=64,
        norm_topk_prob=True,
    )
    model, other = modeling_qwen3_moe.Qwen3MoeForCausalLM(config).eval(), modeling_qwen3_moe.Qwen3MoeForCausalLM(config)
    ids = torch.randint(0, 64, (1, 9))
    wanted = model(ids).logits
    speed_up_gates(model)
    speed_up_rotary(model)
    changed = [module for module in model.modules() if "forward" in module.__dict__]
    assert [type(module.__dict__["forward"]) for module in changed] == [MethodType, FastGate] * 2
    assert torch.allclose(model(ids).logits, wanted, rtol=1e-4, atol=1e-5)
    assert not any("forward" in module.__dict__ for module in other.modules())
    assert modeling_qwen3_moe.Qwen3MoeAttention.forward.__globals__ is modeling_qwen3_moe.__dict__
