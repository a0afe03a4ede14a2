"""Attention over a packed batch: each sequence by itself, with the model's own eager function or a faster one.

The eager function takes masks, sinks and whatever else the architecture has. torch's scaled dot-product attention is
faster and knows masks only; a layer uses it after it gave the same result as the eager one, once with one token and
once with several.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.nn.functional as F

from cluster.model.packed import Step, current_step

PIECE_LIMIT = 2 * 1024 * 1024
"""Rows times keys of one eager call: scores of 32 heads in fp32 stay under 256 MiB."""
TOLERANCE = 3e-6
"""Of the largest value: what fp32 sums in another order differ by."""
_HARMLESS = frozenset(
    {
        "dropout",
        "scaling",
        "sliding_window",  # is in the mask
        "position_ids",
        "cache_position",
        "use_cache",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "is_causal",
        "position_embeddings",
        "logits_to_keep",
    }
)


def attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *args: Any,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention function of transformers' interface, registered with the hook's own name.

    ``query`` is [1, heads, T, dim]; ``key`` and ``value`` are what the layer made of what the cache returned,
    [1, heads, S, dim] of all sequences. The result is [1, T, heads, dim].
    """
    step = current_step()
    batch, cache = step.batch, step.cache
    direct = cache.is_direct(key, value)
    layer = cache.layer
    mask = batch.mask_of(attention_mask)
    plain = not args and all(name in _HARMLESS or extra is None for name, extra in kwargs.items())
    fast = cache.known.fast.get(layer, False) and plain
    outputs = []
    for number, span in enumerate(batch.spans):
        own = query if len(batch.spans) == 1 else query[:, :, span.first : span.last]
        if direct:
            keys, values = batch.store.read(layer, span.runs)
        elif len(batch.spans) == 1:
            keys, values = key, value
        else:
            keys, values = key[:, :, span.key_first : span.key_last], value[:, :, span.key_first : span.key_last]
        if fast:
            outputs.append(_fast(own, keys, values, mask.allowed(number), kwargs["scaling"]))
            continue
        output = _eager(module, own, keys, values, mask.additive(number), args, kwargs)
        if layer not in cache.known.fast:
            _learn(step, layer, plain and "scaling" in kwargs, own, keys, values, number, mask, kwargs, output)
        outputs.append(output)
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1), None


def _fast(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, allowed: torch.Tensor | None, scaling: float
) -> torch.Tensor:
    gqa = query.shape[1] != keys.shape[1]
    output = F.scaled_dot_product_attention(query, keys, values, allowed, scale=scaling, enable_gqa=gqa)
    return output.transpose(1, 2)


def _eager(
    module: Any,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> torch.Tensor:
    eager: Any = sys.modules[type(module).__module__].eager_attention_forward
    rows, num_keys = query.shape[2], keys.shape[2]
    at_once = max(1, PIECE_LIMIT // num_keys)
    if rows <= at_once:
        result: torch.Tensor = eager(module, query, keys, values, mask, *args, **kwargs)[0]
        return result
    pieces = []
    for first in range(0, rows, at_once):
        piece = slice(first, min(first + at_once, rows))
        pieces.append(eager(module, query[:, :, piece], keys, values, mask[:, :, piece], *args, **kwargs)[0])
    return torch.cat(pieces, dim=1)


def _learn(
    step: Step,
    layer: int,
    candidate: bool,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    number: int,
    mask: Any,
    kwargs: dict[str, Any],
    expected: torch.Tensor,
) -> None:
    """Compares both ways on the model's own values; decides when both shapes of a step have been seen."""
    known = step.cache.known
    if not candidate or query.dtype is not torch.float32 or values.shape[-1] != query.shape[-1]:
        known.fast[layer] = False
        return
    got = _fast(query, keys, values, mask.allowed(number), kwargs["scaling"])
    if got.shape != expected.shape or float((got - expected).abs().max()) > TOLERANCE * float(expected.abs().max()):
        known.fast[layer] = False
        return
    known.checked.setdefault(layer, set()).add(query.shape[2] == 1)
    if len(known.checked[layer]) == 2:
        known.fast[layer] = True
