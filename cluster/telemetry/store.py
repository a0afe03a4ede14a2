"""The embedded store: traces in a directory of bounded size, for everybody who has no collector.

Segments are files of length-prefixed OTLP messages (`ExportTraceServiceRequest`); every process writes its own, and
readers put traces together. The oldest segments are removed first. A segment that was cut off by a crash is read up to
there.
"""

from __future__ import annotations

import contextlib
import logging
import os
import struct
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from google.protobuf.message import DecodeError
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

log = logging.getLogger(__name__)

SUFFIX = ".otlp"
SEGMENTS = 16
"""A store has about so many full segments; one is lost at a time."""
_LENGTH = struct.Struct("<I")


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
        data = encode_spans(spans).SerializeToString()
        try:
            if self._file is None or self._size + len(data) > self._segment_bytes:
                self._new_segment()
            assert self._file is not None
            self._file.write(_LENGTH.pack(len(data)) + data)
            self._file.flush()
        except OSError as exc:
            log.warning("the trace store %s cannot be written: %s", self._directory, exc)
            return SpanExportResult.FAILURE
        self._size += len(data) + _LENGTH.size
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


def prune(directory: Path, max_bytes: int) -> None:
    """Removes the oldest segments until the rest has ``max_bytes`` at most."""
    segments = sorted(directory.glob(f"*{SUFFIX}"))
    sizes = {}
    for segment in segments:
        with contextlib.suppress(OSError):
            sizes[segment] = segment.stat().st_size
    total = sum(sizes.values())
    for segment, size in sizes.items():
        if total <= max_bytes:
            return
        with contextlib.suppress(OSError):
            segment.unlink()
        total -= size


def read_store(directory: Path) -> Iterator[ExportTraceServiceRequest]:
    """All messages, oldest segment first."""
    for segment in sorted(directory.glob(f"*{SUFFIX}")):
        try:
            data = segment.read_bytes()
        except OSError:
            continue  # removed just now
        at = 0
        while at + _LENGTH.size <= len(data):
            (size,) = _LENGTH.unpack_from(data, at)
            at += _LENGTH.size
            if at + size > len(data):
                break
            try:
                yield ExportTraceServiceRequest.FromString(data[at : at + size])
            except DecodeError:
                log.warning("%s is damaged; the rest of it is left out", segment)
                break
            at += size
