"""Processes that a benchmark starts: they serve until their standard input ends."""

from __future__ import annotations

import subprocess

END_TIMEOUT_S, KILL_TIMEOUT_S = 20.0, 10.0


def end(process: subprocess.Popen[str]) -> None:
    """Closes its standard input, and kills it if that is not enough."""
    assert process.stdin is not None
    process.stdin.close()
    try:
        process.wait(END_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(KILL_TIMEOUT_S)
