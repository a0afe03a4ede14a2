"""A client process of `bench serve`: sends its share of a load at the planned times, whatever the server does.

Run as ``python -m cluster.bench.client JOB``, a JSON file. Standard input brings one line, once this process has said
that it is ready: the start time on the host's monotonic clock. The end of standard input ends the process at once.
Standard output carries one JSON line for each request as it ends, then ``{"done": true}``.
"""

from __future__ import annotations

import asyncio
import gc
import json
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, Protocol

import grpc

from cluster.bench.load import Arrival, prompt_of
from cluster.config import client_security
from cluster.rpc.v1 import inference_pb2, inference_pb2_grpc
from cluster.transport.credentials import aio_client_channel

CONNECT_S, START_S, SLACK_S = 30.0, 120.0, 5.0

OnTokens = Callable[[int], None]


class Failed(Exception):
    """A request ended without all its tokens."""

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(f"{code}: {detail}")
        self.code, self.detail = code, " ".join(detail.split())[:200]


class Wire(Protocol):
    """How requests reach the server."""

    def prepare(self, prompt_ids: list[int], new_tokens: int) -> Any:
        """A request, made before the load starts so that sending it costs little."""

    async def connect(self) -> None:
        """Raises Failed when nobody answers."""

    async def stream(self, request: Any, timeout_s: float, on_tokens: OnTokens) -> int | None:
        """Sends a request and calls ``on_tokens`` for each message that brings tokens; how many came in all, None where
        the server does not tell. Raises Failed."""

    async def close(self) -> None:
        """Ends the connection."""


class GrpcWire:
    """This project's own protocol, one channel for all requests of the process."""

    def __init__(self, address: str) -> None:
        self._address = address
        options = (("grpc.max_receive_message_length", -1), ("grpc.enable_http_proxy", 0), ("grpc.enable_retries", 0))
        self._channel, self._metadata = aio_client_channel(address, client_security(), options)
        self._generate: Any = inference_pb2_grpc.InferenceStub(self._channel).Generate

    def prepare(self, prompt_ids: list[int], new_tokens: int) -> inference_pb2.GenerateRequest:
        """Greedy, and not ended by end tokens."""
        ids = inference_pb2.TokenIds(ids=prompt_ids)
        return inference_pb2.GenerateRequest(prompt_ids=ids, max_new_tokens=new_tokens, ignore_eos=True)

    async def connect(self) -> None:
        """Waits until the channel is up."""
        try:
            await asyncio.wait_for(self._channel.channel_ready(), CONNECT_S)
        except TimeoutError as exc:
            raise Failed("UNAVAILABLE", f"nobody answers at {self._address} within {CONNECT_S:g} s") from exc

    async def stream(self, request: Any, timeout_s: float, on_tokens: OnTokens) -> int:
        """One server-streaming call."""
        count = 0
        try:
            async for chunk in self._generate(request, timeout=timeout_s, metadata=self._metadata):
                if chunk.tokens:
                    on_tokens(len(chunk.tokens))
                    count += len(chunk.tokens)
        except grpc.aio.AioRpcError as exc:
            raise Failed(exc.code().name, exc.details() or "") from exc
        return count

    async def close(self) -> None:
        """Closes the channel."""
        await self._channel.close(0)


class OpenAiWire:
    """An OpenAI-compatible server: POST /v1/completions with token ids, answered with server-sent events. An event
    counts as one token unless it lists its token ids (vLLM does when asked)."""

    def __init__(self, address: str, model: str) -> None:
        import aiohttp

        self._http: Any = aiohttp
        self._address, self._model = address, model
        # No limit of connections: a load that waits for a free one would not be open.
        self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), trust_env=False)

    def prepare(self, prompt_ids: list[int], new_tokens: int) -> bytes:
        """The body."""
        body = {
            "model": self._model,
            "prompt": prompt_ids,
            "max_tokens": new_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
        }
        return json.dumps(body).encode()

    async def connect(self) -> None:
        """Nothing: the first request connects."""

    async def stream(self, request: bytes, timeout_s: float, on_tokens: OnTokens) -> int | None:
        """One POST."""
        counted, told, exact = 0, None, True
        try:
            async with self._session.post(
                f"http://{self._address}/v1/completions",
                data=request,
                headers={"Content-Type": "application/json"},
                timeout=self._http.ClientTimeout(total=timeout_s),
            ) as response:
                if response.status != 200:
                    raise Failed(f"HTTP_{response.status}", (await response.text())[:200])
                async for event in _events(response.content.iter_any()):
                    if event.get("error"):
                        raise Failed("SERVER_ERROR", json.dumps(event["error"]))
                    told = (event.get("usage") or {}).get("completion_tokens", told)
                    for choice in event.get("choices", [])[:1]:
                        ids = choice.get("token_ids")
                        exact = exact and ids is not None
                        number = 1 if ids is None and (choice.get("text") or not choice.get("finish_reason")) else 0
                        number = number if ids is None else len(ids)
                        if number:
                            on_tokens(number)
                            counted += number
        except TimeoutError as exc:
            raise Failed("DEADLINE_EXCEEDED", f"not ended within {timeout_s:g} s") from exc
        except (self._http.ClientError, OSError) as exc:
            raise Failed("UNAVAILABLE", str(exc) or type(exc).__name__) from exc
        return counted if exact else told

    async def close(self) -> None:
        """Closes all connections."""
        await self._session.close()


async def _events(content: AsyncIterator[bytes]) -> AsyncIterator[dict[str, Any]]:
    """JSON objects of a stream of server-sent events, to ``data: [DONE]``. Raises Failed if that does not come."""
    rest = b""
    async for data in content:
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            if not line.startswith(b"data:"):
                continue
            text = line.removeprefix(b"data:").strip()
            if text == b"[DONE]":
                return
            try:
                event = json.loads(text)
            except ValueError as exc:
                raise Failed("SERVER_ERROR", f"an event is not JSON: {text[:80]!r}") from exc
            if not isinstance(event, dict):
                raise Failed("SERVER_ERROR", f"an event is no JSON object: {text[:80]!r}")
            yield event
    raise Failed("INCOMPLETE", "the stream ended without [DONE]")


# -- sending -------------------------------------------------------------------------------------------------------


def tell(line: dict[str, Any]) -> None:
    """A line for the parent."""
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


class Sender:
    """Sends requests of one job over a wire."""

    def __init__(self, wire: Wire, timeout_s: float) -> None:
        self._wire, self._timeout_s = wire, timeout_s

    async def ask(self, request: Any, new_tokens: int, zero_s: float) -> dict[str, Any]:
        """One request to its end, whatever that is; times are seconds since ``zero_s``."""
        arrivals: list[tuple[float, int]] = []

        def on_tokens(number: int) -> None:
            arrivals.append((round(time.monotonic() - zero_s, 6), number))

        code, detail = "OK", ""
        sent_s = time.monotonic() - zero_s
        try:
            async with asyncio.timeout(self._timeout_s + SLACK_S):
                total = await self._wire.stream(request, self._timeout_s, on_tokens)
            if not arrivals or total not in (None, new_tokens):
                code, detail = "INCOMPLETE", f"{total or 0} of {new_tokens} tokens came"
        except Failed as exc:
            code, detail, total = exc.code, exc.detail, None
        except TimeoutError:
            code, detail, total = "DEADLINE_EXCEEDED", "the deadline was not kept", None
        return {
            "sent_s": round(sent_s, 6),
            "arrivals": arrivals,
            "end_s": round(time.monotonic() - zero_s, 6),
            "code": code,
            "detail": detail,
            "tokens": sum(number for _, number in arrivals) if total is None else total,
        }

    async def send_all(self, planned: list[tuple[float, int, Any, int]], zero_s: float) -> None:
        """Sends every (when, number, request, new tokens) at its time and tells of each as it ends."""

        async def one(index: int, request: Any, new_tokens: int) -> None:
            outcome = await self.ask(request, new_tokens, zero_s)
            tell({"index": index, **outcome})

        async with asyncio.TaskGroup() as tasks:
            for at_s, index, request, new_tokens in planned:
                delay_s = zero_s + at_s - time.monotonic()
                if delay_s > 0:
                    await asyncio.sleep(delay_s)
                tasks.create_task(one(index, request, new_tokens))


async def work(job: dict[str, Any], inbox: asyncio.StreamReader) -> None:
    """Ends when all requests have, or with standard input."""
    wire: Wire
    if job["protocol"] == "openai":
        wire = OpenAiWire(job["address"], job["model"])
    else:
        wire = GrpcWire(job["address"])
    sender = Sender(wire, job["timeout_s"])

    def prepared(entry: dict[str, Any]) -> tuple[float, int, Any, int]:
        ids = entry.get("prompt_ids")
        arrival = Arrival(entry["at_s"], entry["prompt_tokens"], entry["new_tokens"], "", ids)
        prompt_ids = prompt_of(entry["index"], arrival, job["seed"], job["vocab_size"])
        return arrival.at_s, entry["index"], wire.prepare(prompt_ids, arrival.new_tokens), arrival.new_tokens

    try:
        try:
            await wire.connect()
        except Failed as exc:
            tell({"fatal": exc.detail})
            return
        planned = sorted((prepared(entry) for entry in job["requests"]), key=lambda item: item[:2])
        warmup = [
            await sender.ask(request, new, time.monotonic()) for _, _, request, new in map(prepared, job["warmup"])
        ]
        # What is here stays: the collector would only look at it in the middle of the load.
        gc.collect()
        gc.freeze()
        tell({"ready": True, "warmup": [{"code": item["code"], "detail": item["detail"]} for item in warmup]})
        line = await asyncio.wait_for(inbox.readline(), START_S)
        if line:
            end = asyncio.ensure_future(inbox.read())
            sending = asyncio.ensure_future(sender.send_all(planned, float(line)))
            await asyncio.wait({end, sending}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
                tell({"done": True})
            for task in (end, sending):
                task.cancel()
            await asyncio.gather(end, sending, return_exceptions=True)
    finally:
        await wire.close()


async def main(file: Path) -> None:
    """Reads the job and does it."""
    inbox = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(inbox), sys.stdin)
    await work(json.loads(file.read_text(encoding="utf-8")), inbox)


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
