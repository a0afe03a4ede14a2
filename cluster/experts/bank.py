"""The expert weights that a group holds, and the feed-forward computation of its experts.

Only routed experts are here; gates and shared experts belong to the trunk. The activation and the gating of each
architecture are transformers' own (``act_fn``, ``_apply_gate`` of its experts module).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from cluster.core import GroupId
from cluster.errors import InvalidArgument, MissingExperts
from cluster.transport.base import LayerRows
from cluster.weights.dtypes import DTYPE_NAMES
from cluster.weights.mapping import WeightMap
from cluster.weights.skeleton import MoeLayer


@dataclass(frozen=True, slots=True)
class _LayerBank:
    """Weights of one layer's experts: ``slot_of[e]`` is the row of logical expert ``e``, or -1."""

    module: Any
    slot_of_E: torch.Tensor
    up: torch.Tensor
    up_bias: torch.Tensor | None
    down: torch.Tensor
    down_bias: torch.Tensor | None


class ExpertBank:
    """All experts of one group, resident in memory, by MoE layer.

    ``holdings[layer]`` are the sorted logical experts of that layer.
    """

    def __init__(self, group: GroupId, layers: Sequence[_LayerBank], dtype: torch.dtype, device: torch.device) -> None:
        self.group, self._layers, self.dtype, self.device = group, list(layers), dtype, device
        self.holdings = tuple(
            tuple(int(e) for e in torch.nonzero(layer.slot_of_E >= 0).flatten()) for layer in self._layers
        )

    @classmethod
    def load(
        cls,
        group: GroupId,
        weights: WeightMap,
        holdings: Sequence[Sequence[int]],
        dtype: torch.dtype,
        device: torch.device,
        progress: Callable[[int, int], None] | None = None,
    ) -> ExpertBank:
        """Reads the slices of the checkpoint that hold ``holdings`` (per MoE layer, sorted logical experts).

        ``progress(done, total)`` is called after each layer.
        """
        banks = []
        moe_layers = weights.skeleton.moe_layers
        for layer, experts in zip(moe_layers, holdings, strict=True):
            banks.append(_load_layer(weights, layer, list(experts), dtype, device))
            if progress is not None:
                progress(len(banks), len(moe_layers))
        return cls(group, banks, dtype, device)

    @property
    def num_bytes(self) -> int:
        """Bytes of all weights."""
        tensors = [t for b in self._layers for t in (b.up, b.up_bias, b.down, b.down_bias) if t is not None]
        return sum(t.numel() * t.element_size() for t in tensors)

    @torch.inference_mode()
    def compute(self, layer: int, rows: LayerRows) -> torch.Tensor:
        """Per row of ``rows.hidden_TH`` the sum over its pairs of gate weight times expert output, fp32 [T, H],
        on the bank's device.

        Experts are run grouped: each one once, over all its rows. Pairs are summed in order of expert id, so the
        result depends on the rows alone.

        Raises:
            MissingExperts: a pair names an expert that this group does not hold; nothing was computed.
            InvalidArgument: the layer, the dtype, or a row index does not exist.
        """
        if not 0 <= layer < len(self._layers):
            raise InvalidArgument("layer", layer, f"must be from 0 to {len(self._layers) - 1}")
        bank = self._layers[layer]
        hidden_TH = rows.hidden_TH
        if hidden_TH.dtype != self.dtype:
            raise InvalidArgument("dtype", DTYPE_NAMES.get(hidden_TH.dtype), f"must be {DTYPE_NAMES[self.dtype]}")
        num_tokens = hidden_TH.shape[0]
        experts_P, rows_P, weight_P = rows.pair_expert_P.long(), rows.pair_row_P.long(), rows.pair_weight_P
        partial_TH = torch.zeros(hidden_TH.shape, dtype=torch.float32, device=self.device)
        if experts_P.numel() == 0:
            return partial_TH
        num_experts = bank.slot_of_E.numel()
        if int(experts_P.min()) < 0 or int(experts_P.max()) >= num_experts:
            raise InvalidArgument("pair_expert", int(experts_P.max()), f"must be from 0 to {num_experts - 1}")
        if int(rows_P.min()) < 0 or int(rows_P.max()) >= num_tokens:
            raise InvalidArgument("pair_row", int(rows_P.max()), f"must be from 0 to {num_tokens - 1}")
        slot_P = bank.slot_of_E[experts_P]
        if int(slot_P.min()) < 0:
            raise MissingExperts(self.group, layer, sorted(set(experts_P[slot_P < 0].tolist())))
        order_P = torch.argsort(slot_P, stable=True)
        slots, counts = torch.unique_consecutive(slot_P[order_P], return_counts=True)
        rows_P, weight_P = rows_P[order_P].to(self.device), weight_P[order_P].to(self.device)
        hidden_TH = hidden_TH.to(self.device)
        start = 0
        for slot, count in zip(slots.tolist(), counts.tolist(), strict=True):
            index = rows_P[start : start + count]
            output = _expert_forward(bank, slot, hidden_TH[index])
            partial_TH.index_add_(0, index, output.float() * weight_P[start : start + count, None])
            start += count
        return partial_TH


def _load_layer(
    weights: WeightMap, layer: MoeLayer, experts: list[int], dtype: torch.dtype, device: torch.device
) -> _LayerBank:
    slot_of_E = torch.full((layer.num_experts,), -1, dtype=torch.int64)
    slot_of_E[torch.tensor(experts, dtype=torch.int64)] = torch.arange(len(experts))
    if experts:
        tensors = {k: v.to(device) for k, v in weights.read_experts(layer, experts, dtype).items()}
    else:
        tensors = {k: torch.empty((0, *p.shape[1:]), dtype=dtype) for k, p in layer.module.named_parameters()}
    up = "gate_up_proj" if layer.module.has_gate else "up_proj"
    return _LayerBank(
        layer.module,
        slot_of_E,
        tensors[up],
        tensors.get(f"{up}_bias"),
        tensors["down_proj"],
        tensors.get("down_proj_bias"),
    )


def _expert_forward(bank: _LayerBank, slot: int, x_TH: torch.Tensor) -> torch.Tensor:
    """One expert's feed-forward network on its rows, [T, H] in the served dtype."""
    module = bank.module
    hidden = _linear(x_TH, bank.up[slot], None if bank.up_bias is None else bank.up_bias[slot], module.is_transposed)
    hidden = module._apply_gate(hidden) if module.has_gate else module.act_fn(hidden)
    bias = None if bank.down_bias is None else bank.down_bias[slot]
    return _linear(hidden, bank.down[slot], bias, module.is_transposed)


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, transposed: bool) -> torch.Tensor:
    return F.linear(x, weight.t() if transposed else weight, bias)
