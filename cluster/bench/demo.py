"""The demonstration: one prompt through the real client port, and where its time went."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, TextIO

from rich.console import Console
from rich.table import Table

from cluster.api.client import Client
from cluster.rpc.v1 import inference_pb2

EXPLAINED = {
    "tokenize": "text to token ids",
    "queue": "waiting for a place in the batch",
    "turn": "in the batch, waiting for its turn",
    "schedule": "choosing what shares a step",
    "trunk": "attention, norms, gates, shared experts, LM head",
    "dispatch": "splitting tokens by group, packing and sending layer calls",
    "wire": "on the way to the groups and back",
    "expert.queue": "waiting for a group's compute thread",
    "expert.compute": "experts computing, in the group that answered first",
    "expert.straggler": "waiting for the other group to answer too",
    "expert.cold_load": "waiting for weights that were not in memory",
    "failover": "from a failed call to its answer",
    "combine": "adding the groups' answers",
    "sample": "choosing the next token",
    "emit": "token to text",
    "deliver": "from the engine to the front door",
    "stream_out": "waiting for the client to take it",
}


@dataclass(frozen=True, slots=True)
class DemoAnswer:
    """What came back. ``wall_s`` is the client's, from sending to the last token; ``first_s`` to the first."""

    text: str
    last: inference_pb2.GenerateChunk
    wall_s: float
    first_s: float

    def as_json(self) -> dict[str, Any]:
        """The JSON object of the command."""
        return {
            "text": self.text,
            "completion_tokens": self.last.usage.completion_tokens,
            "wall_s": self.wall_s,
            "first_token_s": self.first_s,
            "stages_s": {stage.stage: stage.seconds for stage in self.last.stages},
            "exact": self.last.exact,
            "trace_id": self.last.trace_id,
        }


def stream_answer(address: str, prompt: str, max_new_tokens: int, out: TextIO | None) -> DemoAnswer:
    """Asks over gRPC and writes prompt and text to ``out`` as it comes."""
    request = inference_pb2.GenerateRequest(prompt=prompt, max_new_tokens=max_new_tokens)
    text, last, first_s = "", inference_pb2.GenerateChunk(), 0.0
    with Client(address) as client:
        if out is not None:
            out.write("\n" + prompt)
        started_s = time.monotonic()
        for chunk in client.generate(request):
            first_s = first_s or time.monotonic() - started_s
            text, last = text + chunk.text, chunk
            if out is not None:
                out.write(chunk.text)
                out.flush()
        wall_s = time.monotonic() - started_s
        if out is not None:
            out.write("\n\n")
    return DemoAnswer(text, last, wall_s, first_s)


def show_stages(console: Console, answer: DemoAnswer) -> None:
    """The table of stages."""
    table = Table("stage", "milliseconds", "share", "what it is", title="Where the time went")
    table.columns[1].justify = table.columns[2].justify = "right"
    known = 0.0
    for stage in answer.last.stages:
        known += stage.seconds
        share = stage.seconds / answer.wall_s
        table.add_row(stage.stage, f"{stage.seconds * 1e3:.1f}", f"{share:.1%}", EXPLAINED.get(stage.stage, ""))
    rest = answer.wall_s - known
    table.add_row(
        "(not measured)", f"{rest * 1e3:.1f}", f"{rest / answer.wall_s:.1%}", "client, network, between steps"
    )
    console.print(table)
    console.print(
        f"{answer.last.usage.completion_tokens} tokens in {answer.wall_s * 1e3:.0f} ms (first after "
        f"{answer.first_s * 1e3:.0f} ms) from 2 expert groups; trace {answer.last.trace_id}"
    )
