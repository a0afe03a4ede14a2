"""Dot products and mixes of a few rows, for compiled functions to call; everything is an address or a number.

A tile is four outputs by a few rows. With 1024 inputs four weights are 16 KiB in four streams, each shorter than what
makes the hardware's prefetcher fetch ahead. For weights there are two remedies, and each was measured on one kind of
machine (keys and values of attention are fetched on any):

- With AVX-512 a tile asks for the next one's weights while it reads its own, and only into the second-level cache: into
  the first, they would displace the rows. On two Zen 4 cores the median of 1024 x 1024 went from 174 to 156 µs (27
  GB/s) at 1 row, from 232 to 171 at 8, from 307 to 223 at 16.
- With AVX2 a tile's outputs lie a quarter of a piece of work apart, so that the next tile's weights go on where this
  one's end and the streams become long. On two Zen 3 cores, in turns with fetching (four runs of each), the median of
  1024 x 1024 went from 181-209 to 136-200 µs at 1 row and from 1,229-1,446 to 954-1,154 at 64; that of 2048 x 512,
  whose streams were half as long, from 217-254 to 140-178 at 1 row.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from cluster.kernels.registers import (
    FLOAT,
    LANES,
    OUTPUTS,
    REGISTERS,
    ROWS,
    SMALL,
    VECTOR,
    add_products,
    at,
    constant,
    function,
    load,
    load_weights,
    shuffle,
    spread,
    zero_sums,
)

FETCHES = LANES != 8
"""A tile of weights asks for the next one's, which lie behind it; otherwise they continue its own."""
_BYTE = ir.IntType(8).as_pointer()
_LINE = 64
"""Bytes that a fetch brings."""
_TO_READ, _AS_DATA, _NEAR_L2 = 0, 1, 2  # arguments of LLVM's prefetch; 3 instead of 2 is the first-level cache


def _of_rows(generate: Callable[..., None], width: int) -> Any:
    """An intrinsic whose first argument says for how many rows, 1 to ROWS, ``generate`` is to have made its code."""

    def by_rows(context: Any, builder: ir.IRBuilder, _signature: Any, arguments: Any) -> Any:
        wanted, *others = arguments
        for rows in range(1, ROWS + 1):
            with builder.if_then(builder.icmp_signed("==", wanted, constant(rows))):
                generate(builder, rows, width, *others)
        return context.get_dummy_value()

    @intrinsic  # type: ignore[untyped-decorator]
    def tile(
        typing: Any, rows: Any, a: Any, a_stride: Any, b: Any, b_stride: Any, y: Any, y_stride: Any, n: Any, ahead: Any
    ) -> Any:
        return types.none(*[types.int64] * 9), by_rows

    return tile


def _dots(builder: ir.IRBuilder, rows: int, outputs: int, *arguments: Any) -> None:
    w, w_stride, x, x_stride, y, y_stride, n, ahead = arguments
    sums = _sums_of_products(4, True, builder, rows, outputs, w, w_stride, x, x_stride, n, ahead)
    for number, places in enumerate(sums):
        totals = _totals(builder, [builder.load(place) for place in places])
        address = at(builder, y, y_stride, number)
        builder.store(totals, builder.inttoptr(address, totals.type.as_pointer()), align=4)


def _dots_of_weights(size: int, builder: ir.IRBuilder, rows: int, outputs: int, *arguments: Any) -> None:
    w, apart, x, x_stride, y, y_stride, n, ahead = arguments
    w_stride = builder.mul(apart, builder.mul(n, constant(size)))
    sums = _sums_of_products(size, FETCHES, builder, rows, outputs, w, w_stride, x, x_stride, n, ahead)
    for row, places in enumerate(sums):
        totals = _totals(builder, [builder.load(place) for place in places])
        address = at(builder, y, y_stride, row)
        for number in range(outputs):
            place = at(builder, address, builder.mul(apart, constant(4)), number)
            total = builder.extract_element(totals, ir.Constant(SMALL, number))
            builder.store(total, builder.inttoptr(place, FLOAT.as_pointer()))


def _sums_of_products(
    size: int,
    fetches: bool,
    builder: ir.IRBuilder,
    rows: int,
    outputs: int,
    w: Any,
    w_stride: Any,
    x: Any,
    x_stride: Any,
    n: Any,
    ahead: Any,
) -> list[list[Any]]:
    """Of each row, for each output, a vector whose numbers' sum is the dot product."""
    weights = [at(builder, w, w_stride, number) for number in range(outputs)]
    inputs = [at(builder, x, x_stride, number) for number in range(rows)]
    coming = [at(builder, ahead, w_stride, number) for number in range(outputs)] if fetches else []
    fetch, flags = _fetching(builder)
    sums = zero_sums(builder, rows, outputs)

    def add(vector: Any) -> None:
        start = builder.mul(vector, constant(LANES * size))
        here = builder.mul(vector, constant(LANES * 4))
        factors = (load(builder, builder.add(address, here)) for address in inputs)
        loaded = (load_weights(builder, builder.add(address, start), size) for address in weights)
        _add_all_products(builder, factors, loaded, sums)

    vectors, together = builder.udiv(n, constant(LANES)), max(1, _LINE // (LANES * size))
    lines = builder.udiv(vectors, constant(together))
    with cgutils.for_range(builder, lines) as loop:
        for address in coming:
            line = builder.add(address, builder.mul(loop.index, constant(together * LANES * size)))
            builder.call(fetch, [builder.inttoptr(line, _BYTE), *flags])
        for number in range(together):
            add(builder.add(builder.mul(loop.index, constant(together)), constant(number)))
    if together > 1:
        with cgutils.for_range(builder, vectors, start=builder.mul(lines, constant(together))) as loop:
            add(loop.index)
    return sums


def _totals(builder: ir.IRBuilder, vectors: list[Any]) -> Any:
    """The sums of one, two or four vectors, side by side in a vector.

    Pairs of vectors become one that holds half sums of both, which takes half of what summing each would.
    """
    wanted, width = len(vectors), LANES
    while len(vectors) > 1:
        width //= 2
        firsts = [lane for lane in range(2 * LANES) if lane // width % 2 == 0]
        seconds = [lane + width for lane in firsts]
        vectors = [
            builder.fadd(shuffle(builder, a, b, firsts), shuffle(builder, a, b, seconds))
            for a, b in zip(vectors[::2], vectors[1::2], strict=True)
        ]
    (total,) = vectors
    while width > 1:
        width //= 2
        total = builder.fadd(total, shuffle(builder, total, total, [lane ^ width for lane in range(LANES)]))
    return shuffle(builder, total, total, list(range(0, LANES, LANES // wanted)))


def _fetching(builder: ir.IRBuilder) -> tuple[Any, list[ir.Constant]]:
    fetch = function(builder, "llvm.prefetch.p0i8", ir.VoidType(), [_BYTE, SMALL, SMALL, SMALL])
    return fetch, [ir.Constant(SMALL, flag) for flag in (_TO_READ, _NEAR_L2, _AS_DATA)]


def _mixes(builder: ir.IRBuilder, rows: int, width: int, *arguments: Any) -> None:
    p, p_stride, v, v_stride, y, apart, n, ahead = arguments
    fetch, flags = _fetching(builder)
    shares = [at(builder, p, p_stride, number) for number in range(rows)]
    sums = zero_sums(builder, rows, width)
    results = [
        [builder.add(at(builder, y, apart, row), constant(4 * LANES * column)) for column in range(width)]
        for row in range(rows)
    ]
    for addresses, places in zip(results, sums, strict=True):
        for address, place in zip(addresses, places, strict=True):
            builder.store(load(builder, address), place)
    with cgutils.for_range(builder, n) as loop:
        start = builder.add(v, builder.mul(loop.index, v_stride))
        loaded = (load(builder, builder.add(start, constant(4 * LANES * column))) for column in range(width))
        for column in range(0, width, max(1, 16 // LANES)):
            address = builder.add(builder.add(start, ahead), constant(4 * LANES * column))
            builder.call(fetch, [builder.inttoptr(address, _BYTE), *flags])
        offset = builder.mul(loop.index, constant(4))
        factors = (spread(builder, builder.add(address, offset)) for address in shares)
        _add_all_products(builder, factors, loaded, sums)
    for addresses, places in zip(results, sums, strict=True):
        for address, place in zip(addresses, places, strict=True):
            builder.store(builder.load(place), builder.inttoptr(address, VECTOR.as_pointer()), align=4)


def _add_all_products(
    builder: ir.IRBuilder, factors: Iterator[Any], others: Iterator[Any], sums: list[list[Any]]
) -> None:
    """Of each factor with each of the others, to the factor's sums. What is fewer is held in registers, or the others
    while there is room for these and one factor beside all sums."""
    rows, width = len(sums), len(sums[0])
    if rows < width and (rows + 1) * width + 1 > REGISTERS:
        held = list(factors)
        for number, other in enumerate(others):
            add_products(builder, other, held, [places[number] for places in sums])
        return
    held = list(others)
    for factor, places in zip(factors, sums, strict=True):
        add_products(builder, factor, held, places)


dots, dots_of_one = (_of_rows(_dots, width) for width in (OUTPUTS, 1))
"""``(rows, w, w_stride, x, x_stride, y, y_stride, n, ahead)``: the dot products of each row at ``x`` with the next four
vectors (or one) at ``w``, n floats each, to ``y``: those of a row side by side. Meanwhile as many vectors at ``ahead``
are fetched. Strides are bytes; n is a multiple of LANES."""
dots_of_floats, dots_of_halves, dots_of_bytes = (
    _of_rows(functools.partial(_dots_of_weights, size), OUTPUTS) for size in (4, 2, 1)
)
"""``(rows, w, apart, x, x_stride, y, y_stride, n, ahead)``: the same with four outputs of a weight, so many ``apart``
in it as in ``y``, whose numbers are floats, bf16 or whole ones from -128 to 127. Only if `FETCHES`, those at ``ahead``
are fetched."""


mixes, mixes_of_one = _of_rows(_mixes, OUTPUTS), _of_rows(_mixes, 1)
"""``(rows, p, p_stride, v, v_stride, y, y_stride, n, ahead)``: adds to the next four vectors (or one) of each row at
``y`` the sum of n such at ``v``, each times the row's own factor at ``p``. Meanwhile what lies ``ahead`` bytes behind
each is fetched. Strides are bytes."""
