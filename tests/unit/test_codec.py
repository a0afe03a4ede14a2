from __future__ import annotations

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
from cluster.rpc.v1 import experts_pb2
from cluster.transport.base import LayerReply, LayerRows
from cluster.transport.codec import decode_call, decode_reply, encode_call, encode_error, encode_reply, max_rows


def rows(tokens: int, hidden: int, dtype: torch.dtype, pairs: int) -> LayerRows:
    return LayerRows(
        torch.randn(tokens, hidden).to(dtype),
        torch.randint(0, max(1, tokens), (pairs,), dtype=torch.int32),
        torch.randint(0, 9, (pairs,), dtype=torch.int32),
        torch.rand(pairs),
    )


@given(
    st.integers(0, 9),
    st.integers(1, 9),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.integers(0, 20),
)
def test_a_call_survives_the_wire_bit_by_bit(tokens: int, hidden: int, dtype: torch.dtype, pairs: int) -> None:
    call = LayerCall(2**40, 7, 3, 2, 5, Priority.PREFILL, 1234, "00-aa-bb-01")
    sent = rows(tokens, hidden, dtype, pairs)
    data = encode_call(call, sent).SerializeToString()
    got_call, got = decode_call(experts_pb2.LayerCallMessage.FromString(data))
    assert got_call == call
    assert got.hidden_TH.dtype == dtype
    for name in ("hidden_TH", "pair_row_P", "pair_expert_P", "pair_weight_P"):
        assert torch.equal(getattr(got, name), getattr(sent, name))


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "fp64"},
        {"num_tokens": 2**31},
        {"hidden_size": 3},
        {"hidden": b"123"},
        {"pair_row": b"12345"},
        {"pair_weight": b""},
        {"priority": 9},
    ],
)
def test_lengths_that_do_not_fit_are_refused_before_use(change: dict[str, object]) -> None:
    message = encode_call(LayerCall(1, 1, 0, 1, 1), rows(4, 8, torch.float32, 6))
    for key, value in change.items():
        setattr(message, key, value)
    with pytest.raises(InvalidArgument):
        decode_call(message)


def test_a_reply_survives_and_its_shape_is_checked() -> None:
    reply = LayerReply(torch.randn(3, 4), 0.001, 0.002)
    message = encode_reply(5, reply)
    got = decode_reply(message, 0, 0, 3, 4)
    assert torch.equal(got.partial_TH, reply.partial_TH)
    assert (got.queue_s, got.compute_s) == (0.001, 0.002)
    with pytest.raises(InvalidArgument):
        decode_reply(message, 0, 0, 4, 4)


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
    with pytest.raises(type(error)) as caught:
        decode_reply(encode_error(9, error), 2, 1, 1, 1)
    if isinstance(error, MissingExperts):
        assert isinstance(caught.value, MissingExperts)
        assert caught.value.experts == (3, 7)


def test_a_full_call_fits_a_message() -> None:
    hidden, top_k = 7168, 8
    count = max_rows(hidden, top_k)
    assert count * (hidden * 4 + top_k * 12) < 256 * 1024 * 1024
    assert count > 8192
