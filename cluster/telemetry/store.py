"""The embedded store: traces in a directory of bounded size, for everybody who has no collector.

Segments are files of JSON lines, each a batch of spans of one process (encoding the same as protobuf takes Python five
times as long); every process writes its own, and readers put traces together. The oldest segments are removed first. A
line that was cut off by a crash is left out.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.trace import SpanKind, StatusCode, format_span_id, format_trace_id

from cluster.telemetry.traces import SpanView

log = logging.getLogger(__name__)

SUFFIX = ".jsonl"
SEGMENTS = 16
"""A store has about so many full segments; one is lost at a time."""
_KINDS = {SpanKind.INTERNAL: 1, SpanKind.SERVER: 2, SpanKind.CLIENT: 3, SpanKind.PRODUCER: 4, SpanKind.CONSUMER: 5}


def default_store() -> Path:
    """In the user's state directory, or where that cannot be written, in the system's temporary one."""
    base = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    directory = Path(base) / "expertmesh" / "traces"
    with contextlib.suppress(OSError):
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        if os.access(directory, os.W_OK):
            return directory
    return Path(tempfile.gettempdir()) / f"expertmesh-{os.getuid()}" / "traces"


class StoreExporter(SpanExporter):
    """Writes to a store. One thread calls it."""

    def __init__(self, directory: Path, max_bytes: int) -> None:
        self._directory, self._max_bytes = directory, max_bytes
        self._segment_bytes = max(16 * 1024, max_bytes // SEGMENTS)
        self._file: BinaryIO | None = None
        self._size = 0

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Appends the spans to the segment that is open."""
        if not spans:
            return SpanExportResult.SUCCESS
        batch = {"resource": dict(spans[0].resource.attributes), "spans": [_plain(span) for span in spans]}
        data = json.dumps(batch, separators=(",", ":")).encode() + b"\n"
        try:
            # A segment that others have removed for its age is of no use any more.
            gone = self._file is not None and os.fstat(self._file.fileno()).st_nlink == 0
            if self._file is None or gone or self._size + len(data) > self._segment_bytes:
                self._new_segment()
            assert self._file is not None
            self._file.write(data)
            self._file.flush()
        except OSError as exc:
            log.warning("the trace store %s cannot be written: %s", self._directory, exc)
            return SpanExportResult.FAILURE
        self._size += len(data)
        return SpanExportResult.SUCCESS

    def _new_segment(self) -> None:
        self.shutdown()
        self._directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        prune(self._directory, self._max_bytes - self._segment_bytes)
        name = f"{time.time_ns():020d}-{os.getpid()}{SUFFIX}"
        descriptor = os.open(self._directory / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        self._file, self._size = os.fdopen(descriptor, "wb"), 0

    def shutdown(self) -> None:
        """Closes the segment."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        """Nothing is buffered."""
        return True


def _plain(span: ReadableSpan) -> dict[str, Any]:
    context, parent = span.context, span.parent
    plain: dict[str, Any] = {
        "trace": format_trace_id(context.trace_id),
        "span": format_span_id(context.span_id),
        "name": span.name,
        "kind": _KINDS[span.kind],
        "start": span.start_time,
        "end": span.end_time,
        "attributes": dict(span.attributes or {}),
    }
    if parent is not None:
        plain["parent"], plain["remote"] = format_span_id(parent.span_id), parent.is_remote
    if span.events:
        plain["events"] = [(event.name, event.timestamp) for event in span.events]
    if span.links:
        links = [link.context for link in span.links]
        plain["links"] = [(format_trace_id(link.trace_id), format_span_id(link.span_id)) for link in links]
    if span.status.status_code is StatusCode.ERROR:
        plain["error"] = span.status.description or "error"
    return plain


def prune(directory: Path, max_bytes: int) -> None:
    """Removes the oldest segments until the rest has ``max_bytes`` at most."""
    sizes = {}
    for segment in sorted(directory.glob(f"*{SUFFIX}")):
        with contextlib.suppress(OSError):
            facts = segment.stat()
            sizes[segment] = max(facts.st_size, facts.st_blocks * 512)  # many short ones take a block each
    total = sum(sizes.values())
    for segment, size in sizes.items():
        if total <= max_bytes:
            return
        with contextlib.suppress(OSError):
            segment.unlink()
        total -= size


def read_store(directory: Path) -> Iterator[SpanView]:
    """All spans, oldest segment first. Lines that cannot be read are left out, and said in the log."""
    for segment in sorted(directory.glob(f"*{SUFFIX}")):
        try:
            lines = segment.read_bytes().split(b"\n")
        except OSError:
            continue  # removed just now
        for number, line in enumerate(lines[:-1], 1):  # what is behind the last line end is being written, or was cut
            try:
                batch = json.loads(line)
                yield from [_view(plain, batch["resource"]) for plain in batch["spans"]]
            except (ValueError, KeyError, TypeError):
                log.warning("%s, line %d is damaged and left out", segment, number)


def _view(plain: dict[str, Any], resource: dict[str, Any]) -> SpanView:
    return SpanView(
        plain["trace"],
        plain["span"],
        plain.get("parent", ""),
        plain["name"],
        plain["kind"],
        plain["start"],
        plain["end"],
        plain["attributes"],
        resource,
        tuple((name, at_ns) for name, at_ns in plain.get("events", ())),
        tuple((trace, other) for trace, other in plain.get("links", ())),
        plain.get("error"),
        plain.get("remote", False),
    )
