"""The product's own commands as processes, and what they leave behind."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from cluster.__main__ import main

COMMAND = [sys.executable, "-m", "cluster"]
START_S, STOP_S = 240.0, 90.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def run(*arguments: str, timeout_s: float = START_S) -> subprocess.CompletedProcess[str]:
    """One command to its end."""
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=timeout_s, check=False)


def run_here(*arguments: str) -> subprocess.CompletedProcess[str]:
    """One command in this process, which has imported everything already: for those that end before they start any."""
    out, err, argv = io.StringIO(), io.StringIO(), sys.argv
    status: int | str | None = 0
    sys.argv = ["expertmesh", *arguments]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                main()
            except SystemExit as exc:
                status = exc.code
    finally:
        sys.argv = argv
    assert isinstance(status, int), status
    return subprocess.CompletedProcess(["expertmesh", *arguments], status, out.getvalue(), err.getvalue())


def last_json(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """The JSON object on the last line of standard output."""
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def descendants(pid: int) -> list[psutil.Process]:
    """All processes below one. Ray's daemons stay children of the process that started them."""
    return psutil.Process(pid).children(recursive=True)


def survivors(processes: list[psutil.Process]) -> list[str]:
    """Those that still run, after a short grace for the system to reap them."""
    _, alive = psutil.wait_procs(processes, timeout=15)
    return [f"{p.pid} {p.name()}" for p in alive if p.status() != psutil.STATUS_ZOMBIE]


class ServeProcess:
    """`expertmesh serve` in the background, ready when the constructor returns."""

    def __init__(self, *arguments: str, log: Path) -> None:
        self.address = f"127.0.0.1:{free_port()}"
        self._log = log.open("w")
        self.process = subprocess.Popen(
            [*COMMAND, "serve", "--listen", self.address, *arguments],
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
        )
        limit = time.monotonic() + START_S
        while f"on {self.address}" not in log.read_text():
            if self.process.poll() is not None or time.monotonic() > limit:
                self.process.kill()
                raise AssertionError(f"serve did not start:\n{log.read_text()}")
            time.sleep(0.2)

    def stop(self, by_command: bool = False) -> tuple[int, list[str]]:
        """(exit status, processes left behind), by SIGTERM or by `expertmesh stop`."""
        left = descendants(self.process.pid)
        if by_command:
            done = run("stop", "--server", self.address, "--json")
            assert done.returncode == 0, done.stderr
            assert last_json(done) == {"stopped": [self.address], "running": []}
        else:
            os.kill(self.process.pid, signal.SIGTERM)
        status = self.process.wait(STOP_S)
        self._log.close()
        return status, survivors(left)
