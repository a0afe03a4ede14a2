"""What compiled functions have beyond what numba gives them: numbers at addresses, and vector registers for those that
generate loops (`cluster.kernels.dots`, `cluster.kernels.streams`, `cluster.kernels.panels`)."""

from __future__ import annotations

import platform
from typing import Any

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

OUTPUTS = 4
"""Of a tile."""


def shape_for(features: dict[str, bool], machine: str) -> tuple[int, int]:
    """Floats of a vector register and rows of a tile, so that sums, weights and one row fit in the registers."""
    if features.get("avx512f"):
        return 16, 6
    return (4, 6) if machine in ("aarch64", "arm64") else (8, 3) if features.get("avx2") else (4, 2)


LANES, ROWS = shape_for(dict(binding.get_host_cpu_features()), platform.machine())
FLOAT, INT, SMALL, VECTOR = ir.FloatType(), ir.IntType(64), ir.IntType(32), ir.VectorType(ir.FloatType(), LANES)
_DOUBLE = ir.DoubleType()
PANELS, PANEL = LANES == 8, 2 * LANES
"""Whether many rows are best multiplied in panels, and how many rows are one: see `cluster.kernels.panels`."""
REGISTERS = 16 if platform.machine() in ("x86_64", "AMD64") and LANES < 16 else 32


@intrinsic  # type: ignore[untyped-decorator]
def next_piece(typing: Any, address: Any) -> Any:
    """The number of a piece of work that no other thread gets."""

    def generate(_context: Any, builder: ir.IRBuilder, _signature: Any, arguments: Any) -> Any:
        counter = builder.inttoptr(arguments[0], INT.as_pointer())
        return builder.atomic_rmw("add", counter, ir.Constant(INT, 1), "monotonic")

    return types.int64(types.int64), generate


def _pointer(to: Any, kind: Any) -> Any:
    """An intrinsic that takes an address for one of such values."""

    @intrinsic  # type: ignore[untyped-decorator]
    def pointer(typing: Any, address: Any) -> Any:
        def generate(_context: Any, builder: ir.IRBuilder, _signature: Any, arguments: Any) -> Any:
            return builder.inttoptr(arguments[0], to.as_pointer())

        return types.CPointer(kind)(types.int64), generate

    return pointer


floats, words, longs = _pointer(FLOAT, types.float32), _pointer(SMALL, types.int32), _pointer(INT, types.int64)
doubles = _pointer(_DOUBLE, types.float64)
"""The floats, 32-bit or 64-bit integers, or doubles at an address."""


@intrinsic  # type: ignore[untyped-decorator]
def run_at(typing: Any, function: Any, numbers: Any) -> Any:
    """Runs what `cluster.kernels.compiling.compiled` made, by its address, on numbers at an address."""

    def generate(_context: Any, builder: ir.IRBuilder, _signature: Any, arguments: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [INT.as_pointer()])
        function, numbers = (
            builder.inttoptr(address, to.as_pointer()) for address, to in zip(arguments, (kind, INT), strict=True)
        )
        builder.call(function, [numbers])
        return _context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def power_of_two(typing: Any, exponent: Any) -> Any:
    """2 to a whole number from -126 to 127, by making its exponent bits."""

    def generate(_context: Any, builder: ir.IRBuilder, _signature: Any, arguments: Any) -> Any:
        biased = builder.add(arguments[0], ir.Constant(SMALL, 127))
        return builder.bitcast(builder.shl(biased, ir.Constant(SMALL, 23)), FLOAT)

    return types.float32(types.int32), generate


def zero_sums(builder: ir.IRBuilder, rows: int, width: int) -> list[list[Any]]:
    """Places for sums, which the compiler keeps in registers; 0."""
    sums = [[cgutils.alloca_once(builder, VECTOR) for _ in range(width)] for _ in range(rows)]
    for place in (place for row in sums for place in row):
        builder.store(ir.Constant(VECTOR, [0.0] * LANES), place)
    return sums


def spread(builder: ir.IRBuilder, address: Any) -> Any:
    """A vector of the number at an address."""
    number = builder.load(builder.inttoptr(address, FLOAT.as_pointer()))
    one = builder.insert_element(ir.Constant(VECTOR, ir.Undefined), number, ir.Constant(SMALL, 0))
    return builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(SMALL, LANES), [0] * LANES))


def add_products(builder: ir.IRBuilder, factor: Any, others: list[Any], places: list[Any]) -> None:
    """Of a factor with each of the others, to the sums at places."""
    fma = function(builder, f"llvm.fma.v{LANES}f32", VECTOR, [VECTOR] * 3)
    for other, place in zip(others, places, strict=True):
        builder.store(builder.call(fma, [other, factor, builder.load(place)]), place)


def shuffle(builder: ir.IRBuilder, a: Any, b: Any, lanes: list[int]) -> Any:
    """These lanes of two vectors, those of the second counted on."""
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(SMALL, len(lanes)), lanes))


def at(builder: ir.IRBuilder, address: Any, stride: Any, number: int) -> Any:
    """An address so many strides further."""
    return builder.add(address, builder.mul(stride, constant(number)))


def constant(value: int) -> ir.Constant:
    """A number of 64 bits, as addresses and lengths are."""
    return ir.Constant(INT, value)


def function(builder: ir.IRBuilder, name: str, result: Any, arguments: list[Any]) -> Any:
    """One of LLVM's own functions."""
    return cgutils.get_or_insert_function(builder.module, ir.FunctionType(result, arguments), name)


def load(builder: ir.IRBuilder, address: Any) -> Any:
    """A vector of floats."""
    return builder.load(builder.inttoptr(address, VECTOR.as_pointer()), align=4)


def store(builder: ir.IRBuilder, vector: Any, address: Any) -> None:
    """A vector of floats to an address."""
    builder.store(vector, builder.inttoptr(address, VECTOR.as_pointer()), align=4)


def load_weights(builder: ir.IRBuilder, address: Any, size: int) -> Any:
    """A vector of floats from floats (4 bytes), bf16 (2) or whole numbers (1)."""
    if size == 4:
        return load(builder, address)
    stored = ir.VectorType(ir.IntType(8 * size), LANES)
    loaded = builder.load(builder.inttoptr(address, stored.as_pointer()), align=size)
    wide = ir.VectorType(SMALL, LANES)
    if size == 1:
        return builder.sitofp(builder.sext(loaded, wide), VECTOR)
    return builder.bitcast(builder.shl(builder.zext(loaded, wide), ir.Constant(wide, [16] * LANES)), VECTOR)
