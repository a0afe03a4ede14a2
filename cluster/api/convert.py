"""Proto to core and back. Everything that a client may get wrong is found here, by name, value and limit."""

from __future__ import annotations

import math
import secrets
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cluster.api.tracing import TraceContext
from cluster.core import Deadline, FinishReason, Request, SamplingParams, StopParams
from cluster.engine.events import TokenEvent
from cluster.engine.text import Tokenizer
from cluster.errors import InvalidArgument
from cluster.rpc.v1 import inference_pb2 as pb

MAX_STOP_STRINGS = 16
MAX_STOP_BYTES = 1024
MAX_STOP_IDS = 64
MAX_LOGPROBS = 20
MAX_TEMPERATURE = 100.0
MAX_PENALTY = 100.0
MAX_SEED = 2**64 - 1
_CHARS_PER_TOKEN_LIMIT = 64
"""No token of any tokenizer seen is longer on average; a longer text is refused before it is tokenised."""

_FINISH = {
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    FinishReason.STOP_ID: pb.FINISH_REASON_STOP_ID,
    FinishReason.STOP_STRING: pb.FINISH_REASON_STOP_STRING,
}


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """What requests are checked against. ``context_why`` says what limits the context."""

    vocab_size: int
    context_length: int
    context_why: str
    end_ids: frozenset[int]
    default_max_new_tokens: int
    max_deadline_s: float
    verify: bool
    exact: bool = True


def to_request(
    message: pb.GenerateRequest,
    limits: ModelLimits,
    tokenizer: Tokenizer | None,
    time_left_s: float | None,
    trace: TraceContext,
) -> Request:
    """The request as the engine takes it.

    ``time_left_s`` is what the gRPC deadline leaves, None without one.

    Raises:
        InvalidArgument: a field is outside its limits, which are those in the proto file.
    """
    prompt_ids = _prompt(message, limits, tokenizer)
    room = limits.context_length - len(prompt_ids)
    if room < 1:
        raise InvalidArgument(
            "prompt",
            f"{len(prompt_ids)} tokens",
            f"must be at most {limits.context_length - 1} tokens: the context length is {limits.context_length} "
            f"({limits.context_why}) and holds prompt and answer",
        )
    max_new = message.max_new_tokens if message.HasField("max_new_tokens") else limits.default_max_new_tokens
    if max_new < 1 or max_new > limits.context_length:
        raise InvalidArgument("max_new_tokens", max_new, f"must be from 1 to {limits.context_length}")
    if message.return_logits and not limits.verify:
        raise InvalidArgument("return_logits", True, "the server gives logits only when it was started with --verify")
    stop_ids = _stop_ids(message, limits)
    received_ids = tuple(message.received_ids)
    check_ids("received_ids", received_ids, limits.vocab_size)
    if len(received_ids) >= min(max_new, room):
        raise InvalidArgument(
            "received_ids",
            f"{len(received_ids)} ids",
            f"must be fewer than the {min(max_new, room)} of the whole answer",
        )
    return Request(
        request_id=uuid.uuid4().hex,
        prompt_ids=tuple(prompt_ids),
        sampling=_sampling(message, limits),
        stop=StopParams(min(max_new, room), _stop_strings(message, tokenizer), stop_ids),
        deadline=_deadline(message, limits, time_left_s),
        trace_id=trace.trace_id,
        span_id=trace.span_id,
        trace_detail=trace.detail,
        want_logits=message.return_logits,
        received_ids=received_ids,
    )


def check_ids(field: str, ids: Sequence[int], vocab_size: int) -> None:
    """Raises InvalidArgument for an id outside the vocabulary."""
    for token in ids:
        if token >= vocab_size:
            raise InvalidArgument(field, token, f"must be from 0 to {vocab_size - 1} (the vocabulary)")


def _prompt(message: pb.GenerateRequest, limits: ModelLimits, tokenizer: Tokenizer | None) -> list[int]:
    kind = message.WhichOneof("input")
    if message.messages:
        if kind is not None:
            raise InvalidArgument("messages", f"{len(message.messages)} messages", f"must not be set along with {kind}")
        turns = [(turn.role, turn.content) for turn in message.messages]
        for role, _ in turns:
            if not role:
                raise InvalidArgument("messages.role", role, "must not be empty")
        _check_length("messages", sum(len(content) for _, content in turns), limits)
        ids = _needs(tokenizer, "messages").chat(turns)
        check_ids("messages", ids, limits.vocab_size)
        return ids
    if kind == "prompt_ids":
        ids = list(message.prompt_ids.ids)
        if not ids:
            raise InvalidArgument("prompt_ids", ids, "must hold at least 1 token id")
        check_ids("prompt_ids", ids, limits.vocab_size)
        return ids
    if kind is None:
        raise InvalidArgument("prompt", "nothing", "one of prompt, prompt_ids and messages must be set")
    if not message.prompt:
        raise InvalidArgument("prompt", message.prompt, "must not be empty")
    _check_length("prompt", len(message.prompt), limits)
    ids = _needs(tokenizer, "prompt").encode(message.prompt)
    if not ids:
        raise InvalidArgument("prompt", message.prompt, "must give at least 1 token")
    check_ids("prompt", ids, limits.vocab_size)  # some tokenizers have more ids than their model
    return ids


def _check_length(field: str, num_chars: int, limits: ModelLimits) -> None:
    most = limits.context_length * _CHARS_PER_TOKEN_LIMIT
    if num_chars > most:
        raise InvalidArgument(
            field,
            f"{num_chars} characters",
            f"cannot fit the context length of {limits.context_length} tokens ({limits.context_why})",
        )


def _needs(tokenizer: Tokenizer | None, field: str) -> Tokenizer:
    if tokenizer is None:
        raise InvalidArgument(field, "text", "this checkpoint has no tokenizer files: send prompt_ids")
    return tokenizer


def _sampling(message: pb.GenerateRequest, limits: ModelLimits) -> SamplingParams:
    temperature = message.temperature if message.HasField("temperature") else 0.0
    if not 0.0 <= temperature <= MAX_TEMPERATURE:  # also refuses NaN
        raise InvalidArgument("temperature", temperature, f"must be from 0 (greedy) to {MAX_TEMPERATURE:g}")
    top_k = message.top_k if message.HasField("top_k") else 0
    if not 0 <= top_k <= limits.vocab_size:
        raise InvalidArgument("top_k", top_k, f"must be from 1 to {limits.vocab_size} (the vocabulary), or 0 for all")
    top_p = message.top_p if message.HasField("top_p") else 1.0
    if not 0.0 < top_p <= 1.0:
        raise InvalidArgument("top_p", top_p, "must be more than 0 and at most 1")
    penalty = message.repetition_penalty if message.HasField("repetition_penalty") else 1.0
    if not (0.0 < penalty <= MAX_PENALTY and math.isfinite(penalty)):
        raise InvalidArgument("repetition_penalty", penalty, f"must be more than 0 and at most {MAX_PENALTY:g}")
    logprobs = message.logprobs if message.HasField("logprobs") else 0
    if not 0 <= logprobs <= MAX_LOGPROBS:
        raise InvalidArgument("logprobs", logprobs, f"must be from 0 to {MAX_LOGPROBS}")
    seed = message.seed if message.HasField("seed") else secrets.randbits(64)
    return SamplingParams(
        temperature, top_k, top_p, seed, penalty, num_logprobs=logprobs if message.HasField("logprobs") else 0
    )


def _stop_strings(message: pb.GenerateRequest, tokenizer: Tokenizer | None) -> tuple[str, ...]:
    if len(message.stop) > MAX_STOP_STRINGS:
        raise InvalidArgument("stop", f"{len(message.stop)} strings", f"must be at most {MAX_STOP_STRINGS}")
    for text in message.stop:
        size = len(text.encode())
        if not 1 <= size <= MAX_STOP_BYTES:
            raise InvalidArgument("stop", f"a string of {size} bytes", f"must be from 1 to {MAX_STOP_BYTES} bytes")
    if message.stop:
        _needs(tokenizer, "stop")
    return tuple(message.stop)


def _stop_ids(message: pb.GenerateRequest, limits: ModelLimits) -> frozenset[int]:
    if len(message.stop_ids) > MAX_STOP_IDS:
        raise InvalidArgument("stop_ids", f"{len(message.stop_ids)} ids", f"must be at most {MAX_STOP_IDS}")
    check_ids("stop_ids", message.stop_ids, limits.vocab_size)
    own = frozenset() if message.ignore_eos else limits.end_ids
    return own | frozenset(message.stop_ids)


def _deadline(message: pb.GenerateRequest, limits: ModelLimits, time_left_s: float | None) -> Deadline:
    seconds = limits.max_deadline_s
    if message.HasField("deadline_ms"):
        if message.deadline_ms < 1:
            raise InvalidArgument("deadline_ms", message.deadline_ms, "must be at least 1")
        seconds = min(seconds, message.deadline_ms / 1000)
    if time_left_s is not None:
        seconds = min(seconds, max(0.0, time_left_s))
    return Deadline.after(seconds)


def to_chunk(
    events: Sequence[TokenEvent],
    request: Request,
    num_generated: int,
    stages: Mapping[str, float],
    exact: bool,
) -> pb.GenerateChunk:
    """One chunk of consecutive events; ``num_generated`` tokens came before and with them. The last one tells of
    ``stages``."""
    chunk = pb.GenerateChunk(text="".join(event.text for event in events), trace_id=request.trace_id)
    for event in events:
        if event.token is not None:
            chunk.tokens.append(_token(event))
    last = events[-1]
    if last.finish is not None:
        chunk.finish_reason = _FINISH[last.finish]
        chunk.usage.prompt_tokens = len(request.prompt_ids)
        chunk.usage.completion_tokens = len(request.received_ids) + num_generated
        missing = sorted(last.account.missing) if last.account is not None else []
        chunk.exact = exact and not missing
        chunk.missing_experts.extend(f"{layer}/{expert}" for layer, expert in missing)
        chunk.stages.extend(pb.StageTime(stage=name, seconds=seconds) for name, seconds in stages.items())
    return chunk


def _token(event: TokenEvent) -> pb.Token:
    assert event.token is not None
    token = pb.Token(id=event.token.token, logits_f32=event.logits)
    if event.token.logprob is not None:
        token.logprob = event.token.logprob
        token.top.extend(pb.TokenLogprob(id=i, logprob=value) for i, value in event.token.top)
    return token


def to_reply(chunks: Sequence[pb.GenerateChunk]) -> pb.GenerateReply:
    """All chunks of a generation as one reply."""
    last = chunks[-1]
    return pb.GenerateReply(
        text="".join(chunk.text for chunk in chunks),
        tokens=[token for chunk in chunks for token in chunk.tokens],
        finish_reason=last.finish_reason,
        usage=last.usage,
        exact=last.exact,
        trace_id=last.trace_id,
        stages=last.stages,
        missing_experts=last.missing_experts,
    )
