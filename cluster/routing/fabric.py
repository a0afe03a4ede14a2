"""The router's view of the groups: the newest placement table and one link to each group that it names.

Where tables come from and how links are made is given to the constructor; nothing here knows Ray or gRPC.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from cluster.core import Clock, Deadline, GroupId, GroupInfo, Membership, PlacementTable
from cluster.errors import ExpertMeshError, LinkBroken, Unavailable
from cluster.routing.prediction import look_ahead
from cluster.transport.base import Transport
from cluster.transport.link import Link, LinkStatus

log = logging.getLogger(__name__)

FetchMembership = Callable[[], Membership]
Connect = Callable[[GroupInfo, Deadline], Transport]
Owners = np.ndarray[Any, np.dtype[np.int64]]
CONNECT_TIMEOUT_S = 5.0
REFRESH_PERIOD_S = 1.0
RETRY_S = 0.2


class Fabric:
    """Table and links. Thread-safe: the engine thread dispatches while the refresh thread follows the coordinator.

    ``fetch()`` returns the coordinator's membership or raises; ``connect(info, deadline)`` makes a link; ``follower``
    is told of each membership that is taken.
    """

    def __init__(
        self,
        fetch: FetchMembership,
        connect: Connect,
        clock: Clock = time.monotonic,
        follower: Callable[[Membership], None] | None = None,
    ) -> None:
        self._fetch, self._connect, self._clock, self._follower = fetch, connect, clock, follower
        self._lock = threading.RLock()
        self._membership = Membership(PlacementTable(0, 0, ()))
        self._links: dict[GroupId, Transport] = {}
        self._incarnations: dict[GroupId, str] = {}
        self._owner_LE: list[Owners] = []
        self._last_owner_LE: list[Owners] = []
        self._stores: frozenset[GroupId] = frozenset()
        self._depth = 0
        self._reconnects: dict[GroupId, int] = {}
        self._progress_s = clock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    # -- following the coordinator ---------------------------------------------------------------------------------

    def start(self, timeout_s: float) -> None:
        """Waits for a table and for a link to each of its groups, then follows the coordinator in the background.

        Raises:
            LinkRefused: a group refuses this router.
            Unavailable: coordinator or groups did not answer within ``timeout_s``.
        """
        deadline = Deadline.after(timeout_s, self._clock)
        while True:
            try:
                self.refresh()
                for group in self._membership.groups:
                    self.link(group)
                break
            except Unavailable as exc:
                if deadline.expired():
                    raise
                log.info("waiting for the groups: %s", exc)
                self._stop.wait(RETRY_S)
        self._thread = threading.Thread(target=self._follow, name="fabric", daemon=True)
        self._thread.start()

    def refresh(self) -> None:
        """Takes the coordinator's membership unless its table is older than the one in use."""
        membership = self._fetch()
        with self._lock:
            self._progress_s = self._clock()
            if membership.table.order < self._membership.table.order:
                log.warning(
                    "placement table %s is older than %s: ignored", membership.table.order, self._membership.table.order
                )
                return
            if membership.table != self._membership.table:
                # A plain loop over the table once per version; the dispatcher then only indexes arrays.
                self._owner_LE = [
                    np.array([groups[0] if groups else -1 for groups in experts], dtype=np.int64)
                    for experts in membership.table.owners
                ]
                known = self._last_owner_LE or self._owner_LE
                self._last_owner_LE = [
                    np.where(now >= 0, now, then) for now, then in zip(self._owner_LE, known, strict=True)
                ]
            self._membership = membership
            stores = {info.group: info.store for info in membership.groups.values() if info.store is not None}
            self._stores, self._depth = frozenset(stores), look_ahead(stores.values())
            for group in [g for g in self._links if self._stale(g)]:
                self._drop(group)
        if self._follower is not None:
            self._follower(membership)

    def _stale(self, group: GroupId) -> bool:
        info = self._membership.groups.get(group)
        return info is None or info.incarnation != self._incarnations[group] or not self._links[group].healthy()

    def _drop(self, group: GroupId) -> None:
        self._links.pop(group).close()
        self._incarnations.pop(group, None)

    def _follow(self) -> None:
        while not self._stop.wait(REFRESH_PERIOD_S):
            try:
                self.refresh()
                for group in list(self.membership.groups):
                    self.link(group)
            except ExpertMeshError as exc:
                log.warning("placement refresh: %s", exc)
            except Exception:
                log.exception("placement refresh failed")

    # -- what the dispatcher asks ----------------------------------------------------------------------------------

    @property
    def membership(self) -> Membership:
        """The membership in use."""
        with self._lock:
            return self._membership

    def owners(self, layer: int) -> tuple[PlacementTable, Owners]:
        """The table in use, and the group of each logical expert of the layer, int64 [E] (-1: no living copy)."""
        with self._lock:
            return self._membership.table, self._owner_LE[layer]

    def num_experts(self, layer: int) -> int:
        """Logical experts of a layer."""
        return len(self._owner_LE[layer])

    def store_links(self) -> list[Transport]:
        """Links that are up to groups that load experts when they are called for."""
        with self._lock:
            return [self._links[group] for group in self._stores if group in self._links]

    def depth(self) -> int:
        """How many layers ahead of their calls groups want to know what comes; 0 where all have everything at hand."""
        return self._depth

    def last_owner(self, layer: int, expert: int) -> GroupId:
        """The group that holds an expert, or held it last; 0 if nobody ever did."""
        with self._lock:
            return max(0, int(self._last_owner_LE[layer][expert]))

    def link(self, group: GroupId) -> Transport:
        """The link to a group; made when there is none.

        Raises:
            LinkBroken: the group is not in the table or cannot be reached.
            LinkRefused: the group refuses this router.
        """
        with self._lock:
            if group in self._links and self._stale(group):
                self._drop(group)
            if group in self._links:
                return self._links[group]
            info = self._membership.groups.get(group)
        if info is None:
            raise LinkBroken(f"group {group} is not among the living groups")
        # Not under the lock: a host that does not answer would stop everybody who asks for a table.
        made = self._connect(info, Deadline.after(CONNECT_TIMEOUT_S, self._clock))
        with self._lock:
            if group not in self._links:
                self._links[group], self._incarnations[group] = made, info.incarnation
                self._reconnects[group] = self._reconnects.get(group, -1) + 1
                return made
            other = self._links[group]
        made.close()
        return other

    def link_states(self) -> dict[GroupId, tuple[LinkStatus, int]]:
        """How every link is, and how often it was made anew."""
        with self._lock:
            links, reconnects = dict(self._links), dict(self._reconnects)
        return {group: (_status(link), reconnects.get(group, 0)) for group, link in links.items()}

    def progress_age_s(self) -> float:
        """Seconds since the coordinator last answered."""
        return self._clock() - self._progress_s

    def close(self) -> None:
        """Ends the thread and all links."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=10)
        with self._lock:
            for group in list(self._links):
                self._drop(group)


def _status(link: Transport) -> LinkStatus:
    if isinstance(link, Link):
        return link.status()
    return LinkStatus(
        kind=link.kind, healthy=link.healthy(), why="groups live in the router's process", wanted=link.kind
    )
