"""Bytes that look like what a peer sends: good frames with some of their bytes changed, cut or put together wrongly."""

from __future__ import annotations

import struct

import torch
from hypothesis import strategies as st

from cluster.core import LayerCall, Order, Priority
from cluster.errors import MissingExperts, Overloaded
from cluster.rpc.v1 import links_pb2
from cluster.transport.base import LayerReply, LayerRows
from cluster.transport.codec import (
    WAKE,
    Placement,
    encode_announced_call,
    encode_call,
    encode_cancel,
    encode_form,
    encode_ids,
    encode_order,
)
from cluster.transport.handshake import encode_hello, encode_welcome
from cluster.transport.replies import encode_error, encode_reply

TRACEPARENT = "00-" + "a" * 32 + "-" + "b" * 16 + "-01"
_EXTREMES = [0, 1, 2, 7, 8, 127, 255, 256, 65535, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1]


@st.composite
def mutated(draw: st.DrawFn, good: st.SearchStrategy[bytes]) -> bytes:
    """A good frame after some accidents."""
    frame = bytearray(draw(good))
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, max(0, len(frame) - 1)))
        match draw(st.integers(0, 5)):
            case 0:
                frame[at : at + 1] = draw(st.binary(min_size=1, max_size=1))
            case 1:
                form = draw(st.sampled_from(["<I", "<Q"]))
                value = draw(st.sampled_from(_EXTREMES)) % 2 ** (8 * struct.calcsize(form))
                frame[at : at + struct.calcsize(form)] = struct.pack(form, value)
            case 2:
                del frame[at:]
            case 3:
                frame[at:at] = draw(st.binary(max_size=16))
            case 4:
                frame += draw(good)
            case _:
                del frame[at : at + draw(st.integers(1, 8))]
    return bytes(frame)


@st.composite
def layer_calls(draw: st.DrawFn, hidden: int, experts: int, layers: int) -> bytes:
    """A call as a router sends it: inline, or announced."""
    tokens = draw(st.integers(0, 5))
    pairs = draw(st.integers(0, 3)) * tokens
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.int8]))
    rows = LayerRows.of(
        torch.ones(tokens, hidden).to(dtype),
        [number % max(1, tokens) for number in range(pairs)],
        [draw(st.integers(0, experts)) for _ in range(pairs)],
        [0.5] * pairs,
    )
    trace = draw(st.sampled_from(["", TRACEPARENT]))
    priority = draw(st.sampled_from(list(Priority)))
    number = draw(st.integers(1, 2**40))
    call = LayerCall(number, 3, draw(st.integers(0, layers)), 1, 1, priority, draw(st.integers(0, 5000)), trace)
    return (encode_call if draw(st.booleans()) else encode_announced_call)(call, rows)


ORDERS = st.builds(
    lambda layer, chances: encode_order(Order(3, layer, chances)), st.integers(0, 5), st.binary(max_size=20)
)
_FEW = st.integers(0, 6)
SMALL = st.integers(1, 2**40).map(encode_cancel) | st.just(WAKE)


@st.composite
def local_calls(draw: st.DrawFn, hidden: int, layers: int, memory_bytes: int) -> list[bytes]:
    """What announces a call in shared memory."""
    offset = st.integers(0, memory_bytes // 64).map(lambda number: 64 * number)
    shape = draw(st.integers(0, 6)), draw(st.sampled_from([hidden, hidden, hidden, 1, 2**20]))
    form = encode_form(torch.float32, shape, Placement.SHARED, draw(offset), draw(offset), draw(offset))
    number, pairs = draw(st.integers(1, 40)), draw(_FEW)
    call = LayerCall(number, 3, draw(st.integers(0, layers)), 1, 1, draw(st.sampled_from(list(Priority))), 1000)
    frames = [draw(mutated(st.just(form + encode_ids(call, pairs))))]
    return frames + [encode_cancel(number)] * draw(st.integers(0, 1))


def to_group(hidden: int, experts: int, layers: int) -> st.SearchStrategy[bytes]:
    """All that a router sends after its handshake."""
    calls = layer_calls(hidden, experts, layers)
    behind = st.builds(lambda order, call: order + call, ORDERS, calls)
    return mutated(st.one_of(calls, calls, behind, ORDERS, SMALL)) | st.binary(max_size=200)


REPLIES = st.one_of(
    st.builds(
        lambda tokens, hidden: encode_reply(9, LayerReply(torch.ones(tokens, hidden), 0.1, 0.2)),
        st.integers(0, 4),
        st.integers(1, 9),
    ),
    st.just(encode_error(9, MissingExperts(0, 1, (2, 3)))),
    st.text(max_size=20).map(lambda text: encode_error(9, Overloaded(text))),
)
HELLOS = st.builds(
    lambda text, number, generation: encode_hello(
        links_pb2.Hello(protocol=number, fingerprint=text, dtype=text, secret=text, generation=generation)
    ),
    st.text(max_size=20),
    st.integers(0, 2**31),
    st.text(max_size=8),
) | st.text(max_size=20).map(lambda text: encode_welcome(links_pb2.Welcome(shm_socket=text, store=text)))
