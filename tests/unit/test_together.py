"""Attention of sequences that decode, together and one by one. On a machine with a GPU this runs there."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
import torch.nn.functional as F

from cluster.model import ragged, together
from cluster.model.kv import KvStore
from cluster.model.packed import Chunk, Layers
from cluster.model.together import Single, bundles_of
from cluster.routing.step import StepContext
from cluster.weights.zoo import architectures
from tests.conftest import MakeTiny
from tests.systems import in_process_router

CPU = torch.device("cpu")
IN_ONE_CALL = {"glm4_moe", "granitemoe", "olmoe", "qwen2_moe"}
"""The others have windows or sinks, or values that are narrower than keys."""


@pytest.mark.parametrize("arch", architectures())
def test_logits_are_the_same_together_and_one_by_one(arch: str, tiny: MakeTiny) -> None:
    with in_process_router(tiny(arch), num_groups=1) as router:
        trunk = router._trunk
        for step in range(4):
            size, lengths = 4, [random.randint(2, 60) for _ in range(9)]
            trunk.store = KvStore(200, size)
            free = random.sample(range(200), 200)
            blocks = [[free.pop() for _ in range(-(-length // size))] for length in lengths]
            ids = [[random.randrange(512) for _ in range(length)] for length in lengths]
            trunk.together = False
            trunk.forward([Chunk(row[:-1], 0, own) for row, own in zip(ids, blocks, strict=True)], StepContext(step))
            last = [Chunk(row[-1:], len(row) - 1, own) for row, own in zip(ids, blocks, strict=True)]
            # One that still reads its prompt, in the middle: what decodes is in pieces.
            last.insert(4, Chunk([7, 8, 9], 0, [free.pop()]))
            alone = trunk.forward(last, StepContext(step))
            trunk.together = True
            beside = trunk.forward(last, StepContext(step))
            assert float((alone - beside).abs().max()) < 1e-5 * float(alone.std())


def by_the_book(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    row_starts: torch.Tensor,
    key_starts: torch.Tensor,
    longest_row: int,
    longest_total: int,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> torch.Tensor:
    """What torch's variable-length attention says of itself, which runs on GPUs only."""
    assert window_size == (-1, 0)
    assert enable_gqa == (query.shape[1] != keys.shape[1])
    parts, tops = [], []
    pairs = zip(itertools.pairwise(row_starts.tolist()), itertools.pairwise(key_starts.tolist()), strict=True)
    for (first, last), (key_first, key_last) in pairs:
        rows, total = last - first, key_last - key_first
        tops.append((rows, total))
        keys_S = torch.arange(total, device=query.device)
        seen = keys_S[None, :] <= keys_S[total - rows :, None]
        own, k, v = (
            t.transpose(0, 1)[None] for t in (query[first:last], *(t[key_first:key_last] for t in (keys, values)))
        )
        part = F.scaled_dot_product_attention(own, k, v, seen, scale=scale, enable_gqa=enable_gqa)
        parts.append(part[0].transpose(0, 1))
    assert (longest_row, longest_total) == tuple(max(column) for column in zip(*tops, strict=True))
    return torch.cat(parts)


@pytest.mark.parametrize("arch", architectures())
def test_logits_are_the_same_in_one_call_for_all(arch: str, tiny: MakeTiny, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr(ragged, "can_attend", lambda _query: True)
    monkeypatch.setattr(ragged, "varlen_attn", lambda *a, **k: calls.append(len(a[3]) - 1) or by_the_book(*a, **k))
    with in_process_router(tiny(arch), num_groups=1) as router:
        trunk = router._trunk
        trunk._layers, trunk.together = Layers(), True
        trunk.store = KvStore(400, 4)
        free = random.sample(range(400), 400)
        blocks = [[free.pop() for _ in range(20)] for _ in range(7)]
        ids = [[random.randrange(512) for _ in range(80)] for _ in range(7)]
        step = StepContext(1)
        trunk.forward([Chunk(ids[0][:9], 0, blocks[0])], step)
        trunk.forward([Chunk(ids[0][9:10], 9, blocks[0])], step)
        ends = [random.randint(40, 60) for _ in range(7)]
        calls.clear()
        # Prompts that begin, one that goes on, and some that decode, in one step.
        begun = [Chunk(row[:end], 0, own) for row, end, own in zip(ids[:4], ends, blocks, strict=False)]
        trunk.forward(begun, step)
        mixed = [Chunk(ids[0][ends[0] : ends[0] + 1], ends[0], blocks[0]), Chunk(ids[4][:7], 0, blocks[4])]
        mixed += [Chunk(ids[1][ends[1] : ends[1] + 11], ends[1], blocks[1])]
        mixed += [Chunk(ids[2][ends[2] : ends[2] + 1], ends[2], blocks[2])]
        at_once = trunk.forward(mixed, step)
        assert set(calls) <= {4}, "all sequences of a step"
        assert bool(calls) == (arch in IN_ONE_CALL)
        trunk.together = False
        one_by_one = trunk.forward(mixed, step)
        assert float((at_once - one_by_one).abs().max()) < 1e-5 * float(one_by_one.std())


def single(row: int, total: int) -> Single:
    return Single(row, total, 0, list(range(1000)))


def test_bundles_hold_like_lengths_in_the_order_of_rows_and_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(together, "MAX_POSITIONS", 1000)
    monkeypatch.setattr(together, "MAX_PADDING", 50)
    singles = [single(row, random.choice([5, 6, 7, 90, 95, 800, 3000])) for row in range(60)]
    bundles = bundles_of(singles, 16, CPU)
    rows = [bundle.rows_B.tolist() for bundle in bundles]
    assert sorted(row for part in rows for row in part) == list(range(60))
    for bundle, part in zip(bundles, rows, strict=True):
        totals = bundle.totals_B.tolist()
        assert part == sorted(part)
        assert totals == [singles[row].total for row in part]
        assert len(part) == 1 or len(part) * max(totals) <= 1000
        assert len(part) * max(totals) - sum(totals) <= 50


def test_what_pads_a_history_is_its_own_beginning() -> None:
    (bundle,) = bundles_of([Single(0, 3, 0, [5]), Single(1, 6, 3, [2, 7])], 4, CPU)
    in_store = bundle.at(in_store=True).tolist()
    assert in_store == [[20, 21, 22, 20, 20, 20, 20, 20], [8, 9, 10, 11, 28, 29, 8, 8]]
    assert bundle.at(in_store=False).tolist() == [[0, 1, 2, 0, 0, 0, 0, 0], [3, 4, 5, 6, 7, 8, 3, 3]]

    def window(_batch: object, _head: object, row: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return (key <= row) & (key > row - 2)

    seen = bundle.allowed(window)[:, 0, 0].int().tolist()
    assert seen == [[0, 1, 1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1, 0, 0]]
