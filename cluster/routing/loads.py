"""How often each expert was wanted: counted by the router as layers are called, read as windows by whoever plans."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np

from cluster.core import Priority

_TOGETHER, _PAIRS_TOGETHER = 64, 64 * 1024
"""Calls and pairs that are noted before they are counted: between two layers the caches are full of weights, and
counting takes several times as long as many calls at once."""


class ExpertLoads:
    """Sums since the start, by MoE layer and logical expert. One thread counts, the engine's; any may read.

    A token counts once for each expert that it wants. An activation is a layer call's batch that wanted the expert at
    all: what a decode step pays for.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._noted: list[tuple[int, bool, Any, int]] = []
        self._noted_pairs = 0
        self._tokens: dict[tuple[int, bool], Any] = {}
        self._activations: dict[int, Any] = {}

    def called(self, layer: int, experts_P: Any, num_experts: int, priority: Priority) -> None:
        """A batch wanted these experts, one a pair. The array must not be changed afterwards."""
        with self._lock:
            self._noted.append((layer, priority is Priority.DECODE, experts_P, num_experts))
            self._noted_pairs += len(experts_P)
            if len(self._noted) >= _TOGETHER or self._noted_pairs >= _PAIRS_TOGETHER:
                self._count()

    def _count(self) -> None:
        noted, self._noted, self._noted_pairs = self._noted, [], 0
        for layer, decodes, experts_P, num_experts in noted:
            counts_E = np.bincount(experts_P, minlength=num_experts)
            key = layer, decodes
            if key not in self._tokens:
                self._tokens[key] = np.zeros(num_experts, np.int64)
                self._activations.setdefault(layer, np.zeros(num_experts, np.int64))
            self._tokens[key] += counts_E
            self._activations[layer] += counts_E > 0

    def arrays(self, layers: int, experts: int) -> tuple[Any, Any]:
        """Activations, and tokens of steps that did not only decode, each int64 [L, E]."""
        activations_LE, prefill_LE = np.zeros((layers, experts), np.int64), np.zeros((layers, experts), np.int64)
        with self._lock:
            self._count()
            for layer, counts_E in self._activations.items():
                activations_LE[layer, : len(counts_E)] = counts_E
                tokens_E = self._tokens.get((layer, False))
                if tokens_E is not None:
                    prefill_LE[layer, : len(tokens_E)] = tokens_E
        return activations_LE, prefill_LE

    def sums(self) -> list[dict[str, list[int]]]:
        """By layer: ``decode_tokens``, ``prefill_tokens`` and ``activations`` of each expert."""
        with self._lock:
            self._count()
            found = []
            for layer in sorted(self._activations):
                activations_E = self._activations[layer]
                none_E = np.zeros_like(activations_E)
                found.append(
                    {
                        "decode_tokens": self._tokens.get((layer, True), none_E).tolist(),
                        "prefill_tokens": self._tokens.get((layer, False), none_E).tolist(),
                        "activations": activations_E.tolist(),
                    }
                )
            return found
