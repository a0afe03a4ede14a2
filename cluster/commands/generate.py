"""`expertmesh generate`."""

from __future__ import annotations

import sys
from contextlib import closing
from typing import Annotated

import typer

from cluster.commands.common import DEFAULT_SERVER, Json, Server, emit, stderr


def generate(
    prompt: Annotated[str | None, typer.Argument(help="Text.")] = None,
    ids: Annotated[str | None, typer.Option(help="Token ids with commas, instead of text.")] = None,
    stream: Annotated[bool, typer.Option("--stream", help="Print text as it comes.")] = False,
    max_new_tokens: Annotated[int | None, typer.Option(help="Tokens at most.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Sample from the k most probable tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Sample from the most probable tokens that sum to p.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same tokens.")] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="1 is off.")] = None,
    stop_string: Annotated[list[str] | None, typer.Option("--stop", help="End before this text; repeatable.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Do not end at the model's end tokens.")] = False,
    deadline_ms: Annotated[int | None, typer.Option(help="Milliseconds the request may take.")] = None,
    trace_layers: Annotated[
        bool, typer.Option("--trace-layers", help="Trace single layers of the first steps (see `trace list --all`).")
    ] = False,
    server: Server = DEFAULT_SERVER,
    as_json: Json = False,
) -> None:
    """Generate text with a running server."""
    from cluster.api.client import Client, text_request
    from cluster.api.client_tracing import ClientTracer
    from cluster.rpc.v1 import inference_pb2

    request = text_request(
        prompt,
        ids,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        repetition_penalty=repetition_penalty,
        stop=stop_string or None,
        ignore_eos=ignore_eos,
        deadline_ms=deadline_ms,
    )
    text, tokens, last = "", [], inference_pb2.GenerateChunk()
    show = stderr.file if as_json else sys.stdout
    with closing(ClientTracer.from_environment()) as tracer:
        with Client(server, tracer=tracer) as client:
            for chunk in client.generate(request, trace_layers):
                text += chunk.text
                tokens += [token.id for token in chunk.tokens]
                last = chunk
                if stream:
                    show.write(chunk.text)
                    show.flush()
        if not stream and not as_json:
            sys.stdout.write(text if text or not tokens else ",".join(str(token) for token in tokens))
        if stream or not as_json:
            show.write("\n")
        show.flush()  # before the tracer waits for a collector
        if as_json:
            emit(
                {
                    "text": text,
                    "token_ids": tokens,
                    "finish_reason": inference_pb2.FinishReason.Name(last.finish_reason)
                    .removeprefix("FINISH_REASON_")
                    .lower(),
                    "prompt_tokens": last.usage.prompt_tokens,
                    "completion_tokens": last.usage.completion_tokens,
                    "exact": last.exact,
                    "missing_experts": list(last.missing_experts),
                    "trace_id": last.trace_id,
                    "stages_s": {stage.stage: stage.seconds for stage in last.stages},
                }
            )
