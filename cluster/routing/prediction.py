"""How sure it is that a layer will want an expert, from what its gate says of an earlier hidden state."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from cluster.core import StoreFacts

CHOSEN, NEARLY = 0.65, 0.25
"""Of the K experts that a gate chooses from the residual stream one layer before, and of the K that it nearly chooses,
about so many are among those that it chooses itself (random prompts: 0.54 to 0.74, and 0.21 to 0.27, by model and
layer)."""
_CERTAIN = 255
MAX_DEPTH = 3
"""Further ahead a gate knows little more than how popular experts are."""


def chances(index_TN: torch.Tensor, count: int, num_experts: int) -> bytes:
    """Chance that any of the rows wants each expert, [E] bytes of 255ths; rows are taken as independent. The first
    ``count`` of each row are chosen, the others nearly."""
    misses = _misses(tuple(index_TN.shape), count)
    missed_E = np.exp(np.bincount(index_TN.cpu().numpy().reshape(-1), weights=misses, minlength=num_experts))
    return (_CERTAIN * (1.0 - missed_E) + 0.5).astype(np.uint8).tobytes()


def look_ahead(stores: Iterable[StoreFacts]) -> int:
    """How many layers ahead groups should be told what comes: as many as a load takes, one at least; 0 where all groups
    have everything at hand."""
    depth = 0
    for facts in stores:
        layers = facts.loads_s / facts.loads / facts.gap_s if facts.loads and facts.gap_s else 0.0
        depth = max(depth, min(MAX_DEPTH, 1 + int(layers)))
    return depth


@functools.lru_cache(64)
def _misses(shape: tuple[int, int], count: int) -> Any:
    """Logarithm of the chance that each entry is no choice after all."""
    rows, each = shape
    return np.tile([math.log(1.0 - CHOSEN)] * count + [math.log(1.0 - NEARLY)] * (each - count), rows)
