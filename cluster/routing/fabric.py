"""The router's view of the groups: the newest placement table and one link to each group that it names.

Where tables come from and how links are made is given to the constructor; nothing here knows Ray or gRPC.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from cluster.core import Clock, Deadline, GroupId, GroupInfo, LayerCall, Membership, PlacementTable
from cluster.errors import DeadlineExceeded, ExpertMeshError, LinkBroken, MissingExperts, Overloaded, Unavailable
from cluster.routing.choice import LayerCopies, Owners
from cluster.routing.prediction import look_ahead
from cluster.transport.base import LayerRows, Transport
from cluster.transport.link import Link, LinkStatus

log = logging.getLogger(__name__)

FetchMembership = Callable[[], Membership]
Connect = Callable[[GroupInfo, Deadline], Transport]
PROBE_PERIOD_S, PROBE_TIMEOUT_S = 0.25, 1.0
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
        self._copies: dict[tuple[int, GroupId], LayerCopies] = {}
        self._suspects: dict[GroupId, Any] = {}
        self.view = object()
        """Another one as soon as anything that `copies`, `up` and `membership` say may have changed."""
        self.has_copies = False
        self._last_owner_LE: list[Owners] = []
        self._stores: frozenset[GroupId] = frozenset()
        self._depth = 0
        self._reconnects: dict[GroupId, int] = {}
        self._probes = itertools.count(1 << 62)  # ids that no other call has
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
                owner_LE = [
                    np.array([groups[0] if groups else -1 for groups in experts], dtype=np.int64)
                    for experts in membership.table.owners
                ]
                known = self._last_owner_LE or owner_LE
                self._last_owner_LE = [np.where(now >= 0, now, then) for now, then in zip(owner_LE, known, strict=True)]
                self.has_copies = any(len(groups) > 1 for experts in membership.table.owners for groups in experts)
                self._copies = {}
            self._membership, self.view = membership, object()
            stores = {info.group: info.store for info in membership.groups.values() if info.store is not None}
            self._stores, self._depth = frozenset(stores), look_ahead(stores.values())
            gone = [(group, self._take_out(group)) for group in [g for g in self._links if self._stale(g)]]
            for group in [group for group in self._suspects if group not in membership.groups]:
                self._suspects.pop(group)
            for group, _ in gone:
                self._doubt(group, None)
        for _, link in gone:
            link.close()  # not under the lock: it may wait for a thread of its own
        if self._follower is not None:
            self._follower(membership)

    def _stale(self, group: GroupId) -> bool:
        info = self._membership.groups.get(group)
        return info is None or info.incarnation != self._incarnations[group] or not self._links[group].healthy()

    def _take_out(self, group: GroupId) -> Transport:
        self.view = object()
        self._incarnations.pop(group, None)
        return self._links.pop(group)

    def _follow(self) -> None:
        while not self._stop.wait(PROBE_PERIOD_S if self._suspects else REFRESH_PERIOD_S):
            try:
                self.refresh()
                for group in list(self.membership.groups):
                    try:
                        self._reach(group)
                    except ExpertMeshError as exc:  # the others are there all the same
                        log.warning("group %d cannot be reached: %s", group, exc)
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

    def choose(
        self,
        layer: int,
        experts_P: Owners,
        decode: bool,
        cost: Mapping[GroupId, float],
        handicaps: Mapping[GroupId, float] | None = None,
    ) -> Owners:
        """Whom to ask for each logical expert of the layer, int64 [E] (-1: no living copy): see `LayerCopies`. Groups
        that are doubted only where nobody else holds the expert."""
        return self._layer(layer).choose(experts_P, decode, cost, handicaps)

    def copies(self, layer: int) -> LayerCopies:
        """Who holds the experts of a layer and is not doubted, or is all there is."""
        return self._layer(layer)

    def covered(self, layer: int, experts_P: Any, group: GroupId) -> bool:
        """All of these experts have a living copy elsewhere."""
        others = self._layer(layer, group)
        return others.complete or bool((others.owner_E[experts_P] >= 0).all())

    def elsewhere(self, layer: int, group: GroupId) -> Owners:
        """Whom to ask for each expert instead of a group, int64 [E]; -1 where there is nobody."""
        return self._layer(layer, group).owner_E

    def _layer(self, layer: int, without: GroupId = -1) -> LayerCopies:
        with self._lock:
            key = layer, without
            found = self._copies.get(key)
            if found is None:
                owners = []
                for groups in self._membership.table.owners[layer]:
                    living = [group for group in groups if group != without]
                    trusted = [group for group in living if group not in self._suspects]
                    # Who is doubted may still be all there is; but nobody is sent from one doubted group to another.
                    owners.append(trusted or (living if without < 0 else []))
                found = self._copies[key] = LayerCopies(owners)
            return found

    def num_layers(self) -> int:
        """MoE layers."""
        return len(self._last_owner_LE)

    def num_experts(self, layer: int) -> int:
        """Logical experts of a layer."""
        return len(self._last_owner_LE[layer])

    def suspect(self, group: GroupId, hidden_TH: torch.Tensor) -> None:
        """A group did not answer: it is asked again, while others hold its experts, only after it has answered a probe
        of one such row."""
        with self._lock:
            self._doubt(group, hidden_TH[:1].clone())

    def suspects(self) -> list[GroupId]:
        """Groups that are doubted."""
        with self._lock:
            return sorted(self._suspects)

    def _doubt(self, group: GroupId, row_1H: torch.Tensor | None) -> None:
        if group in self._membership.groups:
            if row_1H is not None or group not in self._suspects:
                self._suspects[group] = row_1H
            self._copies, self.view = {}, object()

    def _reach(self, group: GroupId) -> None:
        """Sees to it that there is a link to a group, and that it answers if that is in doubt."""
        try:
            link = self.link(group)
            if group not in self._suspects:
                return
            row_1H, info = self._suspects[group], self._membership.groups.get(group)
            if row_1H is not None and info is not None:
                layer, experts = next(((i, held) for i, held in enumerate(info.holdings) if held), (0, (0,)))
                rows = LayerRows.of(row_1H, [0], experts[:1], 0.0)
                call = LayerCall(next(self._probes), 0, layer, 0, 0, timeout_ms=int(PROBE_TIMEOUT_S * 1000))
                pending = link.submit(call, rows, Deadline.after(PROBE_TIMEOUT_S, self._clock))
                try:
                    pending.wait(Deadline.after(PROBE_TIMEOUT_S, self._clock))
                finally:
                    if not pending.done():
                        link.cancel(pending)
        except MissingExperts:
            pass  # that is an answer
        except (Unavailable, DeadlineExceeded, Overloaded) as exc:
            log.info("group %d does not answer yet: %s", group, exc)
            return
        with self._lock:
            if self._suspects.get(group) is row_1H:  # it was not doubted anew meanwhile
                self._suspects.pop(group, None)
                self._copies, self.view = {}, object()
        log.warning("group %d answers again", group)

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

    def up(self, group: GroupId) -> Transport | None:
        """The link to a group as it is now, broken perhaps; None where there is none, or only one to another process
        than the table means. Never waits."""
        with self._lock:
            info = self._membership.groups.get(group)
            if info is None or self._incarnations.get(group) != info.incarnation:
                return None
            return self._links.get(group)

    def link(self, group: GroupId) -> Transport:
        """The link to a group; made when there is none.

        Raises:
            LinkBroken: the group is not in the table or cannot be reached.
            LinkRefused: the group refuses this router.
        """
        with self._lock:
            stale = self._take_out(group) if group in self._links and self._stale(group) else None
            if group in self._links:
                return self._links[group]
            info = self._membership.groups.get(group)
        if stale is not None:
            stale.close()
        if info is None:
            raise LinkBroken(f"group {group} is not among the living groups")
        # Not under the lock: a host that does not answer would stop everybody who asks for a table.
        made = self._connect(info, Deadline.after(CONNECT_TIMEOUT_S, self._clock))
        with self._lock:
            if group not in self._links:
                self._links[group], self._incarnations[group], self.view = made, info.incarnation, object()
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
            links = [self._take_out(group) for group in list(self._links)]
        for link in links:
            link.close()


def _status(link: Transport) -> LinkStatus:
    if isinstance(link, Link):
        return link.status()
    return LinkStatus(
        kind=link.kind, healthy=link.healthy(), why="groups live in the router's process", wanted=link.kind
    )
