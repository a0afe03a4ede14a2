"""A link as routers use it: gRPC from the start, the best transport that both ends can do beside it, and the way back.

The gRPC stream is made first and stays: it carries the handshake that says what else is possible, and the calls
whenever the better transport is down. Calls in flight on a transport that breaks fail with LinkBroken, and the
dispatcher sends them again at once. A thread makes what is down again, with growing pauses.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cluster.core import Clock, Deadline, GroupId, LayerCall, Order
from cluster.errors import ExpertMeshError, LinkBroken
from cluster.transport.base import LayerRows, PendingReply, Transport
from cluster.transport.choice import BASE, Candidate, explain

log = logging.getLogger(__name__)

Make = Callable[[str, Deadline], Transport]
"""Makes a transport of a kind, or raises LinkBroken or LinkRefused."""

MAKE_TIMEOUT_S = 10.0
CHECK_PERIOD_S = 0.25
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0


@dataclass(frozen=True, slots=True)
class LinkStatus:
    """How a link is. ``fallbacks`` counts breaks of the better transport, ``returns`` how often it was made again
    after one; ``failure`` is the newest break, ``failure_age_s`` seconds ago."""

    kind: str
    healthy: bool
    why: str
    wanted: str
    fallbacks: int = 0
    returns: int = 0
    failure: str = ""
    failure_age_s: float = 0.0
    progress_age_s: float = 0.0


class Link:
    """Implements `Transport`. ``base`` is a gRPC transport that is up; ``candidates`` are tried in order by ``make``,
    and so is "grpc" when the base breaks while something better is up. ``reasons`` say why others were left out.
    """

    def __init__(
        self,
        base: Transport,
        wanted: str,
        candidates: Sequence[Candidate],
        reasons: Sequence[str],
        make: Make,
        clock: Clock = time.monotonic,
    ) -> None:
        self.group: GroupId = base.group
        self.address = base.address
        self._base, self._wanted, self._candidates, self._make = base, wanted, tuple(candidates), make
        self._left_out = tuple(reasons)
        self._clock = clock
        self._lock = threading.Lock()
        self._best: Transport | None = None
        self._why = self._failure = ""
        self._fallbacks = self._returns = 0
        self._failed_s = self._progress_s = clock()
        self._pause_s, self._retry_s = FIRST_PAUSE_S, clock()
        self._base_pause_s, self._base_retry_s = FIRST_PAUSE_S, clock()
        self._stop = threading.Event()
        self._upgrade()
        self._keeper = threading.Thread(target=self._keep, name=f"link-{self.group}", daemon=True)
        self._keeper.start()

    # -- what the dispatcher uses ----------------------------------------------------------------------------------

    @property
    def kind(self) -> str:
        """What carries calls now."""
        best = self._best
        return best.kind if best is not None else self._base.kind

    @property
    def carrier(self) -> Transport:
        """The transport that carries calls now."""
        best = self._best
        return best if best is not None else self._base

    def submit(self, call: LayerCall, rows: LayerRows, deadline: Deadline) -> PendingReply:
        """See `Transport`. A better transport that is found broken here is left for gRPC at once."""
        best = self._best
        if best is not None:
            try:
                return best.submit(call, rows, deadline)
            except LinkBroken as exc:
                self._fall_back(best, str(exc))
        return self._base.submit(call, rows, deadline)

    def cancel(self, pending: PendingReply) -> None:
        """See `Transport`."""
        best = self._best
        if best is not None:
            best.cancel(pending)
        self._base.cancel(pending)

    def order(self, order: Order, at_once: bool = False) -> None:
        """See `Transport`."""
        best = self._best
        (self._base if best is None else best).order(order, at_once)

    def healthy(self) -> bool:
        """True while anything carries calls."""
        best = self._best
        return not self._stop.is_set() and ((best is not None and best.healthy()) or self._base.healthy())

    def close(self) -> None:
        """See `Transport`."""
        self._stop.set()
        with self._lock:
            transports = [t for t in (self._best, self._base) if t is not None]
        for transport in transports:
            transport.close()
        if threading.current_thread() is not self._keeper:
            self._keeper.join(timeout=2.0)

    def status(self) -> LinkStatus:
        """For operators."""
        healthy = self.healthy()
        with self._lock:
            now_s = self._clock()
            return LinkStatus(
                kind=self.kind,
                healthy=healthy,
                why=self._why,
                wanted=self._wanted,
                fallbacks=self._fallbacks,
                returns=self._returns,
                failure=self._failure,
                failure_age_s=now_s - self._failed_s if self._failure else 0.0,
                progress_age_s=now_s - self._progress_s,
            )

    # -- falling back and returning --------------------------------------------------------------------------------

    def _fall_back(self, broken: Transport, reason: str) -> None:
        with self._lock:
            if self._best is not broken:
                return
            self._best = None
            self._fallbacks += 1
            self._failure, self._failed_s = f"{broken.kind}: {reason}", self._clock()
            self._why = f"fell back from {broken.kind}: {reason}"
            self._pause_s, self._retry_s = FIRST_PAUSE_S, self._clock() + FIRST_PAUSE_S
        log.warning("link to group %d: %s broke, gRPC carries on: %s", self.group, broken.kind, reason)
        broken.close()

    def _upgrade(self) -> None:
        """Tries the candidates in order; afterwards one of them is up or the reasons are known."""
        failures = list(self._left_out)
        for candidate in self._candidates:
            try:
                made = self._make(candidate.kind, Deadline.after(MAKE_TIMEOUT_S, self._clock))
            except ExpertMeshError as exc:
                failures.append(f"{candidate.kind}: {exc}")
                continue
            with self._lock:
                if not self._stop.is_set():
                    self._best = made
                    self._why = explain([candidate.why, *failures])
                    if self._fallbacks > self._returns:
                        self._returns += 1
                        log.warning("link to group %d: %s is back", self.group, made.kind)
                    return
            made.close()
            return
        with self._lock:
            fell = f"fell back from {self._failure}; " if self._failure else ""
            self._why = fell + explain(failures or ["asked for" if self._wanted == BASE else "nothing better"])
            self._retry_s = self._clock() + self._pause_s
            self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)

    def _restore_base(self) -> None:
        try:
            made = self._make(BASE, Deadline.after(MAKE_TIMEOUT_S, self._clock))
        except ExpertMeshError as exc:
            log.info("link to group %d: gRPC: %s", self.group, exc)
            self._base_retry_s = self._clock() + self._base_pause_s
            self._base_pause_s = min(2 * self._base_pause_s, LONGEST_PAUSE_S)
            return
        with self._lock:
            old, self._base = self._base, made
            self._base_pause_s = FIRST_PAUSE_S
            stopped = self._stop.is_set()
        old.close()
        if stopped:
            made.close()

    def _keep(self) -> None:
        while not self._stop.wait(CHECK_PERIOD_S):
            try:
                self._check()
            except Exception:
                log.exception("keeping the link to group %d failed", self.group)
            self._progress_s = self._clock()

    def _check(self) -> None:
        best = self._best
        if best is not None and not best.healthy():
            self._fall_back(best, "found broken")
            best = None
        if best is None and self._candidates and self._base.healthy() and self._clock() >= self._retry_s:
            self._upgrade()
        if best is not None and not self._base.healthy() and self._clock() >= self._base_retry_s:
            self._restore_base()
