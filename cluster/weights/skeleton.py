"""transformers' own model of a checkpoint without its weights, and where its routed experts are.

Parameters are on the meta device; buffers are real (accelerate's ``init_empty_weights``), so rotary frequencies,
which no checkpoint holds, are what the model's own constructor computes. What cannot be served exactly is refused
here by name, before any weight is read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import AutoModelForCausalLM
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from cluster.errors import CheckpointError, UnsupportedModel
from cluster.weights.checkpoint import Checkpoint

EXPERT_PARAMETERS = frozenset(
    {"gate_up_proj", "up_proj", "down_proj", "gate_up_proj_bias", "up_proj_bias", "down_proj_bias"}
)


@dataclass(frozen=True, slots=True)
class MoeLayer:
    """One layer with routed experts: ``layer`` numbers MoE layers only, ``prefix`` is its module's name."""

    layer: int
    prefix: str
    module: Any
    num_experts: int


@dataclass(frozen=True, slots=True)
class Skeleton:
    """A model without weights. ``context_length`` is how many tokens are served exactly, and ``context_why`` says
    what limits it."""

    model: Any
    moe_layers: tuple[MoeLayer, ...]
    experts_per_token: int
    context_length: int
    context_why: str

    @property
    def num_experts(self) -> int:
        """Routed experts of the layer that has the most."""
        return max(layer.num_experts for layer in self.moe_layers)

    def expert_prefixes(self) -> tuple[str, ...]:
        """Parameter-name prefixes that belong to routed experts."""
        return tuple(layer.prefix + "." for layer in self.moe_layers)


def build_skeleton(
    checkpoint: Checkpoint, dtype: torch.dtype, attention: str = "eager", experts: str = "eager"
) -> Skeleton:
    """The model of ``checkpoint`` with parameters on the meta device in ``dtype``.

    ``attention`` and ``experts`` are names registered with transformers' attention and experts interfaces.

    Raises:
        UnsupportedModel: the model cannot be served exactly.
    """
    config, arch = checkpoint.config, checkpoint.arch
    _check_cache(checkpoint)
    try:
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation=attention, experts_implementation=experts
            )
    except Exception as exc:
        raise UnsupportedModel(
            f"--model: {arch}: transformers cannot build it: {' '.join(str(exc).split())[:200]}"
        ) from exc
    model.eval()
    empty = [name for name, parameter in model.named_parameters() if parameter.numel() == 0]
    if empty:
        raise CheckpointError(f"--model: {arch}: the config gives {empty[0]!r} no elements; a size in it is 0")
    modules = [
        (name, module)
        for name, module in model.named_modules()
        if hasattr(module, "has_gate") and hasattr(module, "is_transposed") and hasattr(module, "num_experts")
    ]
    if not modules:
        raise UnsupportedModel(
            f"--model: {arch} has no routed experts behind transformers' experts interface; only mixture-of-experts "
            "models that use it can be served"
        )
    layers = []
    for index, (name, module) in enumerate(modules):
        unknown = {key for key, _ in module.named_parameters()} - EXPERT_PARAMETERS
        if unknown or module.has_post_expert_norm:
            what = ", ".join(sorted(unknown)) or "a norm after each expert"
            raise UnsupportedModel(f"--model: {arch}: its experts have {what}, which expert groups do not compute")
        layers.append(MoeLayer(index, name, module, int(module.num_experts)))
    text_config = config.get_text_config(decoder=True)
    if (
        not getattr(text_config, "is_causal", True)
        or getattr(text_config, "use_bidirectional_attention", None) == "all"
    ):
        raise UnsupportedModel(f"--model: {arch}: its config asks for attention to later tokens; only causal is served")
    per_token = next(
        (
            int(value)
            for key in ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "moe_top_k")
            if isinstance(value := getattr(text_config, key, None), int)
        ),
        0,
    )
    length, why = _context_length(text_config)
    return Skeleton(model, tuple(layers), per_token, length, why)


def _check_cache(checkpoint: Checkpoint) -> None:
    """Refuses models whose cache is more than keys and values a token, as transformers itself would build it."""
    try:
        cache = DynamicCache(config=checkpoint.config)
    except Exception as exc:
        raise UnsupportedModel(
            f"--model: {checkpoint.arch}: transformers builds no plain key-value cache for it: {exc}"
        ) from exc
    foreign = {type(layer).__name__ for layer in cache.layers} - {
        DynamicLayer.__name__,
        DynamicSlidingWindowLayer.__name__,
    }
    if foreign:
        raise UnsupportedModel(
            f"--model: {checkpoint.arch} caches more than keys and values a token ({', '.join(sorted(foreign))}); "
            "state-space, linear-attention, convolution and indexer caches are not served"
        )


def _context_length(config: Any) -> tuple[int, str]:
    """Tokens up to which the rotary frequencies do not depend on what else is in the batch.

    ``longrope`` and ``dynamic`` scaling switch frequencies with the longest sequence of a *batch* (transformers'
    ``dynamic_rope_update``); below the switch they are constant, so that is as far as such a model is served.
    """
    length = int(getattr(config, "max_position_embeddings", 0) or 2**20)
    why = "max_position_embeddings"
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)] or [parameters]
    for rope in nested:
        kind = rope.get("rope_type", "default")
        original = rope.get("original_max_position_embeddings") or getattr(
            config, "original_max_position_embeddings", None
        )
        if kind == "longrope" and original and int(original) < length:
            length, why = int(original), f"original_max_position_embeddings of {kind} rotary scaling"
    return length, why


def missing_message(checkpoint: Checkpoint, names: list[str]) -> CheckpointError:
    """The error for parameters that no tensor of the checkpoint fills."""
    shown = ", ".join(repr(name) for name in names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return CheckpointError(f"--model: {str(checkpoint.path)!r} lacks the weights of {shown}")
