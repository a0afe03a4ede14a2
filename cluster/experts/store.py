"""Experts in less memory than they need: slots for as many as the budget holds, and a thread that fills them.

Experts of one shape share a pool of slots, whatever their layer. A layer call pins the experts that it names; those
that are not there are loaded by the store's own thread, demand before anything ordered ahead, into a free slot or that
of whoever will probably be wanted last (`cluster.experts.residency`). An expert that is pinned, or being loaded, is
never evicted. Cold means on disk: tensors are read from the checkpoint's mapped files, which the system may have in its
page cache, or past it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from cluster.core import Clock, ExpertId, Order
from cluster.errors import ConfigError, InternalError, Unavailable
from cluster.experts.loads import LoadNotes
from cluster.experts.residency import Residency
from cluster.weights.reader import Target

log = logging.getLogger(__name__)

LOAD_TIMEOUT_S = 60.0
_SMOOTH = 1 / 16
_BATCH, _BATCH_S = 8, 0.0005
"""So many experts are loaded at once, and for about so long, before those that are there can be used."""
Fill = Callable[[int, int, Target], None]
"""Reads the parameters of (MoE layer, logical expert) into a slot."""


@dataclass(slots=True)
class LayerStats:
    """Counters of one layer since the start. ``found`` experts were there when a call came, ``hits`` of them because
    they had been loaded ahead; ``stalls`` are calls that waited; ``late`` experts were ordered and not there in time;
    ``wasted_bytes`` were loaded ahead and evicted unused."""

    found: int = 0
    hits: int = 0
    stalls: int = 0
    late: int = 0
    wasted_bytes: int = 0


@dataclass(slots=True)
class StoreStats:
    """Counters of all layers since the start: loads, how many of them were ``ahead`` of any call, and their time."""

    stalled_s: float = 0.0
    loads: int = 0
    loaded_bytes: int = 0
    loads_s: float = 0.0
    evictions: int = 0
    ahead: int = 0


@dataclass(slots=True)
class Pool:
    """Slots of one shape: ``tensors`` have the slots as their first dimension."""

    tensors: dict[str, torch.Tensor]
    expert_bytes: int
    free: list[int]
    slots: int
    targets: list[Target] = field(init=False)
    """The tensors of each slot."""

    def __post_init__(self) -> None:
        slots = range(self.slots)
        self.targets = [Target({name: tensor[slot] for name, tensor in self.tensors.items()}) for slot in slots]


class ExpertStore:
    """``shapes[layer]`` are the parameters' shapes of one expert (names to shapes without the first dimension).
    ``predicts``: experts may be loaded that no call has named. ``num_experts``: that a layer has at most, held or not.

    Raises (constructor):
        ConfigError: the budget does not hold two experts of each shape.
    """

    def __init__(
        self,
        fill: Fill,
        shapes: Sequence[dict[str, tuple[int, ...]]],
        holdings: Sequence[Sequence[int]],
        budget_bytes: int,
        dtype: torch.dtype,
        notes: LoadNotes,
        predicts: bool = True,
        clock: Clock = time.monotonic,
        device: torch.device | None = None,
        num_experts: int = 0,
    ) -> None:
        self._fill, self._notes, self._clock, self._predicts = fill, notes, clock, predicts
        self._lock = threading.Condition()
        self._pool_of = _pools(shapes, holdings, budget_bytes, dtype, device or torch.device("cpu"))
        pools = self._pools()
        most = max(num_experts, 1 + max((max(experts, default=0) for experts in holdings), default=0))
        held_LE = np.zeros((len(holdings), most), bool)
        for layer, experts in enumerate(holdings):
            held_LE[layer, list(experts)] = True
        kind_L = np.array([next(i for i, pool in enumerate(pools) if pool is mine) for mine in self._pool_of])
        self.residency = Residency(held_LE, kind_L, predicts)
        self._slot_LE = np.full(held_LE.shape, -1, np.int64)
        self._demand: deque[ExpertId] = deque()
        self._loading: set[ExpertId] = set()
        self._unused: set[ExpertId] = set()  # loaded ahead, and not asked for yet
        self._failed: dict[ExpertId, BaseException] = {}
        self._closed = False
        self._load_s = 0.0
        self._progress_s = clock()
        self.stats = StoreStats()
        self.layers = [LayerStats() for _ in holdings]
        self._thread = threading.Thread(target=self._run, name="expert-loads", daemon=True)
        self._thread.start()

    @property
    def num_bytes(self) -> int:
        """Bytes of all slots, used or not."""
        return sum(pool.slots * pool.expert_bytes for pool in self._pools())

    def pool(self, layer: int) -> Pool:
        """Where a layer's experts live."""
        return self._pool_of[layer]

    def num_resident(self) -> int:
        """Experts in memory now."""
        with self._lock:
            return self.residency.num_resident()

    def resident_experts(self) -> tuple[tuple[int, ...], ...]:
        """Those in memory now, by MoE layer."""
        with self._lock:
            return tuple(tuple(np.flatnonzero(slot_E >= 0).tolist()) for slot_E in self._slot_LE)

    def capacity(self) -> int:
        """Experts that fit."""
        return sum(pool.slots for pool in self._pools())

    def progress_age_s(self) -> float:
        """Seconds since the thread last finished a load or had nothing to do."""
        with self._lock:
            busy = self._demand or self._loading
            return self._clock() - self._progress_s if busy else 0.0

    def _pools(self) -> list[Pool]:
        return list({id(pool): pool for pool in self._pool_of}.values())

    # -- the compute thread --------------------------------------------------------------------------------------------

    def waves(self, layer: int, experts_A: Any) -> list[Any]:
        """The experts of a call, as many at a time as fit; those that are there come first."""
        with self._lock:
            self.residency.called(layer, experts_A, self._clock())
            slots = self._pool_of[layer].slots
            if len(experts_A) <= slots:
                return [experts_A]
            ordered_A = experts_A[np.argsort(self._slot_LE[layer, experts_A] < 0, kind="stable")]
        return [ordered_A[first : first + slots] for first in range(0, len(ordered_A), slots)]

    @contextmanager
    def pinned(self, layer: int, experts_A: Any) -> Iterator[Any]:
        """Slots of all experts of the layer, [E], right for these for the time of the block; waits for what is not
        there. One thread at a time.

        Raises:
            InternalError: weights cannot be read, or not in time.
            Unavailable: the store is closed.
        """
        counts, slot_E = self.layers[layer], self._slot_LE[layer]
        with self._lock:
            self.residency.pin(layer, experts_A)
            missing_A = experts_A[slot_E[experts_A] < 0]
            counts.found += len(experts_A) - len(missing_A)
            if self._unused:
                used = self._unused.intersection(ExpertId(layer, expert) for expert in experts_A.tolist())
                self._unused -= used
                counts.hits += len(used)
        try:
            if len(missing_A):
                self._wait_for(layer, missing_A)
            yield slot_E
        finally:
            with self._lock:
                self.residency.unpin()
                if self._demand or (self._predicts and not self._loading):
                    self._lock.notify_all()

    def _wait_for(self, layer: int, missing_A: Any) -> None:
        started_s = self._clock()
        counts, slot_E = self.layers[layer], self._slot_LE[layer]
        missing = [ExpertId(layer, expert) for expert in missing_A.tolist()]
        with self._lock:
            counts.stalls += 1
            counts.late += self.residency.were_likely(layer, missing_A)
            for key in missing:
                self._failed.pop(key, None)  # of another call: it is tried again
            self._progress_s = started_s
            self._demand += [key for key in missing if key not in self._loading]
            self._lock.notify_all()
            before_s = started_s
            for key in missing:
                while slot_E[key.expert] < 0:
                    failed = self._failed.pop(key, None)
                    if failed is not None:
                        raise InternalError(f"expert {key.expert} of MoE layer {layer} cannot be read: {failed}")
                    if self._closed:
                        raise Unavailable("the group is shutting down")
                    left_s = before_s + LOAD_TIMEOUT_S - self._clock()
                    if left_s <= 0:
                        raise InternalError(
                            f"expert {key.expert} of MoE layer {layer} was not loaded within {LOAD_TIMEOUT_S:g} s"
                        )
                    self._lock.wait(left_s)
                now_s = self._clock()
                self._notes.add(key.expert, now_s - before_s, self._pool_of[layer].expert_bytes)
                before_s = now_s
            self.stats.stalled_s += before_s - started_s

    # -- ahead ---------------------------------------------------------------------------------------------------------

    def order(self, order: Order) -> None:
        """Experts that calls will probably want soon, not all of them this group's. Replaces what was ordered for the
        layer before."""
        if not 0 <= order.layer < len(self.layers):
            return
        with self._lock:
            self.residency.ordered(order)
            if not self._loading and self.residency.is_next(order.layer):
                self._lock.notify_all()

    def hold(self, layer: int, experts: Sequence[int], added: Sequence[int]) -> None:
        """From now on calls may name these of a layer; the ``added`` ones are loaded when there is time and room.
        Others leave when somebody needs their room."""
        with self._lock:
            self.residency.hold(layer, experts, added)
            self._lock.notify_all()

    # -- the store's thread --------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._lock:
                loads, demanded = self._next_loads()
                while not loads and not self._closed:
                    self._lock.wait(1.0)
                    loads, demanded = self._next_loads()
                if self._closed:
                    return
                self._loading = {key for key, _ in loads}
            self._load(loads, demanded)

    def _next_loads(self) -> tuple[list[tuple[ExpertId, int]], bool]:
        """What to load, where to, and whether a call waits for it. Nothing where there is nothing to do, or no room."""
        loads: list[tuple[ExpertId, int]] = []
        most = max(1, min(_BATCH, int(_BATCH_S / self._load_s))) if self._load_s else 1
        while self._demand and len(loads) < most:
            key = self._demand[0]
            pool = self._pool_of[key.layer]
            if self._slot_LE[key.layer, key.expert] < 0:
                slot = pool.free.pop() if pool.free else self._evict(self.residency.victim(key.layer))
                if slot is None:  # everything is in use: when somebody lets go
                    break
                loads.append((key, slot))
            self._demand.popleft()
        if loads or self._demand:
            return loads, True
        self._progress_s = self._clock()
        while len(loads) < most:
            move = self.residency.next_ahead(self._progress_s, self._load_s, self._has_free)
            if move is None:
                break
            slot = self._pool_of[move.key.layer].free.pop() if move.victim is None else self._evict(move.victim)
            if slot is not None:
                loads.append((move.key, slot))
        return loads, False

    def _has_free(self, layer: int) -> bool:
        return bool(self._pool_of[layer].free)

    def _evict(self, victim: ExpertId | None) -> int | None:
        """The slot of who makes room, which is its no more."""
        if victim is None:
            return None
        slot = int(self._slot_LE[victim.layer, victim.expert])
        self._slot_LE[victim.layer, victim.expert] = -1
        self.residency.went(victim)
        self.stats.evictions += 1
        if victim in self._unused:
            self._unused.discard(victim)
            self.layers[victim.layer].wasted_bytes += self._pool_of[victim.layer].expert_bytes
        return slot

    def _load(self, loads: list[tuple[ExpertId, int]], demanded: bool) -> None:
        started_s = self._clock()
        failed: dict[ExpertId, Exception] = {}
        done = 0
        for key, slot in loads:
            if self._demand and not demanded and done:
                break  # somebody waits
            done += 1
            try:
                self._fill(key.layer, key.expert, self._pool_of[key.layer].targets[slot])
            except Exception as exc:
                log.exception("expert %d of MoE layer %d cannot be read", key.expert, key.layer)
                failed[key] = exc
        with self._lock:
            self._loading = set()
            self._progress_s = self._clock()
            spent_s = self._progress_s - started_s
            self._load_s += (spent_s / done - self._load_s) * (_SMOOTH if self.stats.loads else 1.0)
            self.stats.loads_s += spent_s
            for key, slot in loads[done:]:
                self._pool_of[key.layer].free.append(slot)
                if self.residency.is_pinned(key):  # whoever waits for it found it being loaded
                    self._demand.append(key)
            for key, slot in loads[:done]:
                pool, wanted = self._pool_of[key.layer], demanded or self.residency.is_pinned(key)
                if key in failed:
                    pool.free.append(slot)
                    self.residency.failed(key)
                    if wanted:
                        self._failed[key] = failed[key]
                    continue
                self._slot_LE[key.layer, key.expert] = slot
                self.residency.came(key)
                self.stats.loads += 1
                self.stats.loaded_bytes += pool.expert_bytes
                if not wanted:
                    self.stats.ahead += 1
                    self._unused.add(key)
            self._lock.notify_all()

    def close(self) -> None:
        """Ends the thread."""
        with self._lock:
            self._closed = True
            self._lock.notify_all()
        self._thread.join(timeout=10)


def _pools(
    shapes: Sequence[dict[str, tuple[int, ...]]],
    holdings: Sequence[Sequence[int]],
    budget_bytes: int,
    dtype: torch.dtype,
    device: torch.device,
) -> list[Pool]:
    """The pool of each layer; layers of one shape share theirs, and the budget is divided by what they hold."""
    kinds: dict[Any, list[int]] = {}
    for layer, shape in enumerate(shapes):
        kinds.setdefault(tuple(sorted(shape.items())), []).append(layer)
    sizes = {kind: sum(_elements(shape) for _, shape in kind) * dtype.itemsize for kind in kinds}
    held = {kind: sum(len(holdings[layer]) for layer in layers) for kind, layers in kinds.items()}
    total = sum(sizes[kind] * held[kind] for kind in kinds)
    found: list[Pool | None] = [None] * len(shapes)
    for kind, layers in kinds.items():
        share = budget_bytes * sizes[kind] * held[kind] // total if total else 0
        slots = min(held[kind], share // sizes[kind])
        if held[kind] and slots < min(2, held[kind]):
            least = 2 * sum(sizes.values())
            raise ConfigError(
                f"expert_memory: got {budget_bytes} bytes for experts of {total} bytes; must be at least {least}, so "
                "that two of each shape fit"
            )
        tensors = {name: torch.empty((max(1, slots), *shape), dtype=dtype, device=device) for name, shape in kind}
        pool = Pool(tensors, sizes[kind], list(range(slots))[::-1], slots)
        for layer in layers:
            found[layer] = pool
    return [pool for pool in found if pool is not None]


def _elements(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
