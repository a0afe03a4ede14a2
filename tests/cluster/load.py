"""Steady load of known answers, for whoever does something to the cluster meanwhile: python load.py ADDRESS SECONDS.

Prints one JSON object: requests, failed, mismatched, resumed, longest_gap_s, and who served before and after.
"""

from __future__ import annotations

import json
import random
import sys
import threading
import time
from typing import Any

from cluster.api.client import Client
from cluster.rpc.v1 import inference_pb2 as pb

PROMPTS = [
    "ROMEO.\nBut soft,",
    "1:1 In the beginning",
    "KING HENRY.\nOnce more",
    "And the LORD said",
    "Enter the Ghost",
]
STREAMS, NEW = 4, 48


def ask(client: Client, prompt: str, gaps: list[float]) -> list[int]:
    """Greedy tokens."""
    tokens: list[int] = []
    last_s = time.monotonic()
    for chunk in client.generate(pb.GenerateRequest(prompt=prompt, max_new_tokens=NEW, ignore_eos=True)):
        now_s = time.monotonic()
        gaps.append(now_s - last_s)
        last_s = now_s
        tokens += [token.id for token in chunk.tokens]
    return tokens


def processes(address: str) -> dict[str, Any]:
    """Process and host of everybody."""
    with Client(address, timeout_s=30) as client:
        status = client.status()
    found = {f"experts-{group.group}": [group.process.host, group.process.pid] for group in status.groups}
    return {**found, "router": [status.router.host, status.router.pid]}


def main(address: str, seconds: float) -> dict[str, Any]:
    """The report."""
    known: dict[str, list[int]] = {}
    with Client(address) as client:
        for prompt in PROMPTS:
            known[prompt] = ask(client, prompt, [])
    before = processes(address)
    sys.stderr.write("load\n")
    sys.stderr.flush()
    ends_s = time.monotonic() + seconds
    gaps: list[float] = []
    failed: list[str] = []
    counts = {"requests": 0, "mismatched": 0, "resumed": 0}
    lock = threading.Lock()

    def stream(number: int) -> None:
        rng = random.Random(number)
        with Client(address, timeout_s=120, resume_s=90) as client:
            while time.monotonic() < ends_s:
                prompt, own = rng.choice(PROMPTS), []  # type: tuple[str, list[float]]
                try:
                    same = ask(client, prompt, own) == known[prompt]
                except Exception as exc:  # noqa: BLE001 (whatever it is, it is a failed request)
                    same = True
                    with lock:
                        failed.append(f"{type(exc).__name__}: {exc}")
                with lock:
                    counts["requests"] += 1
                    counts["mismatched"] += not same
                    gaps.extend(own)
            with lock:
                counts["resumed"] += client.resumed

    threads = [threading.Thread(target=stream, args=(number,)) for number in range(STREAMS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {
        **counts,
        "failed": failed,
        "longest_gap_s": max(gaps),
        "before": before,
        "after": processes(address),
    }


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], float(sys.argv[2]))))
