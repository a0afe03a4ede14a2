"""Choosing the next token of one sequence from its logits.

A random number depends on the request's seed and the token's position alone (Philox, a counter-based generator:
Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), so a seed gives the same tokens whatever shares
the batch, and a stream that is resumed elsewhere goes on as it would have. Order of operations as in transformers:
repetition penalty, temperature, top-k, top-p.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from cluster.core import SamplingParams


@dataclass(frozen=True, slots=True)
class Sampled:
    """The chosen token; log-probabilities are of the raw logits and only there when asked for."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


def sample(logits_V: torch.Tensor, params: SamplingParams, history: Sequence[int]) -> Sampled:
    """The next token after ``history`` (prompt and everything generated). ``logits_V`` is fp32 and not changed."""
    chosen_V = logits_V
    if params.repetition_penalty != 1.0:
        seen = torch.tensor(sorted(set(history)), dtype=torch.int64)
        scores = logits_V[seen]
        scores = torch.where(scores < 0, scores * params.repetition_penalty, scores / params.repetition_penalty)
        chosen_V = logits_V.clone()
        chosen_V[seen] = scores
    if params.temperature == 0.0:
        token = int(chosen_V.argmax())
    else:
        token = _draw(chosen_V, params, position=len(history))
    if not params.num_logprobs:
        return Sampled(token)
    logprobs_V = torch.log_softmax(logits_V.double(), dim=-1)
    count = min(params.num_logprobs, logits_V.numel())
    values, ids = torch.topk(logprobs_V, count)
    top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return Sampled(token, float(logprobs_V[token]), top)


def _draw(logits_V: torch.Tensor, params: SamplingParams, position: int) -> int:
    scaled_V = logits_V.double() / params.temperature
    size = scaled_V.numel()
    count = params.top_k if 0 < params.top_k < size else size
    # Sorted by logit and, among equals, by id: the order must not depend on the sort's whims.
    values, ids = torch.sort(scaled_V, descending=True, stable=True)
    values, ids = values[:count], ids[:count]
    weights = torch.softmax(values, dim=-1)
    cumulative = torch.cumsum(weights, dim=-1)
    if params.top_p < 1.0:
        # A token stays if what comes before it is less than top_p: the smallest set that reaches it.
        keep = int(torch.searchsorted(cumulative, params.top_p).item()) + 1
        cumulative, ids = cumulative[:keep], ids[:keep]
    uniform = np.random.Generator(np.random.Philox(key=params.seed, counter=position)).random()
    index = int(torch.searchsorted(cumulative, uniform * float(cumulative[-1]), right=True).item())
    return int(ids[min(index, ids.numel() - 1)])
