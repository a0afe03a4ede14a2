"""`expertmesh bench first`: what the first request after a start waits for, with and without warm-up.

Every start is a new system: groups are new processes, behind the real links, and the router is one, too. Starts with
and without take turns. A ratio is the first request's time to first token over the median of those that follow.
"""

from __future__ import annotations

import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.bench.children import end
from cluster.bench.engine import QUIET, Generator, cores, router_of
from cluster.config import load_config
from cluster.errors import InternalError, InvalidArgument

WARM, COLD = "warm_up", "no_warm_up"
_NEW = 4

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Work:
    """So many starts of each kind, and requests after each: one, and then ``requests`` more, one at a time."""

    starts: int = 5
    requests: int = 50
    prompt: int = 64

    def __post_init__(self) -> None:
        for name in ("starts", "requests", "prompt"):
            if getattr(self, name) < 1:
                raise InvalidArgument(f"--{name}", getattr(self, name), "must be at least 1")


def measure(model: Path, groups: int, memory: str, work: Work, progress: Progress) -> dict[str, Any]:
    """Milliseconds of first requests and of those that followed, and the ratios, by kind of start."""
    found: dict[str, list[list[float]]] = {WARM: [], COLD: []}
    for number in range(work.starts):
        for kind in (WARM, COLD) if number % 2 == 0 else (COLD, WARM):
            found[kind].append(_one_start(model, groups, memory, work, kind == WARM))
            first, *others = found[kind][-1]
            progress(
                f"start {number + 1} of {work.starts}, {kind}: first {first * 1e3:.1f} ms, median of the next "
                f"{statistics.median(others) * 1e3:.1f} ms"
            )
    return {kind: _figures(starts) for kind, starts in found.items()} | {"starts": work.starts}


def _figures(starts: list[list[float]]) -> dict[str, Any]:
    ratios = [first / statistics.median(others) for first, *others in starts]
    return {
        "first_ttft_ms": [first * 1e3 for first, *_ in starts],
        "next_ttft_p50_ms": [statistics.median(others) * 1e3 for _, *others in starts],
        "ratios": ratios,
        "ratio_p50": statistics.median(ratios),
    }


def _one_start(model: Path, groups: int, memory: str, work: Work, warm: bool) -> list[float]:
    settings = {
        "model": str(model.resolve()),
        "groups": groups,
        "dtype": "fp32",
        "threads": max(1, cores() // (groups + 1)),
        "expert_memory": memory,
        "warm_up": warm,
        "telemetry": QUIET,
        "data_plane": {"secret": "bench"},
    }
    numbers = [str(number) for number in (work.requests, work.prompt)]
    process = subprocess.Popen(
        [sys.executable, "-m", "cluster.bench.first", json.dumps(settings), *numbers],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
    finally:
        end(process)
    if not line:
        raise InternalError("a system did not start")
    times_s: list[float] = json.loads(line)
    return times_s


def main() -> None:
    """Starts a system and tells the seconds to the first token of each request."""
    settings, requests, prompt = json.loads(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    with router_of(load_config(flags=settings, environ={})) as router:
        generate, vocab, rng = Generator(router), router.served.info.vocab_size, random.Random()
        times_s = []
        for _ in range(1 + requests):
            started_s = time.perf_counter()
            told = generate([[rng.randrange(vocab) for _ in range(prompt)]], _NEW)
            times_s.append(told["first_s"][0] - started_s)
        sys.stdout.write(json.dumps(times_s) + "\n")
        sys.stdout.flush()
        sys.stdin.readline()


if __name__ == "__main__":
    main()
