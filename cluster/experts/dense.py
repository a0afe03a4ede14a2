"""Experts in the served dtype, as the checkpoint lays them out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from cluster.experts.formats import Breathe, Product, Source, gated, gathered, no_pause, run_each, run_tiled
from cluster.kernels.experts import GatedExperts, Weights
from cluster.kernels.linear import KernelTable
from cluster.kernels.tiles import can_tile


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
        self._gated = None
        if self._few and not biased:
            self._gated = GatedExperts.of(module, Weights(self._up), Weights(self._down))

    def with_slots(
        self, fresh: dict[str, torch.Tensor], sources: Sequence[Source], breathe: Breathe = no_pause
    ) -> DenseExperts:
        """See `LayerExperts`."""
        tensors = {name: gathered(now, fresh[name], sources, breathe) for name, now in self._tensors.items()}
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
            weights, biases = (Weights(self._up), Weights(self._down)), (self._up_bias, self._down_bias)
            parts.append(run_tiled(self._module, rows_PH[:split], slots[:few], counts[:few], weights, biases))
        if few < len(slots):
            route = self._run_grouped if self._grouped else self._run_each
            parts.append(route(rows_PH[split:], slots[few:], counts[few:]))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

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
        output = self._product(gated(self._module, hidden), self._down[first:last], ends_S)
        return output if self._down_bias is None else output + self._down_bias[slot_P]

    def _run_each(self, x_PH: torch.Tensor, slots: Sequence[int], counts: Sequence[int]) -> torch.Tensor:
        weights = (self._up, self._down)
        biases = (self._up_bias, self._down_bias)
        product: Product = lambda x, part, slot: F.linear(x, self._plain(weights[part][slot]))  # noqa: E731
        return run_each(self._module, x_PH, slots, counts, product, biases)
