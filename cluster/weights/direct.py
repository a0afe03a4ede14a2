"""Reading parts of safetensors files past the page cache, at the disk's own speed.

A mapped file is kept in memory by the system for as long as it likes; who has a budget for experts may want what is
beyond it to be on the disk, and nowhere else. Files are opened with O_DIRECT, which wants aligned offsets, lengths and
memory; a file system that has no such thing (tmpfs) is told by `DirectFile.open` returning None.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from cluster.errors import CheckpointError

_ALIGNMENT = 4096
_NEAR_BYTES = 256 * 1024
"""Ranges that are no further apart are read at once."""
_HEADER = struct.Struct("<Q")


class Range(NamedTuple):
    """Bytes of a file."""

    start: int
    end: int


class DirectRead(NamedTuple):
    """A prepared reading of some ranges: after `DirectFile.read` their bytes are in ``tensors``, uint8. ``spans`` are
    where to read from, into what (whole blocks, which may reach beyond the end of the file), and how much is needed."""

    spans: list[tuple[int, memoryview, int]]
    tensors: list[torch.Tensor]


class DirectFile:
    """One safetensors file. Not thread-safe: all readings of a file share one buffer, so what one of them gives is good
    until the next one."""

    def __init__(self, path: Path, fd: int) -> None:
        self._path, self._fd = path, fd
        self._buffer = mmap.mmap(-1, _ALIGNMENT)
        with path.open("rb") as file:
            (length,) = _HEADER.unpack(file.read(_HEADER.size))
            header = json.loads(file.read(length))
        first = _HEADER.size + length
        self._ranges = {
            name: Range(*(first + offset for offset in entry["data_offsets"]))
            for name, entry in header.items()
            if name != "__metadata__"
        }

    @classmethod
    def open(cls, path: Path) -> DirectFile | None:
        """None where the file cannot be read like this."""
        try:
            fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
        except OSError:
            return None
        made = cls(path, fd)
        try:
            os.preadv(fd, [made._buffer], 0)
        except OSError:
            made.close()
            return None
        return made

    def range_of(self, name: str) -> Range:
        """Where a tensor lies in the file."""
        return self._ranges[name]

    def prepare(self, ranges: Sequence[Range]) -> DirectRead:
        """A reading of these, as often as wanted; neighbours are read at once."""
        runs: list[list[int]] = []
        for number in sorted(range(len(ranges)), key=ranges.__getitem__):
            if runs and ranges[number].start - max(ranges[i].end for i in runs[-1]) <= _NEAR_BYTES:
                runs[-1].append(number)
            else:
                runs.append([number])
        starts = [ranges[run[0]].start // _ALIGNMENT * _ALIGNMENT for run in runs]
        lengths = [
            -(-(max(ranges[i].end for i in run) - start) // _ALIGNMENT) * _ALIGNMENT
            for run, start in zip(runs, starts, strict=True)
        ]
        if len(self._buffer) < sum(lengths):
            self._buffer = mmap.mmap(-1, sum(lengths))
        whole = memoryview(self._buffer)
        spans: list[tuple[int, memoryview, int]] = []
        tensors: list[torch.Tensor] = [torch.empty(0)] * len(ranges)
        at = 0
        for run, start, length in zip(runs, starts, lengths, strict=True):
            spans.append((start, whole[at : at + length], max(ranges[i].end for i in run) - start))
            for number in run:
                first, last = ranges[number]
                offset = at + first - start
                tensors[number] = torch.frombuffer(whole, dtype=torch.uint8, count=last - first, offset=offset)
            at += length
        return DirectRead(spans, tensors)

    def read(self, prepared: DirectRead) -> None:
        """Reads.

        Raises:
            CheckpointError: the file has become shorter, or cannot be read.
        """
        for start, into, needed in prepared.spans:
            got = 0
            while got < needed:
                try:
                    count = os.preadv(self._fd, [into[got:] if got else into], start + got)
                except OSError as exc:
                    raise CheckpointError(f"{str(self._path)!r} cannot be read at byte {start + got}: {exc}") from exc
                if not count:
                    raise CheckpointError(f"{str(self._path)!r} has become shorter: it ends at byte {start + got}")
                got += count

    def close(self) -> None:
        """Closes the file; what was read stays good."""
        os.close(self._fd)
