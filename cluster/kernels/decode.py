"""A decoder layer up to its experts, for sequences that have one token each, on CPUs: six compiled calls, two more
where rows of many sequences are laid out for products, with numbers that are kept from step to step.

Written out as a model's modules, this part of a layer is some thirty calls of torch and many more of Python, which take
longer than reading its weights. Here are the same kernels that stand in for the modules one by one (norm, products,
rotary embedding, attention), one behind the other.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import torch

from cluster.kernels.attention import Histories
from cluster.kernels.linear import FastLinear, FastNorm
from cluster.kernels.team import Kept, Work, kept_alone, kept_team, work_of
from cluster.kernels.tiles import FEW, HEADER, INPUTS, PIECE, panel_rows

MOST_ROWS = 64
_COMPILED, _FEW = "heads_compiled", 32 * 1024
"""Floats that one thread passes over: a second one takes longer to begin."""


@dataclass(frozen=True, slots=True)
class LayerParts:
    """Of one layer: the norm before its attention, the products, norms of queries and keys (of a head each, or of all)
    if it has them, its heads' size, the scale of scores, and the norm behind."""

    before: FastNorm
    query: FastLinear
    key: FastLinear
    value: FastLinear
    output: FastLinear
    query_norm: FastNorm | None
    key_norm: FastNorm | None
    dim: int
    scale: float
    after: FastNorm


class Buffers:
    """Rows between the calls of a layer; all layers of a model use the same. For one thread."""

    def __init__(self) -> None:
        self._rows: dict[tuple[str, int], torch.Tensor] = {}
        self._scores = torch.empty(0)

    def rows(self, name: str, width: int) -> torch.Tensor:
        """[`MOST_ROWS`, width]."""
        if (name, width) not in self._rows:
            self._rows[name, width] = torch.empty((MOST_ROWS, width), dtype=torch.float32)
        return self._rows[name, width]

    def scores_at(self, floats: int) -> int:
        """Where there is room for so many."""
        if len(self._scores) < floats:
            self._scores = torch.empty(floats + floats // 4, dtype=torch.float32)
        return self._scores.data_ptr()


class DecodeLayer:
    """One layer's. `most` is the number of rows that it takes."""

    def __init__(self, parts: LayerParts, buffers: Buffers) -> None:
        self._parts, self._buffers, self.dim = parts, buffers, parts.dim
        kept = [kept_team(*which) for which in _TEAMS]
        self._side_by_side, self._attend, self._many_heads, self._many_rows = [run for run in kept if run is not None]
        self._few_heads, self._few_rows = (kept_alone(_COMPILED, name) for name in ("run", "add_and_norm"))
        q, k, v = (linear.weight for linear in (parts.query, parts.key, parts.value))
        self.hidden, self.most = q.shape[1], min(MOST_ROWS, *(each.few for each in _linears(parts)))
        self._heads, self._kv_heads = len(q) // parts.dim, len(k) // parts.dim
        self._scale = ctypes.c_float(parts.scale)
        self._per_row = len(q) + len(k) + len(v)
        self._lay_out()

    @classmethod
    def of(cls, parts: LayerParts, buffers: Buffers) -> DecodeLayer | None:
        """None where sizes do not fit, or nothing can be compiled."""
        q, k, v, o = (linear.weight for linear in (parts.query, parts.key, parts.value, parts.output))
        dim, hidden = parts.dim, q.shape[1]
        tiled = all(linear.tiles for linear in _linears(parts)) and all(kept_team(*which) for which in _TEAMS)
        fits = dim > 0 and dim % INPUTS == 0 and len(q) % dim == 0 and len(k) % dim == 0 and len(v) == len(k)
        fits = fits and k.shape[1] == v.shape[1] == hidden and o.shape == (hidden, len(q))
        fits = fits and len(q) % len(k) == 0 and parts.scale > 0
        normed = all(_fits(norm, {dim, size}) for norm, size in ((parts.query_norm, len(q)), (parts.key_norm, len(k))))
        normed = normed and all(norm.compiled and _fits(norm, {hidden}) for norm in (parts.before, parts.after))
        return cls(parts, buffers) if tiled and fits and normed else None

    def _lay_out(self) -> None:
        parts, hidden = self._parts, self.hidden
        q, k, v, o = (linear.weight for linear in (parts.query, parts.key, parts.value, parts.output))
        # Rows of products lie where they do not clash: see `cluster.kernels.tiles`.
        x = self._buffers.rows("x", hidden + INPUTS)
        mixed = self._buffers.rows("mixed", len(q) + INPUTS)
        queries, keys, values = (self._buffers.rows(*each) for each in (("q", len(q)), ("k", len(k)), ("v", len(v))))
        turned = self._buffers.rows("turned", len(q))
        self._output = self._buffers.rows("output", hidden)
        self._enter = self._norm_of(parts.before, 4 * (hidden + INPUTS), x.data_ptr())
        self._leave = self._norm_of(parts.after, 4 * hidden, 0)
        self._leave[2] = self._output.data_ptr()
        self._project = _Products("x", x, hidden, ((q, queries), (k, keys), (v, values)), self._buffers)
        self._unite = _Products("mixed", mixed, len(q), ((o, self._output),), self._buffers)
        query_norm, key_norm = _norm_numbers(parts.query_norm), _norm_numbers(parts.key_norm)
        kept_row = 4 * len(k)
        self._turn = work_of(
            (
                *(0, 0, self.dim, 0, 0, 0),
                *(queries.data_ptr(), self._heads, _at(parts.query.bias), *query_norm, turned.data_ptr(), 4 * len(q)),
                *(keys.data_ptr(), self._kv_heads, _at(parts.key.bias), *key_norm, 0, kept_row),
                *(values.data_ptr(), len(v), _at(parts.value.bias), 0),
            )
        )
        group = self._heads // self._kv_heads
        self._mix = work_of(
            (
                *(turned.data_ptr(), 0, 0, mixed.data_ptr(), 0, 0, self._kv_heads, group, self.dim, self.dim),
                *(4 * len(q), 4 * self.dim, ctypes.addressof(self._scale), 4 * (len(q) + INPUTS), 0),
            )
        )

    def _norm_of(self, norm: FastNorm, row: int, to: int) -> Work:
        return work_of((0, 0, 0, norm.weight_at, to, self.hidden, 0, 1, norm.epsilon_at, row))

    def __call__(
        self,
        hidden: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        at_T: torch.Tensor,
        stored: tuple[torch.Tensor, torch.Tensor],
        histories: Histories,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The residual stream behind attention, and its norm, both like ``hidden`` [1, T, H].

        ``cos`` and ``sin`` are [1, T, D], contiguous like all; keys and values go to the positions ``at_T`` (int64) of
        ``stored``, [tokens, kv heads, D] each. ``histories`` are those of all T rows, with these tokens.

        Raises:
            ValueError: shapes do not fit each other, or there are too many rows.
        """
        rows = hidden.shape[1]
        keys, values = stored
        if (
            hidden.shape != (1, rows, self.hidden)
            or not 0 < rows <= self.most
            or cos.shape != (1, rows, self.dim)
            or sin.shape != cos.shape
            or at_T.shape != (rows,)
            or len(histories.rows) != rows
            or histories.highest > len(keys)
            or keys.shape[1:] != (self._kv_heads, self.dim)
            or values.shape != keys.shape
            or any(t.dtype is not torch.float32 or not t.is_contiguous() for t in (hidden, cos, sin, keys, values))
            or at_T.dtype is not torch.int64
        ):
            raise ValueError(f"a layer of {self.hidden} and heads of {self.dim}: got {tuple(hidden.shape)}")
        few = rows * self.hidden <= _FEW
        normalise: Kept = self._few_rows if few else self._many_rows
        enter, leave, turn, mix = self._enter, self._leave, self._turn, self._mix
        enter[1], enter[7], enter[8] = hidden.data_ptr(), rows, rows if few else 1
        normalise(enter)
        self._side_by_side(self._project.of(rows))
        few_heads = rows * self._per_row <= _FEW
        turn[1], turn[2], turn[4], turn[5] = rows, rows if few_heads else 1, cos.data_ptr(), sin.data_ptr()
        turn[6], turn[21], turn[26] = at_T.data_ptr(), keys.data_ptr(), values.data_ptr()
        (self._few_heads if few_heads else self._many_heads)(turn)
        mix[2], mix[3], mix[6], mix[15] = keys.data_ptr(), values.data_ptr(), rows, histories.table_at
        mix[5] = self._buffers.scores_at(self._heads * histories.num_tokens)
        self._attend(mix)
        self._side_by_side(self._unite.of(rows))
        if self._parts.output.bias is not None:
            self._output[:rows] += self._parts.output.bias
        residual, normed = torch.empty_like(hidden), torch.empty_like(hidden)
        leave[1], leave[3], leave[5] = hidden.data_ptr(), residual.data_ptr(), normed.data_ptr()
        leave[7], leave[8] = rows, rows if few else 1
        normalise(leave)
        return residual, normed


_TEAMS = (
    ("tiles_compiled", "side_by_side"),
    ("attention_compiled", "run"),
    (_COMPILED, "run"),
    (_COMPILED, "add_and_norm"),
)


def _linears(parts: LayerParts) -> tuple[FastLinear, ...]:
    return parts.query, parts.key, parts.value, parts.output


def _fits(norm: FastNorm | None, sizes: set[int]) -> bool:
    return norm is None or (norm.weight.numel() in sizes and norm.compiled)


def _at(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _norm_numbers(norm: FastNorm | None) -> tuple[int, int, int]:
    return (0, 0, 0) if norm is None else (norm.weight_at, norm.weight.numel(), norm.epsilon_at)


class _Products:
    """Of the same rows with several weights; see `cluster.kernels.tiles.TiledWeights`."""

    def __init__(self, name: str, x: torch.Tensor, inputs: int, each: Any, buffers: Buffers) -> None:
        weights = [(weight.data_ptr(), to.data_ptr(), len(weight), -(-len(weight) // PIECE)) for weight, to in each]
        total = sum(pieces for *_, pieces in weights)
        numbers = [x.data_ptr(), inputs, 0, 4 * x.stride(0), total, *[0] * (HEADER - 6)]
        self._work = work_of([*numbers, *(number for weight in weights for number in weight)])
        self._panel, self._x_at = panel_rows(), x.data_ptr()
        panels = buffers.rows(f"{name}, in panels", x.stride(0))
        many = kept_team("tiles_compiled", "lay_out")
        assert many is not None
        self._lay_out, self._lay_out_many, self._inputs = kept_alone("tiles_compiled", "lay_out"), many, inputs
        self._panels_at = panels.data_ptr()
        self._begins = (ctypes.c_int64 * 2)()
        row, begins_at = 4 * x.stride(0), ctypes.addressof(self._begins)
        self._layout = work_of((self._x_at, row, 0, self._panels_at, row, inputs, self._panel, 1, begins_at, 1))

    def of(self, rows: int) -> Work:
        """The numbers of a call with so many rows, which are there."""
        work = self._work
        work[3] = rows
        if 0 < self._panel <= rows:
            self._begins[1] = rows
            (self._lay_out if rows * self._inputs <= FEW else self._lay_out_many)(self._layout)
            work[1], work[6] = self._panels_at, 1
        else:
            work[1], work[6] = self._x_at, 0
        return work
