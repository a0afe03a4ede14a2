"""Experts of fewer bytes than the served dtype has, and other values: int8 or bf16 on CPUs that serve fp32."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from cluster.errors import ConfigError
from cluster.experts.formats import Breathe, LayerExperts, Source, gathered, no_pause, run_each, run_tiled
from cluster.kernels.experts import GatedExperts, Weights


def reduced_experts(module: Any, tensors: dict[str, torch.Tensor], kind: str) -> LayerExperts:
    """A layer's experts as int8 or bf16, from fp32 parameters of transformers' experts module (first dimension S).

    Raises:
        ConfigError: this machine's kernel cannot hold these weights.
    """
    rounded = RoundedExperts(module, tensors, kind)
    return rounded if rounded.can_tile else PackedExperts(module, tensors, kind)


class RoundedExperts:
    """Weights of fewer bits in plain tensors [S, N, K], on the CPU, for tiles; rows are fp32, and used as they are.

    int8: an output's weights are whole numbers up to 127 times the output's scale, which is fp32. bf16: rounded to it.
    """

    def __init__(self, module: Any, tensors: dict[str, torch.Tensor], kind: str) -> None:
        up = "gate_up_proj" if module.has_gate else "up_proj"
        parts = [_reduced(module, tensors[name], kind) for name in (up, "down_proj")]
        self._hold(module, kind, parts, [tensors.get(f"{name}_bias") for name in (up, "down_proj")])

    def _hold(
        self, module: Any, kind: str, parts: Sequence[Weights], biases: Sequence[torch.Tensor | None]
    ) -> RoundedExperts:
        self._module, self._kind, self._parts, self._biases = module, kind, list(parts), list(biases)
        kept = [*biases, *(tensor for part in parts for tensor in part)]
        self.num_bytes = sum(tensor.nbytes for tensor in kept if tensor is not None)
        biased = any(bias is not None for bias in biases)
        self._gated = None if biased else GatedExperts.of(module, *parts)
        return self

    @property
    def can_tile(self) -> bool:
        """Sizes fit tiles, and something can be compiled."""
        return all(part.can_tile for part in self._parts)

    def with_slots(
        self, fresh: dict[str, torch.Tensor], sources: Sequence[Source], breathe: Breathe = no_pause
    ) -> RoundedExperts:
        """See `LayerExperts`."""
        other = RoundedExperts(self._module, fresh, self._kind)

        def merged(now: torch.Tensor | None, new: torch.Tensor | None) -> torch.Tensor | None:
            return None if now is None or new is None else gathered(now, new, sources, breathe)

        parts = []
        for now, new in zip(self._parts, other._parts, strict=True):
            weight_SNK = gathered(now.weight_SNK, new.weight_SNK, sources, breathe)
            parts.append(Weights(weight_SNK, merged(now.scale_SN, new.scale_SN)))
        biases = [merged(now, new) for now, new in zip(self._biases, other._biases, strict=True)]
        return copy.copy(self)._hold(self._module, self._kind, parts, biases)

    def order(self, counts_S: Any) -> Any:
        """See `LayerExperts`."""
        return np.flatnonzero(counts_S)

    def at_once(self, num_tokens: int) -> GatedExperts | None:
        """See `LayerExperts`."""
        return self._gated

    def shared(self, counts: Sequence[int]) -> int:
        """See `LayerExperts`: all."""
        return len(counts)

    def run(self, rows_PH: torch.Tensor, slots: Sequence[int], counts: Sequence[int]) -> torch.Tensor:
        """See `LayerExperts`."""
        return run_tiled(self._module, rows_PH, slots, counts, self._parts, self._biases)


def _reduced(module: Any, weights: torch.Tensor, kind: str) -> Weights:
    """[S, N, K] from a checkpoint's; expert by expert, so that little is there twice."""
    inputs, outputs = weights.shape[1:] if module.is_transposed else weights.shape[:0:-1]
    dtype = torch.int8 if kind == "int8" else torch.bfloat16
    weight_SNK = torch.empty((len(weights), outputs, inputs), dtype=dtype)
    scale_SN = torch.empty((len(weights), outputs)) if kind == "int8" else None
    for slot, weight in enumerate(weights):
        if scale_SN is None:
            weight_SNK[slot] = _plain(module, weight)
        else:
            weight_SNK[slot], scale_SN[slot] = _scaled(_plain(module, weight))
    return Weights(weight_SNK, scale_SN)


class PackedExperts:
    """The same in FBGEMM's layouts, where nothing can be compiled or sizes do not fit tiles; fp32 otherwise.

    int8: the kernel rounds the activations of a call too, to 7 bits of their range, so that sums in 16 bits cannot
    overflow. bf16: weights are held as fp16, which keeps their digits; for the range see `fits_half`.
    """

    def __init__(self, module: Any, tensors: dict[str, torch.Tensor], kind: str) -> None:
        self._module, self._kind = module, kind
        if kind == "bf16" and not fits_half(tensors):
            raise ConfigError("expert_dtype: got 'bf16'; some weights exceed 65504, which its kernel here cannot hold")
        up = "gate_up_proj" if module.has_gate else "up_proj"
        ups, downs = tensors[up], tensors["down_proj"]
        self._up_bias, self._down_bias = tensors.get(f"{up}_bias"), tensors.get("down_proj_bias")
        make = _int8 if kind == "int8" else _half
        self._weights = [
            (make(_plain(module, first)), make(_plain(module, second)))
            for first, second in zip(ups, downs, strict=True)
        ]
        per_weight = 1 if kind == "int8" else 2
        self.num_bytes = per_weight * (ups.numel() + downs.numel())
        if kind == "int8":  # scale, zero point and column sum of each output
            outputs = [weights.shape[2 if module.is_transposed else 1] for weights in (ups, downs)]
            self.num_bytes += 12 * len(ups) * sum(outputs) if len(ups) else 0
        self.num_bytes += sum(t.nbytes for t in (self._up_bias, self._down_bias) if t is not None)

    def with_slots(
        self, fresh: dict[str, torch.Tensor], sources: Sequence[Source], breathe: Breathe = no_pause
    ) -> PackedExperts:
        """See `LayerExperts`; what is quantised stays so."""
        other = PackedExperts(self._module, fresh, self._kind)
        merged = copy.copy(other)
        merged._weights = [(self if source.old else other)._weights[source.place] for source in sources]
        for name in ("_up_bias", "_down_bias"):
            if getattr(self, name) is not None:
                setattr(merged, name, gathered(getattr(self, name), getattr(other, name), sources, breathe))
        each = self.num_bytes // len(self._weights) if self._weights else 0
        merged.num_bytes = other.num_bytes + each * sum(source.old for source in sources)
        return merged

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
        return run_each(self._module, rows_PH, slots, counts, self._product, biases)

    def _product(self, x: torch.Tensor, part: int, slot: int) -> torch.Tensor:
        x, weight = x.contiguous(), self._weights[slot][part]
        if self._kind == "int8":
            result: torch.Tensor = torch.ops.quantized.linear_dynamic(x, weight, True)
        else:
            result = torch.ops.quantized.linear_dynamic_fp16(x, weight)
        return result


def fits_half(tensors: dict[str, torch.Tensor]) -> bool:
    """Every weight is within the range of fp16."""
    return all(float(t.abs().max()) < torch.finfo(torch.float16).max for t in tensors.values() if t.numel())


def _plain(module: Any, weight: torch.Tensor) -> torch.Tensor:
    """[outputs, inputs], however the checkpoint lays it out."""
    return weight.t().contiguous() if module.is_transposed else weight


def _scaled(weight_NK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Whole numbers (int8 [N, K]), and each output's scale (fp32 [N])."""
    weight_NK = weight_NK.float()
    scale_N = (weight_NK.abs().amax(1) / 127).clamp_min(torch.finfo(torch.float32).tiny)
    return (weight_NK / scale_N[:, None]).round_().clamp_(-127, 127).to(torch.int8), scale_N


def _int8(weight_NK: torch.Tensor) -> Any:
    rounded, scale_N = _scaled(weight_NK)
    zeros = torch.zeros(len(scale_N), dtype=torch.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch means to move these tensors elsewhere some day
        whole = torch._make_per_channel_quantized_tensor(rounded, scale_N.double(), zeros, 0)
        return torch.ops.quantized.linear_prepack(whole, None)


def _half(weight_NK: torch.Tensor) -> Any:
    return torch.ops.quantized.linear_prepack_fp16(weight_NK.bfloat16().float(), None)
