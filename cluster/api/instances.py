"""Servers that run on this machine: `serve` leaves a small file for each, so that `stop` finds it."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil


@dataclass(frozen=True, slots=True)
class Instance:
    """One `serve` process. ``started_s`` tells it from a later process with the same id."""

    pid: int
    started_s: float
    address: str

    def alive(self) -> bool:
        """The process is still the one that wrote the file."""
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(self.pid)
            return abs(process.create_time() - self.started_s) < 1 and process.status() != psutil.STATUS_ZOMBIE
        return False


def _directory() -> Path:
    directory = Path(tempfile.gettempdir()) / f"expertmesh-{os.getuid()}"
    directory.mkdir(mode=0o700, exist_ok=True)
    return directory


def announce(address: str) -> Path:
    """Writes the file of this process; the caller removes it."""
    instance = Instance(os.getpid(), psutil.Process().create_time(), address)
    file = _directory() / f"{os.getpid()}.json"
    file.write_text(json.dumps(asdict(instance)), encoding="utf-8")
    return file


def running() -> list[Instance]:
    """Servers that still run; files of others are removed."""
    found = []
    for file in sorted(_directory().glob("*.json")):
        try:
            instance = Instance(**json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            instance = None
        if instance is not None and instance.alive():
            found.append(instance)
        else:
            file.unlink(missing_ok=True)
    return found
