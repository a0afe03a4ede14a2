"""Loops that keep their sums in vector registers, for compiled functions to call; everything is an address or a number.

A tile is four outputs by a few rows. With 1024 inputs four weights are 16 KiB in four streams, each shorter than what
makes the hardware's prefetcher fetch ahead. There are two remedies, and each was measured on one kind of machine:

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
import platform
from collections.abc import Callable, Iterator
from typing import Any

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

OUTPUTS = 4


def shape_for(features: dict[str, bool], machine: str) -> tuple[int, int]:
    """Floats of a vector register and rows of a tile, so that sums, weights and one row fit in the registers."""
    if features.get("avx512f"):
        return 16, 6
    return (4, 6) if machine in ("aarch64", "arm64") else (8, 3) if features.get("avx2") else (4, 2)


LANES, ROWS = shape_for(dict(binding.get_host_cpu_features()), platform.machine())
_FLOAT, _INT, _SMALL, _VECTOR = ir.FloatType(), ir.IntType(64), ir.IntType(32), ir.VectorType(ir.FloatType(), LANES)
_DOUBLE = ir.DoubleType()
FETCHES = LANES != 8
"""A tile of weights asks for the next one's, which lie behind it; otherwise they continue its own."""
_REGISTERS = 16 if platform.machine() in ("x86_64", "AMD64") and LANES < 16 else 32
_BYTE = ir.IntType(8).as_pointer()
_LINE = 64
"""Bytes that a fetch brings."""
_TO_READ, _AS_DATA, _NEAR_L2 = 0, 1, 2  # arguments of LLVM's prefetch; 3 instead of 2 is the first-level cache
_Generate = Callable[..., None]


@intrinsic  # type: ignore[untyped-decorator]
def next_piece(typing: Any, address: Any) -> Any:
    """The number of a piece of work that no other thread gets."""

    def generate(_context: Any, builder: ir.IRBuilder, _signature: Any, arguments: Any) -> Any:
        counter = builder.inttoptr(arguments[0], _INT.as_pointer())
        return builder.atomic_rmw("add", counter, ir.Constant(_INT, 1), "monotonic")

    return types.int64(types.int64), generate


def _pointer(to: Any, kind: Any) -> Any:
    """An intrinsic that takes an address for one of such values."""

    @intrinsic  # type: ignore[untyped-decorator]
    def pointer(typing: Any, address: Any) -> Any:
        def generate(_context: Any, builder: ir.IRBuilder, _signature: Any, arguments: Any) -> Any:
            return builder.inttoptr(arguments[0], to.as_pointer())

        return types.CPointer(kind)(types.int64), generate

    return pointer


floats, words, longs = _pointer(_FLOAT, types.float32), _pointer(_SMALL, types.int32), _pointer(_INT, types.int64)
doubles = _pointer(_DOUBLE, types.float64)
"""The floats, 32-bit or 64-bit integers, or doubles at an address."""


@intrinsic  # type: ignore[untyped-decorator]
def power_of_two(typing: Any, exponent: Any) -> Any:
    """2 to a whole number from -126 to 127, by making its exponent bits."""

    def generate(_context: Any, builder: ir.IRBuilder, _signature: Any, arguments: Any) -> Any:
        biased = builder.add(arguments[0], ir.Constant(_SMALL, 127))
        return builder.bitcast(builder.shl(biased, ir.Constant(_SMALL, 23)), _FLOAT)

    return types.float32(types.int32), generate


def _of_rows(generate: _Generate, width: int) -> Any:
    """An intrinsic whose first argument says for how many rows, 1 to ROWS, ``generate`` is to have made its code."""

    def by_rows(context: Any, builder: ir.IRBuilder, _signature: Any, arguments: Any) -> Any:
        wanted, *others = arguments
        for rows in range(1, ROWS + 1):
            with builder.if_then(builder.icmp_signed("==", wanted, _constant(rows))):
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
        address = _at(builder, y, y_stride, number)
        builder.store(totals, builder.inttoptr(address, totals.type.as_pointer()), align=4)


def _dots_of_weights(size: int, builder: ir.IRBuilder, rows: int, outputs: int, *arguments: Any) -> None:
    w, apart, x, x_stride, y, y_stride, n, ahead = arguments
    w_stride = builder.mul(apart, builder.mul(n, _constant(size)))
    sums = _sums_of_products(size, FETCHES, builder, rows, outputs, w, w_stride, x, x_stride, n, ahead)
    for row, places in enumerate(sums):
        totals = _totals(builder, [builder.load(place) for place in places])
        address = _at(builder, y, y_stride, row)
        for number in range(outputs):
            place = _at(builder, address, builder.mul(apart, _constant(4)), number)
            total = builder.extract_element(totals, ir.Constant(_SMALL, number))
            builder.store(total, builder.inttoptr(place, _FLOAT.as_pointer()))


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
    weights = [_at(builder, w, w_stride, number) for number in range(outputs)]
    inputs = [_at(builder, x, x_stride, number) for number in range(rows)]
    coming = [_at(builder, ahead, w_stride, number) for number in range(outputs)] if fetches else []
    fetch, flags = _fetching(builder)
    sums = _sums(builder, rows, outputs)

    def add(vector: Any) -> None:
        start = builder.mul(vector, _constant(LANES * size))
        here = builder.mul(vector, _constant(LANES * 4))
        factors = (_load(builder, builder.add(address, here)) for address in inputs)
        loaded = (_load_weights(builder, builder.add(address, start), size) for address in weights)
        _add_all_products(builder, factors, loaded, sums)

    vectors, together = builder.udiv(n, _constant(LANES)), max(1, _LINE // (LANES * size))
    lines = builder.udiv(vectors, _constant(together))
    with cgutils.for_range(builder, lines) as loop:
        for address in coming:
            line = builder.add(address, builder.mul(loop.index, _constant(together * LANES * size)))
            builder.call(fetch, [builder.inttoptr(line, _BYTE), *flags])
        for number in range(together):
            add(builder.add(builder.mul(loop.index, _constant(together)), _constant(number)))
    if together > 1:
        with cgutils.for_range(builder, vectors, start=builder.mul(lines, _constant(together))) as loop:
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
            builder.fadd(_shuffle(builder, a, b, firsts), _shuffle(builder, a, b, seconds))
            for a, b in zip(vectors[::2], vectors[1::2], strict=True)
        ]
    (total,) = vectors
    while width > 1:
        width //= 2
        total = builder.fadd(total, _shuffle(builder, total, total, [lane ^ width for lane in range(LANES)]))
    return _shuffle(builder, total, total, list(range(0, LANES, LANES // wanted)))


def _shuffle(builder: ir.IRBuilder, a: Any, b: Any, lanes: list[int]) -> Any:
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(_SMALL, len(lanes)), lanes))


def _fetching(builder: ir.IRBuilder) -> tuple[Any, list[ir.Constant]]:
    fetch = _function(builder, "llvm.prefetch.p0i8", ir.VoidType(), [_BYTE, _SMALL, _SMALL, _SMALL])
    return fetch, [ir.Constant(_SMALL, flag) for flag in (_TO_READ, _NEAR_L2, _AS_DATA)]


def _mixes(builder: ir.IRBuilder, rows: int, width: int, *arguments: Any) -> None:
    p, p_stride, v, v_stride, y, apart, n, ahead = arguments
    fetch, flags = _fetching(builder)
    shares = [_at(builder, p, p_stride, number) for number in range(rows)]
    sums = _sums(builder, rows, width)
    results = [
        [builder.add(_at(builder, y, apart, row), _constant(4 * LANES * column)) for column in range(width)]
        for row in range(rows)
    ]
    for addresses, places in zip(results, sums, strict=True):
        for address, place in zip(addresses, places, strict=True):
            builder.store(_load(builder, address), place)
    with cgutils.for_range(builder, n) as loop:
        start = builder.add(v, builder.mul(loop.index, v_stride))
        loaded = (_load(builder, builder.add(start, _constant(4 * LANES * column))) for column in range(width))
        for column in range(0, width, max(1, 16 // LANES)):
            address = builder.add(builder.add(start, ahead), _constant(4 * LANES * column))
            builder.call(fetch, [builder.inttoptr(address, _BYTE), *flags])
        offset = builder.mul(loop.index, _constant(4))
        factors = (_spread(builder, builder.add(address, offset)) for address in shares)
        _add_all_products(builder, factors, loaded, sums)
    for addresses, places in zip(results, sums, strict=True):
        for address, place in zip(addresses, places, strict=True):
            builder.store(builder.load(place), builder.inttoptr(address, _VECTOR.as_pointer()), align=4)


def _sums(builder: ir.IRBuilder, rows: int, width: int) -> list[list[Any]]:
    """Places for sums, which the compiler keeps in registers; 0."""
    sums = [[cgutils.alloca_once(builder, _VECTOR) for _ in range(width)] for _ in range(rows)]
    for place in (place for row in sums for place in row):
        builder.store(ir.Constant(_VECTOR, [0.0] * LANES), place)
    return sums


def _spread(builder: ir.IRBuilder, address: Any) -> Any:
    """A vector of the number at an address."""
    number = builder.load(builder.inttoptr(address, _FLOAT.as_pointer()))
    one = builder.insert_element(ir.Constant(_VECTOR, ir.Undefined), number, ir.Constant(_SMALL, 0))
    return builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(_SMALL, LANES), [0] * LANES))


def _add_all_products(
    builder: ir.IRBuilder, factors: Iterator[Any], others: Iterator[Any], sums: list[list[Any]]
) -> None:
    """Of each factor with each of the others, to the factor's sums. What is fewer is held in registers, or the others
    while there is room for these and one factor beside all sums."""
    rows, width = len(sums), len(sums[0])
    if rows < width and (rows + 1) * width + 1 > _REGISTERS:
        held = list(factors)
        for number, other in enumerate(others):
            _add_products(builder, other, held, [places[number] for places in sums])
        return
    held = list(others)
    for factor, places in zip(factors, sums, strict=True):
        _add_products(builder, factor, held, places)


def _add_products(builder: ir.IRBuilder, factor: Any, others: list[Any], places: list[Any]) -> None:
    fma = _function(builder, f"llvm.fma.v{LANES}f32", _VECTOR, [_VECTOR] * 3)
    for other, place in zip(others, places, strict=True):
        builder.store(builder.call(fma, [other, factor, builder.load(place)]), place)


def _at(builder: ir.IRBuilder, address: Any, stride: Any, number: int) -> Any:
    return builder.add(address, builder.mul(stride, _constant(number)))


def _constant(value: int) -> ir.Constant:
    return ir.Constant(_INT, value)


def _function(builder: ir.IRBuilder, name: str, result: Any, arguments: list[Any]) -> Any:
    return cgutils.get_or_insert_function(builder.module, ir.FunctionType(result, arguments), name)


def _load(builder: ir.IRBuilder, address: Any) -> Any:
    return builder.load(builder.inttoptr(address, _VECTOR.as_pointer()), align=4)


def _load_weights(builder: ir.IRBuilder, address: Any, size: int) -> Any:
    """A vector of floats from floats (4 bytes), bf16 (2) or whole numbers (1)."""
    if size == 4:
        return _load(builder, address)
    stored = ir.VectorType(ir.IntType(8 * size), LANES)
    loaded = builder.load(builder.inttoptr(address, stored.as_pointer()), align=size)
    wide = ir.VectorType(_SMALL, LANES)
    if size == 1:
        return builder.sitofp(builder.sext(loaded, wide), _VECTOR)
    return builder.bitcast(builder.shl(builder.zext(loaded, wide), ir.Constant(wide, [16] * LANES)), _VECTOR)


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
