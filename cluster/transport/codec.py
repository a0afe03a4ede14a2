"""Layer calls and replies as protobuf messages: raw little-endian tensor bytes, every length checked before use."""

from __future__ import annotations

import sys
import warnings

import numpy as np
import torch

from cluster.core import LayerCall, Priority
from cluster.errors import (
    DeadlineExceeded,
    ExpertMeshError,
    InternalError,
    InvalidArgument,
    MissingExperts,
    Overloaded,
    Unavailable,
)
from cluster.rpc.v1 import experts_pb2
from cluster.transport.base import LayerReply, LayerRows

PROTOCOL_VERSION = 1
MAX_MESSAGE_BYTES = 256 * 1024 * 1024
"""Larger calls are split by the dispatcher (see `max_rows`)."""
_HEADROOM_BYTES = 1024 * 1024

_WIRE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_WIRE_NAMES = {dtype: name for name, dtype in _WIRE_DTYPES.items()}

# Tensors over received bytes are read-only, and nothing here writes to them; torch warns once a process all the same.
warnings.filterwarnings("ignore", message="The given buffer is not writable")

if sys.byteorder != "little":  # pragma: no cover
    raise ImportError("the wire format is little-endian and is not converted on this machine")


def max_rows(hidden_size: int, experts_per_token: int) -> int:
    """Rows of one call at most, so that neither the call nor its fp32 reply exceeds a message."""
    return max(1, (MAX_MESSAGE_BYTES - _HEADROOM_BYTES) // (4 * hidden_size + 12 * max(1, experts_per_token)))


def tensor_bytes(tensor: torch.Tensor) -> bytes:
    """The tensor's elements as little-endian bytes, row by row (one copy)."""
    flat = tensor.detach().contiguous().view(torch.uint8).numpy()
    return flat.tobytes()


def tensor_from(data: bytes, dtype: torch.dtype, shape: tuple[int, ...], field: str) -> torch.Tensor:
    """The inverse of `tensor_bytes`. The tensor is read-only where ``data`` is: it must not be written to.

    Raises:
        InvalidArgument: the length does not fit shape and dtype.
    """
    expected = dtype.itemsize
    for size in shape:
        expected *= size
    if len(data) != expected:
        raise InvalidArgument(field, f"{len(data)} bytes", f"shape {shape} of {dtype} takes {expected} bytes")
    if expected == 0:
        return torch.empty(shape, dtype=dtype)
    array = np.frombuffer(data, dtype=np.uint8)
    return torch.frombuffer(array, dtype=dtype).view(shape)


def encode_call(call: LayerCall, rows: LayerRows) -> experts_pb2.LayerCallMessage:
    """The message of a call."""
    num_tokens, hidden_size = rows.hidden_TH.shape
    return experts_pb2.LayerCallMessage(
        call_id=call.call_id,
        step_id=call.step_id,
        layer=call.layer,
        table_epoch=call.table_epoch,
        table_version=call.table_version,
        priority=int(call.priority),
        timeout_ms=call.timeout_ms,
        traceparent=call.traceparent,
        num_tokens=num_tokens,
        hidden_size=hidden_size,
        dtype=_WIRE_NAMES[rows.hidden_TH.dtype],
        hidden=tensor_bytes(rows.hidden_TH),
        pair_row=tensor_bytes(rows.pair_row_P),
        pair_expert=tensor_bytes(rows.pair_expert_P),
        pair_weight=tensor_bytes(rows.pair_weight_P),
    )


def decode_call(message: experts_pb2.LayerCallMessage) -> tuple[LayerCall, LayerRows]:
    """Header and payload of a call.

    Raises:
        InvalidArgument: unknown dtype, or lengths and rows that do not fit each other.
    """
    dtype = _WIRE_DTYPES.get(message.dtype)
    if dtype is None:
        raise InvalidArgument("dtype", message.dtype, f"must be one of {', '.join(_WIRE_DTYPES)}")
    if message.priority not in (0, 1):
        raise InvalidArgument("priority", message.priority, "must be 0 or 1")
    hidden_TH = tensor_from(message.hidden, dtype, (message.num_tokens, message.hidden_size), "hidden")
    pairs = len(message.pair_row) // 4
    rows = LayerRows(
        hidden_TH,
        tensor_from(message.pair_row, torch.int32, (pairs,), "pair_row"),
        tensor_from(message.pair_expert, torch.int32, (pairs,), "pair_expert"),
        tensor_from(message.pair_weight, torch.float32, (pairs,), "pair_weight"),
    )
    call = LayerCall(
        call_id=message.call_id,
        step_id=message.step_id,
        layer=message.layer,
        table_epoch=message.table_epoch,
        table_version=message.table_version,
        priority=Priority(message.priority),
        timeout_ms=message.timeout_ms,
        traceparent=message.traceparent,
    )
    return call, rows


def encode_reply(call_id: int, reply: LayerReply) -> experts_pb2.LayerReplyMessage:
    """The message of a good reply."""
    return experts_pb2.LayerReplyMessage(
        call_id=call_id,
        status=experts_pb2.REPLY_STATUS_OK,
        partial=tensor_bytes(reply.partial_TH),
        queue_us=round(reply.queue_s * 1e6),
        compute_us=round(reply.compute_s * 1e6),
    )


def encode_error(call_id: int, error: ExpertMeshError) -> experts_pb2.LayerReplyMessage:
    """The message of a reply that failed."""
    message = experts_pb2.LayerReplyMessage(call_id=call_id, error=str(error))
    if isinstance(error, MissingExperts):
        message.status = experts_pb2.REPLY_STATUS_MISSING_EXPERTS
        message.missing_experts.extend(error.experts)
    elif isinstance(error, Overloaded):
        message.status = experts_pb2.REPLY_STATUS_BUSY
    elif isinstance(error, InvalidArgument):
        message.status = experts_pb2.REPLY_STATUS_BAD_CALL
    elif isinstance(error, DeadlineExceeded):
        message.status = experts_pb2.REPLY_STATUS_EXPIRED
    elif isinstance(error, Unavailable):
        message.status = experts_pb2.REPLY_STATUS_UNAVAILABLE
    else:
        message.status = experts_pb2.REPLY_STATUS_INTERNAL
    return message


def decode_reply(
    message: experts_pb2.LayerReplyMessage, group: int, layer: int, num_tokens: int, hidden_size: int
) -> LayerReply:
    """The reply of a message, checked against the call it answers.

    Raises:
        MissingExperts, Overloaded, DeadlineExceeded, Unavailable, InternalError: what the group answered.
        InvalidArgument: the payload does not have the call's shape.
    """
    status = message.status
    if status == experts_pb2.REPLY_STATUS_MISSING_EXPERTS:
        raise MissingExperts(group, layer, list(message.missing_experts))
    if status == experts_pb2.REPLY_STATUS_BUSY:
        raise Overloaded(message.error)
    if status == experts_pb2.REPLY_STATUS_EXPIRED:
        raise DeadlineExceeded(message.error)
    if status == experts_pb2.REPLY_STATUS_UNAVAILABLE:
        raise Unavailable(message.error)
    if status != experts_pb2.REPLY_STATUS_OK:
        raise InternalError(f"group {group}: {message.error}")
    partial_TH = tensor_from(message.partial, torch.float32, (num_tokens, hidden_size), "partial")
    return LayerReply(partial_TH, message.queue_us / 1e6, message.compute_us / 1e6)
