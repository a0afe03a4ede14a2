"""The open-loop benchmark against servers in this process: what a server does is in the figures. No absolute times are
asserted but those that a server takes on purpose, from below."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest

from cluster.bench.load import Arrival, main_traffic, make_load, parse_also, read_replay, write_record
from cluster.bench.serve import Generator, Target, grpc_target, measure, openai_target, run_load
from cluster.errors import InvalidArgument, Unavailable
from cluster.rpc.v1 import inference_pb2 as pb
from tests.conftest import MakeTiny
from tests.door import Door
from tests.servers import DONE, event, fake_grpc, fake_openai
from tests.systems import in_process_router

ONE = Generator(clients=1, timeout_s=60.0, warmup=0)
NEVER = threading.Event()


def silent(_message: str) -> None:
    pass


def burst(number: int, new: int = 4, kind: str = "main") -> list[Arrival]:
    """Requests 10 ms apart."""
    return [Arrival(i / 100, 5, new, kind) for i in range(number)]


def at_once(_number: int, request: pb.GenerateRequest, _context: Any) -> Iterator[int]:
    """A token a chunk."""
    for _ in range(request.max_new_tokens):
        yield 1


def test_a_real_server_is_measured_by_class_and_its_warm_up_is_not_counted(tiny: MakeTiny) -> None:
    door = Door()
    try:
        with in_process_router(tiny("qwen3_moe")) as router:
            door.open(router)
            target = grpc_target(door.address)
            traffic = [main_traffic(10, "uniform:4:8", "3"), parse_also("every:0.5s,prompt=fixed:20,new=2", 1)]
            arrivals = make_load(traffic, 1.5, 7, 1000, target.context_length)
            result, outcomes = measure(target, arrivals, 7, Generator(2, 60.0, 3), silent)
    finally:
        door.close()
    json.dumps(result, allow_nan=False)
    assert result["completed"] == result["requests"] == len(arrivals) == len(outcomes)
    assert result["warmup"] == {"requests": 3, "failed": 0}
    main, also = result["classes"]
    assert (also["class"], also["requests"], also["tokens"], also["prompt_tokens"]) == ("also", 3, 6, 60)
    assert main["tokens"] == 3 * main["requests"]
    assert main["gap_ms"]["samples"] == 2 * main["requests"]
    assert result["arch"] == "qwen3_moe"
    assert result["max_batch"] >= 1
    for item in outcomes:
        assert item.sent_s is not None
        assert item.end_s is not None
        assert item.planned_s <= item.sent_s <= item.arrivals[0][0] <= item.arrivals[-1][0] <= item.end_s


def test_requests_leave_at_their_times_whatever_the_server_does() -> None:
    everyone = threading.Barrier(12)

    def together(_number: int, request: pb.GenerateRequest, _context: Any) -> Iterator[int]:
        everyone.wait(30)  # nobody is answered before all have asked
        yield request.max_new_tokens

    with fake_grpc(together) as (address, _):
        result, _ = measure(grpc_target(address), burst(12), 1, Generator(3, 60.0, 0), silent)
    assert result["completed"] == 12
    assert result["max_in_flight"] == 12


def test_a_slow_server_shows_in_first_tokens_and_gaps() -> None:
    def slow(_number: int, _request: pb.GenerateRequest, _context: Any) -> Iterator[int]:
        NEVER.wait(0.3)
        yield 1
        NEVER.wait(0.2)
        yield 3

    with fake_grpc(slow) as (address, _):
        result, _ = measure(grpc_target(address), burst(5), 1, ONE, silent)
    assert result["completed"] == 5
    assert result["ttft_ms"]["p50"] >= 299
    assert result["gap_ms"]["max"] >= 199
    assert result["gap_ms"]["p50"] == 0, "three of four tokens came together"
    assert result["gap_ms"]["samples"] == 15
    assert result["tpot_ms"]["p50"] >= 199 / 3
    assert result["e2e_ms"]["p50"] >= 499


def test_errors_short_answers_and_hanging_requests_are_counted_by_code() -> None:
    def wrong(number: int, request: pb.GenerateRequest, context: Any) -> Iterator[int]:
        yield 1
        if number % 4 == 1:
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "the queue is full")
        elif number % 4 == 2:
            return
        elif number % 4 == 3:
            while context.is_active():
                NEVER.wait(0.05)
            return
        yield request.max_new_tokens - 1

    with fake_grpc(wrong) as (address, _):
        result, _ = measure(grpc_target(address), burst(8), 1, Generator(1, 2.0, 0), silent)
    assert result["errors"] == {"RESOURCE_EXHAUSTED": 2, "INCOMPLETE": 2, "DEADLINE_EXCEEDED": 2}
    assert result["error_examples"]["RESOURCE_EXHAUSTED"] == "the queue is full"
    assert result["error_examples"]["INCOMPLETE"] == "1 of 4 tokens came"
    assert result["completed"] == result["ttft_ms"]["samples"] == 2
    assert result["span_s"] >= 2.0


def test_a_server_that_is_not_there_or_answers_no_warm_up_is_no_measurement() -> None:
    def refuse(_number: int, _request: pb.GenerateRequest, context: Any) -> Iterator[int]:
        context.abort(grpc.StatusCode.UNAVAILABLE, "starting")
        yield 1

    with fake_grpc(refuse) as (address, _):
        target = grpc_target(address)
        with pytest.raises(Unavailable, match="warm-up was answered: UNAVAILABLE: starting"):
            run_load(target, burst(4), 1, Generator(2, 5.0, 3), silent)
    with pytest.raises(Unavailable, match="nobody answers"):
        grpc_target(address)


def test_requests_of_a_client_process_that_dies_are_errors() -> None:
    released = threading.Event()

    def hold(_number: int, request: pb.GenerateRequest, _context: Any) -> Iterator[int]:
        released.wait(30)
        yield request.max_new_tokens

    def progress(message: str) -> None:
        if message.startswith("sending"):
            victim = next(child for child in psutil.Process().children() if "cluster.bench.client" in child.cmdline())
            victim.kill()
            victim.wait(10)
            released.set()

    with fake_grpc(hold) as (address, _):
        arrivals = [Arrival(1.0 + i / 100, 5, 4) for i in range(10)]
        result, outcomes = measure(grpc_target(address), arrivals, 1, Generator(2, 20.0, 0), progress)
    assert result["errors"] == {"LOST": 5}
    assert result["completed"] == 5
    assert len(outcomes) == 10
    assert any("lost in the client processes" in text for text in result["problems"])


def test_the_client_processes_end_with_the_run_that_is_stopped() -> None:
    def stop(message: str) -> None:
        if message.startswith("sending"):
            raise KeyboardInterrupt

    with fake_grpc(at_once) as (address, _):
        with pytest.raises(KeyboardInterrupt):
            run_load(grpc_target(address), [Arrival(3600.0, 5, 4)], 1, ONE, stop)
    assert not [child for child in psutil.Process().children() if "cluster.bench.client" in child.cmdline()]


def test_a_recorded_load_asks_the_same_again(tmp_path: Path) -> None:
    file = tmp_path / "load.jsonl"
    with fake_grpc(at_once) as (address, server):
        target = grpc_target(address)
        arrivals = make_load([main_traffic(40, "uniform:3:9", "2")], 0.5, 5, 100, target.context_length)
        write_record(file, arrivals, 5, target.vocab_size)
        run_load(target, arrivals, 5, ONE, silent)
        asked = sorted(server.prompts)
        server.prompts.clear()
        again = read_replay(file, 100, target.vocab_size, target.context_length)
        outcomes, _ = run_load(target, again, 6, ONE, silent)
    assert len(asked) == len(arrivals)
    assert sorted(server.prompts) == asked
    assert all(0 <= token < 50 for prompt in asked for token in prompt)
    assert [item.planned_s for item in outcomes] == [item.at_s for item in arrivals]


# -- OpenAI-compatible servers -------------------------------------------------------------------------------------


def openai(address: str) -> Target:
    return openai_target(address, None, 50)


def test_tokens_of_an_openai_server_are_counted_by_their_ids_or_by_events() -> None:
    def answer(number: int, body: dict[str, Any]) -> tuple[int, list[bytes]]:
        if number % 2:
            pieces = [event(choices=[{"text": "a", "token_ids": [7]}])]
            pieces += [event(choices=[{"text": "bcd", "token_ids": [7, 8, 9], "finish_reason": "length"}])]
        else:
            pieces = [event(choices=[{"text": "x"}]) for _ in range(body["max_tokens"])]
            pieces += [event(choices=[{"text": "", "finish_reason": "length"}])]
            # An event may be cut anywhere.
            pieces = [pieces[0][:9], pieces[0][9:] + pieces[1], *pieces[2:]]
        usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": body["max_tokens"]}
        return 200, [*pieces, event(choices=[], usage=usage), DONE]

    with fake_openai(answer) as (address, bodies):
        target = openai(address)
        assert (target.model, target.context_length) == ("m", 100)
        result, outcomes = measure(target, burst(6), 1, ONE, silent)
    assert result["completed"] == 6, result["error_examples"]
    assert result["tokens"] == 24
    assert result["gap_ms"]["samples"] == 18
    assert {item.tokens for item in outcomes} == {4}
    assert all(len(body["prompt"]) == 5 and body["stream"] and body["ignore_eos"] for body in bodies)
    assert len({tuple(body["prompt"]) for body in bodies}) == 6


def test_what_an_openai_server_does_wrong_is_counted_by_code() -> None:
    def answer(number: int, _body: dict[str, Any]) -> tuple[int, list[bytes]]:
        token = event(choices=[{"text": "x", "token_ids": [1]}])
        return [
            (503, [b"overloaded"]),
            (200, [token, event(error={"message": "out of memory"}), DONE]),
            (200, [token, token]),
            (200, [token, token, DONE]),
            (200, [b"data: {nonsense\n\n"]),
        ][number]

    with fake_openai(answer) as (address, _):
        result, _ = measure(openai(address), burst(5), 1, ONE, silent)
    assert result["errors"] == {"HTTP_503": 1, "SERVER_ERROR": 2, "INCOMPLETE": 2}
    assert result["error_examples"]["HTTP_503"] == "overloaded"
    assert result["completed"] == 0


def test_a_model_that_an_openai_server_has_not_is_refused_by_name() -> None:
    with fake_openai(lambda _number, _body: (200, [])) as (address, _):
        with pytest.raises(InvalidArgument, match="--openai-model: got 'n'; the server has m"):
            openai_target(address, "n", 50)
    with pytest.raises(Unavailable, match="v1/models"):
        openai(address)


# -- the command ---------------------------------------------------------------------------------------------------


def command(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    flags = ["--clients", "1", "--new-tokens", "3", "--prompt-dist", "fixed:5"]
    return subprocess.run(
        [sys.executable, "-m", "cluster", "bench", "serve", *flags, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=folder,
        env={**__import__("os").environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
    )


def test_the_command_writes_json_a_picture_and_the_load(tmp_path: Path) -> None:
    with fake_grpc(at_once) as (address, _):
        done = command(
            "--server", address, "--rate", "20", "--duration", "1", "--record", "load.jsonl", "--json", folder=tmp_path
        )
        assert done.returncode == 0, done.stderr
        result = json.loads(done.stdout.strip().splitlines()[-1])
        assert result["completed"] == result["requests"] > 0
        assert result["load"]["rate"] == 20
        assert (tmp_path / result["plot"]).read_bytes().startswith(b"\x89PNG")
        lines = (tmp_path / "load.jsonl").read_text().splitlines()
        assert len(lines) == result["requests"]
        assert not list(tmp_path.glob("job*"))


def test_the_command_shows_a_table_and_fails_if_nothing_completed(tmp_path: Path) -> None:
    def refuse(number: int, _request: pb.GenerateRequest, context: Any) -> Iterator[int]:
        if number:
            context.abort(grpc.StatusCode.UNAVAILABLE, "gone [for lunch]")
        yield 3

    with fake_grpc(refuse) as (address, _):
        done = command(
            "--server", address, "--rate", "20", "--duration", "1", "--warmup", "1", "--no-plot", folder=tmp_path
        )
    assert done.returncode == 1, done.stderr
    assert "failed with UNAVAILABLE: gone [for lunch]" in done.stdout
    assert "TTFT" in done.stdout
    assert not list(tmp_path.iterdir())
