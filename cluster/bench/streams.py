"""A closed loop of streams in a process of its own: rounds of the same work, one after another, timed from here.

Run as ``python -m cluster.bench.streams ADDRESS STREAMS REQUESTS PROMPT NEW VOCAB``. For each line of standard input it
sends its requests, so many at a time, and answers ``{"seconds": s, "tokens": n, "failed": n}``.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time

from cluster.bench.client import Failed, GrpcWire

TIMEOUT_S = 300.0


async def _round(wire: GrpcWire, streams: int, requests: int, prompt: int, new: int, vocab: int) -> dict[str, float]:
    made = [wire.prepare([random.randrange(vocab) for _ in range(prompt)], new) for _ in range(requests)]
    tokens = failed = 0

    def count(number: int) -> None:
        nonlocal tokens
        tokens += number

    async def stream() -> None:
        nonlocal failed
        while made:
            request = made.pop()
            try:
                await wire.stream(request, TIMEOUT_S, count)
            except Failed:
                failed += 1

    started_s = time.monotonic()
    await asyncio.gather(*(stream() for _ in range(streams)))
    return {"seconds": time.monotonic() - started_s, "tokens": tokens, "failed": failed}


async def _main() -> None:
    address, *numbers = sys.argv[1:]
    wire = GrpcWire(address)
    await wire.connect()
    sizes = [int(number) for number in numbers]
    loop = asyncio.get_running_loop()
    while await loop.run_in_executor(None, sys.stdin.readline):
        sys.stdout.write(json.dumps(await _round(wire, *sizes)) + "\n")
        sys.stdout.flush()
    await wire.close()


if __name__ == "__main__":
    asyncio.run(_main())
