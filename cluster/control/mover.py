"""Carries out a change of the placement while the system serves, layer by layer.

New copies are loaded and run first; then the table names them, and the old ones no more; when all routers use that
table the old copies go. Whatever fails on the way leaves more copies than are wanted, never fewer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from cluster.control.coordinator import Coordinator
from cluster.control.routers import Routers
from cluster.core import Clock, Deadline, GroupId
from cluster.errors import ExpertMeshError, Unavailable
from cluster.placement.planner import Holdings

Hold = Callable[[GroupId, int, Sequence[int]], int]
"""Tells a group which experts of a layer to hold, exactly; returns when they are warm. Bytes that it read."""
ACK_TIMEOUT_S = 15.0
SEEN_TIMEOUT_S = 10.0
SETTLE_S = 0.2
"""Calls that were sent under the table before have been computed by then."""
PAUSE_S = 0.05
"""Between layers: groups compute, too."""
MAX_AT_ONCE = 8
"""Hosts whose groups load at a time."""


@dataclass(slots=True)
class Moved:
    """What has been done so far."""

    loaded: int = 0
    dropped: int = 0
    num_bytes: int = 0


class Mover:
    """Used by one thread. ``sleep`` may end early, by raising."""

    def __init__(
        self,
        coordinator: Coordinator,
        routers: Routers,
        hold: Hold,
        clock: Clock = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._coordinator, self._routers, self._hold = coordinator, routers, hold
        self._clock, self._sleep = clock, sleep

    def move(
        self,
        target: Mapping[GroupId, Holdings],
        moved: Moved,
        flipped: Callable[[], None],
        skip_dead: bool = False,
    ) -> None:
        """Makes the groups hold ``target``, and lets the table name that; counts in ``moved`` as it goes. ``flipped``
        is called each time that the table has come to want other copies. With ``skip_dead`` groups that do not answer
        are left for later.

        Raises:
            ExpertMeshError: a group did not do its part. Layers before are done; the others are as they were, with
                copies to spare.
        """
        for layer in range(len(self._coordinator.experts_per_layer)):
            wanted = {group: tuple(sorted(holdings[layer])) for group, holdings in target.items()}
            if self._layer(layer, wanted, moved, flipped, skip_dead):
                self._sleep(PAUSE_S)

    def _layer(
        self,
        layer: int,
        wanted: dict[GroupId, tuple[int, ...]],
        moved: Moved,
        flipped: Callable[[], None],
        skip_dead: bool,
    ) -> bool:
        """Whether there was anything to do."""
        held = {group: set(holdings[layer]) for group, holdings in self._coordinator.holdings().items()}
        missing = {g: sorted(held.get(g, set()) | set(experts)) for g, experts in wanted.items()}
        missing = {
            g: experts
            for g, experts in missing.items()
            if set(experts) != held.get(g, set()) and (g in held or not skip_dead)
        }
        if missing:
            moved.loaded += sum(len(set(experts) - held.get(g, set())) for g, experts in missing.items())
            moved.num_bytes += self._hold_all(layer, missing)
            self._see(layer, missing)
        as_before = self._coordinator.wanted(layer) == {g: frozenset(experts) for g, experts in wanted.items()}
        order = self._coordinator.want(layer, wanted)
        if not as_before:
            flipped()
        if not self._surplus(layer, wanted):
            return bool(missing)
        self.wait_for_routers(order)
        surplus = self._surplus(layer, wanted)
        now = self._coordinator.holdings()
        self._hold_all(layer, surplus)
        moved.dropped += sum(len(set(now[g][layer]) - set(experts)) for g, experts in surplus.items())
        self._coordinator.poll()
        return True

    def _see(self, layer: int, told: Mapping[GroupId, Sequence[int]]) -> None:
        """Polls until the groups say that they hold what they were told to.

        Raises:
            Unavailable: one does not, for some time.
        """
        deadline = Deadline.after(SEEN_TIMEOUT_S, self._clock)
        while True:
            self._coordinator.poll()
            now = self._coordinator.holdings()
            lacking = [g for g, experts in told.items() if g not in now or not set(experts) <= set(now[g][layer])]
            if not lacking:
                return
            if deadline.expired():
                raise Unavailable(f"group {lacking[0]} does not hold what it was told to")
            self._sleep(0.2)

    def _surplus(self, layer: int, wanted: Mapping[GroupId, Sequence[int]]) -> dict[GroupId, tuple[int, ...]]:
        """What groups should hold that hold more: what is wanted, and copies that the table names all the same, since
        nobody else has their expert."""
        held, owners = self._coordinator.holdings(), self._coordinator.membership().table.owners[layer]
        keep = {g: {*wanted.get(g, ()), *(e for e in held[g][layer] if g in owners[e])} for g in held}
        return {g: tuple(sorted(keep[g])) for g in held if set(held[g][layer]) - keep[g]}

    def _hold_all(self, layer: int, experts_of: Mapping[GroupId, Sequence[int]]) -> int:
        """Hosts at the same time, the groups of one host one after the other: they share its cores and its disk."""
        infos = self._coordinator.membership().groups
        by_host: dict[str, list[GroupId]] = {}
        for group in experts_of:
            by_host.setdefault(infos[group].host if group in infos else "", []).append(group)

        def one_host(groups: list[GroupId]) -> int:
            return sum(self._hold(group, layer, experts_of[group]) for group in groups)

        with ThreadPoolExecutor(max_workers=MAX_AT_ONCE, thread_name_prefix="tell-group") as pool:
            told = [pool.submit(one_host, groups) for groups in by_host.values()]
        failed: ExpertMeshError | None = None
        total = 0
        for future in told:
            try:
                total += future.result()
            except ExpertMeshError as exc:
                failed = exc
        if failed is not None:
            raise failed
        return total

    def wait_for_routers(self, order: tuple[int, int]) -> None:
        """Until no router uses a table before this one, nor waits for calls of one.

        Raises:
            Unavailable: one of them still does after a while.
        """
        deadline = Deadline.after(ACK_TIMEOUT_S, self._clock)
        while behind := self._routers.behind(order):
            if deadline.expired():
                raise Unavailable(f"routers {', '.join(behind)} still use an older table after {ACK_TIMEOUT_S:g} s")
            self._sleep(0.1)
        self._sleep(SETTLE_S)
