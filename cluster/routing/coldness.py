"""What a prompt will probably make groups load: bytes and seconds, from what the router sees and groups report.

An expert is cold where the groups that hold it say that it is not in memory, until a call names it. Which experts a
prompt will want is known well for the first MoE layer, whose gate the router can ask at once; for the layers behind it
what they were asked for lately has to do: a prompt of T tokens wants an expert with chance 1 - (1 - p)^T, where p is
the share of recent tokens that did. Arrays only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from cluster.core import GroupInfo

_MEMORY = 1 / 16
"""Weight of the newest call in the share of tokens that want an expert."""
_DEFAULT_BYTES_PER_S = 1e9
"""Until a group has loaded anything."""

Need = np.ndarray[Any, np.dtype[np.float32]]
"""Chance that a prompt wants each expert, [L, E]."""


class Coldness:
    """One thread, the engine's, asks and calls; another one may tell of groups. Nothing is kept, and everything is 0,
    while no group has a budget.

    ``first_layer(ids)`` is the chance, in bytes of 255ths, that any of some token ids wants each expert of the first
    MoE layer; None where nobody knows.
    """

    def __init__(self, first_layer: Callable[[Sequence[int]], bytes | None]) -> None:
        self._first_layer = first_layer
        self._share_LE = np.zeros((0, 0), np.float32)
        self._cold_LE: Need | None = None
        self._bytes_per_s = _DEFAULT_BYTES_PER_S

    @property
    def active(self) -> bool:
        """Some group loads experts when they are called for."""
        return self._cold_LE is not None

    def follow(self, groups: Iterable[GroupInfo]) -> None:
        """What the groups say now."""
        stores = [(info, info.store) for info in groups if info.store is not None]
        if not stores:
            self._cold_LE = None
            return
        shape = (len(stores[0][0].holdings), 1 + max(max(held, default=0) for i, _ in stores for held in i.holdings))
        cold_LE, warm_LE = np.zeros(shape, np.float32), np.zeros(shape, bool)
        for info, store in stores:
            for layer, (held, size, resident) in enumerate(
                zip(info.holdings, store.expert_bytes, store.resident_experts, strict=True)
            ):
                cold_LE[layer, list(held)] = size
                warm_LE[layer, list(resident)] = True
        cold_LE[warm_LE] = 0.0
        if self._share_LE.shape != shape:
            self._share_LE = np.zeros(shape, np.float32)
        self._cold_LE = cold_LE
        loaded, took_s = sum(s.loaded_bytes for _, s in stores), sum(s.loads_s for _, s in stores)
        if loaded and took_s:
            self._bytes_per_s = loaded / took_s

    def called(self, layer: int, experts_P: Any, num_tokens: int) -> None:
        """A layer call of so many tokens named these experts, one a pair: they are in memory now."""
        cold_LE = self._cold_LE
        share_LE = self._share_LE
        if cold_LE is None or cold_LE.shape != share_LE.shape or layer >= len(cold_LE):
            return  # groups came or went a moment ago
        most = cold_LE.shape[1]
        counts_E = np.bincount(experts_P, minlength=most)[:most]
        share_E = share_LE[layer]
        share_E += (counts_E / np.float32(max(1, num_tokens)) - share_E) * np.float32(_MEMORY)
        cold_LE[layer, counts_E > 0] = 0.0

    def need(self, prompt_ids: Sequence[int]) -> Need | None:
        """What a prompt will probably want; None while nothing can be cold."""
        if self._cold_LE is None:
            return None
        share_LE = np.clip(self._share_LE, 0.0, 1.0)
        need_LE: Need = (1.0 - (1.0 - share_LE) ** np.float32(len(prompt_ids))).astype(np.float32)
        told = self._first_layer(prompt_ids)
        if told is not None:
            chance_E = np.frombuffer(told, np.uint8)[: need_LE.shape[1]]
            need_LE[0, : len(chance_E)] = chance_E / np.float32(255)
        return need_LE

    def cold_bytes(self, need_LE: Need, beside: Sequence[Need] = ()) -> float:
        """Bytes that will probably be loaded for a prompt, and not for one of those ``beside`` it anyway."""
        cold_LE = self._cold_LE
        if cold_LE is None or cold_LE.shape != need_LE.shape:
            return 0.0
        extra_LE = need_LE * cold_LE
        for other_LE in beside:
            if other_LE.shape == need_LE.shape:
                extra_LE = extra_LE * (1.0 - other_LE)
        return float(extra_LE.sum())

    def seconds(self, num_bytes: float) -> float:
        """What loads of so many bytes take, as groups' loads do on average."""
        return num_bytes / self._bytes_per_s
