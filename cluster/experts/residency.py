"""Which experts are in memory, which ones calls will probably want, and who makes room for whom. Numbers only.

Calls go through the layers round and round. So for every expert there is an estimate of the layer calls until one wants
it: as many as its layer is away, and a whole round more for each time that it will probably be passed by. Its chance to
be wanted when its layer is called is how often recent calls named it (popularity, an exponential average), or what an
order says. Who will be wanted last makes room; this is Belady's rule (A study of replacement algorithms for a
virtual-storage computer, IBM Systems Journal 5(2), 1966) with estimates in place of the future.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from cluster.core import ExpertId, Order

LIKELY = 0.5
"""Chance from which on an expert is loaded ahead even if it may come late."""
POSSIBLE = 0.35
"""Chance from which on an expert is loaded ahead where there is time for it. For less, two of three loads and more
would be for nothing."""
_RARE = 0.02
_OF_A_BYTE = 1 / 255
_MEMORY = 1 / 16
"""Weight of the newest call in popularity and in times between calls."""
_IDLE = 4.0
"""After so many times what a call usually takes to come nobody waits for it, and there is time for anything."""


class Move(NamedTuple):
    """An expert to load ahead, and who makes room for it; nobody where a slot is free."""

    key: ExpertId
    victim: ExpertId | None


class _Candidate(NamedTuple):
    """An expert, and the chance that its layer's call wants it."""

    chance: float
    layer: int
    expert: int


class Residency:
    """``held_LE``: experts that the group holds, bool [L, E]; ``kind_L`` numbers layers whose experts can take each
    other's room, int [L]. ``predicts``: experts may be loaded that no call named. One layer is called at a time.

    What is wanted and who may go are worked out once for each call or order, and then only taken from.
    """

    def __init__(self, held_LE: Any, kind_L: Any, predicts: bool) -> None:
        self._layers: int = held_LE.shape[0]
        self._most: int = held_LE.shape[1]
        self._held_LE, self._predicts = held_LE, predicts
        self._kind_L = kind_L
        self._resident_LE = np.zeros(held_LE.shape, bool)
        self._popularity_LE = np.zeros(held_LE.shape)
        self._ordered_LE = np.zeros(held_LE.shape)
        self._were_ordered_LE = np.zeros(held_LE.shape)
        self._has_orders: set[int] = set()
        self._pinned_layer, self._pinned = -1, frozenset[int]()
        self._skipped = False
        self._gap_s = [0.0] * self._layers
        self._called_s = 0.0
        self._current = self._layers - 1
        self._wanted: list[_Candidate] | None = None
        """Best last. None: to be worked out."""
        self._leaving: dict[int, list[tuple[float, int]]] = {}
        """By kind of layer, who will be wanted last at the end: layer calls until then, and place in [L, E]."""
        every = np.arange(self._layers)
        self._distance_LL1 = [((every - at - 1) % self._layers + 1)[:, None] for at in range(self._layers)]
        kinds = set(kind_L.tolist())
        self._kind_places = {kind: np.flatnonzero(np.repeat(kind_L == kind, self._most)) for kind in kinds}

    # -- what happens --------------------------------------------------------------------------------------------------

    def called(self, layer: int, experts: Any, now_s: float) -> None:
        """A call of a layer names these: what was ordered for it is over, and the next layer is due."""
        popularity_E = self._popularity_LE[layer]
        popularity_E *= 1.0 - _MEMORY
        popularity_E[experts] += _MEMORY
        self._were_ordered_LE[layer] = self._ordered_LE[layer]
        if layer in self._has_orders:
            self._has_orders.discard(layer)
            self._ordered_LE[layer] = 0.0
        if self._distance(layer) == 1 and self._called_s:
            gap_s, usual_s = now_s - self._called_s, self._gap_s[layer]
            if not usual_s:
                self._gap_s[layer] = gap_s
            else:  # what is much longer is a pause
                self._gap_s[layer] += (min(gap_s, _IDLE * usual_s) - usual_s) * _MEMORY
        self._current, self._called_s = layer, now_s
        self._wanted = None
        self._leaving.clear()

    def ordered(self, order: Order) -> None:
        """Replaces what was ordered for the layer before."""
        chance_E = np.frombuffer(order.chances, np.uint8)[: self._most]
        self._ordered_LE[order.layer, : len(chance_E)] = chance_E * _OF_A_BYTE
        self._has_orders.add(order.layer)
        self._wanted = None

    def came(self, key: ExpertId) -> None:
        """It is in memory now."""
        self._resident_LE[key.layer, key.expert] = True

    def went(self, key: ExpertId) -> None:
        """It is not any more."""
        self._resident_LE[key.layer, key.expert] = False

    def pin(self, layer: int, experts: Any) -> None:
        """These are in use, or waited for, and nobody else."""
        self._pinned_layer, self._pinned = layer, frozenset(experts.tolist())

    def unpin(self) -> None:
        """The call is over."""
        self._pinned = frozenset()
        if self._skipped:  # now they may go
            self._leaving.clear()
            self._skipped = False

    def failed(self, key: ExpertId) -> None:
        """It cannot be loaded: not wanted until somebody asks for it again."""
        self._ordered_LE[key.layer, key.expert] = self._popularity_LE[key.layer, key.expert] = 0.0
        self._wanted = None

    def hold(self, layer: int, experts: Sequence[int], added: Sequence[int]) -> None:
        """The group holds these of the layer now, and no others; the ``added`` ones are taken to be wanted."""
        self._held_LE[layer] = False
        self._held_LE[layer, list(experts)] = True
        self._popularity_LE[layer, ~self._held_LE[layer]] = 0.0
        self._popularity_LE[layer, list(added)] = LIKELY
        self._wanted = None
        self._leaving.clear()

    # -- what follows --------------------------------------------------------------------------------------------------

    def is_next(self, layer: int) -> bool:
        """The layer's call is the one that comes next."""
        return self._distance(layer) == 1

    def num_resident(self) -> int:
        """Experts in memory."""
        return int(self._resident_LE.sum())

    def is_pinned(self, key: ExpertId) -> bool:
        """It is in use, or waited for."""
        return key.expert in self._pinned and key.layer == self._pinned_layer

    def were_likely(self, layer: int, experts: Any) -> int:
        """How many of these were likely by the order that the layer's last call met."""
        return int(np.count_nonzero(self._were_ordered_LE[layer, experts] >= LIKELY))

    def gap_s(self) -> float:
        """What it usually takes from one layer's call to the next one's; 0 until it is known."""
        return float(sum(self._gap_s) / self._layers)

    def next_ahead(self, now_s: float, load_s: float, has_free: Callable[[int], bool]) -> Move | None:
        """What is best loaded now with nobody waiting for it: of the nearest layer that wants anything, the expert with
        the best chance. Only who will be wanted later makes room, or two could take each other's again and again.
        ``load_s`` is what a load takes, ``has_free(layer)`` says whether a slot is free."""
        if not self._predicts:
            return None
        if self._wanted is None:
            self._wanted = self._wanted_now(now_s, load_s)
        while self._wanted:
            chance, layer, expert = self._wanted[-1]
            key = ExpertId(layer, expert)
            if self._resident_LE[layer, expert] or self.is_pinned(key):
                self._wanted.pop()
                continue
            if has_free(layer):
                self._wanted.pop()
                return Move(key, None)
            wait = self._distance(layer) + self._layers * (1.0 / chance - 1.0)
            victim = self._take_victim(layer, wait)
            if victim is None:
                return None
            self._wanted.pop()
            return Move(key, victim)
        return None

    def victim(self, layer: int) -> ExpertId | None:
        """Who makes room for an expert of ``layer`` that is waited for; None if everybody is in use."""
        victim = self._take_victim(layer, 0.0)
        if victim is None:  # those that came since then have not been looked at
            self._leaving.clear()
            victim = self._take_victim(layer, 0.0)
        return victim

    def _take_victim(self, layer: int, wait: float) -> ExpertId | None:
        kind = int(self._kind_L[layer])
        if kind not in self._leaving:
            self._leaving[kind] = self._leaving_now(kind)
        leaving = self._leaving[kind]
        while leaving and leaving[-1][0] > wait:
            of_layer, expert = divmod(leaving.pop()[1], self._most)
            key = ExpertId(of_layer, expert)
            if self.is_pinned(key):
                self._skipped = True
            elif self._resident_LE[of_layer, expert]:
                return key
        return None

    def _wanted_now(self, now_s: float, load_s: float) -> list[_Candidate]:
        """What is ordered, and what is popular in the layer that comes next; nearest layers last."""
        found: list[_Candidate] = []
        near = (self._current + 1) % self._layers
        for layer in sorted({near, *self._has_orders}, key=self._distance, reverse=True):
            chance_E = self._ordered_LE[layer]
            if layer == near:
                chance_E = np.maximum(chance_E, self._popularity_LE[layer])
            least = POSSIBLE if self._has_time(layer, now_s, load_s) else LIKELY
            experts = np.flatnonzero((chance_E >= least) & ~self._resident_LE[layer] & self._held_LE[layer])
            of_layer = zip(chance_E[experts].tolist(), experts.tolist(), strict=True)
            found += sorted(_Candidate(chance, layer, expert) for chance, expert in of_layer)
        return found

    def _leaving_now(self, kind: int) -> list[tuple[float, int]]:
        chance_LE = np.maximum(self._popularity_LE, self._ordered_LE)
        np.maximum(chance_LE, _RARE, out=chance_LE)
        wait_LE = self._layers / chance_LE
        wait_LE += self._distance_LL1[self._current] - self._layers
        places = self._kind_places[kind]
        places = places[self._resident_LE.reshape(-1)[places]]
        waits = wait_LE.reshape(-1)[places]
        order = np.argsort(waits, kind="stable")
        return list(zip(waits[order].tolist(), places[order].tolist(), strict=True))

    def _distance(self, layer: int) -> int:
        """Layer calls until this layer's."""
        return int((layer - self._current - 1) % self._layers + 1)

    def _has_time(self, layer: int, now_s: float, load_s: float) -> bool:
        """A load will probably be over before the layer is called, or no call is about to come."""
        first = self._current + 1
        due_s = sum(self._gap_s[(first + i) % self._layers] for i in range(self._distance(layer)))
        passed_s = now_s - self._called_s
        return bool(passed_s + load_s < due_s or passed_s > _IDLE * due_s)
