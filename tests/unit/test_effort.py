"""What a token of a prompt costs, from a model's own layers."""

from __future__ import annotations

import pytest
import torch

from cluster.weights.checkpoint import Checkpoint
from cluster.weights.effort import ATTENTION_SPEED, history_tokens
from cluster.weights.skeleton import build_skeleton
from cluster.weights.zoo import architectures
from tests.conftest import MakeTiny


def test_weights_of_a_token_over_what_a_token_of_history_costs(tiny: MakeTiny) -> None:
    skeleton = build_skeleton(Checkpoint(str(tiny("mixtral"))), torch.float32)
    config = skeleton.model.config
    hidden, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    dim = hidden // heads
    attention = hidden * dim * (2 * heads + 2 * kv_heads)
    experts = config.num_experts_per_tok * 3 * hidden * inner
    gate = sum(p.numel() for n, p in skeleton.model.named_parameters() if n.endswith("layers.0.mlp.gate.weight"))
    expected = (attention + experts) / (heads * 2 * dim) * ATTENTION_SPEED
    assert history_tokens(skeleton) == pytest.approx(expected, rel=0.02, abs=gate / (heads * 2 * dim) + 1)
    assert layers > 1


@pytest.mark.parametrize("arch", architectures())
def test_every_architecture_says_what_history_costs(arch: str, tiny: MakeTiny) -> None:
    skeleton = build_skeleton(Checkpoint(str(tiny(arch))), torch.float32)
    assert history_tokens(skeleton) > 0
