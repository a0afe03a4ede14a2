"""`expertmesh bench trace-cost` and `failover-cost`."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cluster.commands.bench import machine
from cluster.commands.common import Json, emit, reporting, stdout, stopping
from cluster.config import EMBEDDED_MODEL, load_config

if TYPE_CHECKING:
    from cluster.bench.trace_cost import Work


def trace_cost(
    model: Annotated[Path, typer.Option(help="Checkpoint directory.")] = EMBEDDED_MODEL,
    groups: Annotated[int, typer.Option(help="Expert groups.")] = 2,
    pairs: Annotated[int, typer.Option(help="Interleaved pairs of rounds, each with a control.")] = 36,
    streams: Annotated[int, typer.Option(help="Requests at a time.")] = 8,
    requests: Annotated[int, typer.Option(help="Requests of a round.")] = 16,
    prompt: Annotated[int, typer.Option(help="Tokens of a prompt; random ones.")] = 32,
    new: Annotated[int, typer.Option(help="New tokens a request.")] = 32,
    server: Annotated[str | None, typer.Option(help="HOST:PORT of a server that runs already, instead.")] = None,
    as_json: Json = False,
) -> None:
    """Measure what tracing every request costs: throughput with traces off and with all of them, in turns.

    Traces go to a store of their own in a temporary directory, unless OTEL_EXPORTER_OTLP_ENDPOINT names a collector.
    """
    from cluster.bench import trace_cost as benchmark

    work = benchmark.Work(pairs, streams, requests, prompt, new)
    with stopping() as stop, reporting() as progress:
        if server is not None:
            result = benchmark.measure(server, work, progress)
        else:
            with tempfile.TemporaryDirectory(prefix="expertmesh-traces-") as store:
                telemetry = {"store": store, "metrics_listen": "127.0.0.1:0"}
                flags = {"model": str(model), "groups": groups, "telemetry": telemetry}
                result = _on_own_server(flags, work, progress, stop.arm, benchmark.set_tracing)
    result["machine"] = machine()
    if as_json:
        emit(result)
        return
    low, high = result["cost_ci"]
    control_low, control_high = result["control_ci"]
    stdout.print(
        f"traces off {result['off_tokens_per_s']:.1f} tokens/s, all {result['all_tokens_per_s']:.1f}: tracing every "
        f"request costs {result['cost_percent']:.2f} % ({low:.2f} to {high:.2f}, 95 %, {result['pairs']} pairs)\n"
        f"control, off against off: {result['control_percent']:.2f} % ({control_low:.2f} to {control_high:.2f}); "
        f"{result['spans_dropped']} spans dropped"
    )


def failover_cost(
    model: Annotated[Path, typer.Option(help="Checkpoint directory.")] = EMBEDDED_MODEL,
    groups: Annotated[int, typer.Option(help="Expert groups.")] = 3,
    copies: Annotated[int, typer.Option(help="Groups that hold each expert.")] = 2,
    pairs: Annotated[int, typer.Option(help="Interleaved pairs of rounds, each with a control.")] = 20,
    streams: Annotated[int, typer.Option(help="Requests at a time.")] = 8,
    requests: Annotated[int, typer.Option(help="Requests of a round.")] = 48,
    prompt: Annotated[int, typer.Option(help="Tokens of a prompt; random ones.")] = 32,
    new: Annotated[int, typer.Option(help="New tokens a request.")] = 32,
    server: Annotated[str | None, typer.Option(help="HOST:PORT of a server that runs already, instead.")] = None,
    as_json: Json = False,
) -> None:
    """Measure what fail-over and hedging cost while nothing fails: throughput with them off and on, in turns."""
    from cluster.bench import trace_cost as benchmark

    slices = max(1, requests // max(1, streams))  # one request of each stream at a time
    work = benchmark.Work(pairs, streams, requests, prompt, new, slices)
    with stopping() as stop, reporting() as progress:
        if server is not None:
            result = benchmark.measure(server, work, progress, benchmark.set_fail_over)
        else:
            quiet = {"traces": "off", "metrics_listen": "127.0.0.1:0"}
            flags = {"model": str(model), "groups": groups, "copies": copies, "telemetry": quiet}
            result = _on_own_server(flags, work, progress, stop.arm, benchmark.set_fail_over)
    result["machine"] = machine()
    if as_json:
        emit(result)
        return
    low, high = result["cost_ci"]
    control_low, control_high = result["control_ci"]
    stdout.print(
        f"off {result['off_tokens_per_s']:.1f} tokens/s, on {result['all_tokens_per_s']:.1f}: fail-over costs "
        f"{result['cost_percent']:.2f} % ({low:.2f} to {high:.2f}, 95 %, {result['pairs']} pairs)\n"
        f"control, off against off: {result['control_percent']:.2f} % ({control_low:.2f} to {control_high:.2f}); "
        f"{result['hedged']} calls hedged"
    )


def _on_own_server(
    flags: dict[str, Any],
    work: Work,
    progress: Callable[[str], None],
    arm: Callable[[], None],
    switch: Callable[[Any, bool], bool],
) -> dict[str, Any]:
    from cluster import app as composition
    from cluster.bench import trace_cost as benchmark
    from cluster.plan import make_plan

    plan = make_plan(load_config(flags={**flags, "listen": "127.0.0.1:0"}))
    with composition.RaySession(plan.config, progress):
        arm()
        deployment = composition.deploy(plan, progress)
        try:
            return benchmark.measure(deployment.address, work, progress, switch)
        finally:
            deployment.remove()
