"""Dot products of a few rows with weights that come from memory, for compiled functions to call; everything is an
address or a number.

A tile is four outputs by a few rows. With 1024 inputs four weights are 16 KiB in four streams, each shorter than what
makes the hardware's prefetcher fetch ahead. There are two remedies, and each was measured on one kind of machine:

- With AVX-512 as many rows as one tile has are multiplied by one output at a time, so that weights are one stream, and
  what comes 8 KiB later is fetched. With more rows the tile that comes is fetched, only into the second-level cache,
  since in the first it would displace the rows; and evenly while all rows go past the tile before it: lines that are
  asked for faster than memory brings them hold up the loads of those that are there. On two Zen 4 cores, in turns with
  tiles that fetched the next one's four streams (14 rounds, medians of the ratios), experts of bench-700m took 1.02 to
  1.05 times less with one to four rows each, where reading their weights and nothing else takes 1.15 to 1.2 times less;
  1.01 to 1.02 with six to sixteen, and 1.04 with 24; one weight 1024 x 1024 0.95 to 1.08 with 1 to 512 rows. What a row
  gives depends in its last bits on whether there are more rows than a tile has, as it does in panels.
- With AVX2 a tile's outputs lie a quarter of a piece of work apart, so that the next tile's weights go on where this
  one's end and the streams become long. On two Zen 3 cores, in turns with fetching (four runs of each), the median of
  1024 x 1024 went from 181-209 to 136-200 µs at 1 row and from 1,229-1,446 to 954-1,154 at 64; that of 2048 x 512,
  whose streams were half as long, from 217-254 to 140-178 at 1 row.
"""

from __future__ import annotations

import functools
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from cluster.kernels.dots import LINE, add_all_products, by_lines, by_rows, fetch, sum_up, totals
from cluster.kernels.registers import (
    FLOAT,
    LANES,
    OUTPUTS,
    SMALL,
    at,
    constant,
    load,
    load_weights,
    zero_sums,
)

FETCHES = LANES != 8
"""Weights that come are asked for; otherwise those of a tile continue the streams of the one before."""
_CHAINS = 4
"""Sums of one output and row, in turns: one alone would wait for each addition."""


def _tile(size: int, builder: ir.IRBuilder, rows: int, outputs: int, *arguments: Any) -> None:
    w, apart, x, x_stride, y, y_stride, n, ahead, slow = arguments
    w_stride = builder.mul(apart, builder.mul(n, constant(size)))
    weights = [at(builder, w, w_stride, number) for number in range(outputs)]
    inputs = [at(builder, x, x_stride, number) for number in range(rows)]
    sums = zero_sums(builder, rows, outputs)

    def add(vector: Any) -> None:
        start, here = (builder.mul(vector, constant(LANES * each)) for each in (size, 4))
        factors = (load(builder, builder.add(address, here)) for address in inputs)
        loaded = (load_weights(builder, builder.add(address, start), size) for address in weights)
        add_all_products(builder, factors, loaded, sums)

    def fetch_lines(line: Any) -> None:
        for number in range(outputs if FETCHES else 0):
            coming = builder.add(builder.mul(line, constant(outputs)), constant(number))
            fetch(builder, builder.add(ahead, builder.mul(builder.lshr(coming, slow), constant(LINE))))

    by_lines(builder, n, size, add, fetch_lines)
    for row, places in enumerate(sums):
        found = totals(builder, [builder.load(place) for place in places])
        address = at(builder, y, y_stride, row)
        for number in range(outputs):
            place = at(builder, address, builder.mul(apart, constant(4)), number)
            total = builder.extract_element(found, ir.Constant(SMALL, number))
            builder.store(total, builder.inttoptr(place, FLOAT.as_pointer()))


def _stream(size: int, builder: ir.IRBuilder, rows: int, _outputs: int, *arguments: Any) -> None:
    w, x, x_stride, y, y_stride, n, ahead = arguments
    inputs = [at(builder, x, x_stride, number) for number in range(rows)]
    chains = _CHAINS if rows <= _CHAINS - 1 else _CHAINS // 2  # a tile's sums have registers, and this is no more
    sums = zero_sums(builder, rows, chains)

    def add(vector: Any, chain: int) -> None:
        weight = load_weights(builder, builder.add(w, builder.mul(vector, constant(LANES * size))), size)
        here = builder.mul(vector, constant(LANES * 4))
        factors = (load(builder, builder.add(address, here)) for address in inputs)
        add_all_products(builder, factors, iter([weight]), [[places[chain]] for places in sums])

    vectors, together = builder.udiv(n, constant(LANES)), constant(chains)
    turns = builder.udiv(vectors, together)
    with cgutils.for_range(builder, turns) as loop:
        first = builder.mul(loop.index, together)
        start = builder.add(ahead, builder.mul(first, constant(LANES * size)))
        for ask in range(0, chains * LANES * size, LINE):
            fetch(builder, builder.add(start, constant(ask)))
        for chain in range(chains):
            add(builder.add(first, constant(chain)), chain)
    with cgutils.for_range(builder, vectors, start=builder.mul(turns, together)) as loop:
        add(loop.index, 0)
    for row, places in enumerate(sums):
        vectors_of_row = [builder.load(place) for place in places]
        while len(vectors_of_row) > 1:
            pairs = zip(vectors_of_row[::2], vectors_of_row[1::2], strict=True)
            vectors_of_row = [builder.fadd(a, b) for a, b in pairs]
        sum_up(builder, vectors_of_row, at(builder, y, y_stride, row))


def _tiles_of(size: int) -> Any:
    @intrinsic  # type: ignore[untyped-decorator]
    def tile(
        typing: Any,
        rows: Any,
        w: Any,
        apart: Any,
        x: Any,
        x_stride: Any,
        y: Any,
        y_stride: Any,
        n: Any,
        ahead: Any,
        slow: Any,
    ) -> Any:
        return types.none(*[types.int64] * 10), by_rows(functools.partial(_tile, size), OUTPUTS)

    return tile


def _streams_of(size: int) -> Any:
    @intrinsic  # type: ignore[untyped-decorator]
    def stream(typing: Any, rows: Any, w: Any, x: Any, x_stride: Any, y: Any, y_stride: Any, n: Any, ahead: Any) -> Any:
        return types.none(*[types.int64] * 8), by_rows(functools.partial(_stream, size), 1)

    return stream


tile_of_floats, tile_of_halves, tile_of_bytes = (_tiles_of(size) for size in (4, 2, 1))
"""``(rows, w, apart, x, x_stride, y, y_stride, n, ahead, slow)``: the dot products of each row at ``x``, n floats, with
four outputs of a weight, so many ``apart`` in it as in ``y``, whose numbers are floats, bf16 or whole ones from -128 to
127. If `FETCHES`, as many bytes as the four have are fetched from ``ahead`` on; with ``slow`` 1 half of them, with 2 a
quarter. Strides are bytes; n is a multiple of LANES."""
stream_of_floats, stream_of_halves, stream_of_bytes = (_streams_of(size) for size in (4, 2, 1))
"""``(rows, w, x, x_stride, y, y_stride, n, ahead)``: the same with one output; as many bytes as it has are fetched."""
