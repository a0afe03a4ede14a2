"""The picture of a served load, as PNG: distributions of time to first token and of gaps, and every request in time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cluster.bench.figures import gaps_s, ttft_s
from cluster.bench.load import Outcome

COLORS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9")
"""Told apart by people who see few colours (Okabe and Ito)."""
FAILED = "#d00000"
SHORTEST_MS = 0.01
"""Gaps of tokens that came together are 0, which a logarithmic axis has not; they are drawn here."""


def write_plot(path: Path, outcomes: Sequence[Outcome], title: str) -> None:
    """Draws requests to ``path``, and nothing on any screen."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    figure = Figure(figsize=(12, 8), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=10)
    axes: Any = figure.subplot_mosaic([["ttft", "gap"], ["time", "time"]], height_ratios=[1, 1.3])
    colors = {kind: COLORS[i % len(COLORS)] for i, kind in enumerate(dict.fromkeys(item.kind for item in outcomes))}
    for kind, color in colors.items():
        chosen = [item for item in outcomes if item.kind == kind and item.ok]
        _cumulative(axes["ttft"], [ttft_s(item) * 1e3 for item in chosen], color, f"{kind} ({len(chosen)})")
        gaps = [max(SHORTEST_MS, gap * 1e3) for item in chosen for gap in gaps_s(item)]
        _cumulative(axes["gap"], gaps, color, f"{kind} ({len(gaps)})")
    for name, words in (("ttft", "planned arrival to first token"), ("gap", "between two tokens of a stream")):
        axes[name].set(xlabel=f"{words}, ms", ylabel="share of samples", ylim=(0, 1.02))
        axes[name].grid(alpha=0.3)
        for share in (0.5, 0.9, 0.99):
            axes[name].axhline(share, color="black", linewidth=0.5, linestyle=":")
        if axes[name].lines[:-3]:
            axes[name].set_xscale("log")
            axes[name].xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes[name].xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axes[name].xaxis.set_minor_formatter(NullFormatter())
            axes[name].legend(loc="upper left", fontsize=8)
    _timeline(axes["time"], outcomes, colors)
    figure.savefig(path, dpi=110, format="png")


def _cumulative(axis: Any, values_ms: Sequence[float], color: str, label: str) -> None:
    if values_ms:
        ordered = sorted(values_ms)
        shares = [(i + 1) / len(ordered) for i in range(len(ordered))]
        axis.step([ordered[0], *ordered], [0.0, *shares], where="post", color=color, label=label, linewidth=1.5)


def _timeline(axis: Any, outcomes: Sequence[Outcome], colors: dict[str, str]) -> None:
    """A row a request: thin until its first token, thick while it streams, a cross where it failed."""
    rows = {item.index: row for row, item in enumerate(sorted(outcomes, key=lambda item: item.planned_s))}
    height = max(0.8, min(5.0, 220 / max(1, len(rows))))
    for kind, color in colors.items():
        chosen = [item for item in outcomes if item.kind == kind]
        started = [item for item in chosen if item.arrivals]
        ended = [item for item in chosen if item.end_s is not None]
        axis.hlines(
            [rows[item.index] for item in ended],
            [item.planned_s for item in ended],
            [item.arrivals[0][0] if item.arrivals else item.end_s for item in ended],
            colors=color,
            alpha=0.45,
            linewidth=height * 0.4,
            label=f"{kind}: until its first token",
        )
        axis.hlines(
            [rows[item.index] for item in started],
            [item.arrivals[0][0] for item in started],
            [item.arrivals[-1][0] for item in started],
            colors=color,
            linewidth=height,
            label=f"{kind}: streaming",
        )
    failed = [item for item in outcomes if not item.ok]
    if failed:
        ends = [item.planned_s if item.end_s is None else item.end_s for item in failed]
        axis.plot(
            ends,
            [rows[item.index] for item in failed],
            "x",
            color=FAILED,
            markersize=5,
            label=f"failed ({len(failed)})",
        )
    axis.set(xlabel="seconds since the start of the load", ylabel="request", xlim=(0, None))
    axis.invert_yaxis()
    axis.grid(alpha=0.3)
    axis.legend(loc="lower left", fontsize=8)
