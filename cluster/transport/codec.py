"""Frames: what routers and groups say to each other on a link, whatever carries it.

A frame is one message of a gRPC stream or one packet of a local socket: a kind byte, a fixed little-endian header, then
bytes that the header describes. Nothing is ever unpickled, and every length is checked before use. The handshake's
frames hold protobuf messages (`protos/cluster/rpc/v1/links.proto`), since they grow with the versions of the project; a
layer call crosses once per MoE layer, and its header is a C struct that takes a microsecond.

A call's payload is its rows ``[T, H]`` and behind them, from the next multiple of 4, its P pairs ``[3, P]``: int32
rows, int32 logical experts, fp32 gate weights. ``Placement`` says where it is.
"""

from __future__ import annotations

import ctypes
import enum
import functools
import struct
import sys
import warnings
from typing import Any, NamedTuple

import numpy as np
import torch

from cluster.core import LayerCall, Order, Priority
from cluster.errors import (
    InvalidArgument,
)
from cluster.transport.base import LayerRows, Pairs

PROTOCOL_VERSION = 6
MAX_MESSAGE_BYTES = 256 * 1024 * 1024
"""Larger calls are split by the dispatcher (see `max_rows`)."""
_HEADROOM_BYTES = 1024 * 1024
KNOWN_FORMS = 4096
"""Forms of calls that are remembered: the same shapes come again and again."""

if sys.byteorder != "little":  # pragma: no cover
    raise ImportError("the wire format is little-endian and is not converted on this machine")

# Tensors over received bytes are read-only, and nothing here writes to them; torch warns once a process all the same.
warnings.filterwarnings("ignore", message="The given (buffer|NumPy array) is not writable")

_DTYPES = {1: torch.float32, 2: torch.bfloat16, 3: torch.float16, 4: torch.int8}
_DTYPE_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_INT32, _FP32 = np.dtype("<i4"), np.dtype("<f4")
# numpy knows no bfloat16: these are looked at as integers first.
_NUMPY: dict[torch.dtype, np.dtype[Any]] = {
    torch.float32: _FP32,
    torch.bfloat16: np.dtype("<i2"),
    torch.float16: np.dtype("<f2"),
    torch.int8: np.dtype("i1"),
}
PAIR_BYTES = 12

Bytes = np.ndarray[Any, np.dtype[np.uint8]]


class Kind(enum.IntEnum):
    """First byte of a frame."""

    HELLO = 1
    WELCOME = 2
    CALL = 3
    CANCEL = 4
    REPLY = 5
    WAKE = 6
    ORDER = 7


class Placement(enum.IntEnum):
    """Where the rows of a call or a reply are. Pairs travel with them, except that they are inline when announced."""

    INLINE = 0
    """Behind the header."""
    SHARED = 1
    """In the link's shared memory, at the header's offsets."""
    ANNOUNCED = 2
    """Sent by the link's process group, in the order of the announcements."""


# A call's header: the form of its payload (kind, dtype, placement, 0; T, H; where rows, pairs and reply are), which is
# the same for many calls, then P and the fields of `LayerCall` in their order. Padded so that what follows is aligned.
_FORM = struct.Struct("<4B2I3Q4x")
_IDS = struct.Struct("<I2QI2Q2I55sx")
FORM_BYTES = _FORM.size
IDS_BYTES = _IDS.size
CALL_BYTES = FORM_BYTES + IDS_BYTES
_AT = FORM_BYTES
_CALL_ID = struct.Struct("<BQ")
_ORDER = struct.Struct("<B3x2IQ")


class CallForm(NamedTuple):
    """Form and place of a call's payload. Offsets are from the start of the shared memory, or of the payload."""

    dtype: torch.dtype
    num_tokens: int
    hidden_size: int
    placement: Placement
    rows_offset: int
    pairs_offset: int
    reply_offset: int
    rows_bytes: int
    reply_bytes: int


def aligned(num_bytes: int) -> int:
    """Where the pairs begin behind so many bytes of rows."""
    return (num_bytes + 3) & ~3


def max_rows(hidden_size: int, experts_per_token: int) -> int:
    """Rows of one call at most, so that neither the call nor its fp32 reply exceeds a message."""
    return max(1, (MAX_MESSAGE_BYTES - _HEADROOM_BYTES) // (4 * hidden_size + PAIR_BYTES * max(1, experts_per_token)))


def on_cpu(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself where its bytes are in a row in this process's memory, else a copy that is."""
    if tensor.is_cpu and tensor.is_contiguous():
        return tensor
    return tensor.cpu().contiguous()


def as_bytes(tensor: torch.Tensor) -> Any:
    """The tensor's elements as little-endian bytes: a buffer over its memory where it is contiguous on the CPU. It does
    not keep that memory alive."""
    return _array_type(tensor.nbytes).from_address(tensor.data_ptr()) if tensor.numel() else b""


@functools.lru_cache(KNOWN_FORMS)
def _array_type(num_bytes: int) -> Any:
    # By way of numpy the same view takes three times as long.
    return ctypes.c_char * num_bytes


def tensor_at(data: Any, dtype: torch.dtype, shape: tuple[int, ...], offset: int = 0) -> torch.Tensor:
    """A tensor over the bytes of a buffer from ``offset``; it keeps the buffer alive and must not be written to."""
    if 0 in shape:
        return torch.empty(shape, dtype=dtype)
    # By way of numpy, which takes half as long as torch.frombuffer.
    tensor = torch.from_numpy(np.ndarray(shape, _NUMPY[dtype], data, offset))
    return tensor.view(dtype) if dtype is torch.bfloat16 else tensor


# -- calls ---------------------------------------------------------------------------------------------------------


@functools.lru_cache(KNOWN_FORMS)
def encode_form(
    dtype: torch.dtype,
    shape: tuple[int, int],
    placement: Placement,
    rows_offset: int = 0,
    pairs_offset: int = 0,
    reply_offset: int = 0,
) -> bytes:
    """The first part of a call's header.

    Raises:
        InvalidArgument: links do not carry this dtype.
    """
    code = _DTYPE_CODES.get(dtype)
    if code is None:
        raise InvalidArgument("dtype", dtype, "links carry fp32, bf16, fp16 and int8")
    return _FORM.pack(Kind.CALL, code, placement, 0, *shape, rows_offset, pairs_offset, reply_offset)


def encode_ids(call: LayerCall, num_pairs: int) -> bytes:
    """The second part."""
    traceparent = call[7]
    return _IDS.pack(num_pairs, *call[:7], traceparent.encode("ascii") if traceparent else b"")


def put_ids(into: bytearray, call: LayerCall) -> None:
    """Writes the second part, but for the number of pairs, to the first `IDS_BYTES` of a buffer."""
    traceparent = call[7]
    _IDS.pack_into(into, 0, 0, *call[:7], traceparent.encode("ascii") if traceparent else b"")


def encode_call(call: LayerCall, rows: LayerRows, before: bytes = b"") -> bytes:
    """A whole call in one frame (one copy of the payload), behind ``before``."""
    hidden_TH, pairs_3P = on_cpu(rows.hidden_TH), rows.pairs_3P
    num_bytes = hidden_TH.nbytes
    pairs_offset = aligned(num_bytes)
    form = _inline_form(hidden_TH.dtype, hidden_TH.shape)
    padding = b"\0" * (pairs_offset - num_bytes)
    return b"".join((before, form, encode_ids(call, pairs_3P.shape[1]), as_bytes(hidden_TH), padding, pairs_3P.data))


@functools.lru_cache(KNOWN_FORMS)
def _inline_form(dtype: torch.dtype, shape: torch.Size) -> bytes:
    # A cache of its own: what hashes members of enumerations takes longer than all the rest of a header.
    num_tokens, hidden_size = shape
    num_bytes = aligned(num_tokens * hidden_size * dtype.itemsize)
    return encode_form(dtype, (num_tokens, hidden_size), Placement.INLINE, 0, num_bytes)


def encode_announced_call(call: LayerCall, rows: LayerRows) -> bytes:
    """A call whose rows go another way."""
    form = encode_form(rows.hidden_TH.dtype, _shape(rows.hidden_TH), Placement.ANNOUNCED)
    return b"".join((form, encode_ids(call, rows.pairs_3P.shape[1]), rows.pairs_3P.data))


def _shape(hidden_TH: torch.Tensor) -> tuple[int, int]:
    num_tokens, hidden_size = hidden_TH.shape
    return num_tokens, hidden_size


def call_id_of(frame: bytes | memoryview) -> int:
    """The id of a call whose header may not be trusted; 0 if there is none."""
    return int(_IDS.unpack_from(frame, FORM_BYTES)[1]) if len(frame) >= CALL_BYTES else 0


@functools.lru_cache(KNOWN_FORMS)
def decode_form(frame: bytes) -> CallForm:
    """The first `FORM_BYTES` of a call.

    Raises:
        InvalidArgument: too short, unknown dtype or placement, or larger than a message may be.
    """
    if len(frame) < FORM_BYTES:
        raise InvalidArgument("frame", len(frame), f"a call has at least {CALL_BYTES} bytes")
    _, code, placement, _, num_tokens, hidden_size, *offsets = _FORM.unpack_from(frame)
    dtype = _DTYPES.get(code)
    if dtype is None:
        raise InvalidArgument("dtype", code, f"must be one of {', '.join(str(known) for known in _DTYPES)}")
    if placement not in PLACEMENTS:
        raise InvalidArgument("placement", placement, "must be from 0 to 2")
    elements = num_tokens * hidden_size
    if 4 * elements > MAX_MESSAGE_BYTES:
        raise InvalidArgument("rows", (num_tokens, hidden_size), f"a message has at most {MAX_MESSAGE_BYTES} bytes")
    rows, pairs, reply = offsets
    rows_bytes = elements * dtype.itemsize
    return CallForm(dtype, num_tokens, hidden_size, PLACEMENTS[placement], rows, pairs, reply, rows_bytes, 4 * elements)


def decode_ids(frame: bytes | memoryview) -> tuple[LayerCall, int]:
    """The rest of the header: the call, and its number of pairs.

    Raises:
        InvalidArgument: too short, or an unknown priority.
    """
    if len(frame) < CALL_BYTES:
        raise InvalidArgument("frame", len(frame), f"a call has at least {CALL_BYTES} bytes")
    num_pairs, call_id, step_id, layer, epoch, version, priority, timeout_ms, trace = _IDS.unpack_from(frame, _AT)
    if priority not in _PRIORITIES:
        raise InvalidArgument("priority", priority, "must be 0, 1 or 2")
    traceparent = trace.rstrip(b"\0").decode("ascii", "replace") if trace[0] else ""
    return LayerCall(call_id, step_id, layer, epoch, version, _PRIORITIES[priority], timeout_ms, traceparent), num_pairs


_PRIORITIES = {int(priority): priority for priority in Priority}
PLACEMENTS = {int(placement): placement for placement in Placement}


def decode_call(frame: bytes | memoryview) -> tuple[LayerCall, LayerRows]:
    """A call that is whole in its frame. The rows are views of ``frame``.

    Raises:
        InvalidArgument: as `decode_form` and `decode_ids`, or the length does not fit.
    """
    form = decode_form(bytes(frame[:FORM_BYTES]))
    call, num_pairs = decode_ids(frame)
    in_order = form.rows_offset == 0 and form.pairs_offset == aligned(form.rows_bytes)
    if form.placement is not Placement.INLINE or not in_order:
        raise InvalidArgument("placement", int(form.placement), "this link carries payloads inline, pairs behind rows")
    pairs_at = CALL_BYTES + form.pairs_offset
    check_length(frame, pairs_at + num_pairs * PAIR_BYTES)
    return call, LayerRows(rows_over(form, frame, CALL_BYTES), pairs_over(frame, num_pairs, pairs_at))


def decode_announced(frame: bytes | memoryview, num_pairs: int) -> Pairs:
    """The pairs of a call whose rows come another way.

    Raises:
        InvalidArgument: the length does not fit.
    """
    check_length(frame, CALL_BYTES + num_pairs * PAIR_BYTES)
    return pairs_over(frame, num_pairs, CALL_BYTES)


def rows_over(form: CallForm, data: Any, start: int = 0) -> torch.Tensor:
    """The rows as a view of the buffer that they are in, which begins at ``start``."""
    return tensor_at(data, form.dtype, (form.num_tokens, form.hidden_size), start + form.rows_offset)


def check_length(frame: bytes | memoryview, expected: int) -> None:
    if len(frame) != expected:
        raise InvalidArgument("payload", f"{len(frame)} bytes in all", f"the header says {expected} bytes")


def pairs_over(data: Any, num_pairs: int, offset: int) -> Pairs:
    """The pairs as a view of a buffer's bytes from ``offset``."""
    return np.ndarray((3, num_pairs), _INT32, data, offset)


WAKE = bytes([Kind.WAKE])
"""A whole frame: a call is about to come. Whoever sleeps takes as long to wake up as the call takes to be written."""


def encode_cancel(call_id: int) -> bytes:
    """Says that a call's answer is no longer wanted."""
    return _CALL_ID.pack(Kind.CANCEL, call_id)


def encode_order(order: Order) -> bytes:
    """Says which experts of a layer calls will probably want soon."""
    return _ORDER.pack(Kind.ORDER, order.layer, len(order.chances), order.step_id) + order.chances


def decode_order(frame: bytes | memoryview) -> tuple[Order, memoryview]:
    """What `encode_order` was given, and what comes behind it: nothing, or another frame.

    Raises:
        InvalidArgument: the length does not fit.
    """
    if len(frame) < _ORDER.size:
        raise InvalidArgument("frame", len(frame), f"an order has at least {_ORDER.size} bytes")
    _, layer, count, step_id = _ORDER.unpack_from(frame)
    size = _ORDER.size + count
    if len(frame) < size:
        raise InvalidArgument("order", f"{len(frame)} bytes", f"the header says {count} experts")
    return Order(step_id, layer, bytes(frame[_ORDER.size : size])), memoryview(frame)[size:]


def decode_call_id(frame: bytes | bytearray | memoryview) -> int:
    """The id of the call that a cancellation is for.

    Raises:
        InvalidArgument: the frame is cut.
    """
    if len(frame) < _CALL_ID.size:
        raise InvalidArgument("frame", len(frame), f"it has {_CALL_ID.size} bytes")
    return int(_CALL_ID.unpack_from(frame)[1])
