"""What drills do to a system that serves. By process id, and undone when the drill is over."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import psutil

from cluster.errors import ExpertMeshError

Pid = Callable[[], int]


class Targets(Protocol):
    """What there is to damage. Process ids are as they are now: a restarted process has another one."""

    def group(self) -> int:
        """Process id of the group that is damaged."""
        ...

    def router(self) -> int:
        """Process id of the router that is damaged."""
        ...

    def coordinator(self) -> int:
        """Process id of the coordinator."""
        ...

    def controller(self) -> int:
        """Process id of Serve's controller."""
        ...

    def drop_links(self) -> None:
        """Closes the group's links once."""
        ...

    def scale(self) -> None:
        """Adds a group, and removes it again."""
        ...

    def balance(self) -> None:
        """Switches balance on, and waits until experts have been moved."""
        ...


SLICE_S = 0.02


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of damage, and what may come of it."""

    name: str
    what: str
    max_gap_ms: float | None = None
    """Longest gap between two tokens that passes."""
    max_untouched_gap_ms: float | None = None
    """As before, of streams at other routers than the damaged one."""
    max_p99_ratio: float | None = None
    """Of p99 of time per output token: requests that met the damage, to those before."""
    lasts: bool = True
    """It goes on for a while; otherwise it is done at once."""
    must_improve: bool = False
    """p99 of requests' time per output token is to be less afterwards than before."""
    before_s: float = 10.0
    """Load before the damage, by default."""
    restarts: bool = False
    """The group, or the router, will be another process."""
    routers: int = 1
    """Routers that it takes."""
    groups: int = 3
    """Groups, by default."""
    least_s: float = 0.0
    """It takes so long to mean anything."""


KINDS = {
    kind.name: kind
    for kind in (
        Kind("kill-group", "SIGKILL for one group's process", max_gap_ms=300.0, lasts=False, restarts=True),
        Kind("hang-group", "SIGSTOP for one group's process, and SIGCONT some seconds later", max_gap_ms=1300.0),
        Kind("slow-group", "one group's process runs a tenth of the time", max_p99_ratio=2.0),
        Kind(
            "flap-group",
            "SIGKILL for one group's process, and again each time that it is back",
            restarts=True,
            least_s=30.0,
        ),
        Kind("drop-link", "one group closes all its links, again and again"),
        Kind("kill-coordinator", "SIGKILL for the coordinator's process", max_gap_ms=300.0),
        Kind("kill-controller", "SIGKILL for the process of Serve's controller", max_gap_ms=300.0),
        Kind(
            "kill-router",
            "SIGKILL for one router's process",
            max_untouched_gap_ms=300.0,
            lasts=False,
            restarts=True,
            routers=2,
        ),
        Kind("scale", "one more group is started, and stopped again", max_p99_ratio=2.0, lasts=False),
        Kind(
            "rebalance",
            "the hottest experts are in one group, and balance is switched on",
            max_p99_ratio=1.25,
            must_improve=True,
            before_s=20.0,
            groups=2,  # more groups than cores hide from each other which one has most to do
            lasts=False,
        ),
    )
}


@contextmanager
def damaged(kind: Kind, targets: Targets) -> Iterator[None]:
    """Does the damage for the time of the block."""
    killed = {
        "kill-group": targets.group,
        "kill-router": targets.router,
        "kill-coordinator": targets.coordinator,
        "kill-controller": targets.controller,
    }
    if kind.name in killed:
        os.kill(killed[kind.name](), signal.SIGKILL)
        yield
    elif kind.name == "hang-group":
        pid = targets.group()
        try:
            os.kill(pid, signal.SIGSTOP)
            yield
        finally:
            _signal(pid, signal.SIGCONT)
    elif kind.name == "slow-group":
        with _repeating(_slower(targets.group()), 0.0):
            yield
    elif kind.name == "flap-group":
        with _repeating(_kills_whoever_is_new(targets.group), 0.5):
            yield
    elif kind.name == "drop-link":
        with _repeating(targets.drop_links, 0.4):
            yield
    else:
        (targets.scale if kind.name == "scale" else targets.balance)()
        yield


def needs_cluster(kind: Kind) -> bool:
    """It cannot be done with process ids of groups alone."""
    return kind.name in ("kill-coordinator", "kill-controller", "drop-link")


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _slower(pid: int) -> Callable[[], None]:
    """Nine tenths of each slice it is stopped."""

    def one_slice() -> None:
        _signal(pid, signal.SIGSTOP)
        time.sleep(0.9 * SLICE_S)
        _signal(pid, signal.SIGCONT)
        time.sleep(0.1 * SLICE_S)

    return one_slice


def _kills_whoever_is_new(group: Pid) -> Callable[[], None]:
    killed: set[int] = set()

    def look() -> None:
        try:
            pid = group()
        except ExpertMeshError:
            return  # it is not back yet
        if pid not in killed and psutil.pid_exists(pid):
            killed.add(pid)
            _signal(pid, signal.SIGKILL)

    return look


@contextmanager
def _repeating(action: Callable[[], None], pause_s: float) -> Iterator[None]:
    """Runs an action again and again in a thread, and ends with it done."""
    stop = threading.Event()
    failed: list[Exception] = []

    def run() -> None:
        try:
            while not stop.is_set():
                action()
                stop.wait(pause_s)
        except Exception as exc:  # noqa: BLE001 (raised where the drill waits)
            failed.append(exc)

    thread = threading.Thread(target=run, name="damage", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(30)
    if failed:
        raise failed[0]
