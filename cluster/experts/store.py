"""Experts in less memory than they need: slots for as many as the budget holds, and a thread that fills them.

Experts of one shape share a pool of slots, whatever their layer. A layer call pins the experts that it names; those
that are not there are loaded by the store's own thread, demand before anything ordered ahead, into a free slot or the
one that was not used for longest, of its own layer where that has its even share of the pool: calls go through the
layers round and round, and what was not used for longest of all is what comes next. An expert that is pinned, or being
loaded, is never evicted. Cold means on disk: tensors are read from the checkpoint's mapped files, which the system may
have in its page cache.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from cluster.core import Clock, ExpertId
from cluster.errors import ConfigError, InternalError, Unavailable
from cluster.experts.loads import LoadNotes

log = logging.getLogger(__name__)

LOAD_TIMEOUT_S = 60.0
Read = Callable[[int, int], dict[str, torch.Tensor]]
"""(MoE layer, logical expert) -> its parameters, first dimension 1."""


@dataclass(slots=True)
class StoreStats:
    """Counters since the start. ``stalls`` are calls that waited, ``hits`` experts that were there when a call came,
    ``wasted_bytes`` were loaded ahead and evicted unused."""

    hits: int = 0
    stalls: int = 0
    stalled_s: float = 0.0
    loads: int = 0
    loaded_bytes: int = 0
    loads_s: float = 0.0
    evictions: int = 0
    ahead: int = 0
    late: int = 0
    wasted_bytes: int = 0


@dataclass(slots=True)
class Pool:
    """Slots of one shape: ``tensors`` have the slots as their first dimension."""

    tensors: dict[str, torch.Tensor]
    expert_bytes: int
    free: list[int]
    slots: int
    share: int
    """Slots of each of its layers, evenly."""
    residents: OrderedDict[ExpertId, int] = field(default_factory=OrderedDict)
    """Slot of each resident expert, the one used last at the end."""


class ExpertStore:
    """``shapes[layer]`` are the parameters' shapes of one expert (names to shapes without the first dimension).

    Raises (constructor):
        ConfigError: the budget does not hold two experts of each shape.
    """

    def __init__(
        self,
        read: Read,
        shapes: Sequence[dict[str, tuple[int, ...]]],
        holdings: Sequence[Sequence[int]],
        budget_bytes: int,
        dtype: torch.dtype,
        notes: LoadNotes,
        clock: Clock = time.monotonic,
    ) -> None:
        self._read, self._notes, self._clock = read, notes, clock
        self._lock = threading.Condition()
        self._pool_of = _pools(shapes, holdings, budget_bytes, dtype)
        self._pinned: dict[ExpertId, int] = {}
        self._demand: deque[ExpertId] = deque()
        self._ahead: deque[ExpertId] = deque()
        self._loading: ExpertId | None = None
        self._unused: set[ExpertId] = set()  # loaded ahead, and not asked for yet
        self._failed: dict[ExpertId, BaseException] = {}
        self._closed = False
        self._progress_s = clock()
        self.stats = StoreStats()
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
            return sum(len(pool.residents) for pool in self._pools())

    def capacity(self) -> int:
        """Experts that fit."""
        return sum(pool.slots for pool in self._pools())

    def progress_age_s(self) -> float:
        """Seconds since the thread last finished a load or had nothing to do."""
        with self._lock:
            busy = self._demand or self._ahead or self._loading is not None
            return self._clock() - self._progress_s if busy else 0.0

    def _pools(self) -> list[Pool]:
        return list({id(pool): pool for pool in self._pool_of}.values())

    # -- the compute thread --------------------------------------------------------------------------------------------

    def waves(self, layer: int, experts: Sequence[int]) -> Iterator[list[int]]:
        """The experts of a call, as many at a time as fit; those that are there come first."""
        pool = self._pool_of[layer]
        with self._lock:
            ordered = sorted(experts, key=lambda expert: ExpertId(layer, expert) not in pool.residents)
        for first in range(0, len(ordered), pool.slots):
            yield ordered[first : first + pool.slots]

    @contextmanager
    def pinned(self, layer: int, experts: Sequence[int]) -> Iterator[dict[int, int]]:
        """Slots by expert for the time of the block; waits for what is not there.

        Raises:
            InternalError: weights cannot be read, or not in time.
            Unavailable: the store is closed.
        """
        keys = [ExpertId(layer, expert) for expert in experts]
        pool = self._pool_of[layer]
        with self._lock:
            for key in keys:
                self._pinned[key] = self._pinned.get(key, 0) + 1
            missing = [key for key in keys if key not in pool.residents]
            self.stats.hits += len(keys) - len(missing)
            self._unused.difference_update(keys)
        try:
            if missing:
                self._wait_for(pool, missing)
            with self._lock:
                for key in keys:
                    pool.residents.move_to_end(key)
                slots = {key.expert: pool.residents[key] for key in keys}
            yield slots
        finally:
            with self._lock:
                for key in keys:
                    left = self._pinned[key] - 1
                    if left:
                        self._pinned[key] = left
                    else:
                        del self._pinned[key]
                self._lock.notify_all()

    def _wait_for(self, pool: Pool, missing: Sequence[ExpertId]) -> None:
        started_s = self._clock()
        with self._lock:
            self.stats.stalls += 1
            for key in missing:
                self._failed.pop(key, None)  # of another call: it is tried again
            self._progress_s = started_s
            self.stats.late += sum(key == self._loading or key in self._ahead for key in missing)
            for key in missing:
                if key != self._loading:
                    self._demand.append(key)
            self._lock.notify_all()
            before_s = started_s
            for key in missing:
                while key not in pool.residents:
                    failed = self._failed.pop(key, None)
                    if failed is not None:
                        raise InternalError(f"expert {key.expert} of MoE layer {key.layer} cannot be read: {failed}")
                    if self._closed:
                        raise Unavailable("the group is shutting down")
                    left_s = self._progress_s + LOAD_TIMEOUT_S - self._clock()
                    if left_s <= 0:
                        raise InternalError(
                            f"expert {key.expert} of MoE layer {key.layer} was not loaded: no load ended for "
                            f"{LOAD_TIMEOUT_S:g} s"
                        )
                    self._lock.wait(left_s)
                now_s = self._clock()
                self._notes.add(key.expert, now_s - before_s, pool.expert_bytes)
                before_s = now_s
            self.stats.stalled_s += before_s - started_s

    # -- ahead ---------------------------------------------------------------------------------------------------------

    def order(self, layer: int, experts: Sequence[int]) -> None:
        """Experts that calls will probably want soon. Replaces what was ordered for the layer before and not begun."""
        pool = self._pool_of[layer]
        with self._lock:
            kept = [key for key in self._ahead if key.layer != layer]
            wanted = [ExpertId(layer, expert) for expert in experts[: max(1, pool.share)]]
            for key in wanted:
                if key in pool.residents:
                    pool.residents.move_to_end(key)  # somebody else makes room
            self._ahead = deque([*kept, *(key for key in wanted if key not in pool.residents and key != self._loading)])
            self._lock.notify_all()

    # -- the store's thread --------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._lock:
                while not self._closed and not self._demand and not self._can_go_ahead():
                    self._progress_s = self._clock()
                    self._lock.wait(1.0)
                if self._closed:
                    return
                demanded = bool(self._demand)
                key = self._demand.popleft() if demanded else self._ahead.popleft()
                pool = self._pool_of[key.layer]
                if key in pool.residents:
                    continue
                slot = self._slot_for(pool, key.layer)
                if slot is None:  # everything is pinned: again when somebody lets go
                    if demanded:
                        self._demand.appendleft(key)
                        self._lock.wait(1.0)
                    continue
                self._loading = key
            self._load(pool, key, slot, demanded)

    def _can_go_ahead(self) -> bool:
        """Something is ordered ahead, and there is room for it that nobody has pinned."""
        while self._ahead and self._ahead[0] in self._pool_of[self._ahead[0].layer].residents:
            self._ahead.popleft()
        if not self._ahead:
            return False
        pool = self._pool_of[self._ahead[0].layer]
        return bool(pool.free) or any(key not in self._pinned for key in pool.residents)

    def _slot_for(self, pool: Pool, layer: int) -> int | None:
        if pool.free:
            return pool.free.pop()
        counts = Counter(key.layer for key in pool.residents)
        free = [key for key in pool.residents if key not in self._pinned]  # the one not used for longest first
        if not free:
            return None
        fullest = layer if counts[layer] >= pool.share else max(counts, key=counts.__getitem__)
        victim = next((key for key in free if key.layer == fullest), free[0])
        self.stats.evictions += 1
        if victim in self._unused:
            self._unused.discard(victim)
            self.stats.wasted_bytes += pool.expert_bytes
        return pool.residents.pop(victim)

    def _load(self, pool: Pool, key: ExpertId, slot: int, demanded: bool) -> None:
        started_s = self._clock()
        try:
            for name, tensor in self._read(key.layer, key.expert).items():
                pool.tensors[name][slot].copy_(tensor[0])
        except Exception as exc:
            log.exception("expert %d of MoE layer %d cannot be read", key.expert, key.layer)
            with self._lock:
                self._loading = None
                pool.free.append(slot)
                if demanded or key in self._pinned:
                    self._failed[key] = exc
                self._lock.notify_all()
            return
        with self._lock:
            self._loading = None
            pool.residents[key] = slot
            self._progress_s = self._clock()
            self.stats.loads += 1
            self.stats.loaded_bytes += pool.expert_bytes
            self.stats.loads_s += self._progress_s - started_s
            if not demanded and key not in self._pinned:
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
        tensors = {name: torch.empty((max(1, slots), *shape), dtype=dtype) for name, shape in kind}
        pool = Pool(tensors, sizes[kind], list(range(slots))[::-1], slots, max(1, slots // len(layers)))
        for layer in layers:
            found[layer] = pool
    return [pool for pool in found if pool is not None]


def _elements(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
