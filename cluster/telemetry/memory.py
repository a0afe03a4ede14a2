"""What a process occupies, from the operating system."""

from __future__ import annotations

import ctypes
import os
import socket
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class ProcessFacts:
    """Identity and memory of a process; ``anonymous_bytes`` leaves out mapped files."""

    pid: int
    host: str
    rss_bytes: int
    anonymous_bytes: int


def process_facts() -> ProcessFacts:
    """Facts of this process. Memory is 0 where the system has no ``/proc``."""
    rss = anonymous = 0
    try:
        # Not smaps_rollup: it walks the page tables, 67 ms a GiB, with the process's memory map locked.
        for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
            name, _, rest = line.partition(":")
            if name == "VmRSS":
                rss = int(rest.split()[0]) * 1024
            elif name == "RssAnon":
                anonymous = int(rest.split()[0]) * 1024
    except OSError:
        pass
    return ProcessFacts(os.getpid(), socket.gethostname(), rss, anonymous)


_M_MMAP_THRESHOLD = -3
"""glibc's number of this setting."""


def give_back_memory() -> None:
    """Returns to the system what the allocator keeps of memory that is free again, such as what loading took."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's; others have nothing like it
    if trim is not None:
        trim(0)


def give_back_at_once(least_bytes: int = 256 * 1024) -> None:
    """From now on what is freed of at least ``least_bytes`` goes back to the system at once, and not to the allocator's
    heaps, which are as large as the largest moment of each thread. Costs page faults; for processes with a budget."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, least_bytes)
