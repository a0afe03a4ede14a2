"""Membership and the placement table, rebuilt from what the groups themselves say they hold. Plain threads, no Ray."""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from cluster.core import Clock, Deadline, GroupId, GroupInfo, Membership
from cluster.errors import ExpertMeshError, Unavailable
from cluster.placement.planner import Holdings, table_from_groups

log = logging.getLogger(__name__)

AskGroup = Callable[[GroupId], GroupInfo]
"""Asks one group for its info; raises ExpertMeshError when it does not answer in time."""

POLL_PERIOD_S = 1.0
MISSES = 3
"""Polls without an answer in a row after which a group is no member any more."""
MAX_ASKED = 32
"""Groups that are asked at a time."""


class Coordinator:
    """Polls the groups and keeps the table. ``epoch`` is higher than that of every coordinator before.

    The table names the copies that groups hold. Where `want` says which of them are wanted, it names the others only
    while nobody else has their expert.
    """

    def __init__(
        self,
        experts_per_layer: Sequence[int],
        groups: Sequence[GroupId],
        ask: AskGroup,
        epoch: int,
        clock: Clock = time.monotonic,
    ) -> None:
        self.experts_per_layer, self._groups, self._ask = tuple(experts_per_layer), list(groups), ask
        self._epoch, self._clock = epoch, clock
        self._lock = threading.Lock()
        self._polling = threading.Lock()
        self._infos: dict[GroupId, GroupInfo] = {}
        self._misses = dict.fromkeys(self._groups, 0)
        self._wanted: dict[int, dict[GroupId, frozenset[int]]] = {}
        self._membership = Membership(table_from_groups(epoch, 0, self.experts_per_layer, ()))
        self._pool = ThreadPoolExecutor(max_workers=MAX_ASKED, thread_name_prefix="ask-group")
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="coordinator", daemon=True)
        self._progress_s = clock()

    def start(self, timeout_s: float, without: bool = False) -> None:
        """Waits until every group has answered once, then polls in the background; ``without`` those that do not answer
        in time, as after others have served before.

        Raises:
            Unavailable: a group did not answer within ``timeout_s``.
        """
        deadline = Deadline.after(timeout_s, self._clock)
        self.poll()
        while set(self._infos) != set(self._groups):
            if deadline.expired() and without:
                log.warning("groups %s do not answer", sorted(set(self._groups) - set(self._infos)))
                break
            if deadline.expired():
                missing = sorted(set(self._groups) - set(self._infos))
                raise Unavailable(f"groups {missing} did not answer within {timeout_s:g} s")
            self._stop.wait(0.2)
            self.poll()
        self._thread.start()

    def poll(self) -> None:
        """Asks every group once; a change of members or holdings makes a new version of the table."""
        with self._polling:  # answers of an earlier poll must not come after those of a later one
            groups = self.groups()
            answers = dict(zip(groups, self._pool.map(self._try, groups), strict=True))
            with self._lock:
                for group in [group for group in groups if group in self._misses]:
                    info = answers[group]
                    self._misses[group] = 0 if info is not None else self._misses[group] + 1
                    if info is not None:
                        self._infos[group] = info
                    elif self._misses[group] >= MISSES and self._infos.pop(group, None) is not None:
                        log.warning("group %d did not answer %d times: no longer a member", group, MISSES)
                self._make_table()
                self._progress_s = self._clock()

    def _make_table(self) -> None:
        before, infos = self._membership, self._infos
        table = table_from_groups(self._epoch, before.table.version, self.experts_per_layer, infos.values())
        table = dataclasses.replace(table, owners=_preferred(table.owners, self._wanted))
        born = {g: i.incarnation for g, i in infos.items()}
        if table.owners != before.table.owners or born != {g: i.incarnation for g, i in before.groups.items()}:
            table = dataclasses.replace(table, version=before.table.version + 1)
        self._membership = Membership(table, dict(infos))

    def _try(self, group: GroupId) -> GroupInfo | None:
        try:
            return self._ask(group)
        except ExpertMeshError as exc:
            log.info("group %d: %s", group, exc)
            return None

    def _follow(self) -> None:
        while not self._stop.wait(POLL_PERIOD_S):
            try:
                self.poll()
            except Exception:
                log.exception("polling the groups failed")

    def membership(self) -> Membership:
        """The newest table and the groups it names."""
        with self._lock:
            return dataclasses.replace(self._membership, progress_age_s=self.progress_age_s())

    # -- what changes of the placement need ----------------------------------------------------------------------------

    def groups(self) -> list[GroupId]:
        """The groups that there should be."""
        with self._lock:
            return list(self._groups)

    def holdings(self) -> dict[GroupId, Holdings]:
        """What the living groups say that they hold."""
        with self._lock:
            return {group: info.holdings for group, info in self._infos.items()}

    def wanted(self, layer: int) -> dict[GroupId, frozenset[int]] | None:
        """What `want` said last."""
        with self._lock:
            return self._wanted.get(layer)

    def want(self, layer: int, held: Mapping[GroupId, Sequence[int]]) -> tuple[int, int]:
        """From now on the table prefers these copies of a layer; the order of the table that does."""
        with self._lock:
            self._wanted[layer] = {group: frozenset(experts) for group, experts in held.items()}
            self._make_table()
            return self._membership.table.order

    def add(self, group: GroupId) -> None:
        """There is a new group, or will be soon."""
        with self._lock:
            if group not in self._misses:
                self._groups.append(group)
                self._misses[group] = 0

    def remove(self, group: GroupId) -> tuple[int, int]:
        """The group is no member any more; the order of the table without it."""
        with self._lock:
            if group in self._misses:
                self._groups.remove(group)
                del self._misses[group]
            self._infos.pop(group, None)
            self._make_table()
            return self._membership.table.order

    def progress_age_s(self) -> float:
        """Seconds since the last poll ended."""
        return self._clock() - self._progress_s

    def close(self) -> None:
        """Ends the thread."""
        self._stop.set()
        self._pool.shutdown(wait=False, cancel_futures=True)


def _preferred(
    owners: tuple[tuple[tuple[GroupId, ...], ...], ...], wanted: Mapping[int, Mapping[GroupId, frozenset[int]]]
) -> tuple[tuple[tuple[GroupId, ...], ...], ...]:
    """Without copies that are not wanted, except of experts that no living group is wanted to hold and does."""
    found = []
    for layer, experts in enumerate(owners):
        mine = wanted.get(layer)
        if mine is None:
            found.append(experts)
            continue
        none: frozenset[int] = frozenset()
        kept = [tuple(g for g in groups if e in mine.get(g, none)) or groups for e, groups in enumerate(experts)]
        found.append(tuple(kept))
    return tuple(found)
