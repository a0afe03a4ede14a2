"""What all commands share: consoles, options, the JSON result, and signals. Results go to standard output (with --json
as one object on its last line), everything else to standard error."""

from __future__ import annotations

import json
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from cluster.telemetry.console import ProgressReport

DEFAULT_SERVER = "127.0.0.1:9000"

stdout = Console(highlight=False, soft_wrap=True)
stderr = Console(stderr=True, highlight=False, soft_wrap=True)

Json = Annotated[bool, typer.Option("--json", help="One JSON object as the last line of standard output.")]
Server = Annotated[str, typer.Option("--server", help="HOST:PORT of a router's client port, or several with commas.")]
ConfigFile = Annotated[Path | None, typer.Option("--config", help="YAML file; keys as in the README.")]


class Stopped(Exception):
    """SIGTERM or Ctrl-C arrived."""


def emit(result: dict[str, Any]) -> None:
    """The JSON object of a command."""
    sys.stdout.write(json.dumps(result, allow_nan=False) + "\n")
    sys.stdout.flush()


def reporting() -> ProgressReport:
    """Progress on standard error."""
    return ProgressReport(stderr)


class Stop:
    """Turns SIGTERM and Ctrl-C into `Stopped` while something starts, and into the end of `wait` afterwards."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self._waiting = False

    def arm(self) -> None:
        """Puts the handlers in place (again)."""
        signal.signal(signal.SIGTERM, self._on_signal)
        signal.signal(signal.SIGINT, self._on_signal)

    def _on_signal(self, _number: int, _frame: object) -> None:
        again = self._event.is_set()
        self._event.set()
        if not self._waiting and not again:
            raise Stopped

    def wait(self) -> None:
        """Returns when a signal has come."""
        self._waiting = True
        while not self._event.wait(1.0):
            pass


@contextmanager
def stopping() -> Iterator[Stop]:
    """Handlers for the time of a command; restored afterwards."""
    before = [(number, signal.getsignal(number)) for number in (signal.SIGTERM, signal.SIGINT)]
    stop = Stop()
    stop.arm()
    try:
        yield stop
    finally:
        for number, handler in before:
            signal.signal(number, handler)
