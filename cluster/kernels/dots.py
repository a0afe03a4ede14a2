"""Dot products and mixes of a few rows, for compiled functions to call; everything is an address or a number.

A tile is four vectors by a few rows. Those that come next are fetched meanwhile, and only into the second-level cache:
into the first, they would displace the rows. For products with weights see `cluster.kernels.streams`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from cluster.kernels.registers import (
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
    shuffle,
    spread,
    zero_sums,
)

_BYTE = ir.IntType(8).as_pointer()
LINE = 64
"""Bytes that a fetch brings."""
_TO_READ, _AS_DATA, _NEAR_L2 = 0, 1, 2  # arguments of LLVM's prefetch; 3 instead of 2 is the first-level cache


def by_rows(generate: Callable[..., None], width: int) -> Callable[..., Any]:
    """What generates the code of an intrinsic whose first argument says for how many rows, 1 to ROWS, ``generate`` is
    to have made it."""

    def chosen(context: Any, builder: ir.IRBuilder, _signature: Any, arguments: Any) -> Any:
        wanted, *others = arguments
        for rows in range(1, ROWS + 1):
            with builder.if_then(builder.icmp_signed("==", wanted, constant(rows))):
                generate(builder, rows, width, *others)
        return context.get_dummy_value()

    return chosen


def _of_rows(generate: Callable[..., None], width: int) -> Any:
    @intrinsic  # type: ignore[untyped-decorator]
    def tile(
        typing: Any, rows: Any, a: Any, a_stride: Any, b: Any, b_stride: Any, y: Any, y_stride: Any, n: Any, ahead: Any
    ) -> Any:
        return types.none(*[types.int64] * 9), by_rows(generate, width)

    return tile


def _dots(builder: ir.IRBuilder, rows: int, outputs: int, *arguments: Any) -> None:
    w, w_stride, x, x_stride, y, y_stride, n, ahead = arguments
    weights, coming = ([at(builder, start, w_stride, number) for number in range(outputs)] for start in (w, ahead))
    inputs = [at(builder, x, x_stride, number) for number in range(rows)]
    sums = zero_sums(builder, rows, outputs)

    def add(vector: Any) -> None:
        here = builder.mul(vector, constant(LANES * 4))
        factors, loaded = (
            (load(builder, builder.add(address, here)) for address in addresses) for addresses in (inputs, weights)
        )
        add_all_products(builder, factors, loaded, sums)

    def fetch_line(line: Any) -> None:
        for address in coming:
            fetch(builder, builder.add(address, builder.mul(line, constant(LINE))))

    by_lines(builder, n, 4, add, fetch_line)
    for number, places in enumerate(sums):
        sum_up(builder, [builder.load(place) for place in places], at(builder, y, y_stride, number))


def by_lines(
    builder: ir.IRBuilder, n: Any, size: int, add: Callable[[Any], None], fetch_line: Callable[[Any], None]
) -> None:
    """A loop over n numbers of ``size`` bytes, which gives ``add`` each vector's number, and ``fetch_line`` each line's
    before those of its vectors."""
    vectors, together = builder.udiv(n, constant(LANES)), max(1, LINE // (LANES * size))
    lines = builder.udiv(vectors, constant(together))
    with cgutils.for_range(builder, lines) as loop:
        fetch_line(loop.index)
        for number in range(together):
            add(builder.add(builder.mul(loop.index, constant(together)), constant(number)))
    if together > 1:
        with cgutils.for_range(builder, vectors, start=builder.mul(lines, constant(together))) as loop:
            add(loop.index)


def sum_up(builder: ir.IRBuilder, vectors: list[Any], address: Any) -> None:
    """Stores the sums of one, two or four vectors side by side."""
    found = totals(builder, vectors)
    builder.store(found, builder.inttoptr(address, found.type.as_pointer()), align=4)


def totals(builder: ir.IRBuilder, vectors: list[Any]) -> Any:
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


def fetch(builder: ir.IRBuilder, address: Any) -> None:
    """Asks for a line, to be read from the second-level cache soon."""
    ask = function(builder, "llvm.prefetch.p0i8", ir.VoidType(), [_BYTE, SMALL, SMALL, SMALL])
    flags = [ir.Constant(SMALL, flag) for flag in (_TO_READ, _NEAR_L2, _AS_DATA)]
    builder.call(ask, [builder.inttoptr(address, _BYTE), *flags])


def _mixes(builder: ir.IRBuilder, rows: int, width: int, *arguments: Any) -> None:
    p, p_stride, v, v_stride, y, apart, n, ahead = arguments
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
            fetch(builder, builder.add(builder.add(start, ahead), constant(4 * LANES * column)))
        offset = builder.mul(loop.index, constant(4))
        factors = (spread(builder, builder.add(address, offset)) for address in shares)
        add_all_products(builder, factors, loaded, sums)
    for addresses, places in zip(results, sums, strict=True):
        for address, place in zip(addresses, places, strict=True):
            builder.store(builder.load(place), builder.inttoptr(address, VECTOR.as_pointer()), align=4)


def add_all_products(
    builder: ir.IRBuilder, factors: Iterator[Any], others: Iterator[Any], sums: list[list[Any]]
) -> None:
    """Adds the products of each factor with each of the others to the factor's sums. What is fewer is held in
    registers, or the others while there is room for these and one factor beside all sums."""
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
mixes, mixes_of_one = _of_rows(_mixes, OUTPUTS), _of_rows(_mixes, 1)
"""``(rows, p, p_stride, v, v_stride, y, y_stride, n, ahead)``: adds to the next four vectors (or one) of each row at
``y`` the sum of n such at ``v``, each times the row's own factor at ``p``. Meanwhile what lies ``ahead`` bytes behind
each is fetched. Strides are bytes."""
