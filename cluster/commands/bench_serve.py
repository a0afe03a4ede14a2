"""`expertmesh bench serve`."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from cluster.commands.bench import machine
from cluster.commands.common import ConfigFile, Json, Stop, emit, reporting, stdout, stopping
from cluster.config import Config, load_config
from cluster.errors import InvalidArgument

if TYPE_CHECKING:
    from collections.abc import Callable

    from cluster.bench.load import Arrival
    from cluster.bench.serve import Target
    from cluster.telemetry.console import ProgressReport

    MakeLoad = Callable[[int, int | None], list[Arrival]]

ANY_TOKENS = 2**31
RATE, DURATION_S, PROMPTS, NEW_TOKENS = 1.0, 30.0, "fixed:128", "32"


def serve(
    server: Annotated[
        str | None, typer.Option(help="HOST:PORT of a server that runs; by default one is started and stopped.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Checkpoint directory; the embedded model by default.")] = None,
    groups: Annotated[int | None, typer.Option(help="Expert groups; 0 keeps all experts in the router.")] = None,
    transport: Annotated[
        str | None, typer.Option(help="auto, shm, grpc, nccl, gloo, inproc, or one for each group: shm,grpc.")
    ] = None,
    address: Annotated[str | None, typer.Option(help="Ray cluster to join; a local one is started by default.")] = None,
    config: ConfigFile = None,
    rate: Annotated[
        float | None, typer.Option(help=f"Requests a second, Poisson arrivals; {RATE:g} by default.")
    ] = None,
    duration: Annotated[float | None, typer.Option(help=f"Seconds of arrivals; {DURATION_S:g} by default.")] = None,
    prompt_dist: Annotated[
        str | None,
        typer.Option(
            help=f"Tokens of a prompt: fixed:N, uniform:LOW:HIGH, lognormal:MEDIAN:SIGMA:MAX; {PROMPTS} by default."
        ),
    ] = None,
    new_tokens: Annotated[
        str | None, typer.Option(help=f"New tokens of a request, in the same forms; {NEW_TOKENS} by default.")
    ] = None,
    also: Annotated[
        list[str] | None,
        typer.Option(
            help="Another class of requests, reported apart: every:5s,prompt=fixed:2000,new=32,name=long, or "
            "rate:0.2,...; repeatable."
        ),
    ] = None,
    replay: Annotated[Path | None, typer.Option(help="Arrivals from this file (JSON lines) instead.")] = None,
    record: Annotated[Path | None, typer.Option(help="Write the arrivals to this file, for --replay.")] = None,
    max_requests: Annotated[int, typer.Option(help="Requests at most.")] = 10_000,
    seed: Annotated[int | None, typer.Option(help="Of arrivals and prompts; a fresh one by default.")] = None,
    clients: Annotated[int, typer.Option(help="Client processes.")] = 2,
    timeout: Annotated[float, typer.Option(help="Seconds a request may take; then it is an error.")] = 120.0,
    warmup: Annotated[int, typer.Option(help="Requests before the load that are not counted.")] = 4,
    protocol: Annotated[
        str, typer.Option(help="grpc, or openai: /v1/completions of any server, with --server and --vocab-size.")
    ] = "grpc",
    openai_model: Annotated[str | None, typer.Option(help="With openai: model; its first by default.")] = None,
    vocab_size: Annotated[int | None, typer.Option(help="With openai: number of token ids.")] = None,
    plot: Annotated[Path, typer.Option(help="PNG file to write.")] = Path("bench-serve.png"),
    no_plot: Annotated[bool, typer.Option("--no-plot", help="Write none.")] = False,
    as_json: Json = False,
) -> None:
    """Measure a server under an open-loop load: requests leave at their times, whatever it does with those before.

    Prompts are random token ids, answers greedy. Client processes of their own send through the server's port. Times to
    first token count from the planned arrival. Latencies are of completed requests; failed ones are counted by code.
    Exit status 1 if no request completed.
    """
    from cluster.bench import serve as benchmark
    from cluster.bench.load import main_traffic, make_load, parse_also, read_replay, write_record

    generator = benchmark.Generator(clients, timeout, warmup)
    chosen_seed = secrets.randbits(32) if seed is None else seed
    if protocol not in benchmark.PROTOCOLS:
        raise InvalidArgument("--protocol", protocol, f"must be one of {', '.join(benchmark.PROTOCOLS)}")
    flags = {"model": model, "groups": groups, "address": address}
    _exclude("--server", server, {**flags, "transport": transport, "config": config}, "measures a server as it runs")
    drawn = {"rate": rate, "duration": duration, "prompt-dist": prompt_dist, "new-tokens": new_tokens, "also": also}
    _exclude("--replay", replay, drawn, "says when and what to send")
    _check_openai(protocol, server, openai_model, vocab_size)
    for name, file in (("--plot", None if no_plot else plot), ("--record", record)):
        _check_writable(name, file)

    rate = RATE if rate is None else rate
    duration = DURATION_S if duration is None else duration
    prompt_dist = PROMPTS if prompt_dist is None else prompt_dist
    new_tokens = NEW_TOKENS if new_tokens is None else new_tokens

    def load(vocabulary: int, context_length: int | None) -> list[Arrival]:
        """The arrivals for a model."""
        if replay is not None:
            return read_replay(replay, max_requests, vocabulary, context_length)
        traffic = [
            main_traffic(rate, prompt_dist, new_tokens),
            *(parse_also(text, number) for number, text in enumerate(also or [], 1)),
        ]
        return make_load(traffic, duration, chosen_seed, max_requests, context_length)

    load(ANY_TOKENS, ANY_TOKENS)  # what is wrong in any case is said before a server is asked or started
    with stopping() as stop, reporting() as progress, contextlib.ExitStack() as running:
        if protocol == "openai":
            assert server is not None
            assert vocab_size is not None
            target = benchmark.openai_target(server, openai_model, vocab_size)
        elif server is not None:
            target = benchmark.grpc_target(server)
        else:
            settings = load_config(config, {**flags, "data_plane": {"transport": transport}})
            target = running.enter_context(_own_server(settings, load, progress, stop))
        arrivals = load(target.vocab_size, target.context_length)
        if len(arrivals) == max_requests:
            progress(f"the load ends with --max-requests {max_requests}, at {arrivals[-1].at_s:.0f} s")
        if record is not None:
            write_record(record, arrivals, chosen_seed, target.vocab_size)
        result, outcomes = benchmark.measure(target, arrivals, chosen_seed, generator, progress)
    drawn = {"rate": rate, "duration_s": duration, "prompt_dist": prompt_dist, "new_tokens": new_tokens, "also": also}
    result["load"] = {**drawn, "replay": None} if replay is None else {"replay": str(replay)}
    result["record"] = str(record) if record is not None else None
    result["machine"] = machine()
    result["plot"] = None
    if not no_plot:
        from cluster.bench.plot import write_plot

        write_plot(plot, outcomes, _title(result))
        result["plot"] = str(plot)
    if as_json:
        emit(result)
    else:
        _show(result)
    if not result["completed"]:
        raise typer.Exit(1)


@contextmanager
def _own_server(settings: Config, load: MakeLoad, progress: ProgressReport, stop: Stop) -> Iterator[Target]:
    """A server for the time of the benchmark. The load is checked against the model before anything starts."""
    import torch

    from cluster import app as composition
    from cluster.bench.serve import grpc_target
    from cluster.plan import make_plan
    from cluster.weights.checkpoint import Checkpoint
    from cluster.weights.skeleton import build_skeleton

    settings = dataclasses.replace(settings, listen="127.0.0.1:0", front_door="router")
    plan = make_plan(settings)
    load(ANY_TOKENS, build_skeleton(Checkpoint(plan.config.model), torch.float32).context_length)
    with composition.RaySession(plan.config, progress):
        stop.arm()  # Ray has put its own handlers in place
        deployment = composition.deploy(plan, progress)
        try:
            yield grpc_target(deployment.address)
        finally:
            progress("stopping the server")
            deployment.remove()


# -- arguments -----------------------------------------------------------------------------------------------------


def _exclude(flag: str, value: object, others: dict[str, Any], why: str) -> None:
    if value is None:
        return
    for name, other in others.items():
        if other is not None and other != []:
            raise InvalidArgument(f"--{name}", other, f"cannot go with {flag}, which {why}; leave one of them out")


def _check_openai(protocol: str, server: str | None, model: str | None, vocab_size: int | None) -> None:
    if protocol == "openai":
        if server is None:
            raise InvalidArgument("--server", None, "--protocol openai measures a server that runs: give its HOST:PORT")
        if vocab_size is None:
            raise InvalidArgument("--vocab-size", None, "--protocol openai needs it: such a server does not tell")
        return
    for name, value in (("--openai-model", model), ("--vocab-size", vocab_size)):
        if value is not None:
            raise InvalidArgument(name, value, "goes with --protocol openai only; our own server tells it")


def _check_writable(flag: str, file: Path | None) -> None:
    """Before minutes are spent on what cannot be written."""
    if file is None:
        return
    folder = file.resolve().parent
    if not folder.is_dir():
        raise InvalidArgument(flag, str(file), f"there is no directory {folder}; make it first")
    if file.is_dir() or not os.access(file if file.exists() else folder, os.W_OK):
        raise InvalidArgument(flag, str(file), "cannot be written; name another file")


# -- showing -------------------------------------------------------------------------------------------------------

FIGURES = {"ttft_ms": "TTFT", "gap_ms": "gap", "tpot_ms": "TPOT", "e2e_ms": "e2e"}


def _title(result: dict[str, Any]) -> str:
    return (
        f"{result['model']} at {result['server']}: {result['completed']} of {result['requests']} requests completed in "
        f"{result['span_s']:.1f} s, {result['requests_per_s']:.2f} requests/s, {result['tokens_per_s']:.1f} tokens/s"
    )


def _show(result: dict[str, Any]) -> None:
    table = Table("class", "ms", "p50", "p90", "p99", "max", "samples", "p50 spread")
    for column in table.columns:
        column.no_wrap = True
        column.justify = "left" if column.header in ("class", "ms") else "right"
    classes = result["classes"]
    for entry in classes if len(classes) == 1 else [*classes, {**result, "class": "all"}]:
        for key, name in FIGURES.items():
            figure = entry[key]
            spread = "" if figure["p50_low"] is None else f"{_short(figure['p50_low'])}-{_short(figure['p50_high'])}"
            values = [_short(figure[quantile]) for quantile in ("p50", "p90", "p99", "max")]
            table.add_row(entry["class"] if key == "ttft_ms" else "", name, *values, str(figure["samples"]), spread)
        table.add_section()
    stdout.print(table)
    stdout.print(_title(result), markup=False)
    for code, count in result["errors"].items():
        stdout.print(f"{count} failed with {code}: {result['error_examples'][code]}", markup=False)
    late = result["late_ms"]
    stdout.print("TTFT and e2e count from the planned arrival; the spread is of consecutive fifths of the samples")
    stdout.print(
        f"{result['clients']} client processes, late by {_short(late['p50'])} ms (p50), {_short(late['p99'])} ms "
        f"(p99); at most {result['max_in_flight']} requests in flight"
    )
    if any(entry["ttft_ms"]["samples"] < 100 for entry in classes):
        stdout.print("p99 of fewer than 100 samples is about their maximum")
    for problem in result["problems"]:
        stdout.print(f"doubtful: {problem}", markup=False)
    if result["plot"]:
        stdout.print(f"plot: {result['plot']}", markup=False)
    where = result["machine"]
    stdout.print(f"seed {result['seed']}; {where['cpu']}, {where['cores']} cores, Python {where['python']}")


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}" if value < 100 else f"{value:,.0f}"
