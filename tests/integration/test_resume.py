"""Streams that break and go on at another router: the same tokens, the same text, nothing twice and nothing lost."""

from __future__ import annotations

import random
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import pytest

from cluster.api.client import Client, Refused
from cluster.api.resume import Resumable
from cluster.config import EMBEDDED_MODEL
from cluster.errors import ExpertMeshError, Unavailable
from cluster.rpc.v1 import inference_pb2 as pb
from tests.door import Door
from tests.systems import in_process_router


class Doors:
    """Two routers' client ports (one router stands for both: the same weights). ``breaks[i]`` are chunks after which
    streams of door i break, one number a stream; when there are no more they stay whole."""

    def __init__(self, router: Any) -> None:
        self.doors = [Door(), Door()]
        self.breaks: list[list[int]] = [[], []]
        self.asked: list[list[pb.GenerateRequest]] = [[], []]
        for number, door in enumerate(self.doors):
            door.open(router)
            self._spoil(number, door)
        self.addresses = [door.address for door in self.doors]

    def _spoil(self, number: int, door: Door) -> None:
        whole = door.frontend.generate

        async def generate(message: Any, metadata: Any, left_s: Any) -> AsyncGenerator[pb.GenerateChunk, None]:
            self.asked[number].append(message)
            after = self.breaks[number].pop(0) if self.breaks[number] else 1 << 30
            chunks = whole(message, metadata, left_s)
            try:
                async for chunk in chunks:
                    if after == 0:
                        raise Unavailable("planted")
                    after -= 1
                    yield chunk
            finally:
                await chunks.aclose()

        door.frontend.generate = generate  # type: ignore[method-assign]

    def clear(self) -> None:
        self.breaks, self.asked = [[], []], [[], []]


@pytest.fixture(scope="module")
def doors() -> Iterator[Doors]:
    with in_process_router(EMBEDDED_MODEL) as router:
        made = Doors(router)
        yield made
        for door in made.doors:
            door.close()


@contextmanager
def client_of(doors: Doors, count: int = 2, **options: Any) -> Iterator[Client]:
    with Client(",".join(doors.addresses[:count]), timeout_s=60, **options) as client:
        yield client


def answer(client: Client, request: pb.GenerateRequest) -> tuple[list[int], str, Any]:
    tokens: list[int] = []
    text, last = "", pb.GenerateChunk()
    for chunk in client.generate(request):
        tokens += [token.id for token in chunk.tokens]
        text, last = text + chunk.text, chunk
    return tokens, text, (last.finish_reason, last.usage.prompt_tokens, last.usage.completion_tokens, last.exact)


REQUESTS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "seeded": {"temperature": 1.0, "seed": 77, "top_p": 0.9},
    "penalty": {"repetition_penalty": 1.3},
    "stop": {"stop": ["and", "the LORD"]},
    "logprobs": {"logprobs": 2},
}


@pytest.mark.parametrize("kind", REQUESTS)
def test_a_stream_that_breaks_again_and_again_is_the_stream_that_does_not(kind: str, doors: Doors) -> None:
    request = pb.GenerateRequest(prompt="In the beginning God", max_new_tokens=40, ignore_eos=True, **REQUESTS[kind])
    for _ in range(3):
        doors.clear()
        with client_of(doors) as client:
            whole = answer(client, request)
        doors.clear()
        # The first one breaks when something has come: where nothing has, every router is asked once and no more.
        doors.breaks = [[random.randint(1, 9), *random.choices(range(10), k=2)], random.choices(range(10), k=3)]
        planned = [list(each) for each in doors.breaks]
        with client_of(doors) as client:
            broken = answer(client, request)
        assert broken == whole, planned
        received = [len(message.received_ids) for messages in doors.asked for message in messages]
        assert max(received) > 0 or len(whole[0]) < 10


def test_without_a_seed_the_client_makes_one_that_both_routers_get(doors: Doors) -> None:
    doors.clear()
    doors.breaks[0] = [5]
    with client_of(doors) as client:
        tokens, _, _ = answer(client, pb.GenerateRequest(prompt="Lord", max_new_tokens=20, temperature=1.0))
        [first], [second] = doors.asked
        assert first.seed == second.seed
        assert first.HasField("seed")
        doors.clear()
        again = pb.GenerateRequest(prompt="Lord", max_new_tokens=20, temperature=1.0, seed=first.seed)
        assert answer(client, again)[0] == tokens
        assert client.resumed == 1


def test_with_one_router_its_stream_is_asked_for_until_it_is_back(doors: Doors) -> None:
    doors.clear()
    doors.breaks[0] = [3, 0, 0]
    with client_of(doors, 1) as client:
        tokens, _, _ = answer(client, pb.GenerateRequest(prompt="Lord", max_new_tokens=12, ignore_eos=True))
    assert len(tokens) == 12
    assert len(doors.asked[0]) == 4


def test_who_gives_up_says_what_it_was(doors: Doors) -> None:
    request = pb.GenerateRequest(prompt="Lord", max_new_tokens=12, ignore_eos=True)
    doors.clear()
    doors.breaks = [[0], [0]]
    with client_of(doors) as client, pytest.raises(Unavailable, match="planted"):
        answer(client, request)  # nothing has come: every router was tried once
    doors.clear()
    doors.breaks[0] = [4]
    with client_of(doors, resume_s=0) as client, pytest.raises(Unavailable, match="planted"):
        answer(client, request)
    doors.clear()
    doors.breaks = [[4, *[0] * 99], [0] * 99]
    began_s = time.monotonic()
    with client_of(doors, resume_s=0.5) as client, pytest.raises(Unavailable, match="planted"):
        answer(client, request)
    assert time.monotonic() - began_s < 10


class Calls:
    """Stands for a router whose streams go as planned: chunks, and then an error of some code."""

    def __init__(self, plans: list[tuple[list[pb.GenerateChunk], grpc.StatusCode | None, str]]) -> None:
        self.plans, self.asked = plans, list[pb.GenerateRequest]()

    def Generate(self, request: pb.GenerateRequest, timeout: float, metadata: Any) -> Any:
        self.asked.append(request)
        chunks, code, details = self.plans.pop(0)

        class Call:
            def __iter__(self) -> Iterator[pb.GenerateChunk]:
                yield from chunks
                if code is not None:
                    raise Broken(code, details)

            def cancel(self) -> None:
                pass

        return Call()


class Broken(grpc.RpcError):
    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        self._code, self._details = code, details

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return self._details


def chunk_of(token: int, last: bool = False) -> pb.GenerateChunk:
    return pb.GenerateChunk(tokens=[pb.Token(id=token)], finish_reason=pb.FINISH_REASON_LENGTH if last else 0)


def planned(*plans: tuple[list[pb.GenerateChunk], grpc.StatusCode | None, str]) -> tuple[Client, Calls]:
    client, calls = Client("127.0.0.1:1", timeout_s=20, resume_s=1.0), Calls(list(plans))
    client._doors[0].inference = calls  # type: ignore[assignment]
    return client, calls


GONE, FULL, INTERNAL = grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.INTERNAL


def test_a_stream_that_has_ended_is_over_whatever_comes_of_its_call() -> None:
    client, calls = planned(([chunk_of(1), chunk_of(2, last=True)], GONE, "reset"))
    assert answer(client, pb.GenerateRequest(prompt="x"))[0] == [1, 2]
    assert len(calls.asked) == 1


@pytest.mark.parametrize(("code", "details"), [(FULL, "queue"), (INTERNAL, "The actor died: ActorDiedError")])
def test_a_begun_stream_goes_on_when_the_next_router_is_full_or_serve_lost_its_replica(
    code: grpc.StatusCode, details: str
) -> None:
    client, calls = planned(
        ([chunk_of(1)], GONE, ""), ([pb.GenerateChunk()], code, details), ([chunk_of(2, True)], None, "")
    )
    assert answer(client, pb.GenerateRequest(prompt="x"))[0] == [1, 2]
    assert [list(request.received_ids) for request in calls.asked] == [[], [1], [1]]
    assert client.resumed == 1


def test_what_is_not_a_break_is_not_asked_again() -> None:
    for code, details in ((FULL, "queue"), (INTERNAL, "a bug"), (grpc.StatusCode.DEADLINE_EXCEEDED, "")):
        client, calls = planned(([], code, details))
        with pytest.raises(ExpertMeshError):
            answer(client, pb.GenerateRequest(prompt="x"))
        assert len(calls.asked) == 1


def test_empty_chunks_before_errors_do_not_keep_a_stream_alive() -> None:
    """Serve's ingress sends one before each error."""
    plans = [([chunk_of(1)], GONE, "")] + [([pb.GenerateChunk()], GONE, "")] * 500
    client, calls = planned(*plans)
    with pytest.raises(Unavailable):
        answer(client, pb.GenerateRequest(prompt="x"))
    assert len(calls.asked) < 20


def test_bad_beginnings_are_refused(doors: Doors) -> None:
    doors.clear()
    with client_of(doors) as client:
        for received in ([1] * 5, [1] * 6, [10**6]):
            bad = pb.GenerateRequest(prompt="Lord", max_new_tokens=5, received_ids=received)
            with pytest.raises(Refused, match="received_ids"):
                answer(client, bad)


def test_the_time_that_a_request_has_is_not_given_twice() -> None:
    now_s = 10.0
    stream = Resumable(pb.GenerateRequest(prompt="x", deadline_ms=900), 30.0, lambda: now_s)
    now_s = 10.6
    assert 299 <= stream.next_request().deadline_ms <= 301
    now_s = 99.0
    assert stream.next_request().deadline_ms == 1
