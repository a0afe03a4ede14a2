"""`expertmesh trace`: what the embedded store knows."""

from __future__ import annotations

import io
import json
import re
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cluster.commands.common import Json, emit, stderr, stdout
from cluster.config import load_config
from cluster.errors import ConfigError, InvalidArgument
from cluster.telemetry.blame import Report, blame, spent_of
from cluster.telemetry.traces import SpanView, TraceView

Store = Annotated[Path | None, typer.Option(help="Directory of the trace store; the server's telemetry.store.")]
Last = Annotated[int, typer.Option(help="The newest so many requests.")]
SHOWN_DIGITS = 10
PATIENCE_S = 3.0
"""Servers write what they have a few times a second: a trace that was just asked for may take a moment."""


def trace_list(
    slowest: Annotated[bool, typer.Option("--slowest", help="Slowest first, instead of newest first.")] = False,
    last: Last = 20,
    all_traces: Annotated[bool, typer.Option("--all", help="Steps, starts and other background work too.")] = False,
    store: Store = None,
    as_json: Json = False,
) -> None:
    """List traces of requests: when, how long, how they ended, and what took most of the time."""
    traces = _load(store)
    if not all_traces:
        traces = [trace for trace in traces if trace.request is not None]
    traces = traces[::-1][:last] if not slowest else sorted(traces, key=lambda item: -item.root.seconds)[:last]
    rows = [_row(trace) for trace in traces]
    if as_json:
        emit({"traces": rows})
        return
    table = Table("trace", "start", "ms", "first", "tokens", "ended", "known", "most of it")
    for column in table.columns[:5]:
        column.no_wrap = True
    for row in rows:
        table.add_row(
            row["trace_id"][:SHOWN_DIGITS],
            datetime.fromtimestamp(row["start_s"]).strftime("%H:%M:%S"),
            f"{row['seconds'] * 1e3:.1f}",
            "" if row["first_token_s"] is None else f"{row['first_token_s'] * 1e3:.1f}",
            f"{row['prompt_tokens']}+{row['output_tokens']}" if row["name"] == "moe.request" else "",
            Text(row["ended"] if row["name"] == "moe.request" else row["name"]),  # no markup: it may be a client's
            "" if row["attributed_share"] is None else f"{row['attributed_share']:.1%}",
            row["most"],
        )
    stdout.print(table)
    if not rows:
        stderr.print("no traces yet: ask a server something, or name its store with --store")


def trace_show(
    trace_id: Annotated[str, typer.Argument(help="Trace id, or its first digits.")],
    windows: Annotated[bool, typer.Option(help="Show windows of decoding.")] = True,
    svg: Annotated[Path | None, typer.Option(help="Write the picture to this file too.")] = None,
    store: Store = None,
    as_json: Json = False,
) -> None:
    """Show one trace as a waterfall."""
    from cluster.telemetry.waterfall import waterfall

    trace = _find(trace_id, store)
    if svg is not None:
        _draw(waterfall(trace, windows), svg, 150, f"expertmesh trace show {trace.trace_id[:8]}")
    if as_json:
        emit({**_row(trace), "spans": [_span(span) for span in trace.spans]})
    else:
        stdout.print(waterfall(trace, windows, stdout.width))


def trace_blame(
    last: Last = 200,
    quantile: Annotated[float, typer.Option(help="The tail is what is slower than this share of requests.")] = 0.99,
    top: Annotated[int, typer.Option(help="Rows of the table.")] = 12,
    svg: Annotated[Path | None, typer.Option(help="Write the picture to this file too.")] = None,
    store: Store = None,
    as_json: Json = False,
) -> None:
    """Say which causes, groups, layers and experts own the tail."""
    if not 0.0 <= quantile < 1.0:
        raise InvalidArgument("--quantile", quantile, "must be at least 0 and less than 1")
    traces = [trace for trace in _load(store) if trace.request is not None][-last:]
    report = blame(traces, quantile)
    if svg is not None:
        _draw(_table(report, quantile, top), svg, 110, "expertmesh trace blame")
    if as_json:
        emit({"quantile": quantile, **report.as_json()})
        return
    if not report.requests:
        stderr.print("no traces of requests yet: ask a server something, or name its store with --store")
        return
    stdout.print(_table(report, quantile, top))


def trace_export(
    trace_id: Annotated[str, typer.Argument(help="Trace id, or its first digits.")],
    out: Annotated[Path, typer.Option(help="File to write.")],
    form: Annotated[str, typer.Option("--format", help="jaeger or otlp.")] = "jaeger",
    store: Store = None,
    as_json: Json = False,
) -> None:
    """Write one trace as JSON: for Jaeger's UI (tab "JSON File", no backend needed), or as OTLP."""
    from cluster.telemetry.exchange import to_jaeger, to_otlp_json

    if form not in ("jaeger", "otlp"):
        raise InvalidArgument("--format", form, "must be jaeger or otlp")
    trace = _find(trace_id, store)
    found = to_jaeger(trace) if form == "jaeger" else to_otlp_json(trace)
    out.write_text(json.dumps(found), encoding="utf-8")
    if as_json:
        emit({"trace_id": trace.trace_id, "format": form, "spans": len(trace.spans), "out": str(out)})
    else:
        stderr.print(f"wrote {len(trace.spans)} spans to {out}")


def trace_switch(
    on: Annotated[str, typer.Argument(help="on or off.")],
    server: Annotated[str, typer.Option("--server", help="HOST:PORT of the router.")] = "127.0.0.1:9000",
    as_json: Json = False,
) -> None:
    """Switch a running server's traces on or off."""
    from cluster.api.client import Client

    if on not in ("on", "off"):
        raise InvalidArgument("ON", on, "must be on or off")
    with Client(server) as client:
        was_on = client.set_tracing(on == "on")
    if as_json:
        emit({"tracing": on == "on", "was": was_on})
    else:
        stderr.print(f"traces are {on} (they were {'on' if was_on else 'off'})")


def _draw(table: Table, file: Path, width: int, title: str) -> None:
    recorder = Console(record=True, width=width, file=io.StringIO())
    recorder.print(table)
    # Without rich's fonts, which whoever looks at the picture would fetch from somebody else's server.
    picture = re.sub(r"@font-face\s*{.*?}\s*", "", recorder.export_svg(title=title), flags=re.DOTALL)
    file.write_text(picture.replace("Fira Code", "monospace"), encoding="utf-8")
    stderr.print(f"wrote {file}")


def _directory(store: Path | None) -> Path:
    from cluster.telemetry.exporters import store_of  # with the SDK behind it, which other commands need not load

    return store if store is not None else store_of(load_config().telemetry)


def _load(store: Path | None) -> list[TraceView]:
    from cluster.telemetry.store import read_store
    from cluster.telemetry.traces import traces_of

    directory = _directory(store)
    if store is not None and not directory.is_dir():
        raise ConfigError(f"--store: got {str(store)!r}; there is no such directory")
    return list(traces_of(read_store(directory)).values())


def _find(trace_id: str, store: Path | None) -> TraceView:
    """The trace, once it is there. Client and server write their spans themselves, the client often first: where only
    its span is known, the server's are waited for too."""
    wanted = trace_id.lower()
    deadline_s = time.monotonic() + PATIENCE_S
    while True:
        found = [trace for trace in _load(store) if trace.trace_id.startswith(wanted)]
        if len(found) > 1:
            raise InvalidArgument("TRACE_ID", trace_id, f"{len(found)} traces begin like that: give more digits")
        late = time.monotonic() > deadline_s
        if found and (late or found[0].client is None or found[0].request is not None):
            return found[0]
        if late:
            raise InvalidArgument("TRACE_ID", trace_id, f"no such trace in {_directory(store)}; see `trace list`")
        time.sleep(0.2)


def _row(trace: TraceView) -> dict[str, Any]:
    request, root = trace.request, trace.root
    shown = request or root
    numbers = shown.attributes
    spent = next(iter(spent_of(trace)), None)
    causes = sorted(spent.seconds().items(), key=lambda item: -item[1]) if spent is not None else []
    wall_s = spent.wall_s if spent is not None else shown.seconds
    return {
        "trace_id": trace.trace_id,
        "name": shown.name,
        "service": shown.service,
        "start_s": root.start_ns / 1e9,
        "seconds": wall_s,
        "first_token_s": numbers.get("gen_ai.latency.time_to_first_token"),
        "prompt_tokens": numbers.get("gen_ai.usage.input_tokens", 0),
        "output_tokens": numbers.get("gen_ai.usage.output_tokens", 0),
        "ended": shown.error or ", ".join(numbers.get("gen_ai.response.finish_reasons") or []),
        "kept": numbers.get("moe.kept", ""),
        "spans": len(trace.spans),
        "attributed_share": 1 - max(0.0, spent.unattributed_s) / wall_s if spent is not None and wall_s else None,
        "most": _name(*causes[0][0]) if causes else "",
    }


def _span(span: SpanView) -> dict[str, Any]:
    return {
        "span_id": span.span_id,
        "parent_id": span.parent_id,
        "name": span.name,
        "service": span.service,
        "start_ns": span.start_ns,
        "end_ns": span.end_ns,
        "attributes": dict(span.attributes),
        "events": [{"name": name, "at_ns": at_ns} for name, at_ns in span.events],
        "links": [{"trace_id": trace, "span_id": other} for trace, other in span.links],
        "error": span.error,
    }


def _name(cause: str, group: int | None, layer: int | None, expert: int | None) -> str:
    parts = [("group", group), ("layer", layer), ("expert", expert)]
    return " ".join([cause, *(f"{label} {value}" for label, value in parts if value is not None)])


def _table(report: Report, quantile: float, top: int) -> Table:
    ordered: Sequence[float] = sorted(report.attributed)
    table = Table(
        title=f"The slowest {len(report.tail)} of {report.requests} requests (beyond {quantile:.0%}): "
        f"{report.tail_wall_s * 1e3:.0f} ms",
        caption=f"unusual: seconds beyond what is usual for requests of that size; * stands out. Attributed: "
        f"{ordered[len(ordered) // 2]:.1%} of a request's time (median), {ordered[0]:.1%} at least",
    )
    for column in ("cause", "group", "layer", "expert", "seconds", "share", "unusual"):
        table.add_column(column, justify="left" if column == "cause" else "right", no_wrap=True)
    for item in report.causes[:top]:
        where = ["" if value is None else str(value) for value in (item.group, item.layer, item.expert)]
        table.add_row(
            item.cause + (" *" if item.stands_out else ""),
            *where,
            f"{item.seconds:.4f}",
            f"{item.share:.1%}",
            f"{item.excess_s:.4f}",
        )
    return table
