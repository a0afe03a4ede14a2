"""The router's own gRPC server over a router in this process: real sockets, no Ray."""

from __future__ import annotations

import json
import queue
import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status
from transformers import AutoModelForCausalLM

from cluster.api.client import Client, Refused
from cluster.api.router import Router
from cluster.bench.reference import Reference
from cluster.bench.verify import Load, ask, compare, problems
from cluster.core import Deadline, LayerCall, Request, SamplingParams, StopParams
from cluster.engine.events import TokenEvent
from cluster.errors import LinkBroken, Unavailable
from cluster.placement.windows import read_windows
from cluster.rpc.v1 import inference_pb2 as pb
from cluster.telemetry.account import RequestAccount
from cluster.transport.base import LayerRows, PendingReply, Transport
from tests.conftest import MakeTiny
from tests.door import Door
from tests.e2e.processes import last_json, run_here
from tests.systems import SpoilLink, in_process_router

SOON = 30.0


@pytest.fixture(scope="module")
def path(tiny: MakeTiny) -> Path:
    return tiny("deepseek_v3")


@pytest.fixture(scope="module")
def door(path: Path) -> Iterator[Door]:
    door = Door()
    with Client(door.address) as client, pytest.raises(Unavailable, match="starting"):
        client.model_info()
    with grpc.insecure_channel(door.address) as channel:
        reply = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        assert reply.status == health_pb2.HealthCheckResponse.NOT_SERVING
    with in_process_router(path) as router:
        door.open(router)
        yield door
        door.close()


@pytest.fixture
def client(door: Door) -> Iterator[Client]:
    with Client(door.address) as client:
        yield client


def request(ids: list[int], new: int = 8, **fields: object) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        prompt_ids=pb.TokenIds(ids=ids),
        max_new_tokens=new,
        ignore_eos=True,
        **fields,  # type: ignore[arg-type]
    )


def tokens(client: Client, message: pb.GenerateRequest) -> list[int]:
    return [token.id for chunk in client.generate(message) for token in chunk.tokens]


def test_sixteen_clients_at_once_get_sixteen_right_answers(door: Door, path: Path) -> None:
    oracle = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    prompts = [[random.randrange(512) for _ in range(random.randint(3, 40))] for _ in range(16)]

    def one(prompt: list[int]) -> list[int]:
        with Client(door.address) as own:
            return tokens(own, request(prompt, 12))

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(one, prompts))
    for prompt, answer in zip(prompts, answers, strict=True):
        with torch.inference_mode():
            logits = oracle(torch.tensor([prompt + answer[:-1]])).logits[0, len(prompt) - 1 :]
        assert logits.argmax(-1).tolist() == answer


def test_a_seed_gives_the_same_tokens_whatever_shares_the_batch(client: Client) -> None:
    message = request([5, 6, 7], 12, temperature=1.0, seed=42, top_p=0.9)
    alone = tokens(client, message)
    with ThreadPoolExecutor(8) as pool:
        crowd = [
            pool.submit(tokens, client, request([random.randrange(512)] * 9, 20, temperature=1.0)) for _ in range(6)
        ]
        together = tokens(client, message)
        for item in crowd:
            item.result(SOON)
    assert alone == together
    assert alone != tokens(client, request([5, 6, 7], 12, temperature=1.0, seed=43, top_p=0.9))


def test_the_last_chunk_tells_how_it_ended(client: Client) -> None:
    chunks = list(client.generate(request([1, 2, 3], 5, logprobs=2)))
    last = chunks[-1]
    assert last.finish_reason == pb.FINISH_REASON_LENGTH
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (3, 5)
    assert last.exact
    assert len(last.trace_id) == 32
    assert {"trunk", "dispatch", "expert.compute"} <= {stage.stage for stage in last.stages}
    made = [token for chunk in chunks for token in chunk.tokens]
    assert all(len(token.top) == 2 and token.logprob == pytest.approx(token.top[0].logprob) for token in made)
    stopped = list(client.generate(request([1, 2, 3], 50, stop_ids=[made[2].id])))[-1]
    assert stopped.finish_reason == pb.FINISH_REASON_STOP_ID
    assert stopped.usage.completion_tokens <= 3


def test_bad_input_is_invalid_argument_with_the_field_in_the_details(door: Door) -> None:
    method = "/cluster.rpc.v1.Inference/GenerateOnce"
    with grpc.insecure_channel(door.address) as channel:
        call = channel.unary_unary(method, request_serializer=pb.GenerateRequest.SerializeToString)
        with pytest.raises(grpc.RpcError) as caught:
            call(request([600], 5), timeout=SOON)
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        status = rpc_status.from_call(caught.value)
        detail = error_details_pb2.BadRequest()
        assert status.details[0].Unpack(detail)
        assert detail.field_violations[0].field == "prompt_ids"
        raw = channel.unary_unary(method)
        for data, word in (
            (b"\x0a\x02\xff\xfe", "prompt"),
            (b"\x4a\x01\xff", "stop"),
            (b"\xff\xff\xff", "GenerateRequest"),
        ):
            with pytest.raises(grpc.RpcError) as caught:
                raw(data, timeout=SOON)
            assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
            assert word in caught.value.details()
            assert "Traceback" not in caught.value.details()


def test_a_client_that_leaves_frees_its_request_within_one_step(client: Client, door: Door) -> None:
    before = client.status().engine
    stream = client.generate(request([3, 4, 5], 400))
    for _ in range(3):
        next(stream)
    stream.close()
    limit = time.monotonic() + SOON
    while (now := client.status().engine).running and time.monotonic() < limit:
        time.sleep(0.005)
    assert now.cancelled == before.cancelled + 1
    assert now.running == 0
    assert now.max_steps_after_cancel <= 1
    assert now.kv_used_bytes == 0


def test_deadlines_of_request_and_of_the_call_both_count(client: Client, door: Door) -> None:
    with pytest.raises(Exception, match="deadline"):
        tokens(client, request([3], 500, deadline_ms=60))
    with Client(door.address, timeout_s=0.06) as hurried, pytest.raises(Exception, match=r"(?i)deadline"):
        tokens(hurried, request([3], 500))


def test_health_reflection_and_facts(door: Door, client: Client) -> None:
    with grpc.insecure_channel(door.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for service in ("", "cluster.rpc.v1.Inference"):
            reply = health.Check(health_pb2.HealthCheckRequest(service=service))
            assert reply.status == health_pb2.HealthCheckResponse.SERVING
        watch = health.Watch(health_pb2.HealthCheckRequest())
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        watch.cancel()
        ask_ = reflection_pb2.ServerReflectionRequest(list_services="")
        (answer,) = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter([ask_]))
        names = {service.name for service in answer.list_services_response.service}
        assert {"cluster.rpc.v1.Inference", "cluster.rpc.v1.Control", "grpc.health.v1.Health"} <= names
    info = client.model_info()
    assert (info.arch, info.num_moe_layers, info.num_experts, info.experts_per_token) == ("deepseek_v3", 2, 16, 4)
    assert not info.has_tokenizer
    status = client.status()
    assert [len(group.holdings[0].experts) for group in status.groups] == [8, 8]
    assert all(group.healthy for group in status.groups)
    with pytest.raises(Exception, match="no tokenizer files"):
        client.tokenize("hello")
    with pytest.raises(Refused, match="no tokenizer"):
        next(client.generate(pb.GenerateRequest(prompt="hello")))


# -- a planted error is seen ---------------------------------------------------------------------------------------


class Spoiled:
    """A link that changes what it carries."""

    def __init__(self, link: Transport, kind: str) -> None:
        self._link, self._kind = link, kind
        self.kind, self.group, self.address = link.kind, link.group, link.address
        self.cancel, self.healthy, self.close = link.cancel, link.healthy, link.close

    def room(self, *_: object) -> None:
        return None

    def submit(self, call: LayerCall, rows: LayerRows, deadline: Deadline) -> PendingReply:
        experts, weights = rows.pair_expert_P.clone(), rows.pair_weight_P.clone()
        if self._kind == "wrong expert" and call.layer == 0:
            experts[experts == 3] = 4
        elif self._kind == "zeroed experts" and call.layer == 1:
            weights[experts == 5] = 0
        elif self._kind == "swapped gate weights" and len(weights) > 1:
            weights[[0, 1]] = weights[[1, 0]]
        return self._link.submit(call, LayerRows.of(rows.hidden_TH, rows.pair_row_P, experts, weights), deadline)


@pytest.mark.parametrize("kind", ["nothing", "wrong expert", "zeroed experts", "swapped gate weights"])
def test_verify_sees_a_planted_error(kind: str, tiny: MakeTiny) -> None:
    path = tiny("qwen3_moe")
    spoil: SpoilLink = lambda link: Spoiled(link, kind)  # noqa: E731
    door, load = Door(), Load(prompts=6, tokens=16, in_flight=3, seed=7)
    try:
        with in_process_router(path, spoil=spoil) as router:
            door.open(router)
            answers, status = ask(door.address, load, lambda _message: None)
    finally:
        door.close()
    report = compare(Reference(path, torch.float32), answers, load.tokens)
    found = problems({**report, "max_batch": status.engine.max_batch}, load)
    assert bool(found) == (kind != "nothing"), found


def test_status_tells_of_stores_and_starts_and_requests_of_expected_loads(tiny: MakeTiny) -> None:
    door = Door()
    with in_process_router(tiny("qwen3_moe"), expert_memory="150K") as router:
        door.open(router)
        with Client(door.address) as client:
            list(client.generate(request([5, 6, 7])))
            router.fabric.refresh()
            status = client.status()
        account = _account_of(router, [9, 8, 7, 6])
        door.close()
    for group in status.groups:
        store = group.store
        assert len(store.expert_bytes) == len(store.resident_by_layer) == len(group.holdings)
        assert 0 < sum(store.resident_by_layer) == store.resident <= store.capacity
        assert [phase.name for phase in group.process.startup] == ["weights", "experts", "kernel_shapes", "servers"]
    phases = ["weights", "links", "first_step", "warm_up", "kv_cache"]
    assert [phase.name for phase in status.router.startup] == phases
    assert all(phase.seconds > 0 for phase in status.router.startup)
    size = status.groups[0].store.expert_bytes[0]
    assert account.cold_bytes > size, "half of the experts are cold"


def _account_of(router: Router, prompt: list[int]) -> RequestAccount:
    ended: queue.Queue[TokenEvent] = queue.Queue()
    wanted = Request("r", tuple(prompt), SamplingParams(), StopParams(2), Deadline.after(SOON))
    router.engine.submit(wanted, lambda event: ended.put(event) if event.last else None)
    account = ended.get(timeout=SOON).account
    assert account is not None
    return account


def test_loads_are_recorded_in_windows_that_plan_reads(door: Door, client: Client, tmp_path: Path) -> None:
    info, out = client.model_info(), tmp_path / "loads.json"
    stop = threading.Event()

    def load() -> None:
        while not stop.is_set():
            list(client.generate(request([5, 6, 7], 4)))

    thread = threading.Thread(target=load)
    thread.start()
    try:
        done = run_here("loads", "record", "--out", str(out), "--seconds", "0.5", "--server", door.address, "--json")
    finally:
        stop.set()
        thread.join()
    assert last_json(done)["windows"] == 2
    windows, sizes = read_windows(out)
    assert [window.shape for window in windows] == [(info.num_moe_layers, info.num_experts)] * 2
    assert sizes is not None
    assert min(sizes) > 0
    for window, raw in zip(windows, json.loads(out.read_text())["windows"], strict=True):
        # Every token that goes through a step counts once for each expert it wants, in every layer alike; a window may
        # begin and end in the middle of a step.
        each_L = window.sum(-1)
        assert each_L.min() > 0
        assert each_L.max() - each_L.min() <= 2 * 3 * info.experts_per_token
        assert not (each_L % info.experts_per_token).any()
        assert sum(map(sum, raw["activations"])) <= window.sum()
        assert sum(map(sum, raw["decode_tokens"])) > 0
    planned = run_here("plan", "--loads", str(out), "--groups", "2", "--slots", str(2 * info.num_experts), "--json")
    assert last_json(planned)["expert_bytes_known"]


class Gone:
    """A link whose group cannot be reached."""

    def __init__(self, link: Transport) -> None:
        self._link = link
        self.lost = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._link, name)

    def room(self, *_: object) -> None:
        return None

    def submit(self, call: LayerCall, rows: LayerRows, deadline: Deadline) -> PendingReply:
        if self.lost:
            raise LinkBroken("planted: nobody there")
        return self._link.submit(call, rows, deadline)


def test_a_degraded_answer_says_so_and_which_experts_were_missing_and_spoils_no_other(path: Path) -> None:
    links: list[Gone] = []

    def spoil(link: Transport) -> Transport:
        links.append(Gone(link))
        return links[-1]

    door = Door()
    prompt = list(range(40, 60))
    with in_process_router(path, spoil=spoil, data_plane={"missing_experts": "degrade"}) as router:
        door.open(router)
        with Client(door.address) as client:
            right = list(client.generate(request(prompt[::-1])))[-1]
            links[-1].lost = True
            [*_, degraded] = client.generate(request(prompt))
            links[-1].lost = False
            [*_, again] = client.generate(request(prompt))
        door.close()
    assert right.exact
    assert again.exact, "nothing of the degraded answer was used"
    assert not again.missing_experts
    assert not degraded.exact
    held = router.fabric.membership.groups[links[-1]._link.group].holdings
    missing = [tuple(map(int, name.split("/"))) for name in degraded.missing_experts]
    assert missing
    assert all(expert in held[layer] for layer, expert in missing)
