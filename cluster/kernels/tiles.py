"""Products of a few rows each with many weights as the checkpoint lays them out, in one call and by all threads.

Decode reads every weight once for one to some sixteen rows, so memory should set the pace. A library call an expert
costs more in calls than it reads in time, and a layout of its own doubles the memory. Here one compiled function goes
through all experts of a call, a tile of outputs and rows in registers at a time (`cluster.kernels.streams`); each
thread takes the next piece of work when it is done with one.

Tiling for registers: K. Goto and R. van de Geijn, Anatomy of High-Performance Matrix Multiplication, ACM TOMS 34(3),
2008, for the case where one side is a few rows and nothing needs to be copied for caches. Where there are many for a
weight, see `cluster.kernels.panels`.
"""

from __future__ import annotations

import array
import functools
import itertools
from collections.abc import Sequence

import torch

from cluster.kernels.registers import OUTPUTS, PANEL, PANELS
from cluster.kernels.team import alone, team

INPUTS = 16
"""Inputs of a weight must be a multiple of this, and outputs of those of a tile."""
PIECE = 48 if PANELS else 32
"""Outputs of one expert that a thread takes at a time: 192 or 128 KiB of weights with 1024 inputs."""
HEADER = 12
"""Numbers before the slots in what describes a call's work, the counter's address among them."""
DTYPES = (torch.float32, torch.bfloat16, torch.int8)
"""Of weights; rows and results are fp32."""
_COMPILED = "tiles_compiled"
FEW = 64 * 1024
"""Floats that one thread lays out: a second one takes longer to begin."""
_PAGE, _CLASHING = 4096, 4
"""Rows a multiple of so many bytes apart share the few places that a first-level cache has for their address: more of
them than this are copied to other distances first. Two Zen 4 cores, 1024 x 1024: 108 -> 116 GFLOP/s at 8 rows, 152 ->
167 at 16, 177 -> 199 at 64, 180 -> 203 at 1024."""


@functools.cache
def panel_rows() -> int:
    """On this machine so many rows of a weight of floats are best multiplied together, in another order of their
    numbers: see `cluster.kernels.panels`. 0: they are not."""
    return PANEL if PANELS and team(_COMPILED) is not None else 0


def can_tile(weight: torch.Tensor, dtype: torch.dtype = torch.float32) -> bool:
    """`tiled_product` takes this weight ([S, N, K] or one of them) when it has this dtype (float32, bfloat16 or int8),
    and this machine can run it."""
    fits = weight.is_cpu and weight.dtype is dtype and weight.is_contiguous()
    outputs, inputs = weight.shape[-2:]
    return fits and outputs % OUTPUTS == 0 and inputs % INPUTS == 0 and team(_COMPILED) is not None


def tiled_product(
    x_PK: torch.Tensor,
    weight_SNK: torch.Tensor,
    slots: Sequence[int],
    counts: Sequence[int],
    scale_SN: torch.Tensor | None = None,
) -> torch.Tensor:
    """[P, N], fp32: the first ``counts[0]`` rows times the transpose of weight ``slots[0]``, and so on, with as many
    threads as the calling one has. ``weight_SNK`` is one that `can_tile` has accepted; each output is multiplied by its
    ``scale_SN`` (fp32).

    Raises:
        ValueError: a slot does not exist, or rows or scales are not as many or as long as they must be.
    """
    num_slots, outputs, inputs = weight_SNK.shape
    if scale_SN is not None and not fits_scales(weight_SNK, scale_SN):
        raise ValueError(f"scales: got {tuple(scale_SN.shape)} of {scale_SN.dtype}; must be [{num_slots}, {outputs}]")
    ends = list(itertools.accumulate(counts))
    rows = ends[-1] if ends else 0
    if x_PK.shape != (rows, inputs) or x_PK.dtype is not torch.float32:
        raise ValueError(f"rows: got {tuple(x_PK.shape)} of {x_PK.dtype}; must be [{rows}, {inputs}] of float32")
    if rows and not (0 <= min(slots) <= max(slots) < num_slots and min(counts) >= 0):
        raise ValueError(f"slots: got {list(slots)} with {list(counts)} rows; must be below {num_slots}")
    kind = weight_SNK.itemsize, 0 if scale_SN is None else scale_SN.data_ptr()
    return _run(x_PK, weight_SNK.data_ptr(), outputs, inputs, slots, ends, kind)


def fits_scales(weight_SNK: torch.Tensor, scale_SN: torch.Tensor) -> bool:
    """One fp32 number for each output of each weight."""
    return scale_SN.shape == weight_SNK.shape[:2] and scale_SN.dtype is torch.float32 and scale_SN.is_contiguous()


class TiledWeight:
    """One weight [N, K], fp32, that `can_tile` has accepted."""

    def __init__(self, weight_NK: torch.Tensor) -> None:
        self._weight = weight_NK  # it stays where it is
        self._at, self._shape = weight_NK.data_ptr(), tuple(weight_NK.shape)

    def product(self, x_RK: torch.Tensor) -> torch.Tensor:
        """[R, N], fp32: rows times the transpose; R is not 0. See `tiled_product`."""
        outputs, inputs = self._shape
        if x_RK.shape[1] != inputs or x_RK.dtype is not torch.float32:
            raise ValueError(f"rows: got {tuple(x_RK.shape)} of {x_RK.dtype}; must be [R, {inputs}] of float32")
        return _run(x_RK, self._at, outputs, inputs, _FIRST, (x_RK.shape[0],))


class TiledWeights:
    """Several such weights with the same number of inputs."""

    def __init__(self, weights: Sequence[torch.Tensor]) -> None:
        self._weights = list(weights)  # they stay where they are
        (self._inputs,) = {weight.shape[1] for weight in weights}
        self._each = [(weight.data_ptr(), len(weight), -(-len(weight) // PIECE)) for weight in weights]
        self._pieces = sum(pieces for *_, pieces in self._each)

    def products(self, x_RK: torch.Tensor) -> list[torch.Tensor]:
        """The products of the same rows with each of them, in one call. See `TiledWeight.product`."""
        if x_RK.shape[1] != self._inputs or x_RK.dtype is not torch.float32:
            raise ValueError(f"rows: got {tuple(x_RK.shape)} of {x_RK.dtype}; must be [R, {self._inputs}] of float32")
        run = team(_COMPILED, "side_by_side")
        assert run is not None
        rows = x_RK.shape[0]
        x_RK, panels = _laid_out(x_RK, (rows,))
        results = [torch.empty((rows, outputs), dtype=torch.float32) for _, outputs, _ in self._each]
        work = [x_RK.data_ptr(), self._inputs, rows, 4 * x_RK.stride(0), self._pieces, panels, *[0] * (HEADER - 7)]
        for (at, outputs, pieces), result in zip(self._each, results, strict=True):
            work += (at, result.data_ptr(), outputs, pieces)
        run(work)
        return results


_FIRST = (0,)


def _laid_out(x_PK: torch.Tensor, ends: Sequence[int], size: int = 4) -> tuple[torch.Tensor, int]:
    """The same rows, those of a weight (of numbers of ``size`` bytes) up to each of ``ends``, where they do not clash;
    and 1 if in panels, as far as they fill some."""
    rows, inputs = x_PK.shape
    if x_PK.stride(1) != 1:
        x_PK = x_PK.contiguous()
    panel = panel_rows() if size == 4 else 0
    if panel and rows >= panel and any(end - begin >= panel for begin, end in itertools.pairwise((0, *ends))):
        lay_out = alone(_COMPILED, "lay_out") if x_PK.numel() <= FEW else team(_COMPILED, "lay_out")
        assert lay_out is not None
        found = torch.empty((rows, inputs + INPUTS), dtype=torch.float32)[:, :inputs]
        begins = array.array("q", (0, *ends))
        x_at, to_at, x_row, to_row = x_PK.data_ptr(), found.data_ptr(), 4 * x_PK.stride(0), 4 * found.stride(0)
        lay_out((x_at, x_row, 0, to_at, to_row, inputs, panel, len(ends), begins.buffer_info()[0], 1))
        return found, 1
    if rows > _CLASHING and 4 * inputs % _PAGE == 0:
        return torch.empty((rows, inputs + INPUTS), dtype=torch.float32)[:, :inputs].copy_(x_PK), 0
    return x_PK, 0


def _run(
    x_PK: torch.Tensor,
    weights_at: int,
    outputs: int,
    inputs: int,
    slots: Sequence[int],
    ends: Sequence[int],
    kind: tuple[int, int] = (4, 0),
) -> torch.Tensor:
    """``kind``: the bytes of a weight's number, and where scales are."""
    run = team(_COMPILED)
    assert run is not None
    x_PK, panels = _laid_out(x_PK, ends, kind[0])
    result = torch.empty((x_PK.shape[0], outputs), dtype=torch.float32)
    pieces = -(-outputs // PIECE)
    header = (x_PK.data_ptr(), weights_at, result.data_ptr(), inputs, outputs, len(slots), pieces, 4 * x_PK.stride(0))
    run((*header, *kind, panels, *slots, 0, *ends))
    return result
