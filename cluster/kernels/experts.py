"""One layer's experts with SiLU gates in four compiled steps: sort, gated product, product, sum. Rows of many pairs are
laid out before the products.

Between two products of a decoding step lies a handful of rows. What numpy and torch need to sort, gather, gate and add
them costs more in calls than the work takes, the more so as the weights that stream through the caches displace all
that those calls need. The gate is applied to each piece of the first product while it is in a cache.
"""

from __future__ import annotations

import ctypes
import threading
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from cluster.kernels.served import ServedLayer
from cluster.kernels.team import Work, address_of, kept_alone, kept_team, team, work_of
from cluster.kernels.tiles import DTYPES, HEADER, INPUTS, PIECE, can_tile, fits_scales, panel_rows

STATUS, NUM, SORTED = 0, 1, 2
"""Where a plan has its outcome, the number of slots that have rows, and the work of a product: its header, these slots,
and where the rows of each begin."""
BAD_EXPERT, BAD_ROW, MISSING = 1, 2, 3
UP, UP_SIZE, UP_SCALES, DOWN, DOWN_SIZE, DOWN_SCALES = range(6)
SLOT_OF, EXPERTS, SLOTS, INNER, ROW, MOST = range(6, 12)
SORT, GATED, PRODUCT, COMBINE = range(12, 16)
NUMBERS = 16
"""Numbers of a layer that is served (`cluster.kernels.served`): where its two weights are, bytes of a number of each,
where their scales are; the slots of experts, and how many experts and slots; inner size, and width of a row; rows of a
call at most; and where the four steps are."""
_COMPILED = "experts_compiled"
SMALL = 64 * 1024
"""Floats of all pairs' rows up to which one thread moves them: a second one takes longer to begin."""
_PER_PIECE = 32 * 1024
"""Floats that a thread moves at a time otherwise, if not a panel of rows."""
_KEPT_BYTES = 128 * 1024**2
SERVED_LONGS = 96
"""Numbers of the steps of a call that is served, but for those of its pairs, rows and slots."""
_PLANS = 512
"""Kept at most; a few KiB each."""


class _Plan:
    """Numbers of the steps of a call of some sizes; what differs between calls of these sizes is to be filled in."""

    def __init__(self, num_tokens: int, num_pairs: int, slots: int, hidden: int, inner: int) -> None:
        T, P, H = num_tokens, num_pairs, hidden
        self.one = T == 1  # every pair has the same row, where it is
        self.moves_few = P * H <= SMALL
        self.x_row = 0 if self.one else 4 * (H + INPUTS)  # so far apart rows do not clash: see `cluster.kernels.tiles`
        self.num_floats = P * ((0 if self.one else H + INPUTS) + 2 * inner + H)
        own = HEADER + 2 * min(P, slots) + 2  # of a product, with its counter
        self.numbers = np.empty(SORTED + own + 3 * P + T + slots, np.int64)
        plan_at: int = self.numbers.ctypes.data
        self.rows_at = rows_at = plan_at + 8 * (SORTED + own)
        places_at, pairs_of_at, ends_at = rows_at + 8 * P, rows_at + 16 * P, rows_at + 24 * P
        self.sort = work_of(
            (*(0, 0, 0, 0, T, P, slots, plan_at, rows_at, ends_at, places_at, pairs_of_at), ends_at + 8 * T)
            + (0, 0, self.x_row, H)
        )
        self.gated = work_of((0, 0, 0, H, inner, 0, -(-inner // PIECE), self.x_row, 0, plan_at, 0, 0, 0))
        self.product: Work = (ctypes.c_int64 * own).from_buffer(self.numbers.data, 8 * SORTED)
        self.product[0] = ctypes.addressof(self.product) + 8 * (own - 1)
        self.product[4], self.product[5], self.product[7], self.product[8] = inner, H, -(-H // PIECE), 4 * inner
        self.product[11] = 0
        many = T if self.moves_few else max(1, _PER_PIECE * T // (H * P))
        self.combine = work_of((0, 0, H, T, 0, many, ends_at, places_at, pairs_of_at, 0))


class Scratch(threading.local):
    """Memory between the steps, kept from call to call up to `_KEPT_BYTES`, and plans; each thread has its own, since a
    group in its router's process is probed by another thread than the one that computes."""

    def __init__(self) -> None:
        self._kept = torch.empty(0)
        self._plans: dict[tuple[int, ...], _Plan] = {}

    def plan(self, *sizes: int) -> _Plan:
        """One for a call of such sizes; until the next one it is the caller's."""
        plan = self._plans.get(sizes)
        if plan is None:
            plan = _Plan(*sizes)
            if plan.moves_few:
                if len(self._plans) >= _PLANS:
                    self._plans.clear()
                self._plans[sizes] = plan
        return plan

    def floats(self, number: int) -> torch.Tensor:
        """At least so many."""
        if number <= self._kept.numel():
            return self._kept
        found = torch.empty(number)
        if found.nbytes <= _KEPT_BYTES:
            self._kept = found
        return found


class Weights(NamedTuple):
    """What one of the two products of a layer's experts takes: [S, N, K], and a scale for each output, if any."""

    weight_SNK: torch.Tensor
    scale_SN: torch.Tensor | None = None

    @property
    def can_tile(self) -> bool:
        """See `cluster.kernels.tiles.can_tile`."""
        fits = self.scale_SN is None or fits_scales(self.weight_SNK, self.scale_SN)
        return fits and can_tile(self.weight_SNK, self.weight_SNK.dtype) and self.weight_SNK.dtype in DTYPES

    @property
    def kind(self) -> tuple[int, int]:
        """Bytes of a number, and where the scales are."""
        return self.weight_SNK.itemsize, 0 if self.scale_SN is None else self.scale_SN.data_ptr()


class GatedExperts:
    """Experts whose first weights [S, 2 I, H] make gates and what they let through, and whose second are [S, H, I]; on
    the CPU, without biases."""

    def __init__(self, up: Weights, down: Weights) -> None:
        self._weights = up, down  # they stay where they are
        up_SGH, down_SHI = up.weight_SNK, down.weight_SNK
        self._up_at, self._down_at = up_SGH.data_ptr(), down_SHI.data_ptr()
        self._up_kind, self._down_kind = self._kinds = up.kind, down.kind
        self._panel = panel_rows() if self._up_kind[0] == self._down_kind[0] == 4 else 0
        self._num_slots, self._hidden, self._inner = down_SHI.shape
        lay_out = team("tiles_compiled", "lay_out")
        found = kept_team(_COMPILED, "gated"), kept_team("tiles_compiled"), kept_team(_COMPILED, "combine")
        steps = [step for step in found if step is not None]
        assert lay_out is not None
        assert len(steps) == len(found)
        self._lay_out = lay_out
        self._gated, self._product, self._combine = steps
        self._sort, self._combine_few = kept_alone(_COMPILED, "sort"), kept_alone(_COMPILED, "combine")

    @classmethod
    def of(cls, module: Any, up: Weights, down: Weights) -> GatedExperts | None:
        """For weights that tiles can take and an experts module that computes as described, by what its gate makes of
        random rows; None for any other."""
        if not (len(up.weight_SNK) and module.has_gate):
            return None
        inner = down.weight_SNK.shape[2]
        fits = up.weight_SNK.shape[1] == 2 * inner and up.can_tile and down.can_tile
        if not fits or team(_COMPILED, "gated") is None:
            return None
        with torch.inference_mode():
            probe = 5.0 * torch.randn(3, 2 * inner)
            probe[0] *= 1000  # some are cut off where they are large
            gate, through = probe.chunk(2, dim=-1)
            same = torch.allclose(module._apply_gate(probe), F.silu(gate) * through, rtol=1e-5, atol=1e-6)
        return cls(up, down) if same else None

    def served(self, slot_of_E: Any, most_tokens: int) -> ServedLayer:
        """For calls of few rows, up to ``most_tokens``, that are served by one thread (see `run`)."""
        numbers = np.zeros(NUMBERS, np.int64)
        numbers[UP], numbers[DOWN] = self._up_at, self._down_at
        (numbers[UP_SIZE], numbers[UP_SCALES]), (numbers[DOWN_SIZE], numbers[DOWN_SCALES]) = self._kinds
        numbers[SLOT_OF], numbers[EXPERTS], numbers[SLOTS] = slot_of_E.ctypes.data, len(slot_of_E), self._num_slots
        numbers[INNER], numbers[ROW], numbers[MOST] = self._inner, self._hidden, most_tokens
        steps = (_COMPILED, "sort"), (_COMPILED, "gated"), ("tiles_compiled", "run"), (_COMPILED, "combine")
        numbers[SORT:] = [address_of(*step) for step in steps]
        pairs, slots = SMALL // self._hidden, self._num_slots
        longs = SERVED_LONGS + HEADER + 2 * min(pairs, slots) + 3 * pairs + most_tokens + slots
        floats = pairs * (self._hidden + INPUTS + 2 * self._inner + self._hidden)
        kept = numbers, slot_of_E, self
        needed = 8 * longs + 12 * pairs + 4 * floats + 2 * 64
        return ServedLayer(address_of(_COMPILED, "serve"), numbers.ctypes.data, needed, kept)

    def run(
        self,
        hidden_TH: torch.Tensor,
        pairs_3P: Any,
        slot_of_E: Any,
        scratch: Scratch,
        total_TH: torch.Tensor | None = None,
    ) -> torch.Tensor | None:
        """Per row of ``hidden_TH`` (fp32) the sum over its pairs of gate weight times what the expert makes of the row,
        fp32 [T, H]; added to ``total_TH`` where that is given. Pairs are those of a `LayerRows`, ``slot_of_E`` (int64)
        the slot of each logical expert. None, and nothing done, where a pair names what does not exist.

        Raises:
            ValueError: rows are not as long as they must be, or not fp32 on the CPU.
        """
        shape = (len(hidden_TH), self._hidden)
        for rows in (hidden_TH,) if total_TH is None else (hidden_TH, total_TH):
            if rows.shape != shape or rows.dtype is not torch.float32 or not rows.is_cpu:
                raise ValueError(f"rows: got {tuple(rows.shape)} of {rows.dtype}; must be {shape} of float32")
        if total_TH is not None and not total_TH.is_contiguous():
            raise ValueError("total: must be contiguous")
        num_tokens, num_pairs = hidden_TH.shape[0], pairs_3P.shape[1]
        hidden_TH, pairs_3P = hidden_TH.contiguous(), np.ascontiguousarray(pairs_3P, np.int32)
        H, inner = self._hidden, self._inner
        plan = scratch.plan(num_tokens, num_pairs, self._num_slots, H, inner)
        floats = scratch.floats(plan.num_floats)
        hidden_at, gates_at = hidden_TH.data_ptr(), floats.data_ptr()
        ups_at = gates_at + 4 * num_pairs * inner
        outputs_at = ups_at + 4 * num_pairs * inner
        x_at = hidden_at if plan.one else outputs_at + 4 * num_pairs * H
        named_at: int = pairs_3P.ctypes.data
        sort, gated, product, combine = plan.sort, plan.gated, plan.product, plan.combine
        sort[1], sort[2], sort[3], sort[4] = named_at, named_at + 4 * num_pairs, slot_of_E.ctypes.data, len(slot_of_E)
        sort[14], sort[15] = hidden_at, x_at if plan.moves_few and not plan.one else 0
        self._sort(sort)
        if plan.numbers[STATUS]:
            return None
        num = int(plan.numbers[NUM])
        if not (plan.one or plan.moves_few):
            gated[13] = product[11] = in_panels = 1 if self._panel else 0
            many, begins_at = self._panel or max(1, _PER_PIECE // H), plan.numbers.ctypes.data
            begins_at += 8 * (SORTED + HEADER + num)
            self._lay_out((hidden_at, 4 * H, plan.rows_at, x_at, plan.x_row, H, many, num, begins_at, in_panels))
        gated[1], gated[2], gated[3], gated[6], gated[9] = x_at, self._up_at, gates_at, num, ups_at
        gated[11], gated[12] = self._up_kind
        self._gated(gated)
        product[1], product[2], product[3], product[6] = gates_at, self._down_at, outputs_at, num
        product[9], product[10] = self._down_kind
        self._product(product)
        adds = total_TH is not None
        if total_TH is None:
            total_TH = torch.empty((num_tokens, H))
        combine[1], combine[2], combine[5], combine[10] = (
            outputs_at,
            total_TH.data_ptr(),
            adds,
            named_at + 8 * num_pairs,
        )
        (self._combine_few if plan.moves_few else self._combine)(combine)
        return total_TH
