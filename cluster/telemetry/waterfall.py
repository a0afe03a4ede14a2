"""A trace in a terminal: its tree with bars on one time axis, and what matters of each span."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from cluster.telemetry.traces import SpanView, TraceView

WIDE, NARROW = 44, 20
"""Characters of the bars; narrow on terminals of less than `ENOUGH`."""
ENOUGH = 110
_COLORS = {
    "moe.queue": "yellow",
    "moe.prefill": "cyan",
    "moe.decode": "green",
    "moe.decode.window": "bright_black",
    "moe.expert_batch": "blue",
    "moe.expert.cold_load": "red",
    "moe.failover": "red",
    "moe.stream_out": "magenta",
}
_SHOWN = (
    ("moe.group", "group"),
    ("moe.layer", "layer"),
    ("moe.expert", "expert"),
    ("moe.tokens", "tokens"),
    ("moe.calls", "calls"),
    ("moe.worst.layer", "worst layer"),
    ("moe.cause", "cause"),
)


def waterfall(trace: TraceView, windows: bool = True, columns: int = 150) -> Table:
    """The trace as a table for a terminal of so many columns. ``windows`` shows the windows of decoding too."""
    width = WIDE if columns >= ENOUGH else NARROW
    start_ns = min(span.start_ns for span in trace.spans)
    end_ns = max(span.end_ns for span in trace.spans)
    title = f"trace {trace.trace_id}: {trace.root.name}, {(end_ns - start_ns) / 1e6:.1f} ms"
    table = Table(title=title, expand=False, pad_edge=False)
    table.add_column("span", no_wrap=True)
    table.add_column("from", justify="right", no_wrap=True)
    table.add_column("ms", justify="right", no_wrap=True)
    table.add_column(f"0 to {(end_ns - start_ns) / 1e6:.1f} ms", no_wrap=True, min_width=width)
    table.add_column("most of it, and of whom", overflow="fold")
    children = trace.children()

    def add(span: SpanView, depth: int) -> None:
        if span.name == "moe.decode.window" and not windows:
            return
        style = "bold red" if span.error is not None else ""
        table.add_row(
            Text(" " * depth + span.name.removeprefix("moe.").removeprefix("expertmesh."), style=style),
            f"{(span.start_ns - start_ns) / 1e6:.1f}",
            f"{span.seconds * 1e3:.1f}",
            _bar(span, start_ns, end_ns, width),
            Text(_about(span)),
        )
        for child in children.get(span.span_id, []):
            add(child, depth + 1)

    for root in children.get("", []):
        add(root, 0)
    return table


def _bar(span: SpanView, start_ns: int, end_ns: int, width: int) -> Text:
    whole = max(1, end_ns - start_ns)
    first = min(int((span.start_ns - start_ns) * width / whole), width - 1)
    length = min(max(1, round((span.end_ns - span.start_ns) * width / whole)), width - first)
    return Text(" " * first + "█" * length, style=_COLORS.get(span.name, "white"))


def _about(span: SpanView) -> str:
    found = [f"{label} {span.attributes[key]}" for key, label in _SHOWN if key in span.attributes]
    times = sorted(span.times().items(), key=lambda item: -item[1])[:3]
    found += [f"{name} {seconds * 1e3:.1f}" for name, seconds in times if seconds >= 1e-4]
    if span.error is not None:
        found.append(span.error)
    return ", ".join(found)
