"""`expertmesh bench first` and `bench pairs`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from cluster.commands.bench import machine
from cluster.commands.common import Json, emit, reporting, stdout, stopping
from cluster.config import EMBEDDED_MODEL


def first(
    model: Annotated[Path, typer.Option(help="Checkpoint directory.")] = EMBEDDED_MODEL,
    groups: Annotated[int, typer.Option(help="Expert groups, each a process; 0: none but the router.")] = 2,
    starts: Annotated[int, typer.Option(help="Starts of each kind.")] = 5,
    requests: Annotated[int, typer.Option(help="Requests that follow the first one, one at a time.")] = 50,
    prompt: Annotated[int, typer.Option(help="Tokens of a prompt; random ones.")] = 64,
    expert_memory: Annotated[str, typer.Option(help="Of a group: all, or bytes such as 512M.")] = "all",
    as_json: Json = False,
) -> None:
    """Measure the first request after a start against those that follow, with and without warm-up.

    Each start is a new router and new groups; a ratio is the first time to first token over the others' median.
    """
    from cluster.bench import first as benchmark

    work = benchmark.Work(starts, requests, prompt)
    with stopping(), reporting() as progress:
        result = benchmark.measure(model, groups, expert_memory, work, progress)
    result["machine"] = machine()
    if as_json:
        emit(result)
        return
    table = Table("start", "first TTFT, ms", "next, median ms", "ratios", "median")
    for kind in (benchmark.WARM, benchmark.COLD):
        row = result[kind]
        lists = [
            " ".join(f"{value:.{digits}f}" for value in row[key])
            for key, digits in (("first_ttft_ms", 1), ("next_ttft_p50_ms", 1), ("ratios", 2))
        ]
        table.add_row(kind, *lists, f"{row['ratio_p50']:.2f}")
    stdout.print(table)


def pairs(
    first: Annotated[str, typer.Argument(help="HOST:PORT of a running server.")],
    second: Annotated[str, typer.Argument(help="HOST:PORT of another one, of the same model.")],
    pairs: Annotated[int, typer.Option(help="Interleaved pairs of rounds, each with a control.")] = 20,
    streams: Annotated[int, typer.Option(help="Requests at a time.")] = 8,
    requests: Annotated[int, typer.Option(help="Requests of a round.")] = 16,
    prompt: Annotated[int, typer.Option(help="Tokens of a prompt; random ones.")] = 32,
    new: Annotated[int, typer.Option(help="New tokens a request.")] = 32,
    as_json: Json = False,
) -> None:
    """Measure what the second of two servers costs against the first, such as one setting on and off: throughput by
    interleaved rounds."""
    from cluster.bench import pairs as benchmark
    from cluster.bench.trace_cost import Work

    with stopping(), reporting() as progress:
        result = benchmark.measure(first, second, Work(pairs, streams, requests, prompt, new), progress)
    result["machine"] = machine()
    if as_json:
        emit(result)
        return
    for name in ("cost", "control"):
        low, high = result[f"{name}_ci"]
        what = "the second one costs" if name == "cost" else "control: the first one against itself"
        stdout.print(f"{what} {result[f'{name}_percent']:+.2f} % ({low:+.2f} to {high:+.2f}, {result['pairs']} pairs)")
