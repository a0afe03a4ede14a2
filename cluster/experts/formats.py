"""How a layer's experts lie in memory, and how rows go through them.

Dense experts are the checkpoint's values in plain tensors, which all devices understand. Quantised formats keep fewer
bytes and other values.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F

from cluster.kernels.experts import GatedExperts
from cluster.kernels.linear import KernelTable
from cluster.kernels.tiles import can_tile, tiled_product

Product = Callable[[torch.Tensor, int, int], torch.Tensor]
"""(rows, 0 for the up-projection or 1 for the down-projection, slot) -> rows, without bias."""
Breathe = Callable[[], None]
"""Called between two pieces of work of a thread that others should hardly notice; it may wait."""
CALL_ROWS = 3.0
"""An expert costs what so many rows cost, and its rows: its weights are read."""


def no_pause() -> None:
    """Nobody else is to be spared."""


class Source(NamedTuple):
    """Where an expert of a new set of slots comes from: a slot of the old set, or a place in fresh tensors."""

    old: bool
    place: int


class LayerExperts(Protocol):
    """The experts of one layer in one group, by slot (the order in which they were loaded)."""

    num_bytes: int

    def with_slots(
        self, fresh: dict[str, torch.Tensor], sources: Sequence[Source], breathe: Breathe = no_pause
    ) -> LayerExperts:
        """The experts of another set of slots: each from a slot of these, or from the tensors ``fresh``. ``breathe`` is
        called after each piece of the work."""
        ...

    def at_once(self, num_tokens: int) -> GatedExperts | None:
        """What computes whole calls of so many rows, from pairs to sums; None where `run` has to."""
        ...

    def order(self, counts_S: Any) -> Any:
        """Slots that have rows, in the order in which `run` wants them. ``counts_S``: rows of each slot."""
        ...

    def run(self, rows_PH: torch.Tensor, slots: Sequence[int], counts: Sequence[int]) -> torch.Tensor:
        """[P, H]: the first ``counts[0]`` rows through expert ``slots[0]``, and so on."""
        ...

    def shared(self, counts: Sequence[int]) -> int:
        """So many of the first experts, in this order, are best run together by all threads of the caller; the others
        are split among threads."""
        ...


class DenseExperts:
    """Weights as in the checkpoint, in the served dtype.

    ``tensors`` are the parameters of transformers' experts module for these experts, first dimension S. On CPUs experts
    with so few rows as ``table`` says go through tiles (`cluster.kernels.tiles`), all at once and with all threads,
    those with SiLU gates without coming back to Python for each product (`at_once`); everything else through torch's
    grouped products.
    """

    def __init__(self, module: Any, tensors: dict[str, torch.Tensor], table: KernelTable | None) -> None:
        self._module, self._tensors, self._table = module, tensors, table
        up = "gate_up_proj" if module.has_gate else "up_proj"
        self._up, self._down = tensors[up], tensors["down_proj"]
        self._up_bias, self._down_bias = tensors.get(f"{up}_bias"), tensors.get("down_proj_bias")
        self.num_bytes = sum(t.nbytes for t in (self._up, self._down, self._up_bias, self._down_bias) if t is not None)
        self._grouped = self._can_group()
        self._few = 0
        """Experts with at most so many rows go through tiles."""
        if table is not None and not module.is_transposed and can_tile(self._up) and can_tile(self._down):
            self._few = table.tiled_up_to
        biased = self._up_bias is not None or self._down_bias is not None
        self._gated = GatedExperts.of(module, self._up, self._down) if self._few and not biased else None

    def with_slots(
        self, fresh: dict[str, torch.Tensor], sources: Sequence[Source], breathe: Breathe = no_pause
    ) -> DenseExperts:
        """See `LayerExperts`."""
        tensors = {name: _gathered(now, fresh[name], sources, breathe) for name, now in self._tensors.items()}
        return DenseExperts(self._module, tensors, self._table)

    def _plain(self, weight: torch.Tensor) -> torch.Tensor:
        """[outputs, inputs], however the checkpoint lays it out."""
        return weight.t() if self._module.is_transposed else weight

    def _can_group(self) -> bool:
        """Grouped products want certain dtypes and alignments; asking is the only way to know."""
        if not len(self._up):
            return False
        try:
            row = torch.zeros((1, self._up.shape[1 if self._module.is_transposed else 2]))
            self._product(row.to(self._up), self._up, self._ends([1] + [0] * (len(self._up) - 1)))
        except (RuntimeError, TypeError):
            return False
        return True

    def _ends(self, counts_S: Any) -> torch.Tensor:
        return torch.from_numpy(np.cumsum(counts_S, dtype=np.int32)).to(self._up.device)

    def _product(self, x_PK: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        return F.grouped_mm(x_PK, weight if self._module.is_transposed else weight.transpose(1, 2), offs=offsets)

    def order(self, counts_S: Any) -> Any:
        """See `LayerExperts`: those with few rows first."""
        slots = np.flatnonzero(counts_S)
        many = counts_S[slots] > self._few
        return np.concatenate((slots[~many], slots[many])) if many.any() else slots

    def at_once(self, num_tokens: int) -> GatedExperts | None:
        """See `LayerExperts`."""
        return self._gated if num_tokens <= self._few else None

    def shared(self, counts: Sequence[int]) -> int:
        """See `LayerExperts`: those that go through tiles."""
        return len(counts) if max(counts) <= self._few else sum(count <= self._few for count in counts)

    def run(self, rows_PH: torch.Tensor, slots: Sequence[int], counts: Sequence[int]) -> torch.Tensor:
        """See `LayerExperts`."""
        few = self.shared(counts)
        split = sum(counts[:few])
        parts = []
        if few:
            parts.append(self._run_tiled(rows_PH[:split], slots[:few], counts[:few]))
        if few < len(slots):
            route = self._run_grouped if self._grouped else self._run_each
            parts.append(route(rows_PH[split:], slots[few:], counts[few:]))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _run_tiled(self, x_PH: torch.Tensor, slots: Sequence[int], counts: Sequence[int]) -> torch.Tensor:
        def product(x_PK: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
            output = tiled_product(x_PK, weight, slots, counts)
            return output if bias is None else output + bias[np.repeat(slots, counts)]

        hidden = product(x_PH, self._up, self._up_bias)
        return product(_gated(self._module, hidden), self._down, self._down_bias)

    def _run_grouped(self, x_PH: torch.Tensor, slots: Sequence[int], counts: Sequence[int]) -> torch.Tensor:
        first, last = slots[0], slots[-1] + 1  # ascending
        counts_S = np.zeros(last - first, np.int32)
        counts_S[np.asarray(slots) - first] = counts
        slot_P = None
        if self._up_bias is not None or self._down_bias is not None:
            slot_P = torch.from_numpy(np.repeat(slots, counts)).to(x_PH.device)
        ends_S = self._ends(counts_S)
        hidden = self._product(x_PH, self._up[first:last], ends_S)
        if self._up_bias is not None:
            hidden = hidden + self._up_bias[slot_P]
        output = self._product(_gated(self._module, hidden), self._down[first:last], ends_S)
        return output if self._down_bias is None else output + self._down_bias[slot_P]

    def _run_each(self, x_PH: torch.Tensor, slots: Sequence[int], counts: Sequence[int]) -> torch.Tensor:
        weights = (self._up, self._down)
        biases = (self._up_bias, self._down_bias)
        product: Product = lambda x, part, slot: F.linear(x, self._plain(weights[part][slot]))  # noqa: E731
        return _each(self._module, x_PH, slots, counts, product, biases)


class QuantisedExperts:
    """Weights of fewer bits in FBGEMM's layouts, on the CPU; everything else stays fp32.

    int8: weights rounded to 8 bits with one fp32 scale an output channel (the largest magnitude becomes 127). The
    kernel rounds the activations of a call too, to 7 bits of their range, so that sums in 16 bits cannot overflow.
    bf16: weights rounded to bf16 and held as fp16, which keeps their digits; for the range see `fits_half`.
    """

    def __init__(self, module: Any, tensors: dict[str, torch.Tensor], kind: str) -> None:
        self._module, self._kind = module, kind
        up = "gate_up_proj" if module.has_gate else "up_proj"
        ups, downs = tensors[up], tensors["down_proj"]
        self._up_bias, self._down_bias = tensors.get(f"{up}_bias"), tensors.get("down_proj_bias")
        make = _int8 if kind == "int8" else _half
        self._weights = [
            (make(self._plain(first)), make(self._plain(second))) for first, second in zip(ups, downs, strict=True)
        ]
        per_weight = 1 if kind == "int8" else 2
        self.num_bytes = per_weight * (ups.numel() + downs.numel())
        if kind == "int8":  # scale, zero point and column sum of each output
            outputs = [weights.shape[2 if module.is_transposed else 1] for weights in (ups, downs)]
            self.num_bytes += 12 * len(ups) * sum(outputs) if len(ups) else 0
        self.num_bytes += sum(t.nbytes for t in (self._up_bias, self._down_bias) if t is not None)

    def with_slots(
        self, fresh: dict[str, torch.Tensor], sources: Sequence[Source], breathe: Breathe = no_pause
    ) -> QuantisedExperts:
        """See `LayerExperts`; what is quantised stays so."""
        other = QuantisedExperts(self._module, fresh, self._kind)
        merged = copy.copy(other)
        merged._weights = [(self if source.old else other)._weights[source.place] for source in sources]
        for name in ("_up_bias", "_down_bias"):
            if getattr(self, name) is not None:
                setattr(merged, name, _gathered(getattr(self, name), getattr(other, name), sources, breathe))
        each = self.num_bytes // len(self._weights) if self._weights else 0
        merged.num_bytes = other.num_bytes + each * sum(source.old for source in sources)
        return merged

    def _plain(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.t().contiguous() if self._module.is_transposed else weight

    def order(self, counts_S: Any) -> Any:
        """See `LayerExperts`."""
        return np.flatnonzero(counts_S)

    def at_once(self, num_tokens: int) -> GatedExperts | None:
        """See `LayerExperts`."""
        return None

    def shared(self, counts: Sequence[int]) -> int:
        """See `LayerExperts`: none, a product of few rows gains little from a second thread."""
        return 0

    def run(self, rows_PH: torch.Tensor, slots: Sequence[int], counts: Sequence[int]) -> torch.Tensor:
        """See `LayerExperts`."""
        biases = (self._up_bias, self._down_bias)
        return _each(self._module, rows_PH, slots, counts, self._product, biases)

    def _product(self, x: torch.Tensor, part: int, slot: int) -> torch.Tensor:
        x, weight = x.contiguous(), self._weights[slot][part]
        if self._kind == "int8":
            result: torch.Tensor = torch.ops.quantized.linear_dynamic(x, weight, True)
        else:
            result = torch.ops.quantized.linear_dynamic_fp16(x, weight)
        return result


def _gathered(now: torch.Tensor, fresh: torch.Tensor, sources: Sequence[Source], breathe: Breathe) -> torch.Tensor:
    """The slots of ``sources``, one after the other."""
    found = torch.empty((len(sources), *now.shape[1:]), dtype=now.dtype, device=now.device)
    for slot, source in enumerate(sources):
        found[slot].copy_((now if source.old else fresh)[source.place])
        breathe()
    return found


def fits_half(tensors: dict[str, torch.Tensor]) -> bool:
    """Every weight is within the range of fp16."""
    return all(float(t.abs().max()) < torch.finfo(torch.float16).max for t in tensors.values() if t.numel())


def _int8(weight_NK: torch.Tensor) -> Any:
    weight_NK = weight_NK.float()
    scale_N = (weight_NK.abs().amax(1) / 127).clamp_min(torch.finfo(torch.float32).tiny)
    rounded = (weight_NK / scale_N[:, None]).round_().clamp_(-127, 127).to(torch.int8)
    zeros = torch.zeros(len(scale_N), dtype=torch.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch means to move these tensors elsewhere some day
        whole = torch._make_per_channel_quantized_tensor(rounded, scale_N.double(), zeros, 0)
        return torch.ops.quantized.linear_prepack(whole, None)


def _half(weight_NK: torch.Tensor) -> Any:
    return torch.ops.quantized.linear_prepack_fp16(weight_NK.bfloat16().float(), None)


def _each(
    module: Any,
    x_PH: torch.Tensor,
    slots: Sequence[int],
    counts: Sequence[int],
    product: Product,
    biases: tuple[torch.Tensor | None, torch.Tensor | None],
) -> torch.Tensor:
    """One product an expert; the activation once for all."""
    counts = list(counts)

    def layer(rows: torch.Tensor, part: int) -> torch.Tensor:
        bias = biases[part]
        outputs = [product(x, part, slot) for x, slot in zip(rows.split(counts), slots, strict=True)]
        if bias is not None:
            outputs = [output + bias[slot] for output, slot in zip(outputs, slots, strict=True)]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    return layer(_gated(module, layer(x_PH, 0)), 1)


def _gated(module: Any, hidden: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = module._apply_gate(hidden) if module.has_gate else module.act_fn(hidden)
    return result
