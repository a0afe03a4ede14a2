"""`expertmesh bench dispatch`."""

from __future__ import annotations

import contextlib
import os
import platform
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from cluster.commands.common import Json, emit, reporting, stdout, stopping
from cluster.errors import InvalidArgument


def dispatch(
    transport: Annotated[
        list[str] | None, typer.Option(help="shm, grpc, gloo or nccl; repeatable. All by default.")
    ] = None,
    tokens: Annotated[str, typer.Option(help="Numbers of tokens a call, with commas.")] = "1,8,64,512",
    hidden: Annotated[str, typer.Option(help="Hidden sizes, with commas.")] = "1024,2048,7168",
    samples: Annotated[int, typer.Option(help="Calls of each shape at most.")] = 2000,
    seconds: Annotated[float, typer.Option(help="Bound for one transport and its floor, each shape.")] = 2.0,
    ray: Annotated[bool, typer.Option(help="Measure a Serve handle and a Ray actor too.")] = True,
    as_json: Json = False,
) -> None:
    """Measure what a layer call costs over each transport, beside the floor of the same bytes in plain Python.

    Two processes on cores of their own; experts only echo. A transport and its floor (a local socket, a TCP socket, a
    bare gRPC stream) take turns, so that both meet the same machine.
    """
    from cluster.bench import dispatch as benchmark

    shapes = benchmark.Shapes(numbers("--tokens", tokens), numbers("--hidden", hidden), samples, seconds)
    kinds = benchmark.transports_here(transport or [])
    with stopping() as stop, reporting() as progress:
        result = benchmark.measure(kinds, shapes, progress)
        if ray:
            result |= _beside_ray(kinds, samples, 10 * seconds, progress, stop.arm)
    result["machine"] = machine()
    if as_json:
        emit(result)
    else:
        _show(result)


def _beside_ray(kinds: list[str], samples: int, seconds: float, progress: Any, arm: Any) -> dict[str, Any]:
    from cluster.app import RaySession
    from cluster.bench.handles import measure_handles
    from cluster.config import load_config

    with RaySession(load_config(flags={"address": ""}), progress):
        arm()
        progress("8 tokens x 2048 through a Serve handle and a Ray actor")
        return measure_handles(kinds, samples, seconds)


def numbers(name: str, text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as exc:
        raise InvalidArgument(name, text, "must be whole numbers with commas between them") from exc


def machine() -> dict[str, Any]:
    """Where figures were taken."""
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    return {"cpu": model, "cores": len(os.sched_getaffinity(0)), "python": platform.python_version()}


def _show(result: dict[str, Any]) -> None:
    table = Table("transport", "rows", "p50 µs", "p99 µs", "floor µs", "ratio", "spread", "GB/s", "calls")
    for column in table.columns:
        column.no_wrap = True
        column.justify = "left" if column.header == "transport" else "right"
    for row in result["results"]:
        table.add_row(
            row["transport"],
            f"{row['tokens']}x{row['hidden']}",
            f"{row['p50_us']:.0f}",
            f"{row['p99_us']:.0f}",
            f"{row['floor_us']:.0f}",
            f"{row['ratio']:.2f}",
            f"{row['ratio_low']:.2f}-{row['ratio_high']:.2f}",
            f"{row['gb_per_s']:.2f}",
            str(row["samples"]),
        )
    stdout.print(table)
    kinds = dict.fromkeys((row["transport"], row["floor_kind"]) for row in result["results"])
    stdout.print("floors: " + ", ".join(f"{floor} for {kind}" for kind, floor in kinds))
    copy = result.get("copy")
    if copy:
        stdout.print(
            f"{copy['tokens']} x {copy['hidden']}: shm moves {copy['shm_gb_per_s']:.2f} GB/s both ways, a plain copy "
            f"{copy['memory_copy_gb_per_s']:.2f} GB/s: {copy['ratio']:.0%}"
        )
    if "serve_handle_p50_us" in result:
        stdout.print(
            f"8 x 2048 beside Ray: Serve handle {result['serve_handle_p50_us']:.0f} µs, Ray actor "
            f"{result['ray_actor_p50_us']:.0f} µs; "
            + ", ".join(
                f"{row['transport']} {row['p50_us']:.0f} µs ({row['serve_handle_ratio']:.1f} x faster than the handle)"
                for row in result["beside_ray"]
            )
        )
    where = result["machine"]
    stdout.print(f"{where['cpu']}, {where['cores']} cores, Python {where['python']}", highlight=False)
