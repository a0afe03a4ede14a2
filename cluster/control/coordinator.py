"""Membership and the placement table, rebuilt from what the groups themselves say they hold. Plain threads, no Ray."""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from cluster.core import Clock, Deadline, GroupId, GroupInfo, Membership
from cluster.errors import ExpertMeshError, Unavailable
from cluster.placement.planner import table_from_groups

log = logging.getLogger(__name__)

AskGroup = Callable[[GroupId], GroupInfo]
"""Asks one group for its info; raises ExpertMeshError when it does not answer in time."""

POLL_PERIOD_S = 1.0
MISSES = 3
"""Polls without an answer in a row after which a group is no member any more."""


class Coordinator:
    """Polls the groups and keeps the table. ``epoch`` is higher than that of every coordinator before."""

    def __init__(
        self,
        experts_per_layer: Sequence[int],
        groups: Sequence[GroupId],
        ask: AskGroup,
        epoch: int,
        clock: Clock = time.monotonic,
    ) -> None:
        self._experts_per_layer, self._groups, self._ask = tuple(experts_per_layer), tuple(groups), ask
        self._epoch, self._clock = epoch, clock
        self._lock = threading.Lock()
        self._infos: dict[GroupId, GroupInfo] = {}
        self._misses = dict.fromkeys(self._groups, 0)
        self._membership = Membership(table_from_groups(epoch, 0, self._experts_per_layer, ()))
        self._pool = ThreadPoolExecutor(max_workers=max(1, len(self._groups)), thread_name_prefix="ask-group")
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="coordinator", daemon=True)
        self._progress_s = clock()

    def start(self, timeout_s: float) -> None:
        """Waits until every group has answered once, then polls in the background.

        Raises:
            Unavailable: a group did not answer within ``timeout_s``.
        """
        deadline = Deadline.after(timeout_s, self._clock)
        self.poll()
        while set(self._infos) != set(self._groups):
            if deadline.expired():
                missing = sorted(set(self._groups) - set(self._infos))
                raise Unavailable(f"groups {missing} did not answer within {timeout_s:g} s")
            self._stop.wait(0.2)
            self.poll()
        self._thread.start()

    def poll(self) -> None:
        """Asks every group once; a change of members or holdings makes a new version of the table."""
        answers = list(self._pool.map(self._try, self._groups))
        with self._lock:
            for group, info in zip(self._groups, answers, strict=True):
                self._misses[group] = 0 if info is not None else self._misses[group] + 1
                if info is not None:
                    self._infos[group] = info
                elif self._misses[group] >= MISSES and self._infos.pop(group, None) is not None:
                    log.warning("group %d did not answer %d times: no longer a member", group, MISSES)
            before = self._membership
            table = table_from_groups(self._epoch, before.table.version, self._experts_per_layer, self._infos.values())
            born = {g: i.incarnation for g, i in self._infos.items()}
            if table.owners != before.table.owners or born != {g: i.incarnation for g, i in before.groups.items()}:
                table = table_from_groups(
                    self._epoch, before.table.version + 1, self._experts_per_layer, self._infos.values()
                )
            self._membership = Membership(table, dict(self._infos))
            self._progress_s = self._clock()

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

    def progress_age_s(self) -> float:
        """Seconds since the last poll ended."""
        return self._clock() - self._progress_s

    def close(self) -> None:
        """Ends the thread."""
        self._stop.set()
        self._pool.shutdown(wait=False, cancel_futures=True)
