"""Replies of layer calls as frames (see `cluster.transport.codec`): rows behind or beside the header, or why there are
none."""

from __future__ import annotations

import enum
import functools
import struct
from typing import Any, NamedTuple

import numpy as np
import torch

from cluster.errors import (
    DeadlineExceeded,
    ExpertMeshError,
    InternalError,
    InvalidArgument,
    MissingExperts,
    Overloaded,
    Unavailable,
)
from cluster.transport.base import LayerReply
from cluster.transport.codec import KNOWN_FORMS, PLACEMENTS, Kind, Placement, as_bytes, check_length, on_cpu, tensor_at

MAX_ERROR_BYTES = 4000
_KIND_REPLY, _STATUS_OK = 5, 1  # as in the enumerations; looking them up there costs as much as packing


class ReplyStatus(enum.IntEnum):
    """How a call ended."""

    OK = 1
    MISSING_EXPERTS = 2
    BUSY = 3
    BAD_CALL = 4
    INTERNAL = 5
    EXPIRED = 6
    UNAVAILABLE = 7


# kind, status, placement, 0; T, H; call_id, then seconds by the group's clock: queue, compute, when it answered, and
# waiting for weights; bytes of these weights, and the expert that took longest (-1: none).
_REPLY = struct.Struct("<4B2IQ4dQi4x")
_REPLY_TIMES = struct.Struct("<Q4dQi")
_REPLY_FORM_BYTES = 12
REPLY_BYTES, ANSWERED_AT = _REPLY.size, 36
"""Bytes of the header, and where in it the time of the answer is."""


class ReplyHead(NamedTuple):
    """Header of a reply. ``answered_s`` is the group's own monotonic clock: of use on the same host only."""

    call_id: int
    status: ReplyStatus
    placement: Placement
    num_tokens: int
    hidden_size: int
    queue_s: float
    compute_s: float
    answered_s: float
    load_s: float
    load_bytes: int
    load_expert: int


def _fields(call_id: int, reply: LayerReply, placement: Placement, answered_s: float) -> tuple[Any, ...]:
    partial_TH, queue_s, compute_s, load_s, expert, num_bytes = reply
    rows, width = partial_TH.shape
    what = _KIND_REPLY, _STATUS_OK, placement, 0, rows, width, call_id
    return *what, queue_s, compute_s, answered_s, load_s, num_bytes, expert


def reply_header(call_id: int, reply: LayerReply, placement: Placement, answered_s: float = 0.0) -> bytes:
    """The header of a good reply."""
    return _REPLY.pack(*_fields(call_id, reply, placement, answered_s))


def put_reply_header(into: bytearray, call_id: int, reply: LayerReply, placement: Placement) -> None:
    """Writes it to the first `REPLY_BYTES` of a buffer, without the time of the answer."""
    _REPLY.pack_into(into, 0, *_fields(call_id, reply, placement, 0.0))


def encode_reply(call_id: int, reply: LayerReply) -> bytes:
    """A whole good reply in one frame."""
    partial_TH = on_cpu(reply.partial_TH)
    return b"".join((reply_header(call_id, reply, Placement.INLINE), as_bytes(partial_TH)))


def encode_error(call_id: int, error: ExpertMeshError) -> bytes:
    """A reply that failed: experts that are missing, or one line of text, behind the header."""
    tail = str(error).encode("utf-8", "replace")[:MAX_ERROR_BYTES]
    status = ReplyStatus.INTERNAL
    if isinstance(error, MissingExperts):
        status, tail = ReplyStatus.MISSING_EXPERTS, np.asarray(error.experts, "<u4").tobytes()
    else:
        for kind, code in _ERROR_STATUS:
            if isinstance(error, kind):
                status = code
                break
    return _REPLY.pack(Kind.REPLY, status, 0, 0, 0, 0, call_id, 0.0, 0.0, 0.0, 0.0, 0, -1) + tail


_ERROR_STATUS: tuple[tuple[type[ExpertMeshError], ReplyStatus], ...] = (
    (Overloaded, ReplyStatus.BUSY),
    (InvalidArgument, ReplyStatus.BAD_CALL),
    (DeadlineExceeded, ReplyStatus.EXPIRED),
    (Unavailable, ReplyStatus.UNAVAILABLE),
)
_STATUS_ERROR = {
    ReplyStatus.BUSY: Overloaded,
    ReplyStatus.EXPIRED: DeadlineExceeded,
    ReplyStatus.UNAVAILABLE: Unavailable,
}
_STATUSES = {int(status): status for status in ReplyStatus}


@functools.lru_cache(KNOWN_FORMS)
def good_reply(shape: tuple[int, int], placement: Placement) -> bytes:
    """How every good reply of this shape begins."""
    return reply_header(0, LayerReply(torch.empty(shape, device="meta")), placement)[:_REPLY_FORM_BYTES]


@functools.lru_cache(KNOWN_FORMS)
def good_inline_reply(shape: tuple[int, int]) -> bytes:
    """How every good reply of this shape begins whose rows are behind it."""
    return good_reply(shape, Placement.INLINE)  # members of enumerations take long to hash


def decode_times(frame: bytes | memoryview) -> tuple[int, float, float, float, float, int, int]:
    """Call id; queue, compute, answer and load seconds; bytes and expert of the load: of a reply, good or not.

    Raises:
        InvalidArgument: the frame is too short for a reply.
    """
    if len(frame) < _REPLY.size:
        raise InvalidArgument("frame", len(frame), f"a reply has at least {_REPLY.size} bytes")
    return _REPLY_TIMES.unpack_from(frame, _REPLY_FORM_BYTES)


def decode_reply_head(frame: bytes | bytearray | memoryview) -> ReplyHead:
    """The header of a reply.

    Raises:
        InvalidArgument: too short, or unknown status or placement.
    """
    if len(frame) < _REPLY.size:
        raise InvalidArgument("frame", len(frame), f"a reply has at least {_REPLY.size} bytes")
    _, status, placement, _, num_tokens, hidden_size, call_id, *times = _REPLY.unpack_from(frame)
    if status not in _STATUSES or placement not in PLACEMENTS:
        raise InvalidArgument("status", (status, placement), "unknown status or placement")
    return ReplyHead(call_id, _STATUSES[status], PLACEMENTS[placement], num_tokens, hidden_size, *times)


def raise_for_status(
    head: ReplyHead, frame: bytes | memoryview, group: int, layer: int, shape: tuple[int, int]
) -> None:
    """Raises what a reply says that went wrong; nothing if it is good and has the call's ``shape``.

    Raises:
        MissingExperts, Overloaded, DeadlineExceeded, Unavailable, InternalError: what the group answered.
        InvalidArgument: the payload does not have the call's shape.
    """
    if head.status is ReplyStatus.OK:
        got = (head.num_tokens, head.hidden_size)
        if got != shape:
            raise InvalidArgument("partial", got, f"the call has the shape {shape}")
        return
    tail = bytes(frame[_REPLY.size :])
    if head.status is ReplyStatus.MISSING_EXPERTS:
        raise MissingExperts(group, layer, np.frombuffer(tail[: len(tail) // 4 * 4], "<u4").tolist())
    text = tail.decode("utf-8", "replace")
    kind = _STATUS_ERROR.get(head.status)
    raise kind(text) if kind is not None else InternalError(f"group {group}: {text}")


def reply_rows(frame: bytes, shape: tuple[int, int]) -> torch.Tensor:
    """The rows of a good reply that is whole in its frame.

    Raises:
        InvalidArgument: the length does not fit.
    """
    check_length(frame, _REPLY.size + 4 * shape[0] * shape[1])
    return tensor_at(frame, torch.float32, shape, _REPLY.size)
