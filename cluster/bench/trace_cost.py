"""`expertmesh bench trace-cost` and `failover-cost`: throughput of one server with something switched on and off.

Rounds of the same work take turns: off, all (on), and off once more as a control, in an order that turns as well, so
that slow drifts of the machine meet all of them. The cost is the median over the triples.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from cluster.api.client import Client
from cluster.bench.children import end
from cluster.errors import InternalError, InvalidArgument

OFF, ALL, CONTROL = "off", "all", "control"
_RESAMPLES = 10_000
ORDERS = tuple(itertools.permutations((OFF, ALL, CONTROL)))

Progress = Callable[[str], None]
Switch = Callable[[Client, bool], bool]
"""Switches something on or off; how it was before."""


@dataclass(frozen=True, slots=True)
class Work:
    """One round: so many requests, so many of them at a time; in so many slices, which take turns themselves, so that
    what the machine does in a few seconds meets off and on alike."""

    pairs: int = 36
    streams: int = 8
    requests: int = 16
    prompt: int = 32
    new: int = 32
    slices: int = 1

    def __post_init__(self) -> None:
        for name, least in (("pairs", 1), ("streams", 1), ("requests", 1), ("prompt", 1), ("new", 1)):
            value = getattr(self, name)
            if value < least:
                raise InvalidArgument(f"--{name}", value, f"must be at least {least}")

    @property
    def each(self) -> int:
        """Requests of a slice."""
        return max(1, self.requests // self.slices)


class Streams:
    """The process that sends."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def round(self) -> float:
        """Tokens a second of one round.

        Raises:
            InternalError: requests failed, or the process is gone.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise InternalError("the client process ended")
        told = json.loads(line)
        if told["failed"]:
            raise InternalError(f"{told['failed']} requests failed while costs were measured")
        return float(told["tokens"] / told["seconds"])


@contextmanager
def streams_to(address: str, work: Work, vocab_size: int) -> Iterator[Streams]:
    """A client process for the time of the block."""
    numbers = [str(value) for value in (work.streams, work.each, work.prompt, work.new, vocab_size)]
    process = subprocess.Popen(
        [sys.executable, "-m", "cluster.bench.streams", address, *numbers],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield Streams(process)
    finally:
        end(process)


def set_tracing(client: Client, on: bool) -> bool:
    """The switch of `trace-cost`."""
    return client.set_tracing(on)


def set_fail_over(client: Client, on: bool) -> bool:
    """The switch of `failover-cost`."""
    return client.set_fail_over(on)


def measure(address: str, work: Work, progress: Progress, switch: Switch = set_tracing) -> dict[str, Any]:
    """The figures; leaves the switch as it was."""
    speeds: dict[str, list[float]] = {OFF: [], ALL: [], CONTROL: []}
    with Client(address) as client:
        vocab_size = client.model_info().vocab_size
        was_on = switch(client, False)
        try:
            with streams_to(address, work, vocab_size) as streams:
                progress("warming up")
                streams.round()
                streams.round()
                for number in range(work.pairs):
                    seconds_a_token = dict.fromkeys(speeds, 0.0)
                    for part in range(work.slices):
                        for kind in ORDERS[(number * work.slices + part) % len(ORDERS)]:
                            switch(client, kind == ALL)
                            seconds_a_token[kind] += 1 / streams.round()
                    for kind, sum_s in seconds_a_token.items():
                        speeds[kind].append(work.slices / sum_s)
                    if number % 5 == 4:
                        progress(f"{number + 1} of {work.pairs} pairs: {cost_of(speeds[OFF], speeds[ALL])[0]:+.2f} %")
        finally:
            switch(client, was_on)
        status = client.status()
    return {
        **figures(speeds),
        "spans_dropped": status.telemetry.spans_dropped,
        "traces": list(status.telemetry.traces),
        "hedged": status.dispatch.hedged,
    }


def figures(speeds: dict[str, list[float]]) -> dict[str, Any]:
    """From tokens a second of each round: medians, the cost, its 95 % interval, and the control's."""
    # The two rounds without traces of a triple are of one kind: either is the other's control.
    off = [(first + second) / 2 for first, second in zip(speeds[OFF], speeds[CONTROL], strict=True)]
    cost, interval = cost_of(off, speeds[ALL])
    control, control_interval = cost_of(speeds[OFF], speeds[CONTROL])
    return {
        "pairs": len(off),
        "off_tokens_per_s": float(np.median(off)),
        "all_tokens_per_s": float(np.median(speeds[ALL])),
        "cost_percent": cost,
        "cost_ci": interval,
        "control_percent": control,
        "control_ci": control_interval,
    }


def cost_of(off: list[float], on: list[float]) -> tuple[float, list[float]]:
    """Median over the pairs of what is lost, in percent, and its 95 % bootstrap interval."""
    lost = np.array([(1.0 - b / a) * 100.0 for a, b in zip(off, on, strict=True)])
    picks = np.random.default_rng(0).integers(0, len(lost), (_RESAMPLES, len(lost)))
    low, high = np.quantile(np.median(lost[picks], axis=1), (0.025, 0.975))
    return float(np.median(lost)), [float(low), float(high)]
