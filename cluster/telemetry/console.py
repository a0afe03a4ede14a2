"""What people see on standard error: progress of long work, with the time it takes. Results go to standard output."""

from __future__ import annotations

import threading
import time
from types import TracebackType

from rich.console import Console
from rich.status import Status

PLAIN_PERIOD_S = 15.0


class ProgressReport:
    """Call it with what begins now. A spinner on a terminal; elsewhere a line a stage, and a sign of life.

    Use as a context manager.
    """

    def __init__(self, console: Console) -> None:
        self._console, self._started_s = console, time.monotonic()
        self._status: Status | None = None
        self._message = ""
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> ProgressReport:
        if self._console.is_terminal:
            self._status = self._console.status("")
            self._status.start()
        else:
            self._thread = threading.Thread(target=self._sign_of_life, daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._status is not None:
            self._status.stop()

    def __call__(self, message: str) -> None:
        """``message`` is what begins now."""
        self._message = message
        self._console.print(f"[dim]{time.monotonic() - self._started_s:6.1f} s[/dim]  {message}", highlight=False)
        if self._status is not None:
            self._status.update(message)

    def _sign_of_life(self) -> None:
        while not self._stop.wait(PLAIN_PERIOD_S):
            if self._message:
                elapsed_s = time.monotonic() - self._started_s
                self._console.print(f"{elapsed_s:6.1f} s  ... {self._message}", highlight=False, markup=False)
