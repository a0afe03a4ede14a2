from __future__ import annotations

import math

import pytest

from cluster.api.convert import ModelLimits, to_request
from cluster.api.tracing import TraceContext
from cluster.errors import InvalidArgument
from cluster.rpc.v1 import inference_pb2 as pb
from tests.unit.test_text import BYTES

LIMITS = ModelLimits(256, 100, "max_position_embeddings", frozenset({1}), 16, 60.0, verify=False)
IDS = pb.TokenIds(ids=[3, 4])


def convert(message: pb.GenerateRequest, left_s: float | None = None, tokenizer: object = BYTES):  # type: ignore[no-untyped-def]
    return to_request(message, LIMITS, tokenizer, left_s, TraceContext("t" * 32, "s" * 16))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, ["prompt", "must be set"]),
        ({"prompt": ""}, ["prompt", "empty"]),
        ({"prompt_ids": pb.TokenIds()}, ["prompt_ids", "at least 1"]),
        ({"prompt_ids": pb.TokenIds(ids=[3, 256])}, ["prompt_ids", "256", "255"]),
        ({"prompt_ids": pb.TokenIds(ids=[2**32 - 1])}, ["prompt_ids", "4294967295", "255"]),
        ({"prompt_ids": pb.TokenIds(ids=[5] * 100)}, ["prompt", "100 tokens", "99", "max_position_embeddings"]),
        ({"prompt": "a" * 100}, ["prompt", "100 tokens", "99"]),
        ({"prompt": "a" * 10_000_000}, ["prompt", "characters", "100"]),
        ({"prompt": "a", "messages": [pb.Message(role="user", content="x")]}, ["messages", "along with prompt"]),
        ({"messages": [pb.Message(content="x")]}, ["messages.role", "empty"]),
        ({"messages": [pb.Message(role="user", content="x")]}, ["messages", "chat template"]),
        ({"prompt_ids": IDS, "max_new_tokens": -1}, ["max_new_tokens", "-1", "from 1 to 100"]),
        ({"prompt_ids": IDS, "max_new_tokens": 0}, ["max_new_tokens", "0"]),
        ({"prompt_ids": IDS, "max_new_tokens": 101}, ["max_new_tokens", "101"]),
        ({"prompt_ids": IDS, "temperature": math.nan}, ["temperature", "nan"]),
        ({"prompt_ids": IDS, "temperature": -0.5}, ["temperature", "-0.5"]),
        ({"prompt_ids": IDS, "temperature": math.inf}, ["temperature", "inf"]),
        ({"prompt_ids": IDS, "top_p": 0.0}, ["top_p", "0.0", "more than 0"]),
        ({"prompt_ids": IDS, "top_p": 1.01}, ["top_p", "1.01", "at most 1"]),
        ({"prompt_ids": IDS, "top_p": math.nan}, ["top_p", "nan"]),
        ({"prompt_ids": IDS, "top_k": 257}, ["top_k", "257", "256"]),
        ({"prompt_ids": IDS, "top_k": -1}, ["top_k", "-1"]),
        ({"prompt_ids": IDS, "repetition_penalty": 0.0}, ["repetition_penalty", "0.0"]),
        ({"prompt_ids": IDS, "repetition_penalty": math.nan}, ["repetition_penalty", "nan"]),
        ({"prompt_ids": IDS, "logprobs": 21}, ["logprobs", "21", "20"]),
        ({"prompt_ids": IDS, "stop": ["x" * 10_240]}, ["stop", "10240 bytes", "1024"]),
        ({"prompt_ids": IDS, "stop": [""]}, ["stop", "0 bytes"]),
        ({"prompt_ids": IDS, "stop": ["x"] * 17}, ["stop", "17", "16"]),
        ({"prompt_ids": IDS, "stop_ids": [256]}, ["stop_ids", "256"]),
        ({"prompt_ids": IDS, "stop_ids": [5] * 65}, ["stop_ids", "65", "64"]),
        ({"prompt_ids": IDS, "deadline_ms": 0}, ["deadline_ms", "0", "at least 1"]),
        ({"prompt_ids": IDS, "return_logits": True}, ["return_logits", "--verify"]),
    ],
)
def test_bad_input_is_answered_with_field_value_and_limit(fields: dict[str, object], words: list[str]) -> None:
    with pytest.raises(InvalidArgument) as caught:
        convert(pb.GenerateRequest(**fields))
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert "\n" not in str(caught.value)


def test_text_and_stop_strings_need_a_tokenizer() -> None:
    for fields in ({"prompt": "a"}, {"prompt_ids": IDS, "stop": ["x"]}):
        with pytest.raises(InvalidArgument, match="no tokenizer files"):
            convert(pb.GenerateRequest(**fields), tokenizer=None)


def test_a_good_request_keeps_what_it_says() -> None:
    message = pb.GenerateRequest(
        prompt_ids=IDS,
        max_new_tokens=7,
        temperature=0.5,
        top_k=256,
        top_p=1.0,
        seed=2**64 - 1,
        stop=["x"],
        stop_ids=[9],
        repetition_penalty=1.2,
        logprobs=5,
        deadline_ms=2000,
    )
    request = convert(message)
    assert request.prompt_ids == (3, 4)
    assert request.sampling.seed == 2**64 - 1
    assert request.stop.stop_ids == {1, 9}
    assert (request.stop.max_new_tokens, request.stop.stop_strings) == (7, ("x",))
    assert 1.5 < request.deadline.remaining_s() <= 2.0


def test_defaults_and_limits() -> None:
    request = convert(pb.GenerateRequest(prompt_ids=pb.TokenIds(ids=[5] * 90), ignore_eos=True), left_s=3.0)
    assert request.stop.max_new_tokens == 10, "the context holds no more"
    assert request.stop.stop_ids == frozenset()
    assert request.sampling.temperature == 0
    assert 2.5 < request.deadline.remaining_s() <= 3.0


def test_the_clients_trace_id_is_kept_and_a_bad_one_replaced() -> None:
    assert TraceContext.of({"traceparent": f"00-{'ab' * 16}-{'cd' * 8}-01"}).trace_id == "ab" * 16
    for bad in ({}, {"traceparent": "00-zz-1-01"}, {"traceparent": f"00-{'00' * 16}-{'cd' * 8}-01"}):
        made = TraceContext.of(bad).trace_id
        assert len(made) == 32
        assert int(made, 16) != 0
