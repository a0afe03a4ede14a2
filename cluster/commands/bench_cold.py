"""`expertmesh bench cold`."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from cluster.commands.bench import machine
from cluster.commands.common import Json, emit, reporting, stdout, stopping
from cluster.config import EMBEDDED_MODEL
from cluster.errors import InvalidArgument


def cold(
    model: Annotated[Path, typer.Option(help="Checkpoint directory.")] = EMBEDDED_MODEL,
    groups: Annotated[int, typer.Option(help="Expert groups, each a process.")] = 2,
    budget: Annotated[float, typer.Option(help="Share of a group's experts that its budget holds.")] = 0.5,
    rounds: Annotated[int, typer.Option(help="Rounds; each system gets the same prompts in turn.")] = 16,
    streams: Annotated[int, typer.Option(help="Prompts at a time.")] = 8,
    prompt: Annotated[int, typer.Option(help="Tokens of a prompt; random ones.")] = 24,
    new: Annotated[int, typer.Option(help="New tokens a prompt.")] = 24,
    cold_is: Annotated[
        str, typer.Option("--cold", help="disk: experts are read past the page cache; cache: from it.")
    ] = "disk",
    pairs: Annotated[
        int, typer.Option(help="Pairs of rounds, with and without prediction, where the budget holds all experts.")
    ] = 0,
    seed: Annotated[int | None, typer.Option(help="Of the prompts; a fresh one by default.")] = None,
    as_json: Json = False,
) -> None:
    """Measure what too little memory for experts costs: all resident, loads on demand, and loads that were predicted.

    Exit status 0 only if all three give the same tokens.
    """
    from cluster.bench import cold as benchmark

    if cold_is not in ("disk", "cache"):
        raise InvalidArgument("--cold", cold_is, "must be disk or cache")
    on_disk = cold_is == "disk"
    number = secrets.randbits(31) if seed is None else seed
    load = benchmark.Load(budget, rounds, streams, prompt, new, number, on_disk, pairs)
    with stopping(), reporting() as progress:
        result = benchmark.measure(model, groups, load, progress)
    result["machine"] = machine()
    if as_json:
        emit(result)
    else:
        table = Table("experts", "TTFT p50", "p99 ms", "TPOT p50", "p99 ms", "stalls", "loads", "late", "wasted MB")
        for mode in benchmark.MODES:
            row = result[mode]
            times = [f"{row[key]:.1f}" for key in ("ttft_p50_ms", "ttft_p99_ms", "tpot_p50_ms", "tpot_p99_ms")]
            counts = [str(row["cold_stalls"]), str(row["loads"]), str(row["late"])]
            table.add_row(mode, *times, *counts, f"{row['wasted_bytes'] / 1e6:.1f}")
        stdout.print(table)
        if result["stalls_fewer"] is not None:
            stdout.print(f"prediction: {result['stalls_fewer']:.1f} times fewer stalls; cold: {result['cold']}")
        if pairs:
            full = result["full_budget"]
            low, high = full["prediction_cost_ci"]
            stdout.print(
                f"with a budget for all it costs {full['prediction_cost_percent']:.2f} % ({low:.2f} to {high:.2f})"
            )
    if not result["same_tokens"]:
        raise typer.Exit(1)
