"""The experts that a group holds, by MoE layer, and what a layer call computes with them.

Only routed experts are here; gates and shared experts belong to the trunk. The activation and the gating of each
architecture are transformers' own (``act_fn``, ``_apply_gate`` of its experts module), or compiled where that was found
to be the same (`cluster.kernels.experts`); how weights lie in memory is `cluster.experts.formats`.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from cluster.core import GroupId
from cluster.errors import ConfigError, InternalError, InvalidArgument, MissingExperts
from cluster.experts.compute import Compute, stored_dtype
from cluster.experts.crew import Crew
from cluster.experts.dense import DenseExperts
from cluster.experts.formats import CALL_ROWS, Breathe, LayerExperts, Source, no_pause
from cluster.experts.loads import LoadNotes
from cluster.experts.reduced import reduced_experts
from cluster.experts.store import ExpertStore, Fill
from cluster.experts.tiers import HostTier
from cluster.kernels.experts import Scratch
from cluster.kernels.served import ServedLayer, ServedLayers
from cluster.telemetry.memory import give_back_at_once
from cluster.transport.base import LayerRows
from cluster.weights.dtypes import DTYPE_NAMES, settle
from cluster.weights.mapping import WeightMap
from cluster.weights.reader import ExpertReader, Target
from cluster.weights.skeleton import MoeLayer

MAX_PIECE_BYTES = 4 * 1024**2
"""Where experts have a budget, about so many bytes of rows go through them at a time: large prefills would otherwise
take as much memory as the experts."""
MIXED_PAIRS = 256
"""Rows times pairs of a call up to which a dense product adds the experts' answers. Measured on two cores, bench-700m,
nine pairs in turns: a decode step took 0.91 of what it takes with an indexed sum at batch 1 (4), 0.98 at 8 (256), and
1.04 at 16 (1,024)."""
_LEAVE_S = 30.0
MAX_SERVED_TOKENS = 512
"""Of a call that is computed where it is read; rows times pairs are bounded more narrowly."""
LOADING_THREADS = 4
"""Where threads are not counted out, as beside a GPU."""


@dataclass(frozen=True, slots=True)
class _LayerBank:
    """One layer's experts: ``slot_of_E[e]`` is the slot of logical expert ``e``, or -1; in a store, where slots change
    hands, any other number only says that the group holds it."""

    slot_of_E: Any
    experts: LayerExperts
    num_slots: int


class ExpertBank:
    """All experts of one group by MoE layer, resident in memory or, where the budget does not hold them, in a store.
    Used by one thread at a time.

    ``holdings[layer]`` are the sorted logical experts of that layer.
    """

    def __init__(
        self,
        group: GroupId,
        layers: Sequence[_LayerBank],
        how: Compute,
        moe_layers: Sequence[MoeLayer],
        reader: ExpertReader,
        store: ExpertStore | None = None,
        host_tier: HostTier | None = None,
    ) -> None:
        self.group, self._layers, self.how, self.store, self._reader = group, list(layers), how, store, reader
        self._moe_layers, self._host_tier = moe_layers, host_tier
        self._leaving: list[tuple[float, int]] = []
        """When layers that experts left may be looked through in host memory."""
        self.dtype, self.device = how.dtype, how.device
        self._scratch = Scratch()
        self._crew = Crew(how.threads if how.device.type == "cpu" else 1)
        self._served: ServedLayers | None = None
        self._change: Callable[[Callable[[], None]], None] | None = None

    def served(self) -> ServedLayers | None:
        """The layers, for who computes calls of few rows without `compute`; None where that is not the same, as with
        experts that may have to be loaded. `change_with` is to be called before `hold`."""
        if self.store is None and self._served is None:
            self._served = ServedLayers([self._served_layer(bank) for bank in self._layers])
        return self._served

    def change_with(self, between_calls: Callable[[Callable[[], None]], None]) -> None:
        """Layers that are served are changed by ``between_calls``, which runs what it is given while none is."""
        self._change = between_calls

    @staticmethod
    def _served_layer(bank: _LayerBank) -> ServedLayer | None:
        experts = bank.experts.at_once(1)
        if experts is None:
            return None
        tokens = 1
        while tokens < MAX_SERVED_TOKENS and bank.experts.at_once(2 * tokens) is experts:
            tokens *= 2
        return experts.served(bank.slot_of_E, tokens)

    def _replace(self, layer: int, new: _LayerBank) -> None:
        def change() -> None:
            self._layers[layer] = new  # a call that has begun finishes with the old ones
            if self._served is not None:
                self._served.put(layer, self._served_layer(new))

        change() if self._served is None or self._change is None else self._change(change)

    @property
    def holdings(self) -> tuple[tuple[int, ...], ...]:
        """By MoE layer, the sorted logical experts that calls may name now."""
        return tuple(tuple(np.flatnonzero(layer.slot_of_E >= 0).tolist()) for layer in self._layers)

    @classmethod
    def load(
        cls,
        group: GroupId,
        weights: WeightMap,
        holdings: Sequence[Sequence[int]],
        how: Compute,
        notes: LoadNotes | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> ExpertBank:
        """Reads the slices of the checkpoint that hold ``holdings`` (per MoE layer, sorted logical experts), or
        nothing yet where they go to a store, which tells ``notes`` what calls wait for.

        ``progress(done, total)`` is called after each layer.

        Raises:
            ConfigError: the experts cannot have this dtype here.
        """
        banks = []
        moe_layers = weights.skeleton.moe_layers
        sizes = [weights.expert_bytes(layer, how.dtype) for layer in moe_layers]
        needed = sum(size * len(experts) for size, experts in zip(sizes, holdings, strict=True))
        if how.memory_bytes and needed > how.memory_bytes:
            return _stored(group, weights, holdings, how, notes or LoadNotes())
        reader = ExpertReader(weights, stored_dtype(how))
        for layer, experts in zip(moe_layers, holdings, strict=True):
            banks.append(_load_layer(reader, layer, list(experts), how))
            if progress is not None:
                progress(len(banks), len(moe_layers))
        return cls(group, banks, how, moe_layers, reader)

    @property
    def num_bytes(self) -> int:
        """Bytes of all weights in memory."""
        return self.store.num_bytes if self.store is not None else sum(item.experts.num_bytes for item in self._layers)

    def reads_direct(self) -> bool:
        """Experts that are not in memory are read past the page cache."""
        return self._reader.is_direct

    @torch.inference_mode()
    def hold(self, layer: int, experts: Sequence[int], breathe: Breathe = no_pause) -> int:
        """From now on the layer holds exactly these: new ones are read, and run once, before a call may name them.
        For one thread at a time, another than the one that computes; bytes that were read. Does nothing where they are
        held already. ``breathe`` is called after each piece of the work.

        Raises:
            InvalidArgument: layer or experts do not exist.
            ConfigError: they exceed the budget of a group that has no store to load them on demand.
        """
        if not 0 <= layer < len(self._layers):
            raise InvalidArgument("layer", layer, f"must be from 0 to {len(self._layers) - 1}")
        old, wanted = self._layers[layer], sorted(set(experts))
        if wanted and not 0 <= wanted[0] <= wanted[-1] < len(old.slot_of_E):
            raise InvalidArgument("experts", wanted[-1], f"must be from 0 to {len(old.slot_of_E) - 1}")
        added = [expert for expert in wanted if old.slot_of_E[expert] < 0]
        if not added and len(wanted) == int((old.slot_of_E >= 0).sum()):
            return 0
        moe_layer = self._moe_layers[layer]
        each: int = sum(math.prod(p.shape[1:]) for p in moe_layer.module.parameters()) * self.how.dtype.itemsize
        slot_of_E = np.full(len(old.slot_of_E), -1, np.int64)
        if self.store is not None:
            slot_of_E[wanted] = 0
            self._drop_from_host()
            if self._host_tier is not None:  # a call under way may still name those that go
                before = np.flatnonzero(old.slot_of_E >= 0).tolist()
                self._host_tier.hold(layer, sorted({*before, *wanted}))
                self._leaving.append((time.monotonic() + _LEAVE_S, layer))
            self.store.hold(layer, wanted, added)
            self._layers[layer] = _LayerBank(slot_of_E, old.experts, old.num_slots)
            return each * len(added)
        kept = int((old.slot_of_E >= 0).sum())
        if self.how.memory_bytes and self.num_bytes + each * (len(wanted) - kept) > self.how.memory_bytes:
            raise ConfigError(
                f"expert_memory: {len(wanted)} experts in MoE layer {layer} would exceed the {self.how.memory_bytes} "
                f"bytes of group {self.group}, which was started with all of its experts in memory; serve with more"
            )
        slot_of_E[wanted] = np.arange(len(wanted))
        fresh = {
            key: torch.empty((len(added), *p.shape[1:]), dtype=stored_dtype(self.how))
            for key, p in moe_layer.module.named_parameters()
        }
        for number, expert in enumerate(added):
            self._reader.fill(moe_layer, expert, Target({key: tensor[number] for key, tensor in fresh.items()}))
            breathe()
        fresh = {key: tensor.to(self.device) for key, tensor in fresh.items()}
        place = {expert: number for number, expert in enumerate(added)}
        sources = [
            Source(False, place[expert]) if expert in place else Source(True, int(old.slot_of_E[expert]))
            for expert in wanted
        ]
        new = _LayerBank(slot_of_E, old.experts.with_slots(fresh, sources, breathe), max(1, len(wanted)))
        slots = [int(slot_of_E[expert]) for expert in added]
        if slots:
            rows_PH = torch.randn(len(slots), _hidden_size(moe_layer)).to(self.device, self.dtype)
            for row, slot in enumerate(slots):
                new.experts.run(rows_PH[row : row + 1], [slot], [1])
                breathe()
        self._replace(layer, new)
        return each * len(added)

    @torch.inference_mode()
    def compute(self, layer: int, rows: LayerRows) -> torch.Tensor:
        """Per row of ``rows.hidden_TH`` the sum over its pairs of gate weight times expert output, fp32 [T, H],
        on the bank's device.

        Experts are run grouped: each one once, over all its rows.

        Raises:
            MissingExperts: a pair names an expert that this group does not hold; nothing was computed.
            InvalidArgument: the layer, the dtype, or a row index does not exist.
        """
        if not 0 <= layer < len(self._layers):
            raise InvalidArgument("layer", layer, f"must be from 0 to {len(self._layers) - 1}")
        bank = self._layers[layer]
        hidden_TH, (rows_P, experts_P, weight_P) = rows
        if hidden_TH.dtype != self.dtype:
            raise InvalidArgument("dtype", DTYPE_NAMES.get(hidden_TH.dtype), f"must be {DTYPE_NAMES[self.dtype]}")
        at_once = bank.experts.at_once(len(hidden_TH)) if experts_P.size else None
        if self.store is None and at_once is not None:
            total_TH = at_once.run(hidden_TH, rows.pairs_3P, bank.slot_of_E, self._scratch)
            if total_TH is not None:
                return total_TH
        partial_TH = torch.zeros(hidden_TH.shape, dtype=torch.float32, device=self.device)
        if not experts_P.size:
            return partial_TH
        slot_P = self._slots(bank, layer, rows_P, experts_P, hidden_TH.shape[0])
        if self.store is None:
            self._add(bank, partial_TH, hidden_TH, rows_P, weight_P, slot_P)
            settle(self.device)
            return partial_TH
        waves = self.store.waves(layer, np.flatnonzero(np.bincount(experts_P)))
        for wave_A in waves:
            pairs = slice(None) if len(waves) == 1 else np.flatnonzero(np.isin(experts_P, wave_A))
            with self.store.pinned(layer, wave_A) as slot_E:
                slot_P = slot_E[experts_P[pairs]]
                for piece in _pieces(slot_P, MAX_PIECE_BYTES // hidden_TH[0].nbytes):
                    if at_once is not None:
                        named = rows.pairs_3P[:, pairs][:, piece]
                        if at_once.run(hidden_TH, named, slot_E, self._scratch, partial_TH) is None:
                            raise InternalError(f"layer {layer}: the store lost an expert that a call has pinned")
                        continue
                    self._add(bank, partial_TH, hidden_TH, rows_P[pairs][piece], weight_P[pairs][piece], slot_P[piece])
                settle(self.device)  # before others may have the slots
        return partial_TH

    def _drop_from_host(self) -> None:
        """Host memory of experts that left a while ago: no call names them any more."""
        now_s = time.monotonic()
        due = {layer for at_s, layer in self._leaving if at_s <= now_s}
        self._leaving = [(at_s, layer) for at_s, layer in self._leaving if at_s > now_s]
        for layer in due if self._host_tier is not None else ():
            assert self._host_tier is not None
            self._host_tier.hold(layer, self.holdings[layer])

    def _add(
        self,
        bank: _LayerBank,
        partial_TH: torch.Tensor,
        hidden_TH: torch.Tensor,
        rows_P: Any,
        weight_P: Any,
        slot_P: Any,
    ) -> None:
        """Adds what the experts in some slots make of their rows."""
        counts_S = np.bincount(slot_P, minlength=bank.num_slots)
        slots = bank.experts.order(counts_S)
        rank_S = np.zeros(bank.num_slots, np.int64)
        rank_S[slots] = np.arange(slots.size)
        order_P = np.argsort(rank_S[slot_P], kind="stable")
        row_P, weight_P = rows_P[order_P], weight_P.view(np.float32)[order_P]
        index_P = torch.from_numpy(row_P).to(self.device, torch.int64)
        sorted_PH = hidden_TH.to(self.device).index_select(0, index_P)
        output_PH = self._run(bank.experts, sorted_PH, slots, counts_S[slots]).float()
        small = partial_TH.is_cpu and len(partial_TH) * len(row_P) <= MIXED_PAIRS
        if small and math.isfinite(float(output_PH.sum())):
            # What is not finite must stay in its row, and 0 times infinity would not.
            mix_TP = np.zeros((len(partial_TH), len(row_P)), np.float32)
            mix_TP[row_P, np.arange(len(row_P))] = weight_P
            partial_TH.addmm_(torch.from_numpy(mix_TP), output_PH)
        else:
            gate_P = torch.from_numpy(weight_P).to(self.device)
            partial_TH.index_add_(0, index_P, output_PH * gate_P[:, None])

    def _slots(self, bank: _LayerBank, layer: int, rows_P: Any, experts_P: Any, num_tokens: int) -> Any:
        """The slot of each pair, after everything has been checked."""
        num_experts = len(bank.slot_of_E)
        if int(experts_P.min()) < 0 or int(experts_P.max()) >= num_experts:
            raise InvalidArgument("pair_expert", int(experts_P.max()), f"must be from 0 to {num_experts - 1}")
        if int(rows_P.min()) < 0 or int(rows_P.max()) >= num_tokens:
            raise InvalidArgument("pair_row", int(rows_P.max()), f"must be from 0 to {num_tokens - 1}")
        slot_P = bank.slot_of_E[experts_P]
        if int(slot_P.min()) < 0:
            raise MissingExperts(self.group, layer, sorted(set(experts_P[slot_P < 0].tolist())))
        return slot_P

    def _run(self, experts: LayerExperts, x_PH: torch.Tensor, slots_A: Any, counts_A: Any) -> torch.Tensor:
        """Through the experts, by as many threads as there are, each with about the same work."""
        slots, counts = slots_A.tolist(), counts_A.tolist()
        workers = min(self._crew.size, len(slots))
        shared = experts.shared(counts)
        if workers == 1 or shared == len(slots):
            return experts.run(x_PH, slots, counts)
        if shared:
            rows = sum(counts[:shared])
            together = experts.run(x_PH[:rows], slots[:shared], counts[:shared])
            return torch.cat((together, self._run(experts, x_PH[rows:], slots_A[shared:], counts_A[shared:])))
        cost = counts_A + CALL_ROWS
        middle = np.cumsum(cost) - cost / 2
        wanted = np.searchsorted(middle, cost.sum() * np.arange(1, workers) / workers).tolist()
        inner = [min(max(cut, i), len(slots) - workers + i) for i, cut in enumerate(wanted, 1)]  # one expert at least
        cuts = [0, *inner, len(slots)]
        rows_at = [0, *np.cumsum(counts).tolist()]
        parts: list[torch.Tensor | None] = [None] * workers

        def job(number: int) -> None:
            first, last = cuts[number], cuts[number + 1]
            piece = x_PH[rows_at[first] : rows_at[last]]
            parts[number] = experts.run(piece, slots[first:last], counts[first:last])

        self._crew.run([lambda number=number: job(number) for number in range(workers)])  # type: ignore[misc]
        return torch.cat([part for part in parts if part is not None])

    def close(self) -> None:
        """Ends the threads."""
        self._crew.close()
        if self.store is not None:
            self.store.close()


def _hidden_size(layer: MoeLayer) -> int:
    down = layer.module.down_proj.shape  # [E, H, I], or transposed
    return int(down[2] if layer.module.is_transposed else down[1])


def _pieces(slot_P: Any, most: int) -> list[Any]:
    """The pairs of a call, about ``most`` at a time and all of an expert together."""
    if len(slot_P) <= most:
        return [slice(None)]
    order_P = np.argsort(slot_P, kind="stable")
    starts = np.flatnonzero(np.diff(slot_P[order_P], prepend=-1))
    cuts = [0]
    for start, end in itertools.pairwise([*starts.tolist(), len(order_P)]):
        if end - cuts[-1] > most and start > cuts[-1]:
            cuts.append(start)
    return [order_P[first:last] for first, last in itertools.pairwise([*cuts, len(order_P)])]


def _stored(
    group: GroupId, weights: WeightMap, holdings: Sequence[Sequence[int]], how: Compute, notes: LoadNotes
) -> ExpertBank:
    """A bank whose experts are loaded when calls name them."""
    layers = weights.skeleton.moe_layers
    if not how.exact:
        raise ConfigError("expert_memory: a budget is for experts in the served dtype")
    shapes = [{key: tuple(p.shape[1:]) for key, p in layer.module.named_parameters()} for layer in layers]

    give_back_at_once()
    reader = ExpertReader(weights, how.dtype, how.direct)

    def from_disk(layer: int, expert: int, target: Target) -> None:
        reader.fill(layers[layer], expert, target)

    fill: Fill = from_disk
    tier = None
    if how.from_host or how.device.type != "cpu":
        tier = HostTier(reader, layers, holdings, how.device, LOADING_THREADS)
        fill = tier.fill
    most = max(layer.num_experts for layer in layers)
    store = ExpertStore(
        fill, shapes, holdings, how.memory_bytes, how.dtype, notes, how.predicts, device=how.device, num_experts=most
    )
    banks = []
    for layer, experts in zip(layers, holdings, strict=True):
        slot_of_E = np.full(layer.num_experts, -1, np.int64)
        slot_of_E[list(experts)] = 0
        pool = store.pool(layer.layer)
        dense = DenseExperts(layer.module, pool.tensors, how.table)
        banks.append(_LayerBank(slot_of_E, dense, max(1, pool.slots)))
    return ExpertBank(group, banks, how, layers, reader, store, tier)


def _load_layer(reader: ExpertReader, layer: MoeLayer, experts: list[int], how: Compute) -> _LayerBank:
    slot_of_E = np.full(layer.num_experts, -1, np.int64)
    slot_of_E[experts] = np.arange(len(experts))
    kind = "auto" if how.exact else how.expert_dtype
    threads = how.threads if how.device.type == "cpu" else LOADING_THREADS
    tensors = {k: v.to(how.device) for k, v in reader.read(layer, experts, max(1, threads)).items()}
    if kind == "auto":
        dense: LayerExperts = DenseExperts(layer.module, tensors, how.table)
        return _LayerBank(slot_of_E, dense, max(1, len(experts)))
    if how.device.type != "cpu" or how.dtype is not torch.float32 or kind == "fp32":
        raise ConfigError(
            f"expert_dtype: got {kind!r} with dtype {DTYPE_NAMES[how.dtype]} on {how.device.type}; other dtypes than "
            "the served one are for CPUs that serve fp32"
        )
    return _LayerBank(slot_of_E, reduced_experts(layer.module, tensors, kind), max(1, len(experts)))
