"""Sixteen-lane float vectors for numba: what its own loops cannot promise the compiler.

Numba cannot say that two arrays do not overlap, so LLVM guards every small loop with run-time checks and
keeps nothing in registers across it; and its libm calls are scalar. Here memory is an address (int64), a
vector is a value of type `vec`, and LLVM splits it into whatever registers the machine has. No operation
carries fast-math flags except the order of `total`: NaN and infinity behave, so a sick activation stays
visible.

Everything in this file is callable from compiled code only.
"""

from __future__ import annotations

import operator
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, overload, register_model

LANES = 16
VECTOR_BYTES = 4 * LANES

_I16, _I32 = ir.IntType(16), ir.IntType(32)
_F16, _F32 = ir.HalfType(), ir.FloatType()
_VEC, _IVEC = ir.VectorType(_F32, LANES), ir.VectorType(_I32, LANES)
_HVEC = ir.VectorType(_I16, LANES)


class Vec(types.Type):
    """The numba type of a vector value."""

    def __init__(self) -> None:
        super().__init__(name="Vec16f")


vec = Vec()


@register_model(Vec)
class _VecModel(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: Any) -> None:
        super().__init__(dmm, fe_type, _VEC)


def _constant(value: float) -> ir.Constant:
    return ir.Constant(_VEC, [value] * LANES)


def _integers(value: int) -> ir.Constant:
    return ir.Constant(_IVEC, [value] * LANES)


def _shuffle(builder: Any, x: Any, y: Any, lanes: list[int]) -> Any:
    return builder.shuffle_vector(x, y, ir.Constant(ir.VectorType(_I32, len(lanes)), lanes))


def _call(builder: Any, name: str, result: Any, args: list[Any], **options: Any) -> Any:
    signature = ir.FunctionType(result, [arg.type for arg in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, signature, name), args, **options)


def _load(builder: Any, address: Any, kind: Any) -> Any:
    value = builder.load(builder.inttoptr(address, kind.as_pointer()))
    value.align = 2 if kind in (_I16, _F16, _HVEC, ir.VectorType(_F16, LANES)) else 4
    return value


def _store(context: Any, builder: Any, value: Any, address: Any, align: int = 4) -> Any:
    builder.store(value, builder.inttoptr(address, value.type.as_pointer())).align = align
    return context.get_dummy_value()


@intrinsic
def load(typing: Any, address: Any) -> Any:
    """Return the 16 floats at `address`."""
    return vec(types.int64), lambda context, builder, sig, args: _load(builder, args[0], _VEC)


@intrinsic
def store(typing: Any, address: Any, x: Any) -> Any:
    """Write 16 floats to `address`."""
    return types.none(types.int64, vec), lambda context, builder, sig, args: _store(context, builder, args[1], args[0])


@intrinsic
def load_scalar(typing: Any, address: Any) -> Any:
    """Return the float at `address`."""
    return types.float32(types.int64), lambda context, builder, sig, args: _load(builder, args[0], _F32)


@intrinsic
def store_scalar(typing: Any, address: Any, x: Any) -> Any:
    """Write one float to `address`."""
    return types.none(types.int64, types.float32), lambda context, builder, sig, args: _store(
        context, builder, args[1], args[0]
    )


@intrinsic
def load_scalar_bf16(typing: Any, address: Any) -> Any:
    """Return the bfloat16 number at `address` as a float."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        wide = builder.zext(_load(builder, args[0], _I16), _I32)
        return builder.bitcast(builder.shl(wide, _I32(16)), _F32)

    return types.float32(types.int64), generate


@intrinsic
def load_scalar_fp16(typing: Any, address: Any) -> Any:
    """Return the float16 number at `address` as a float."""
    return types.float32(types.int64), lambda context, builder, sig, args: builder.fpext(
        _load(builder, args[0], _F16), _F32
    )


@intrinsic
def first(typing: Any, x: Any) -> Any:
    """Return lane 0."""
    return types.float32(vec), lambda context, builder, sig, args: builder.extract_element(args[0], _I32(0))


@intrinsic
def load_int32(typing: Any, address: Any) -> Any:
    """Return the int32 at `address`, as int64."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.sext(_load(builder, args[0], _I32), ir.IntType(64))

    return types.int64(types.int64), generate


@intrinsic
def load_int64(typing: Any, address: Any) -> Any:
    """Return the int64 at `address`."""
    return types.int64(types.int64), lambda context, builder, sig, args: _load(builder, args[0], ir.IntType(64))


@intrinsic
def store_int64(typing: Any, address: Any, x: Any) -> Any:
    """Write one int64 to `address`."""
    return types.none(types.int64, types.int64), lambda context, builder, sig, args: _store(
        context, builder, args[1], args[0], 8
    )


@intrinsic
def store_int32(typing: Any, address: Any, x: Any) -> Any:
    """Write the low half of an int64 to `address`."""
    return types.none(types.int64, types.int64), lambda context, builder, sig, args: _store(
        context, builder, builder.trunc(args[1], _I32), args[0]
    )


@intrinsic
def fetch_add(typing: Any, address: Any, step: Any) -> Any:
    """Atomically add to the int64 at `address`; return what it was."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        pointer = builder.inttoptr(args[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", pointer, args[1], "monotonic")

    return types.int64(types.int64, types.int64), generate


@intrinsic
def load_bf16(typing: Any, address: Any) -> Any:
    """Return 16 bfloat16 numbers as floats."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        wide = builder.zext(_load(builder, args[0], _HVEC), _IVEC)
        return builder.bitcast(builder.shl(wide, _integers(16)), _VEC)

    return vec(types.int64), generate


@intrinsic
def round_bf16(typing: Any, x: Any) -> Any:
    """Round to bfloat16, to nearest even; NaN stays NaN."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        bits = builder.bitcast(args[0], _IVEC)
        odd = builder.and_(builder.lshr(bits, _integers(16)), _integers(1))
        rounded = builder.add(builder.add(bits, odd), _integers(0x7FFF))
        rounded = builder.bitcast(builder.and_(rounded, _integers(0xFFFF0000)), _VEC)
        return builder.select(builder.fcmp_unordered("uno", args[0], args[0]), args[0], rounded)

    return vec(vec), generate


@intrinsic
def store_bf16(typing: Any, address: Any, x: Any) -> Any:
    """Write numbers that `round_bf16` returned as 16 bfloat16 numbers."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        high = builder.lshr(builder.bitcast(args[1], _IVEC), _integers(16))
        return _store(context, builder, builder.trunc(high, _HVEC), args[0], 2)

    return types.none(types.int64, vec), generate


@intrinsic
def load_fp16(typing: Any, address: Any) -> Any:
    """Return 16 float16 numbers as floats."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.fpext(_load(builder, args[0], ir.VectorType(_F16, LANES)), _VEC)

    return vec(types.int64), generate


@intrinsic
def store_fp16(typing: Any, address: Any, x: Any) -> Any:
    """Write 16 floats as float16, rounded to nearest even."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _store(context, builder, builder.fptrunc(args[1], ir.VectorType(_F16, LANES)), args[0], 2)

    return types.none(types.int64, vec), generate


@intrinsic
def round_fp16(typing: Any, x: Any) -> Any:
    """Round to float16."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.fpext(builder.fptrunc(args[0], ir.VectorType(_F16, LANES)), _VEC)

    return vec(vec), generate


@intrinsic
def splat(typing: Any, x: Any) -> Any:
    """Return a vector with `x` in every lane."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        first = builder.insert_element(ir.Constant(_VEC, ir.Undefined), args[0], _I32(0))
        return _shuffle(builder, first, first, [0] * LANES)

    return vec(types.float32), generate


def _arithmetic(python_operator: Any, instruction: str) -> None:
    """Let compiled code write `x + y` for two vectors."""

    @intrinsic
    def apply(typing: Any, x: Any, y: Any) -> Any:
        return vec(vec, vec), lambda context, builder, sig, args: getattr(builder, instruction)(*args)

    @overload(python_operator)
    def typed(x, y):  # type: ignore[no-untyped-def]  # numba compares this signature with the lambda's
        if isinstance(x, Vec) and isinstance(y, Vec):
            return lambda x, y: apply(x, y)
        return None


_arithmetic(operator.add, "fadd")
_arithmetic(operator.sub, "fsub")
_arithmetic(operator.mul, "fmul")
_arithmetic(operator.truediv, "fdiv")


@intrinsic
def fma(typing: Any, x: Any, y: Any, z: Any) -> Any:
    """Return x·y + z, fused where the machine can."""
    return vec(vec, vec, vec), lambda context, builder, sig, args: _call(
        builder, "llvm.fmuladd.v16f32", _VEC, list(args)
    )


@intrinsic
def where_less(typing: Any, x: Any, y: Any, below: Any, otherwise: Any) -> Any:
    """Return `below` in lanes where x < y, else `otherwise` (also where either is NaN)."""
    return vec(vec, vec, vec, vec), lambda context, builder, sig, args: builder.select(
        builder.fcmp_ordered("<", args[0], args[1]), args[2], args[3]
    )


@intrinsic
def total(typing: Any, x: Any) -> Any:
    """Return the sum of the lanes."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        start = ir.Constant(_F32, -0.0)
        return _call(builder, "llvm.vector.reduce.fadd.v16f32", _F32, [start, args[0]], fastmath=("reassoc",))

    return types.float32(vec), generate


def _in_quads(lanes: list[int]) -> list[int]:
    """Repeat a choice of lanes 0-3 (first operand) and 16-19 (second) in all four quarters of a vector."""
    return [lane + 4 * quarter for quarter in range(4) for lane in lanes]


def _quarters(chosen: list[int]) -> list[int]:
    """Choose whole quarters: 0-3 of the first operand, 4-7 of the second."""
    return [4 * quarter + lane for quarter in chosen for lane in range(4)]


_TREE = (
    (_in_quads([0, 16, 1, 17]), _in_quads([2, 18, 3, 19])),
    (_in_quads([0, 1, 16, 17]), _in_quads([2, 3, 18, 19])),
    (_quarters([0, 2, 4, 6]), _quarters([1, 3, 5, 7])),
    (_quarters([0, 2, 4, 6]), _quarters([1, 3, 5, 7])),
)


@intrinsic
def totals(typing: Any, rows: Any) -> Any:
    """Return sixteen sums at once: lane i is the sum of the lanes of the i-th vector of the tuple.

    A tree of 15 additions; sixteen calls of `total` would cost four times the instructions.
    """

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        values = [builder.extract_value(args[0], i) for i in range(LANES)]
        for left, right in _TREE:
            values = [
                builder.fadd(_shuffle(builder, x, y, left), _shuffle(builder, x, y, right))
                for x, y in zip(values[::2], values[1::2], strict=True)
            ]
        return values[0]

    return vec(types.UniTuple(vec, LANES)), generate


@intrinsic(prefer_literal=True)
def quad(typing: Any, x: Any, index: Any) -> Any:
    """Return lanes 4·index to 4·index+3 of `x`, repeated four times; `index` is a literal."""
    chosen = index.literal_value
    return vec(vec, index), lambda context, builder, sig, args: _shuffle(
        builder, args[0], args[0], _quarters([chosen] * 4)
    )


@intrinsic(prefer_literal=True)
def lane(typing: Any, x: Any, index: Any) -> Any:
    """Return lane `index` of `x` in every lane; `index` is a literal."""
    chosen = index.literal_value
    return vec(vec, index), lambda context, builder, sig, args: _shuffle(builder, args[0], args[0], [chosen] * LANES)


@intrinsic
def load_quad(typing: Any, address: Any) -> Any:
    """Return the four floats at `address`, repeated four times."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        four = _load(builder, args[0], ir.VectorType(_F32, 4))
        return _shuffle(builder, four, four, [0, 1, 2, 3] * 4)

    return vec(types.int64), generate


@intrinsic
def store_quad(typing: Any, address: Any, x: Any) -> Any:
    """Write lanes 0-3 to `address`."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _store(context, builder, _shuffle(builder, args[1], args[1], [0, 1, 2, 3]), args[0])

    return types.none(types.int64, vec), generate


@intrinsic
def scale_by_power(typing: Any, x: Any, shifted: Any) -> Any:
    """Return x·2^n where `shifted` is n + 1.5·2^23, whose low mantissa bits hold n."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        bits = builder.shl(builder.bitcast(args[1], _IVEC), _integers(23))
        power = builder.bitcast(builder.add(bits, _integers(127 << 23)), _VEC)
        return builder.fmul(args[0], power)

    return vec(vec, vec), generate
