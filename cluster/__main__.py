"""The command line. Exit status: 0 done, 1 a check failed or the server answered with an error, 2 something given is
wrong. The commands are in `cluster.commands`."""

from __future__ import annotations

import logging
import sys
from typing import Annotated

import typer

from cluster import __version__
from cluster.commands import (
    bench,
    bench_cold,
    bench_engine,
    bench_pairs,
    bench_serve,
    bench_trace,
    config,
    demo,
    doctor,
    drill,
    generate,
    loads,
    numa,
    placement,
    plan,
    serve,
    status,
    token,
    trace,
    verify,
    zoo,
)
from cluster.commands.common import Stopped, stderr, stdout
from cluster.errors import CheckpointError, ConfigError, ExpertMeshError, InvalidArgument

log = logging.getLogger(__name__)

app = typer.Typer(
    name="expertmesh",
    help="Serves mixture-of-experts language models with their experts spread over a Ray cluster, exactly.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
zoo_app = typer.Typer(help="Random-weight checkpoints of every architecture that is tested.", no_args_is_help=True)
trace_app = typer.Typer(help="Traces in the embedded store: where requests spent their time.", no_args_is_help=True)
config_app = typer.Typer(help="Configuration files.", no_args_is_help=True)
bench_app = typer.Typer(help="Benchmarks: ratios to a floor that is measured in the same run.", no_args_is_help=True)


def _examples(*lines: str) -> str:
    return "Examples:\n\n" + "\n\n".join(f"  [bold]{line}[/bold]" for line in lines)


app.command(epilog=_examples("expertmesh serve", "expertmesh serve --model ./mixtral --groups 4"))(serve.serve)
app.command(epilog=_examples("expertmesh stop", "expertmesh stop --server 127.0.0.1:9000"))(serve.stop)
app.command(epilog=_examples('expertmesh generate "To be, or" --stream', "expertmesh generate --ids 5,6,7 --json"))(
    generate.generate
)
app.command(epilog=_examples("expertmesh status", "expertmesh status --rebalances --json"))(status.status)
config_app.command("check", epilog=_examples("expertmesh config check serve.yaml"))(config.check)
app.add_typer(config_app, name="config")
app.command(epilog=_examples("expertmesh doctor", "expertmesh doctor --config serve.yaml --json"))(doctor.doctor)
app.command(
    epilog=_examples("expertmesh token alice", "expertmesh token bob --expires 2030-01-31 --requests-per-minute 600")
)(token.token)
app.command(
    epilog=_examples(
        "expertmesh verify", "expertmesh verify --model ./mixtral --groups 1 --groups 2 --transport grpc --json"
    )
)(verify.verify)
app.command(epilog=_examples("expertmesh demo", 'expertmesh demo --prompt "And God said"'))(demo.demo)
zoo_app.command("list")(zoo.zoo_list)
zoo_app.command("make", epilog=_examples("expertmesh zoo make --arch mixtral --out /tmp/mixtral"))(zoo.zoo_make)
app.add_typer(zoo_app, name="zoo")
app.command(
    epilog=_examples(
        "expertmesh plan --loads loads.json --groups 3 --slots 36 --mode survivable",
        "expertmesh plan --loads loads.json --groups 32 --slots 288 --hosts 4 --expert-groups 8 --json",
    )
)(plan.plan)
app.command(epilog=_examples("expertmesh scale --groups 4", "expertmesh scale --groups 2 --server 127.0.0.1:9000"))(
    placement.scale
)
app.command(epilog=_examples("expertmesh drain 1", "expertmesh drain 1 --back"))(placement.drain)
app.command(epilog=_examples("expertmesh balance on", "expertmesh balance now --json"))(placement.balance)
app.command(epilog=_examples("expertmesh drill kill-group", "expertmesh drill hang-group --json"))(drill.drill)
trace_app.command("list", epilog=_examples("expertmesh trace list", "expertmesh trace list --slowest --last 5"))(
    trace.trace_list
)
trace_app.command(
    "show", epilog=_examples("expertmesh trace show 4bf92f35", "expertmesh trace show 4bf92f35 --svg t.svg")
)(trace.trace_show)
trace_app.command(
    "blame", epilog=_examples("expertmesh trace blame", "expertmesh trace blame --last 500 --quantile 0.95")
)(trace.trace_blame)
trace_app.command(
    "export",
    epilog=_examples(
        "expertmesh trace export 4bf92f35 --out trace.json",
        "expertmesh trace export 4bf92f35 --format otlp --out t.json",
    ),
)(trace.trace_export)
trace_app.command(
    "switch", epilog=_examples("expertmesh trace switch off", "expertmesh trace switch on --server 127.0.0.1:9000")
)(trace.trace_switch)
app.add_typer(trace_app, name="trace")
numa_app = typer.Typer(help="Where router and groups sit on this machine.", no_args_is_help=True)
numa_app.command(
    "show", epilog=_examples("expertmesh numa show", "expertmesh numa show --groups 7 --sysfs ./sys --json")
)(numa.show)
numa_app.callback()(lambda: None)  # a group, although it has one command
app.add_typer(numa_app, name="numa")
loads_app = typer.Typer(help="How often experts are wanted.", no_args_is_help=True)
loads_app.command("record", epilog=_examples("expertmesh loads record --out loads.json --windows 2 --seconds 30"))(
    loads.record
)
loads_app.callback()(lambda: None)
app.add_typer(loads_app, name="loads")
bench_app.command(
    "dispatch", epilog=_examples("expertmesh bench dispatch", "expertmesh bench dispatch --no-ray --json")
)(bench.dispatch)
bench_app.command("cold", epilog=_examples("expertmesh bench cold", "expertmesh bench cold --budget 0.25 --json"))(
    bench_cold.cold
)
bench_app.command("first", epilog=_examples("expertmesh bench first", "expertmesh bench first --starts 3 --json"))(
    bench_pairs.first
)
bench_app.command("pairs", epilog=_examples("expertmesh bench pairs 127.0.0.1:9000 127.0.0.1:9001 --json"))(
    bench_pairs.pairs
)
bench_app.command(
    "trace-cost", epilog=_examples("expertmesh bench trace-cost", "expertmesh bench trace-cost --pairs 40 --json")
)(bench_trace.trace_cost)
bench_app.command(
    "failover-cost", epilog=_examples("expertmesh bench failover-cost", "expertmesh bench failover-cost --json")
)(bench_trace.failover_cost)
bench_app.command(
    "serve",
    epilog=_examples(
        "expertmesh bench serve --rate 2 --duration 60",
        "expertmesh bench serve --server 127.0.0.1:9000 --prompt-dist uniform:8:96 --json",
        "expertmesh bench serve --also every:5s,prompt=fixed:1500,name=long --record load.jsonl",
        "expertmesh bench serve --replay load.jsonl",
    ),
)(bench_serve.serve)
bench_app.command(
    "engine", epilog=_examples("expertmesh bench engine --model ./my-moe --batch 1,8,16 --groups 2 --json")
)(bench_engine.engine)
bench_app.command(
    "compare", epilog=_examples("expertmesh bench compare --model ./my-moe --peers transformers,vllm,llama.cpp")
)(bench_engine.compare)
app.add_typer(bench_app, name="bench")


@app.callback(invoke_without_command=True)
def common(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log to standard error.")] = False,
) -> None:
    """Options of all commands."""
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.INFO if verbose else logging.ERROR,
        format="%(asctime)s %(levelname)s %(name)s %(message)s",
    )
    if version:
        stdout.print(f"expertmesh {__version__}")
        raise typer.Exit


def main() -> None:
    """Entry point: errors become one line and an exit status."""
    try:
        # Without standalone mode, typer returns the status of a command that raised Exit, and does not exit itself.
        status = app(standalone_mode=False)
        sys.exit(status if isinstance(status, int) else 0)
    except (Stopped, KeyboardInterrupt):
        stderr.print("stopped")
        sys.exit(130)
    except (ConfigError, InvalidArgument, CheckpointError) as exc:
        stderr.print(f"error: {exc}", markup=False)
        sys.exit(2)
    except ExpertMeshError as exc:
        stderr.print(f"error: {exc}", markup=False)
        sys.exit(2 if exc.code == "INVALID_ARGUMENT" else 1)
    except typer.Abort:
        sys.exit(130)
    except Exception as exc:
        shown = getattr(exc, "format_message", None)
        if shown is not None:
            if shown():
                stderr.print(f"error: {shown()}", markup=False)
            sys.exit(2)
        log.info("internal error", exc_info=exc)
        reason = " ".join(str(exc).split())[:200]
        stderr.print(f"internal error: {type(exc).__name__}: {reason} (--verbose shows where)", markup=False)
        sys.exit(1)


if __name__ == "__main__":
    main()
