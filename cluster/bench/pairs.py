"""`expertmesh bench pairs`: throughput of two servers that run already, by interleaved rounds of the same load.

The first is asked twice in every pair, before and after or in another order that turns, so that it is its own control
and slow drifts of the machine meet both. The cost is the median over the pairs of what the second one lacks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cluster.api.client import Client
from cluster.bench.trace_cost import ALL, CONTROL, OFF, ORDERS, Work, figures, streams_to
from cluster.errors import InvalidArgument

Progress = Callable[[str], None]


def measure(first: str, second: str, work: Work, progress: Progress) -> dict[str, Any]:
    """The figures.

    Raises:
        InvalidArgument: the servers serve different models.
    """
    infos = []
    for address in (first, second):
        with Client(address) as client:
            infos.append(client.model_info())
    if infos[0].fingerprint != infos[1].fingerprint:
        raise InvalidArgument("SECOND", second, f"serves {infos[1].name}, and {first} serves {infos[0].name}")
    speeds: dict[str, list[float]] = {OFF: [], ALL: [], CONTROL: []}
    vocab = infos[0].vocab_size
    with streams_to(first, work, vocab) as to_first, streams_to(second, work, vocab) as to_second:
        progress("warming up")
        for streams in (to_first, to_second, to_first, to_second):
            streams.round()
        for number in range(work.pairs):
            for kind in ORDERS[number % len(ORDERS)]:
                speeds[kind].append((to_second if kind == ALL else to_first).round())
            if number % 5 == 4:
                told = figures(speeds)
                progress(f"{number + 1} of {work.pairs} pairs: {told['cost_percent']:+.2f} %")
    told = figures(speeds)
    renamed = {"off_tokens_per_s": "first_tokens_per_s", "all_tokens_per_s": "second_tokens_per_s"}
    return {renamed.get(name, name): value for name, value in told.items()}
