"""What became of each change of the placement: why, what it promised, what it did, and what clients felt of it."""

from __future__ import annotations

import itertools
import threading
from collections import deque
from dataclasses import dataclass, field, replace

QUEUED, RUNNING, WATCHING = "queued", "running", "watching"
DONE, FAILED, ROLLED_BACK, NOTHING = "done", "failed", "rolled back", "nothing to do"
FINAL = (DONE, FAILED, ROLLED_BACK, NOTHING)
KEPT = 64


@dataclass(frozen=True, slots=True)
class Receipt:
    """``balance_*`` are mean over maximum of the groups' loads: planned from (``before``), promised (``predicted``),
    and seen in the load windows after the change (``measured``). ``gap_p99_ms_*`` are of gaps between two tokens of a
    stream, ``gaps_*`` how many there were."""

    number: int
    kind: str
    why: str
    state: str = QUEUED
    began_unix_s: float = 0.0
    duration_s: float = 0.0
    copies_loaded: int = 0
    copies_dropped: int = 0
    bytes_loaded: int = 0
    balance_before: float | None = None
    balance_predicted: float | None = None
    balance_measured: float | None = None
    gap_p99_ms_before: float | None = None
    gap_p99_ms_during: float | None = None
    gap_p99_ms_after: float | None = None
    gaps_before: int = 0
    gaps_during: int = 0
    gaps_after: int = 0
    problem: str = ""
    groups: tuple[int, ...] = field(default_factory=tuple)
    """Groups that take calls after it."""


class Receipts:
    """The newest ones. Thread-safe. Numbers begin after ``above``."""

    def __init__(self, above: int = 0) -> None:
        self._lock = threading.Lock()
        self._numbers = itertools.count(above + 1)
        self._receipts: deque[Receipt] = deque(maxlen=KEPT)

    def new(self, kind: str, why: str) -> Receipt:
        """A change that waits for its turn."""
        with self._lock:
            receipt = Receipt(next(self._numbers), kind, why)
            self._receipts.append(receipt)
            return receipt

    def update(self, receipt: Receipt, **changes: object) -> Receipt:
        """The receipt with changes, kept in place of the old one."""
        changed = replace(receipt, **changes)  # type: ignore[arg-type]
        with self._lock:
            for place, kept in enumerate(self._receipts):
                if kept.number == receipt.number:
                    self._receipts[place] = changed
        return changed

    def all(self) -> list[Receipt]:
        """Oldest first."""
        with self._lock:
            return list(self._receipts)
