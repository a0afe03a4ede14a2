"""Experts in less memory than they need: exact, bounded, and whoever waits is told for what."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from cluster.core import ExpertId, Order
from cluster.errors import ConfigError, InternalError, MissingExperts
from cluster.experts.bank import ExpertBank
from cluster.experts.compute import Compute
from cluster.experts.loads import LoadNotes
from cluster.experts.store import ExpertStore
from cluster.kernels.linear import ROWS, KernelTable
from cluster.transport.base import LayerRows
from cluster.weights.checkpoint import Checkpoint
from cluster.weights.mapping import WeightMap
from cluster.weights.reader import Target
from cluster.weights.skeleton import build_skeleton
from tests.conftest import MakeTiny
from tests.systems import config_for, in_process_router
from tests.unit.test_exactness import serve_ragged

SHAPE = {"up": (3, 4), "down": (4, 3)}
BYTES = 24 * 4


class Disk:
    """Reads experts whose weights tell who they are; may be slow, or fail."""

    def __init__(self) -> None:
        self.reads: list[ExpertId] = []
        self.may = threading.Event()
        self.may.set()
        self.broken: set[int] = set()

    def __call__(self, layer: int, expert: int, target: Target) -> None:
        assert self.may.wait(20)
        self.reads.append(ExpertId(layer, expert))
        if expert in self.broken:
            raise OSError("planted")
        for tensor in target.tensors.values():
            tensor.fill_(100.0 * layer + expert)


def store_of(
    disk: Disk, slots: int, layers: int = 2, experts: int = 8, predicts: bool = False
) -> tuple[ExpertStore, LoadNotes]:
    notes = LoadNotes()
    held = [list(range(experts))] * layers
    return ExpertStore(disk, [SHAPE] * layers, held, slots * BYTES, torch.float32, notes, predicts), notes


def order_of(layer: int, *experts: int) -> Order:
    return Order(1, layer, bytes(230 if expert in experts else 0 for expert in range(8)))


def eventually(what: Callable[[], bool]) -> None:
    limit_s = time.monotonic() + 10
    while not what():
        assert time.monotonic() < limit_s
        time.sleep(0.005)


def use(store: ExpertStore, layer: int, experts: list[int]) -> None:
    left = set(experts)
    for wave in store.waves(layer, np.array(experts)):
        with store.pinned(layer, wave) as slot_E:
            slots = slot_E[wave].tolist()
            assert len(set(slots)) == len(wave)
            for expert, slot in zip(wave.tolist(), slots, strict=True):
                left.discard(expert)
                for name in SHAPE:
                    assert torch.all(store.pool(layer).tensors[name][slot] == 100.0 * layer + expert)
    assert not left


def test_every_call_finds_its_experts_whatever_fits() -> None:
    disk = Disk()
    for slots in (2, 3, 5, 16):
        store, _ = store_of(disk, slots, predicts=slots == 5)
        for _ in range(200):
            if slots == 5:
                store.order(order_of(random.randrange(2), *random.sample(range(8), 3)))
            use(store, random.randrange(2), random.sample(range(8), random.randrange(1, 9)))
        assert store.num_resident() <= store.capacity() == slots
        assert store.num_bytes == slots * BYTES
        if slots == 16:
            assert store.stats.loads == 16
            assert store.stats.evictions == 0
        store.close()


def test_the_one_that_is_wanted_least_makes_room() -> None:
    disk = Disk()
    store, _ = store_of(disk, 3, layers=1)
    for expert in (0, 1, 2, 0, 0, 2, 3):
        use(store, 0, [expert])
    disk.reads.clear()
    use(store, 0, [0])
    use(store, 0, [2])
    assert disk.reads == []
    use(store, 0, [1])
    assert disk.reads == [ExpertId(0, 1)]
    store.close()


def test_what_is_in_use_stays_and_demand_goes_before_orders() -> None:
    disk = Disk()
    store, _ = store_of(disk, 2, predicts=True)
    (wave,) = store.waves(0, np.array([0, 1]))
    with store.pinned(0, wave):
        store.order(order_of(1, 5, 6))
        time.sleep(0.1)
        assert store.stats.evictions == 0
        disk.reads.clear()
        disk.may.clear()
    eventually(lambda: store.progress_age_s() > 0)  # the first order is being read now
    store.order(order_of(1, 5, 6, 7))
    done = threading.Thread(daemon=True, target=use, args=(store, 0, [3]))
    done.start()
    time.sleep(0.05)
    disk.may.set()
    done.join(10)
    assert disk.reads[1] == ExpertId(0, 3), "before what was ordered ahead"
    store.close()


def test_orders_are_loaded_ahead_and_counted_by_layer_when_they_hit_or_were_wasted() -> None:
    disk = Disk()
    store, notes = store_of(disk, 4, predicts=True)
    use(store, 0, [0, 1])
    store.order(order_of(1, 4, 5))
    eventually(lambda: store.num_resident() == 4)
    notes.reset()
    use(store, 1, [4])
    assert notes.seconds == 0
    assert store.layers[1].found == store.layers[1].hits == 1
    assert store.layers[1].stalls == 0
    assert store.stats.ahead == 2
    use(store, 0, [0, 1, 2, 3])
    assert store.layers[1].wasted_bytes == BYTES, "5 was never asked for"
    assert store.layers[0].stalls == 2
    store.close()


def test_what_was_ordered_and_is_not_there_yet_is_late() -> None:
    disk = Disk()
    store, notes = store_of(disk, 4, predicts=True)
    use(store, 0, [0])
    disk.may.clear()
    notes.reset()
    store.order(order_of(1, 4, 5))
    eventually(lambda: store.progress_age_s() > 0)
    done = threading.Thread(daemon=True, target=use, args=(store, 1, [4, 5, 6]))
    done.start()
    time.sleep(0.05)
    disk.may.set()
    done.join(10)
    assert store.layers[1].late == 2
    assert store.layers[1].stalls == 1
    assert notes.num_bytes == 3 * BYTES
    store.close()


def test_without_prediction_nothing_is_loaded_that_no_call_named() -> None:
    disk = Disk()
    store, _ = store_of(disk, 8)
    for _ in range(10):
        for layer in (0, 1):
            store.order(order_of(layer, 6, 7))
            use(store, layer, [0, 1])
    assert set(disk.reads) == {ExpertId(layer, expert) for layer in (0, 1) for expert in (0, 1)}
    assert store.stats.ahead == 0
    store.close()


def test_an_order_for_what_cannot_be_read_is_tried_once_and_fails_only_who_asks() -> None:
    disk = Disk()
    store, _ = store_of(disk, 4, predicts=True)
    disk.broken = {5}
    use(store, 0, [0])
    store.order(order_of(1, 5))
    eventually(lambda: ExpertId(1, 5) in disk.reads)
    time.sleep(0.1)
    assert disk.reads.count(ExpertId(1, 5)) == 1
    use(store, 1, [4])
    with pytest.raises(InternalError, match="expert 5 of MoE layer 1"):
        use(store, 1, [5])
    store.close()


def test_who_waits_is_told_for_which_expert_and_how_much() -> None:
    disk = Disk()
    store, notes = store_of(disk, 4)
    use(store, 0, [1])
    notes.reset()
    use(store, 0, [1, 6])
    assert notes.expert == 6
    assert notes.num_bytes == BYTES
    assert 0 < notes.seconds < 5
    assert store.layers[0].stalls == 2
    store.close()


def test_weights_that_cannot_be_read_fail_the_call_and_only_it() -> None:
    disk = Disk()
    store, _ = store_of(disk, 2)
    disk.broken = {3}
    with pytest.raises(InternalError, match="expert 3 of MoE layer 0"):
        use(store, 0, [3])
    use(store, 0, [2, 1])
    disk.broken = {3, 4}
    with pytest.raises(InternalError):
        use(store, 0, [3, 4])
    limit_s = time.monotonic() + 10
    while store.progress_age_s() and time.monotonic() < limit_s:
        time.sleep(0.01)
    disk.broken.clear()
    use(store, 0, [3, 4])
    store.close()


def test_a_budget_for_less_than_two_experts_is_refused_with_numbers() -> None:
    with pytest.raises(ConfigError, match=f"expert_memory.*{2 * BYTES}"):
        store_of(Disk(), 1)


TILES = KernelTable(dict.fromkeys(ROWS, (1.0, 0.5)))


@pytest.mark.parametrize("table", [None, TILES], ids=["torch", "tiles"])
@pytest.mark.parametrize(
    ("arch", "from_host", "direct"),
    [
        ("deepseek_v3", False, False),
        ("gpt_oss", False, False),
        ("mixtral", False, False),
        ("gpt_oss", True, False),
        ("mixtral", True, True),
        ("deepseek_v3", True, True),
    ],
)
def test_a_bank_in_a_store_computes_what_a_resident_one_does(
    arch: str,
    from_host: bool,
    direct: bool,
    table: KernelTable | None,
    tiny: MakeTiny,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checkpoint = Checkpoint(tiny(arch))
    weights = WeightMap(checkpoint, build_skeleton(checkpoint, torch.float32))
    layers = weights.skeleton.moe_layers
    held = [list(range(layer.num_experts)) for layer in layers]
    size = weights.expert_bytes(layers[0], torch.float32)
    device = torch.device("cpu")
    resident = ExpertBank.load(0, weights, held, Compute(torch.float32, device))
    how = Compute(torch.float32, device, table=table, memory_bytes=3 * size, from_host=from_host, direct=direct)
    stored = ExpertBank.load(0, weights, held, how)
    assert stored.store is not None
    assert stored.num_bytes <= 3 * size
    hidden_size = int(checkpoint.config.get_text_config(decoder=True).hidden_size)
    for _ in range(6):
        layer = random.randrange(len(layers))
        experts = np.random.randint(0, layers[layer].num_experts, 24)
        rows = LayerRows.of(torch.randn(6, hidden_size), np.repeat(np.arange(6), 4), experts, np.random.rand(24))
        assert torch.allclose(stored.compute(layer, rows), resident.compute(layer, rows), atol=1e-5)
    monkeypatch.setattr("cluster.experts.bank.MAX_PIECE_BYTES", 40 * hidden_size)  # ten rows at a time
    for _ in range(6):
        count = random.randrange(1, 70)
        experts = np.random.randint(0, layers[0].num_experts, count)
        rows = LayerRows.of(torch.randn(count, hidden_size), np.arange(count), experts, np.random.rand(count))
        assert torch.allclose(stored.compute(0, rows), resident.compute(0, rows), atol=1e-5)
    less = [list(range(1, layer.num_experts)) for layer in layers]
    partly = ExpertBank.load(0, weights, less, how)
    rows = LayerRows.of(torch.randn(1, hidden_size), [0], [0], [1.0])
    with pytest.raises(MissingExperts):
        partly.compute(0, rows)
    for bank in (resident, stored, partly):
        bank.close()


def test_a_router_over_groups_with_a_quarter_of_their_experts_gives_the_same_tokens(tiny: MakeTiny) -> None:
    path = tiny("qwen3_moe")
    prompts = [[random.randrange(3, 500) for _ in range(12)] for _ in range(3)]
    answers = []
    for memory in ("all", "100K"):
        with in_process_router(path, 2, expert_memory=memory) as router:
            answers.append(serve_ragged(router, prompts, 5)[0])
            stores = [info.store for info in router.fabric.membership.groups.values()]
            if memory != "all":
                assert all(store is not None and sum(store.stalls) > 0 for store in stores)
    assert answers[0] == answers[1]


@pytest.mark.parametrize(("text", "wanted"), [("all", 0), ("512M", 512 * 2**20), ("1.5G", 3 * 2**29), ("4096", 4096)])
def test_sizes_are_read(text: str, wanted: int, tmp_path: Path) -> None:
    assert config_for(tmp_path, expert_memory=text).memory_bytes() == wanted


@pytest.mark.parametrize("text", ["", "much", "-3", "0", "5X", "nan"])
def test_sizes_that_are_none_are_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expert_memory"):
        config_for(tmp_path, expert_memory=text)
