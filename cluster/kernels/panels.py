"""Products of many rows in panels, where that is faster than the tiles of `cluster.kernels.streams`.

In a panel the numbers of its rows for one input lie side by side, so that a vector holds a sum for each of some rows
and nothing has to be added up across it. With AVX2, six outputs by two vectors need fewer loads for their products than
four by three rows do, and as many registers. On two Zen 3 cores, in turns with tiles (12 rounds of each, medians), a
step of bench-700m with 512 tokens of four prompts went from 1,095 to 886 ms, its experts from 731 to 576 (134 GFLOP/s);
one with 128 tokens, some 16 rows an expert, from 289 to 256. With other registers nothing was measured, and tiles stay;
so they do for weights in int8 and bf16, which a tile makes floats of eight at a time, and a panel one by one: that took
1.3 to 1.4 times as long (1024 x 1024, 16 to 128 rows, in turns).
Each sum is one chain of additions here and eight in a tile; so what a row gives depends in its last bits on how many
rows its weight gets, as it does on a library's products.

Panels of both sides: K. Goto and R. van de Geijn, Anatomy of High-Performance Matrix Multiplication, ACM TOMS 34(3),
2008. Here only rows become panels; weights stay as the checkpoint lays them out.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from cluster.kernels.registers import (
    FLOAT,
    INT,
    LANES,
    PANEL,
    add_products,
    at,
    constant,
    load,
    shuffle,
    spread,
    store,
    zero_sums,
)
from cluster.kernels.tiles import PIECE

_LINE = 64
PANEL_OUTPUTS = 6
"""By so many outputs, or two or four that are left, rows of a panel are multiplied at a time."""
MOST_ROWS = 96
"""Whose results there is room for on the stack, for a piece's outputs (`cluster.kernels.tiles.PIECE`)."""
assert MOST_ROWS % PANEL == PIECE % 2 == 0


def _in_panel(builder: ir.IRBuilder, outputs: int, *arguments: Any) -> None:
    w, apart, x, y, n = arguments
    w_stride = builder.mul(apart, builder.mul(n, constant(4)))
    weights = [at(builder, w, w_stride, number) for number in range(outputs)]
    sums = zero_sums(builder, outputs, 2)
    with cgutils.for_range(builder, builder.udiv(n, constant(LANES))) as loop:
        inputs = builder.add(x, builder.mul(loop.index, constant(LANES * PANEL * 4)))
        start = builder.mul(loop.index, constant(LANES * 4))
        here = [builder.add(address, start) for address in weights]
        for lane in range(LANES):
            rows = [load(builder, builder.add(inputs, constant(4 * (lane * PANEL + half)))) for half in (0, LANES)]
            for address, places in zip(here, sums, strict=True):
                add_products(builder, spread(builder, builder.add(address, constant(4 * lane))), rows, places)
    for number, places in enumerate(sums):
        to = at(builder, y, builder.mul(apart, constant(PANEL * 4)), number)
        for half, place in enumerate(places):
            store(builder, builder.load(place), builder.add(to, constant(half * LANES * 4)))


def _turned(builder: ir.IRBuilder, rows: list[Any]) -> list[Any]:
    """LANES vectors as columns: halves, quarters and so on change places between those that lie as far apart."""
    far = 1
    while far < LANES:
        own = [lane if lane & far == 0 else LANES + lane - far for lane in range(LANES)]
        others = [lane + far if lane & far == 0 else LANES + lane for lane in range(LANES)]
        for low in (number for number in range(LANES) if number & far == 0):
            a, b = rows[low], rows[low + far]
            rows[low], rows[low + far] = shuffle(builder, a, b, own), shuffle(builder, a, b, others)
        far *= 2
    return rows


@intrinsic  # type: ignore[untyped-decorator]
def into_panel(typing: Any, rows: Any, n: Any, panel: Any) -> Any:
    """The rows, n numbers each, whose addresses are at ``rows`` become a panel; n is a multiple of LANES."""

    def generate(context: Any, builder: ir.IRBuilder, _signature: Any, arguments: Any) -> Any:
        rows, n, panel = arguments
        listed = builder.inttoptr(rows, INT.as_pointer())
        addresses = [builder.load(builder.gep(listed, [constant(number)])) for number in range(PANEL)]
        with cgutils.for_range(builder, builder.udiv(n, constant(LANES))) as loop:
            here = builder.mul(loop.index, constant(4 * LANES))
            to = builder.add(panel, builder.mul(here, constant(PANEL)))
            for half in (0, LANES):
                loaded = [load(builder, builder.add(address, here)) for address in addresses[half : half + LANES]]
                for number, column in enumerate(_turned(builder, loaded)):
                    store(builder, column, builder.add(to, constant(4 * (number * PANEL + half))))
        return context.get_dummy_value()

    return types.none(*[types.int64] * 3), generate


@intrinsic  # type: ignore[untyped-decorator]
def out_of_panel(typing: Any, panel: Any, outputs: Any, y: Any, y_stride: Any) -> Any:
    """Results of a panel to rows at ``y``, ``y_stride`` bytes apart; outputs are a multiple of LANES."""

    def generate(context: Any, builder: ir.IRBuilder, _signature: Any, arguments: Any) -> Any:
        panel, outputs, y, y_stride = arguments
        with cgutils.for_range(builder, builder.udiv(outputs, constant(LANES))) as loop:
            here = builder.add(panel, builder.mul(loop.index, constant(4 * LANES * PANEL)))
            to = builder.add(y, builder.mul(loop.index, constant(4 * LANES)))
            for half in (0, LANES):
                loaded = [
                    load(builder, builder.add(here, constant(4 * (number * PANEL + half)))) for number in range(LANES)
                ]
                for number, row in enumerate(_turned(builder, loaded)):
                    store(builder, row, at(builder, to, y_stride, half + number))
        return context.get_dummy_value()

    return types.none(*[types.int64] * 4), generate


@intrinsic  # type: ignore[untyped-decorator]
def on_stack(typing: Any) -> Any:
    """The address of room for results (`MOST_ROWS`) or for anything else, which is the calling function's own."""

    def generate(_context: Any, builder: ir.IRBuilder, _signature: Any, _arguments: Any) -> Any:
        with builder.goto_entry_block():  # `cgutils.alloca_once` would clear it in every call
            place = builder.alloca(ir.ArrayType(FLOAT, MOST_ROWS * PIECE))
            place.align = _LINE
        return builder.ptrtoint(place, INT)

    return types.int64(), generate


@intrinsic  # type: ignore[untyped-decorator]
def dots_in_panel(typing: Any, outputs: Any, w: Any, apart: Any, x: Any, y: Any, n: Any) -> Any:
    """The dot products of the rows of a panel [n, `PANEL`] at ``x`` with 2, 4 or 6 outputs of a weight, so many
    ``apart`` in it as in the panel of results at ``y``."""

    def generate(context: Any, builder: ir.IRBuilder, _signature: Any, arguments: Any) -> Any:
        wanted, *others = arguments
        for number in range(2, PANEL_OUTPUTS + 1, 2):
            with builder.if_then(builder.icmp_signed("==", wanted, constant(number))):
                _in_panel(builder, number, *others)
        return context.get_dummy_value()

    return types.none(*[types.int64] * 6), generate
