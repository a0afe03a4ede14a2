"""The full matrices (`make test-all`): every architecture, group count and layout; memory; the benchmark model."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cluster.api.client import Client
from cluster.rpc.v1 import inference_pb2 as pb
from cluster.weights.layouts import LAYOUTS
from cluster.weights.zoo import architectures
from tests.conftest import MakeTiny
from tests.e2e.processes import ServeProcess, last_json, run

pytestmark = [pytest.mark.full, pytest.mark.timeout(3600)]
COUNTS = ["--prompts", "8", "--tokens", "32", "--in-flight", "4"]


def verify(models: list[Path], groups: list[int], *flags: str) -> list[dict[str, object]]:
    arguments = [word for path in models for word in ("--model", str(path))]
    arguments += [word for count in groups for word in ("--groups", str(count))]
    done = run("verify", *arguments, *flags, "--json", timeout_s=3000)
    assert done.returncode == 0, done.stderr
    runs: list[dict[str, object]] = last_json(done)["runs"]
    assert len(runs) == len(models) * len(groups)
    assert all(item["mismatched_tokens"] == 0 for item in runs)
    return runs


def test_every_architecture_with_one_two_and_three_groups(tiny: MakeTiny) -> None:
    verify([tiny(arch) for arch in architectures()], [1, 2, 3], "--transport", "grpc", *COUNTS)


def test_every_architecture_in_process(tiny: MakeTiny) -> None:
    verify([tiny(arch) for arch in architectures()], [0], "--transport", "inproc", *COUNTS)


def test_deepseek_v3_in_every_layout(tiny: MakeTiny) -> None:
    verify([tiny("deepseek_v3", layout) for layout in LAYOUTS], [2], "--transport", "grpc", *COUNTS)


def test_bench_700m_and_its_memory(tmp_path: Path, tiny: MakeTiny) -> None:
    path = tmp_path / "bench"
    made = run("zoo", "make", "--arch", "qwen3_moe", "--preset", "bench-700m", "--out", str(path), timeout_s=600)
    assert made.returncode == 0, made.stderr
    verify([path], [2], "--prompts", "2", "--tokens", "16", "--in-flight", "2")
    anonymous = {}
    for name, model in (("empty", tiny("qwen3_moe")), ("bench", path)):
        process = ServeProcess("--model", str(model), "--groups", "2", "--dtype", "fp32", log=tmp_path / f"{name}.log")
        with Client(process.address) as client:
            status = client.status()
        process.stop()
        anonymous[name] = status.router.anonymous_bytes
    print(f"router anonymous {anonymous}, trunk {status.trunk_bytes}")
    print("groups", [(g.process.anonymous_bytes, g.expert_bytes) for g in status.groups])
    assert status.trunk_bytes > 350e6
    assert anonymous["bench"] - anonymous["empty"] < 1.3 * status.trunk_bytes
    assert all(group.process.anonymous_bytes < 1.3 * group.expert_bytes + anonymous["empty"] for group in status.groups)


def test_memory_of_the_router_stays_where_it_is(tmp_path: Path) -> None:
    process = ServeProcess("--groups", "2", log=tmp_path / "log")
    rng = random.Random(1)

    def one(_number: int) -> None:
        ids = [rng.randrange(4096) for _ in range(rng.randint(4, 100))]
        with Client(process.address) as client:
            list(
                client.generate(pb.GenerateRequest(prompt_ids=pb.TokenIds(ids=ids), max_new_tokens=16, ignore_eos=True))
            )

    try:
        with ThreadPoolExecutor(8) as pool, Client(process.address) as client:
            list(pool.map(one, range(100)))
            before = client.status().router.rss_bytes
            list(pool.map(one, range(400)))
            after = client.status().router.rss_bytes
    finally:
        process.stop()
    print(f"router resident {before} bytes after 100 requests, {after} after 500")
    assert after < 1.02 * before, f"{before} -> {after} bytes"
