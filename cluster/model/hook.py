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
from cluster.model.packed import current_batch, packed_mask

NAME = "expertmesh"
PIECE_LIMIT = 2 * 1024 * 1024
"""Rows times keys of one call for one sequence: scores of 32 heads in fp32 stay under 256 MiB."""
WHOLE_BATCH_LIMIT = 128 * 1024
"""Rows times keys that one attention call may have: a decode step of 16 sequences of 500 tokens has as many."""

ExpertsHook = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(hidden [T, H], expert index [T, K], gate weight [T, K]) -> [T, H]."""


def register() -> None:
    """Makes the name known to transformers. May be called more than once."""
    ALL_EXPERTS_FUNCTIONS.register(NAME, _experts)
    AttentionInterface.register(NAME, _attention)
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


def _attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    *args: Any,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The model's own eager attention: it takes masks, sinks and whatever else the architecture has.

    ``query`` is [1, heads, T, dim], ``key`` and ``value`` [1, heads, S, dim] of all sequences, the mask [1, 1, T, S];
    the result is [1, T, heads, dim]. One call attends for the whole batch and throws away what crosses sequences;
    where that would be too much, there is one call a sequence, and for long ones several.
    """
    eager: Any = sys.modules[type(module).__module__].eager_attention_forward
    batch = current_batch()
    if query.shape[2] * key.shape[2] <= WHOLE_BATCH_LIMIT:
        return eager(module, query, key, value, attention_mask, *args, **kwargs)[0], None
    pieces = []
    for (start, end), (first, last) in zip(batch.spans, batch.key_spans, strict=True):
        keys, values = key[:, :, first:last], value[:, :, first:last]
        rows = max(1, PIECE_LIMIT // (last - first))
        for at in range(start, end, rows):
            piece = slice(at, min(at + rows, end))
            mask = attention_mask[:, :, piece, first:last]
            pieces.append(eager(module, query[:, :, piece], keys, values, mask, *args, **kwargs)[0])
    return torch.cat(pieces, dim=1), None
