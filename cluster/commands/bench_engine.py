"""`expertmesh bench engine` and `expertmesh bench compare`."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from cluster.commands.bench import machine, numbers
from cluster.commands.common import Json, emit, reporting, stdout, stopping
from cluster.config import EMBEDDED_MODEL
from cluster.errors import InvalidArgument

PEERS_HOME = Path.home() / ".cache" / "expertmesh" / "peers"

Model = Annotated[Path, typer.Option(help="Checkpoint directory.")]
Batch = Annotated[str, typer.Option(help="Prompts at once, with commas.")]
Prompt = Annotated[int, typer.Option(help="Tokens of a prompt; random ones.")]
New = Annotated[int, typer.Option(help="New tokens a prompt.")]
Rounds = Annotated[int, typer.Option(help="Rounds; figures are medians, the spread is over the rounds.")]
Threads = Annotated[int, typer.Option(help="Threads of an engine; 0: all cores.")]
Seed = Annotated[int | None, typer.Option(help="Of the prompts; a fresh one by default.")]
Transport = Annotated[str, typer.Option(help="Links to groups: auto, shm, grpc or gloo.")]
ExpertDtype = Annotated[str, typer.Option(help="auto, fp32, bf16 or int8.")]


def engine(
    model: Model = EMBEDDED_MODEL,
    batch: Batch = "1,8,16",
    prompt: Prompt = 128,
    new: New = 32,
    groups: Annotated[int, typer.Option(help="Expert groups in processes of their own; 0: in the router's.")] = 0,
    copies: Annotated[int, typer.Option(help="Groups that hold each expert; as many times the memory.")] = 1,
    transport: Transport = "auto",
    expert_dtype: ExpertDtype = "auto",
    threads: Threads = 0,
    rounds: Rounds = 3,
    seed: Seed = None,
    as_json: Json = False,
) -> None:
    """Measure the engine without the network in front: prefill, decode, and what of a step goes to experts.

    Greedy, fp32, prompts of random tokens. Groups are processes behind the real links, without Ray, whose part is life
    cycle.
    """
    from cluster.bench import compare

    load = compare.Load(numbers("--batch", batch), prompt, new, rounds, _seed(seed))
    name = compare.GROUPS if groups else compare.INPROC
    engines = {name: _settings(model, groups, _copies(copies, groups), transport, expert_dtype, threads)}
    result = _measure(engines, [], model, load, threads, Path("."))
    result |= {"groups": groups, "copies": copies, "expert_dtype": expert_dtype, "results": result["rows"]}
    if as_json:
        emit(result)
    else:
        _show(result)


def compare(
    peers: Annotated[str, typer.Option(help="transformers, vllm, llama.cpp, with commas.")] = "transformers,vllm",
    model: Model = EMBEDDED_MODEL,
    batch: Batch = "1,8,16",
    prompt: Prompt = 128,
    new: New = 32,
    groups: Annotated[int, typer.Option(help="Groups of expertmesh-groups; 0 leaves it out.")] = 2,
    copies: Annotated[
        int | None,
        typer.Option(
            help="Groups that hold each expert; as many times the memory.", show_default="2, or 1 with one group"
        ),
    ] = None,
    transport: Transport = "auto",
    threads: Threads = 0,
    rounds: Rounds = 3,
    seed: Seed = None,
    home: Annotated[Path, typer.Option(help="Where the peers' virtual environments are kept.")] = PEERS_HOME,
    as_json: Json = False,
) -> None:
    """Measure our engine beside engines that users would otherwise pick, in turns, on the same prompts, in fp32.

    vllm and llama.cpp get virtual environments of their own, made on the first run (some minutes each).
    """
    from cluster.bench import compare as comparison
    from cluster.bench.peers.environments import prepare

    load = comparison.Load(numbers("--batch", batch), prompt, new, rounds, _seed(seed))
    engines = {comparison.INPROC: _settings(model, 0, 1, "auto", "auto", threads)}
    each = _copies(min(2, max(1, groups)) if copies is None else copies, groups)
    if groups:
        engines[comparison.GROUPS] = _settings(model, groups, each, transport, "auto", threads)
    names = [name.strip() for name in peers.split(",") if name.strip()]
    count = threads or _cores()
    with reporting() as progress:
        others = prepare(names, model, "fp32", count, home, progress)
    result = _measure(engines, others, model, load, threads, home) | {"groups": groups, "copies": each}
    if as_json:
        emit(result)
    else:
        _show(result)


def _seed(seed: int | None) -> int:
    return secrets.randbits(31) if seed is None else seed


def _copies(copies: int, groups: int) -> int:
    if not 1 <= copies <= max(1, groups):
        raise InvalidArgument("--copies", copies, f"must be from 1 to the number of groups, {max(1, groups)}")
    return copies


def _cores() -> int:
    return int(machine()["cores"])


def _settings(model: Path, groups: int, copies: int, transport: str, expert_dtype: str, threads: int) -> dict[str, Any]:
    settings: dict[str, Any] = {"model": str(model.resolve()), "groups": groups, "dtype": "fp32", "threads": threads}
    settings["copies"] = copies
    settings["expert_dtype"] = expert_dtype
    settings["data_plane"] = {"transport": transport, "secret": secrets.token_hex(16)}
    return settings


def _measure(
    engines: dict[str, dict[str, Any]], peers: Any, model: Path, load: Any, threads: int, home: Path
) -> dict[str, Any]:
    import tempfile

    from cluster.bench import compare
    from cluster.weights.checkpoint import Checkpoint

    checkpoint = Checkpoint(model)
    vocab_size = int(checkpoint.config.get_text_config(decoder=True).vocab_size)
    with stopping(), reporting() as progress, tempfile.TemporaryDirectory() as logs:
        result = compare.measure(
            engines, peers, str(model.resolve()), "fp32", threads or _cores(), load, vocab_size, Path(logs), progress
        )
    result |= {"model": checkpoint.path.name, "arch": checkpoint.arch, "seed": load.seed, "machine": machine()}
    return result


def _show(result: dict[str, Any]) -> None:
    table = Table("engine", "batch", "prefill ms", "decode ms/step", "tokens/s", "dispatch ms", "experts ms", "rounds")
    for row in result["rows"]:
        parts = [f"{row[key]:.1f}" if key in row else "" for key in ("in_dispatch_ms", "in_experts_ms")]
        decode, prefill = (_spread(row, key, digits) for key, digits in (("decode_ms_per_step", 1), ("prefill_ms", 0)))
        table.add_row(
            row["engine"], str(row["batch"]), prefill, decode, f"{row['tokens_per_s']:.1f}", *parts, str(row["samples"])
        )
    stdout.print(table)
    if result["ratios"]:
        ratios = Table("engine", "than", "batch", "prefill x", "decode x")
        for row in result["ratios"]:
            shown = [_spread(row, key, 2) for key in ("prefill", "decode")]
            ratios.add_row(row["engine"], row["than"], str(row["batch"]), *shown)
        stdout.print(ratios)
    where, groups = result["machine"], result["groups"]
    held = f"; {groups} groups, each expert in {result['copies']}" if groups else ""
    stdout.print(f"{where['cpu']}, {where['cores']} cores, Python {where['python']}{held}", highlight=False)


def _spread(row: dict[str, Any], key: str, digits: int) -> str:
    low, high = row[f"{key}_low"], row[f"{key}_high"]
    return f"{row[key]:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"
