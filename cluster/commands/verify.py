"""`expertmesh verify`."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from cluster.commands.common import DEFAULT_SERVER, ConfigFile, Json, emit, reporting, stdout, stopping
from cluster.config import Config, load_config


def verify(
    model: Annotated[list[str] | None, typer.Option(help="Checkpoint directory; repeatable.")] = None,
    groups: Annotated[list[int] | None, typer.Option(help="Expert groups; repeatable.")] = None,
    copies: Annotated[int | None, typer.Option(help="Groups that hold each expert.")] = None,
    transport: Annotated[
        str | None, typer.Option(help="auto, shm, grpc, nccl, gloo, inproc, or one for each group: shm,grpc.")
    ] = None,
    prompts: Annotated[int, typer.Option(help="Random prompts of 8 to 96 tokens.")] = 8,
    tokens: Annotated[int, typer.Option(help="New tokens a prompt.")] = 32,
    in_flight: Annotated[int, typer.Option(help="Requests at once.")] = 4,
    seed: Annotated[int | None, typer.Option(help="Of the prompts; a fresh one by default.")] = None,
    shared_prefix: Annotated[int, typer.Option(help="Tokens that two of three prompts begin with alike.")] = 0,
    expert_dtype: Annotated[
        str | None,
        typer.Option(help="auto, bf16 or int8: of expert weights; other than auto, accuracy is checked instead."),
    ] = None,
    expert_memory: Annotated[
        str | None, typer.Option(help="Of a group, for experts in memory: all, or bytes such as 512M.")
    ] = None,
    config: ConfigFile = None,
    reference: Annotated[
        str | None, typer.Option(help="Compare with this checkpoint instead of the served one.")
    ] = None,
    address: Annotated[str | None, typer.Option(help="Ray cluster to join; a local one is started by default.")] = None,
    front_door: Annotated[str | None, typer.Option(help="router or serve.")] = None,
    as_json: Json = False,
) -> None:
    """Serve models and compare every token and logit with plain single-process transformers, in fp32.

    Exit status 0 only if no token differs (but where two experts tie), the largest difference of logits is at most
    1e-4 of their standard deviation, near ties are at most 0.5 %, requests in flight together really shared steps, and
    every group was reached over the transport that was asked for.

    What is not given here is as for `serve`: from EXPERTMESH_* variables, the --config file, or its default.

    With --expert-dtype the answers are not exact, and must say so; the exit status is 0 only if the perplexity of
    held-out text rises by less than 1 % (models with a tokenizer).
    """
    import torch

    from cluster import app as composition
    from cluster.bench import verify as checks
    from cluster.bench.reference import Reference
    from cluster.plan import make_plan

    load = checks.Load(prompts, tokens, in_flight, secrets.randbits(32) if seed is None else seed, shared_prefix)
    given: dict[str, Any] = {"front_door": front_door, "address": address, "copies": copies}
    given |= {"expert_dtype": expert_dtype, "expert_memory": expert_memory}
    given["data_plane"] = {"transport": transport}
    paths: Sequence[str | None] = model or [None]
    counts: Sequence[int | None] = groups or [None]
    each = [{**given, "model": path, "groups": count} for path in paths for count in counts]
    plans = [make_plan(verified_config(config, flags)) for flags in each]
    reference_path = Path(reference) if reference else None
    if reference_path is not None:
        flags = {"model": reference, "groups": 0, "copies": 1, "data_plane": {"transport": "inproc"}}
        make_plan(verified_config(config, flags))  # refuses what is no checkpoint
    runs: list[dict[str, Any]] = []
    with stopping() as stop, reporting() as progress, composition.RaySession(plans[0].config, progress):
        stop.arm()
        oracles: dict[Path, Reference] = {}
        for number, plan in enumerate(plans, 1):
            kinds = plan.config.data_plane.transport
            progress(
                f"[{number}/{len(plans)}] {plan.config.model}, {plan.config.groups} groups over {kinds}".replace(
                    "[", "\\["
                )
            )
            deployment = composition.deploy(plan, progress)
            path = reference_path or Path(plan.config.model)
            quality: dict[str, float] = {}
            try:
                answers, status = checks.ask(deployment.address, load, progress)
                if status.expert_dtype:
                    oracles = {path: Reference(path, torch.float32)}
                    quality = _quality(deployment.address, path, oracles[path], progress)
            finally:
                deployment.remove()
            if path not in oracles:
                oracles = {path: Reference(path, torch.float32)}  # one at a time in memory
            progress("computing the reference")
            report: dict[str, Any] = {
                "arch": oracles[path].arch,
                "model": plan.config.model,
                "groups": plan.config.groups,
                "transport": kinds,
                "hosts": [process.host for process in (status.router, *(g.process for g in status.groups))],
                "links": [group.transport for group in status.groups],
                "fallbacks": sum(group.link.fallbacks for group in status.groups),
                "prompts": load.prompts,
                "in_flight": load.in_flight,
                "seed": load.seed,
                **checks.compare(oracles[path], answers, load.tokens, look_for_ties=not status.expert_dtype),
                "expert_dtype": status.expert_dtype or status.dtype,
                "expert_bytes": [group.expert_bytes for group in status.groups],
                "cold_stalls": sum(sum(group.store.stalls) for group in status.groups),
                "anonymous_bytes": [group.process.anonymous_bytes for group in status.groups],
                "preemptions": status.engine.preemptions,
                "prefix_hit_tokens": status.engine.prefix_hit_tokens,
                "max_batch": status.engine.max_batch,
                "visible_devices": [p.visible_devices for p in (status.router, *(g.process for g in status.groups))],
            }
            wanted = [] if plan.one_process else plan.config.transports()
            if quality:
                report |= {
                    **quality,
                    "max_abs_logit_diff": max(report["max_abs_logit_diff"], quality["max_abs_logit_diff"]),
                }
            right = checks.problems(report, load) if not status.expert_dtype else checks.quality_problems(report)
            report["problems"] = right + checks.link_problems(wanted, status)
            report["ok"] = not report["problems"]
            runs.append(report)
            verdict = _verdict(report) if report["ok"] else "NOT EXACT: " + "; ".join(report["problems"])
            progress(verdict)
    result = checks.summary(runs)
    if as_json:
        emit(result)
    else:
        _verify_table(runs)
    if not result["ok"]:
        raise typer.Exit(1)


def verified_config(file: Path | None, flags: dict[str, Any]) -> Config:
    """What is served to be verified: a file's configuration and ``flags``, as `load_config` takes them, in fp32 and on
    a port of its own.

    Raises:
        ConfigError: as `load_config`.
    """
    wanted = load_config(file, flags=flags)
    # On a cluster, router and groups may be on any host.
    interface = "0.0.0.0" if wanted.address else "127.0.0.1"
    listen = f"{interface}:0" if wanted.front_door == "router" else DEFAULT_SERVER
    own = {"dtype": "fp32", "verify": True, "listen": listen}
    return load_config(file, flags={**flags, **own, "data_plane": {**flags["data_plane"], "bind": interface}})


def _quality(address: str, model: Path, oracle: Any, progress: Any) -> dict[str, float]:
    """Accuracy on held-out text; nothing for a model that has no tokenizer."""
    from cluster.bench import verify as checks
    from cluster.engine.text import load_tokenizer

    tokenizer = load_tokenizer(model)
    if tokenizer is None:
        progress("this checkpoint has no tokenizer: no perplexity of held-out text")
        return {}
    return checks.accuracy(address, oracle, checks.held_out_text(tokenizer, checks.NUM_WINDOWS), progress)


def _verdict(run: dict[str, Any]) -> str:
    if run["exact"]:
        return "exact"
    if "perplexity" not in run:
        return f"not exact ({run['expert_dtype']} experts)"
    return (
        f"not exact ({run['expert_dtype']} experts): perplexity {run['perplexity']:.2f} instead of "
        f"{run['perplexity_exact']:.2f} ({run['perplexity_rise']:+.2%})"
    )


def _verify_table(runs: list[dict[str, Any]]) -> None:
    table = Table(
        "arch",
        "groups",
        "links",
        "tokens",
        "different",
        "logit difference / std",
        "near ties",
        "largest batch",
        "verdict",
    )
    for run in runs:
        ratio = run["max_abs_logit_diff"] / run["logit_std"] if run["logit_std"] else float("nan")
        table.add_row(
            run["arch"],
            str(run["groups"]),
            ", ".join(sorted(set(run["links"]))),
            str(run["tokens_compared"]),
            str(run["mismatched_tokens"]),
            f"{ratio:.1e}",
            str(run["near_ties"] + run["routing_ties"]),
            str(run["max_batch"]),
            "[red]failed[/red]" if not run["ok"] else "exact" if run["exact"] else "not exact",
        )
    stdout.print(table)
    # In a column these would be a word a line.
    for run in runs:
        if not run["ok"]:
            stdout.print(
                f"[red]{run['arch']}, {run['groups']} groups: {'; '.join(run['problems'])}[/red]", soft_wrap=True
            )
        elif not run["exact"]:
            stdout.print(f"{run['arch']}, {run['groups']} groups: {_verdict(run)}", soft_wrap=True)
