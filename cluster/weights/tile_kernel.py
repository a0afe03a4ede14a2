"""What `cluster.weights.tiles` runs. Importing it takes the compiler in, and compiles on a machine's first time.

A tile is four outputs by a few rows: its sums stay in registers while the four weights stream by once. With 1024 inputs
four weights are 16 KiB in four streams, each shorter than what makes the hardware's prefetcher fetch ahead, so a tile
asks for the next one's weights while it reads its own, and only into the second-level cache: into the first, they would
displace the rows. On two Zen 4 cores the median of 1024 x 1024 went from 174 to 156 µs (27 GB/s) at 1 row, from 232 to
171 at 8, from 307 to 223 at 16.
"""

from __future__ import annotations

import platform
from typing import Any

from llvmlite import binding, ir
from numba import cfunc, types
from numba.core import cgutils
from numba.extending import intrinsic

from cluster.weights.tiles import HEADER, OUTPUTS, PIECE


def shape_for(features: dict[str, bool], machine: str) -> tuple[int, int]:
    """Floats of a vector register and rows of a tile, so that sums, weights and one row fit in the registers."""
    if features.get("avx512f"):
        return 16, 6
    return (4, 6) if machine in ("aarch64", "arm64") else (8, 2) if features.get("avx2") else (4, 2)


LANES, ROWS = shape_for(dict(binding.get_host_cpu_features()), platform.machine())
_BLOCK_BYTES = 384 * 1024
"""Rows that go through a piece of weights before the next ones do, so that they stay in the second-level cache."""
_BLOCK = _BLOCK_BYTES // 4
_FLOAT, _INT, _SMALL, _VECTOR = ir.FloatType(), ir.IntType(64), ir.IntType(32), ir.VectorType(ir.FloatType(), LANES)
_TO_READ, _AS_DATA, _NEAR_L2 = 0, 1, 2  # arguments of LLVM's prefetch; 3 instead of 2 is the first-level cache


@intrinsic  # type: ignore[untyped-decorator]
def _next_piece(typing: Any, address: Any) -> Any:
    """The number of a piece of work that no other thread gets."""

    def generate(_context: Any, builder: ir.IRBuilder, _signature: Any, arguments: Any) -> Any:
        counter = builder.inttoptr(arguments[0], _INT.as_pointer())
        return builder.atomic_rmw("add", counter, ir.Constant(_INT, 1), "monotonic")

    return types.int64(types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def _tile(typing: Any, rows: Any, w: Any, x: Any, y: Any, K: Any, N: Any) -> Any:
    """Of ``rows`` rows of K inputs at address x the dot products with four weights at w, to results at y that lie N
    apart from row to row."""

    def generate(context: Any, builder: ir.IRBuilder, _signature: Any, arguments: Any) -> Any:
        wanted, *others = arguments
        for rows in range(1, ROWS + 1):
            with builder.if_then(builder.icmp_signed("==", wanted, _constant(rows))):
                _generate(builder, rows, *others)
        return context.get_dummy_value()

    return types.none(*[types.int64] * 6), generate


def _generate(builder: ir.IRBuilder, rows: int, w: Any, x: Any, y: Any, K: Any, N: Any) -> None:
    fma = _function(builder, f"llvm.fma.v{LANES}f32", _VECTOR, [_VECTOR] * 3)
    total = _function(builder, f"llvm.vector.reduce.fadd.v{LANES}f32", _FLOAT, [_FLOAT, _VECTOR])
    byte = ir.IntType(8).as_pointer()
    fetch = _function(builder, "llvm.prefetch.p0i8", ir.VoidType(), [byte, _SMALL, _SMALL, _SMALL])
    flags = [ir.Constant(_SMALL, flag) for flag in (_TO_READ, _NEAR_L2, _AS_DATA)]
    stride, apart = builder.mul(K, _constant(4)), builder.mul(N, _constant(4))
    weights = [builder.add(w, builder.mul(stride, _constant(number))) for number in range(OUTPUTS)]
    inputs = [builder.add(x, builder.mul(stride, _constant(number))) for number in range(rows)]
    ahead = builder.mul(stride, _constant(OUTPUTS))
    sums = [[cgutils.alloca_once(builder, _VECTOR) for _ in range(OUTPUTS)] for _ in range(rows)]
    for place in (place for row in sums for place in row):
        builder.store(ir.Constant(_VECTOR, [0.0] * LANES), place)
    with cgutils.for_range(builder, builder.udiv(K, _constant(LANES))) as loop:
        offset = builder.mul(loop.index, _constant(LANES * 4))
        addresses = [builder.add(address, offset) for address in weights]
        loaded = [_load(builder, address) for address in addresses]
        for address in addresses:
            builder.call(fetch, [builder.inttoptr(builder.add(address, ahead), byte), *flags])
        for address, places in zip(inputs, sums, strict=True):
            row = _load(builder, builder.add(address, offset))
            for weight, place in zip(loaded, places, strict=True):
                builder.store(builder.call(fma, [weight, row, builder.load(place)]), place)
    for number, places in enumerate(sums):
        first = builder.add(y, builder.mul(apart, _constant(number)))
        for output, place in enumerate(places):
            # In any order, as in every library's product.
            value = builder.call(total, [ir.Constant(_FLOAT, 0.0), builder.load(place)], fastmath=("reassoc",))
            builder.store(value, builder.inttoptr(builder.add(first, _constant(4 * output)), _FLOAT.as_pointer()))


def _constant(value: int) -> ir.Constant:
    return ir.Constant(_INT, value)


def _function(builder: ir.IRBuilder, name: str, result: Any, arguments: list[Any]) -> Any:
    return cgutils.get_or_insert_function(builder.module, ir.FunctionType(result, arguments), name)


def _load(builder: ir.IRBuilder, address: Any) -> Any:
    return builder.load(builder.inttoptr(address, _VECTOR.as_pointer()), align=4)


def _pieces(work: Any) -> None:
    """What every thread of the team does with the ``work`` of `cluster.weights.tiles.tiled_product`."""
    counter, x_at, w_at, y_at = work[0], work[1], work[2], work[3]
    K, N, num, pieces = work[4], work[5], work[6], work[7]
    block = max(1, _BLOCK // (K * ROWS)) * ROWS
    while True:
        piece = _next_piece(counter)
        if piece >= num * pieces:
            break
        number, first = piece // pieces, piece % pieces * PIECE
        expert = w_at + work[HEADER + number] * N * K * 4
        start, end = work[HEADER + num + number], work[HEADER + num + number + 1]
        for low in range(start, end, block):
            high = min(low + block, end)
            for n in range(first, min(first + PIECE, N), OUTPUTS):
                for row in range(low, high, ROWS):
                    _tile(min(ROWS, high - row), expert + n * K * 4, x_at + row * K * 4, y_at + (row * N + n) * 4, K, N)


def _compile() -> Any:
    signature = types.void(types.CPointer(types.int64))
    try:
        return cfunc(signature, cache=True)(_pieces)
    except RuntimeError:  # nowhere to keep what was compiled
        return cfunc(signature)(_pieces)


run_pieces = _compile()
