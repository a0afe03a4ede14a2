from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

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
from cluster.transport.base import LayerReply, LayerRows
from cluster.transport.codec import (
    Kind,
    Placement,
    decode_call,
    encode_call,
    max_rows,
)
from cluster.transport.replies import (
    decode_reply_head,
    decode_times,
    encode_error,
    encode_reply,
    good_reply,
    raise_for_status,
    reply_rows,
)


def rows(tokens: int, hidden: int, dtype: torch.dtype, pairs: int) -> LayerRows:
    hidden_TH = torch.randint(-128, 128, (tokens, hidden)).to(dtype)
    if dtype is not torch.int8:
        hidden_TH = torch.randn(tokens, hidden).to(dtype)
    row_P = torch.randint(0, max(1, tokens), (pairs,))
    return LayerRows.of(hidden_TH, row_P, torch.randint(0, 9, (pairs,)), torch.rand(pairs))


@given(
    st.integers(0, 9),
    st.integers(1, 9),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.int8]),
    st.integers(0, 20),
)
def test_a_call_survives_the_wire_bit_by_bit(tokens: int, hidden: int, dtype: torch.dtype, pairs: int) -> None:
    call = LayerCall(2**40, 7, 3, 2, 5, Priority.PREFILL, 1234, "00-" + "a" * 32 + "-" + "b" * 16 + "-01")
    sent = rows(tokens, hidden, dtype, pairs)
    got_call, got = decode_call(encode_call(call, sent))
    assert got_call == call
    assert isinstance(got_call.priority, Priority)
    assert got.hidden_TH.dtype == dtype
    assert torch.equal(got.hidden_TH, sent.hidden_TH)
    assert np.array_equal(got.pairs_3P, sent.pairs_3P)
    for name in ("pair_row_P", "pair_expert_P", "pair_weight_P"):
        assert torch.equal(getattr(got, name), getattr(sent, name))


@given(st.binary(max_size=300))
def test_bytes_that_are_no_call_are_refused_and_nothing_else_happens(junk: bytes) -> None:
    with pytest.raises(InvalidArgument):
        decode_call(bytes([Kind.CALL]) + junk)


@given(st.data())
def test_a_call_with_changed_bytes_is_refused_or_has_the_lengths_that_it_says(data: st.DataObject) -> None:
    frame = bytearray(encode_call(LayerCall(1, 1, 0, 1, 1), rows(4, 8, torch.float32, 6)))
    for _ in range(data.draw(st.integers(1, 4))):
        frame[data.draw(st.integers(1, len(frame) - 1))] = data.draw(st.integers(0, 255))
    try:
        _, got = decode_call(bytes(frame))
    except InvalidArgument:
        return
    assert got.hidden_TH.nbytes + got.pairs_3P.nbytes <= len(frame)


@pytest.mark.parametrize("cut", [1, 4, 40, 100])
def test_a_cut_call_is_refused_before_use(cut: int) -> None:
    frame = encode_call(LayerCall(1, 1, 0, 1, 1), rows(4, 8, torch.float32, 6))
    with pytest.raises(InvalidArgument):
        decode_call(frame[:-cut])
    with pytest.raises(InvalidArgument):
        decode_call(frame + b"x" * cut)


def test_a_dtype_that_links_do_not_carry_is_refused_by_the_sender() -> None:
    with pytest.raises(InvalidArgument, match="dtype"):
        encode_call(LayerCall(1, 1, 0, 1, 1), rows(4, 8, torch.float64, 6))


def test_a_reply_survives_and_its_shape_is_checked() -> None:
    reply = LayerReply(torch.randn(3, 4), 0.001, 0.002)
    frame = encode_reply(5, reply)
    assert decode_times(frame)[:3] == (5, 0.001, 0.002)
    assert frame.startswith(good_reply((3, 4), Placement.INLINE))
    assert torch.equal(reply_rows(frame, (3, 4)), reply.partial_TH)
    raise_for_status(decode_reply_head(frame), frame, 0, 0, (3, 4))
    with pytest.raises(InvalidArgument):
        raise_for_status(decode_reply_head(frame), frame, 0, 0, (4, 4))
    with pytest.raises(InvalidArgument):
        reply_rows(frame[:-1], (3, 4))
    with pytest.raises(InvalidArgument):
        decode_reply_head(frame[:10])
    with pytest.raises(InvalidArgument):
        decode_times(frame[:10])


@pytest.mark.parametrize(
    "error",
    [
        MissingExperts(2, 1, [3, 7]),
        Overloaded("full"),
        DeadlineExceeded("late"),
        InternalError("broken"),
        Unavailable("shutting down"),
    ],
)
def test_errors_arrive_as_what_they_are(error: ExpertMeshError) -> None:
    frame = encode_error(9, error)
    with pytest.raises(type(error)) as caught:
        raise_for_status(decode_reply_head(frame), frame, 2, 1, (1, 1))
    if isinstance(error, MissingExperts):
        assert isinstance(caught.value, MissingExperts)
        assert caught.value.experts == (3, 7)


def test_a_full_call_fits_a_message() -> None:
    hidden, top_k = 7168, 8
    count = max_rows(hidden, top_k)
    assert count * (hidden * 4 + top_k * 12) < 256 * 1024 * 1024
    assert count > 8192
