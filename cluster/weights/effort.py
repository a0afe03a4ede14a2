"""What a token of a prompt costs: weights that it goes through, and history that it attends to."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from cluster.weights.skeleton import Skeleton

ATTENTION_SPEED = 0.55
"""Arithmetic of attention a second over that of products with weights: 110 and 194 GFLOP/s on two cores, bench-700m."""


def history_tokens(skeleton: Skeleton) -> int:
    """Tokens of history that cost a token of a prompt as much time as the weights do; 0 where the configuration does
    not say what heads there are. Sliding windows are taken for whole histories."""
    config = skeleton.model.config
    heads, layers = _number(config, "num_attention_heads"), _number(config, "num_hidden_layers")
    if not heads or not layers:
        return 0
    key = _number(config, "qk_nope_head_dim") + _number(config, "qk_rope_head_dim") or _number(config, "head_dim")
    key = key or _number(config, "hidden_size") // heads
    value = _number(config, "v_head_dim") or key
    each_key = layers * heads * (key + value)
    return round(_weights_of_a_token(skeleton) / each_key * ATTENTION_SPEED) if each_key else 0


def _weights_of_a_token(skeleton: Skeleton) -> int:
    """Of linear layers and routed experts that each token goes through. The head sees only tokens that sample."""
    model, experts = skeleton.model, skeleton.expert_prefixes()
    head = model.get_output_embeddings()
    total = sum(
        module.weight.numel()
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head and not f"{name}.".startswith(experts)
    )
    for layer in skeleton.moe_layers:
        each = sum(math.prod(p.shape[1:]) for p in layer.module.parameters())
        total += min(skeleton.experts_per_token, layer.num_experts) * each
    return total


def _number(config: Any, name: str) -> int:
    value = getattr(config, name, None)
    return value if isinstance(value, int) else 0
