"""The hook into transformers: how its models reach the dispatcher, and which attention they run.

Registered under one name with three public interfaces of transformers (experts, attention, attention masks); models
built with that name call these functions, other models in the process are not touched.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.masking_utils import AttentionMaskInterface

from cluster.errors import UnsupportedModel
from cluster.model.attention import attention
from cluster.model.packed import packed_mask

NAME = "expertmesh"

ExpertsHook = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(hidden [T, H], expert index [T, K], gate weight [T, K]) -> [T, H]."""


def register() -> None:
    """Makes the name known to transformers. May be called more than once."""
    ALL_EXPERTS_FUNCTIONS.register(NAME, _experts)
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, packed_mask)


def attach(experts_module: Any, hook: ExpertsHook) -> None:
    """Routes the calls of one experts module to ``hook``."""
    # Around nn.Module.__setattr__, which would not mind either: this is no parameter, buffer or submodule.
    experts_module.__dict__["expertmesh_hook"] = hook


def check_attention(model: Any) -> None:
    """Refuses a model whose file has no eager attention function to call.

    Raises:
        UnsupportedModel: there is none.
    """
    if not hasattr(sys.modules[type(model).__module__], "eager_attention_forward"):
        raise UnsupportedModel(
            f"--model: {model.config.model_type}: its attention has no eager function that takes explicit masks"
        )


def _experts(
    module: Any, hidden_TH: torch.Tensor, index_TK: torch.Tensor, weight_TK: torch.Tensor, *_args: object
) -> torch.Tensor:
    hook: ExpertsHook = module.expertmesh_hook
    return hook(hidden_TH, index_TK, weight_TK)
