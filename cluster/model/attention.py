"""Attention over a packed batch: each sequence by itself, with the model's own eager function or a faster one; those
with one token together (on GPUs `together`, on CPUs `cluster.kernels.attention`), or all at once (`ragged`).

The eager function takes masks, sinks and whatever else the architecture has. torch's scaled dot-product attention is
faster and knows masks only; a layer uses it after it gave the same result as the eager one, once with one token and
once with several.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.nn.functional as F

from cluster.kernels.attention import Histories, attend, can_attend
from cluster.kernels.chunks import FEWEST, attend_causal, scratch_bytes
from cluster.model import ragged
from cluster.model.packed import Span, Step, current_step
from cluster.model.together import Bundle

PIECE_LIMIT = 2 * 1024 * 1024
"""Rows times keys of one eager call: scores of 32 heads in fp32 stay under 256 MiB."""
SCRATCH_LIMIT = 512 * 1024**2
"""Bytes that causal attention of a chunk may take beside; with more, torch's is used."""
TOLERANCE = 3e-6
"""Of the largest value: what fp32 sums in another order differ by."""
HARMLESS = frozenset(
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
"""Arguments that say nothing that the mask does not."""

_BATCHABLE = HARMLESS | {"s_aux"}
"""Arguments of an eager function that say nothing of single tokens, so that it may be called for several sequences."""


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
    call = _Call(module, query, key, value, current_step(), attention_mask, args, kwargs)
    together = call.of_all()
    if together is None:
        together = call.of_histories()
    if together is not None:
        return together, None
    bundles, spans = call.bundles(), call.batch.spans
    if not bundles:
        return call.of_spans(), None
    outputs = [(bundle, call.of_bundle(number, bundle)) for number, bundle in enumerate(bundles)]
    total = outputs[0][1].new_empty((1, query.shape[2], *outputs[0][1].shape[2:]))
    for bundle, output in outputs:
        bundle.put(total, output)
    for number, span in enumerate(spans):
        if span.num_rows > 1:
            total[:, span.first : span.last] = call.of_span(number, span)
    return total, None


class _Call:
    """One layer's attention over the batch."""

    def __init__(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        step: Step,
        attention_mask: torch.Tensor | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        self._module, self._query, self._key, self._value = module, query, key, value
        self._args, self._kwargs = args, kwargs
        self.batch, self._known = step.batch, step.cache.known
        self._direct = step.cache.is_direct(key, value)
        self._layer = step.cache.layer
        self._mask = self.batch.mask_of(attention_mask)
        self._plain = self._only(HARMLESS)
        self._fast = self._known.fast.get(self._layer, False) and self._plain

    def _only(self, names: frozenset[str]) -> bool:
        """No arguments but these."""
        return not self._args and all(name in names or extra is None for name, extra in self._kwargs.items())

    def bundles(self) -> list[Bundle]:
        """Sequences to be computed together, once it is known how."""
        known = self._layer in self._known.fast and self._only(_BATCHABLE)
        return self.batch.bundles() if known else []

    def of_all(self) -> torch.Tensor | None:
        """[1, T, heads, dim] of all sequences in one call; None where that is not known to be the same."""
        if not (self.batch.together and self._fast and self._known.ragged.get(self._layer, False)):
            return None
        if not self._mask.all_causal():
            return None
        all_rows = self.batch.ragged()
        if self._direct:
            stored = self.batch.store.layer(self._layer)
            if self.batch.num_keys * sum(kept[0].nbytes for kept in stored) > ragged.MOST_BYTES:
                return None
            keys, values = (kept.index_select(0, all_rows.at_S) for kept in stored)
        else:
            keys, values = self._key[0].transpose(0, 1), self._value[0].transpose(0, 1)
        return all_rows.attend(self._query, keys, values, self._kwargs["scaling"])

    def of_histories(self) -> torch.Tensor | None:
        """[1, T, heads, dim]: sequences with one token each read from the store where they lie, the others one by one;
        None where there are none such, or this layer's attention is not known to be the same."""
        if self.batch.together or not (self._fast and self._known.paged.get(self._layer, False)):
            return None
        histories = self._mask.histories()
        if histories is None:
            return None
        keys, values = self.batch.store.layer(self._layer)
        result = self._query.new_empty((1, self._query.shape[2], self._query.shape[1], values.shape[2]))
        attend(self._query, keys, values, histories, self._kwargs["scaling"], result)
        for number, span in enumerate(self.batch.spans):
            if number not in histories.of:
                self.put_span(result, number, span)
        return result

    def of_spans(self) -> torch.Tensor:
        """[1, T, heads, dim], one sequence after the other."""
        spans = self.batch.spans
        if not any(self._is_causal(number, span) for number, span in enumerate(spans)):
            parts = [self.of_span(number, span) for number, span in enumerate(spans)]
            return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        total = self._query.new_empty((1, self._query.shape[2], self._query.shape[1], self._value.shape[3]))
        for number, span in enumerate(spans):
            self.put_span(total, number, span)
        return total

    def put_span(self, total: torch.Tensor, number: int, span: Span) -> None:
        """A sequence's rows of ``total`` [1, T, heads, dim]; many tokens that see all before them are read from the
        store where they lie."""
        place = total[:, span.first : span.last]
        if not self._is_causal(number, span):
            place.copy_(self.of_span(number, span))
            return
        keys, values = self.batch.store.layer(self._layer)
        own = self._query[:, :, span.first : span.last]
        attend_causal(own, keys, values, span.runs, self._kwargs["scaling"], place)

    def _is_causal(self, number: int, span: Span) -> bool:
        known = self._fast and self._known.causal.get(self._layer, False)
        if not known or span.num_rows < FEWEST or not self._mask.is_causal(number):
            return False
        kv_heads, dim = self.batch.store.layer(self._layer)[0].shape[1:]
        return scratch_bytes(span.num_rows, span.total, self._query.shape[1], kv_heads, dim) <= SCRATCH_LIMIT

    def of_bundle(self, number: int, bundle: Bundle) -> torch.Tensor:
        """[B, 1, heads, dim]."""
        if self._direct:
            keys, values = self.batch.store.read_at(self._layer, bundle.at(in_store=True))
        else:
            at_BS = bundle.at(in_store=False)
            keys, values = _pick(self._key, at_BS), _pick(self._value, at_BS)
        own = bundle.queries(self._query)
        if self._fast:
            # One token each: heads that share a key are rows of one product, and nothing is copied for each of them.
            shape = (*keys.shape[:2], -1, own.shape[3])
            allowed, scaling = self._mask.allowed_together(number), self._kwargs["scaling"]
            output = F.scaled_dot_product_attention(own.reshape(shape), keys, values, allowed, scale=scaling)
            return output.reshape(len(own), 1, own.shape[1], values.shape[3])
        mask = self._mask.additive_together(number)
        return _eager(self._module, own, keys, values, mask, self._args, self._kwargs)

    def of_span(self, number: int, span: Span) -> torch.Tensor:
        """[1, t, heads, dim]."""
        key, value, alone = self._key, self._value, len(self.batch.spans) == 1
        own = self._query if alone else self._query[:, :, span.first : span.last]
        if self._direct:
            keys, values = self.batch.store.read(self._layer, span.runs)
        elif alone:
            keys, values = key, value
        else:
            keys, values = key[:, :, span.key_first : span.key_last], value[:, :, span.key_first : span.key_last]
        if self._fast:
            return _fast(own, keys, values, self._mask.allowed(number), self._kwargs["scaling"])
        if self._layer not in self._known.fast:
            self._learn(number, own, keys, values)
        mask = self._mask.additive(number)
        return _eager(self._module, own, keys, values, mask, self._args, self._kwargs)

    def _learn(self, number: int, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Compares both ways on the model's own values, in fp32 whatever their dtype; decides when both shapes of a
        step have been seen."""
        known, layer, kwargs = self._known, self._layer, self._kwargs
        if not (self._plain and "scaling" in kwargs) or values.shape[-1] != query.shape[-1]:
            known.fast[layer] = False
            return
        halves = query, keys, values
        query, keys, values = query.float(), keys.float(), values.float()
        expected = _eager(self._module, query, keys, values, self._mask.additive(number).float(), (), kwargs)
        got = _fast(query, keys, values, self._mask.allowed(number), kwargs["scaling"])
        if query.shape[2] == 1 and self._mask.allowed(number) is None:
            self._learn_stored(number, expected, self._known.paged)
        elif query.shape[2] > 1 and self._mask.is_causal(number):
            self._learn_stored(number, expected, self._known.causal)
        if self._mask.is_causal(number):
            same = known.ragged.get(layer, True) and self._is_same_ragged(number, halves, expected)
            known.ragged[layer] = same
        if got.shape != expected.shape or float((got - expected).abs().max()) > TOLERANCE * float(expected.abs().max()):
            known.fast[layer] = False
            return
        known.checked.setdefault(layer, set()).add(query.shape[2] == 1)
        if len(known.checked[layer]) == 2:
            known.fast[layer] = True

    def _is_same_ragged(self, number: int, halves: tuple[torch.Tensor, ...], expected: torch.Tensor) -> bool:
        """Whether torch's attention of all sequences gives of this one what the layer's own does in fp32."""
        query, keys, values = halves
        if not ragged.can_attend(query):
            return False
        span = self.batch.spans[number]
        try:
            alone = ragged.Ragged([span.num_rows], [[(0, span.total)]], query.device)
            got = alone.attend(query, keys[0].transpose(0, 1), values[0].transpose(0, 1), self._kwargs["scaling"])
        except (RuntimeError, TypeError, ValueError):
            return False
        return bool((got.float() - expected).abs().max() <= ragged.TOLERANCE * expected.abs().max())

    def _learn_stored(self, number: int, expected: torch.Tensor, found: dict[int, bool]) -> None:
        """Whether reading one sequence from the store gives what the layer's own attention does."""
        span, scaling = self.batch.spans[number], self._kwargs["scaling"]
        keys, values = self.batch.store.layer(self._layer)
        own = self._query[:, :, span.first : span.last]
        same = self._direct and scaling > 0 and can_attend(own, keys, values)
        if same:
            got = torch.empty(expected.shape, dtype=torch.float32)
            if found is self._known.causal:
                attend_causal(own, keys, values, span.runs, scaling, got)
            else:
                attend(own, keys, values, Histories([0], [span.runs]), scaling, got)
            same = bool((got - expected).abs().max() <= TOLERANCE * expected.abs().max())
        found[self._layer] = same and found.get(self._layer, True)


def _pick(histories: torch.Tensor, at_BS: torch.Tensor) -> torch.Tensor:
    """[B, heads, S, dim] of [1, heads, all histories, dim]."""
    return histories[0][:, at_BS].transpose(0, 1)


def _fast(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, allowed: torch.Tensor | None, scaling: float
) -> torch.Tensor:
    gqa = query.shape[1] != keys.shape[1]
    rows = query.shape[2]
    # On GPUs masked grouped heads may go through plain products, whose scores take memory as those of eager ones do.
    at_once = rows if query.is_cpu else max(1, PIECE_LIMIT // keys.shape[2])
    parts = []
    for first in range(0, rows, at_once):
        piece = slice(first, first + at_once)
        seen = None if allowed is None else allowed[piece]
        part = F.scaled_dot_product_attention(query[:, :, piece], keys, values, seen, scale=scaling, enable_gqa=gqa)
        parts.append(part.transpose(1, 2))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


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
