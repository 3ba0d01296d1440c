"""Sixteen-lane float vectors for numba: what its own loops cannot promise the compiler.

Numba cannot say that two arrays do not overlap, so LLVM guards every small loop with run-time checks and
keeps nothing in registers across it; and its libm calls are scalar. Here memory is an address (int64), a
vector is a value of type `vec`, and LLVM splits it into whatever registers the machine has. No operation
carries fast-math flags except the order of `total`: NaN and infinity behave, so a sick activation stays
visible.

Everything in this file is callable from compiled code only.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, overload, register_model

LANES = 16
VECTOR_BYTES = 4 * LANES

_I16, _I32, _I64 = ir.IntType(16), ir.IntType(32), ir.IntType(64)
_F16, _F32 = ir.HalfType(), ir.FloatType()
_VEC, _IVEC = ir.VectorType(_F32, LANES), ir.VectorType(_I32, LANES)
_HVEC, _FP16 = ir.VectorType(_I16, LANES), ir.VectorType(_F16, LANES)


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
    value.align = 2 if kind in (_I16, _F16, _HVEC, _FP16) else 4
    return value


def _store(builder: Any, value: Any, address: Any, align: int = 4) -> None:
    builder.store(value, builder.inttoptr(address, value.type.as_pointer())).align = align


def _instructions(result: Any, *parameters: Any) -> Callable[[Callable[..., Any]], Any]:
    """Let compiled code call a function that emits instructions, ``emit(builder, *values)``, by its numba types."""

    def decorate(emit: Callable[..., Any]) -> Any:
        def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            value = emit(builder, *values)
            return context.get_dummy_value() if result is types.none else value

        def typed(typing: Any, *given: Any) -> Any:
            return result(*parameters), generate

        # numba matches arguments by this signature, whose first parameter it takes for the typing context.
        typed.__signature__ = inspect.signature(emit)  # type: ignore[attr-defined]
        typed.__name__, typed.__doc__ = emit.__name__, emit.__doc__
        return intrinsic(typed)

    return decorate


@_instructions(vec, types.int64)
def load(builder: Any, address: Any) -> Any:
    """Return the 16 floats at `address`."""
    return _load(builder, address, _VEC)


@_instructions(types.none, types.int64, vec)
def store(builder: Any, address: Any, x: Any) -> None:
    """Write 16 floats to `address`."""
    _store(builder, x, address)


@_instructions(types.float32, types.int64)
def load_scalar(builder: Any, address: Any) -> Any:
    """Return the float at `address`."""
    return _load(builder, address, _F32)


@_instructions(types.none, types.int64, types.float32)
def store_scalar(builder: Any, address: Any, x: Any) -> None:
    """Write one float to `address`."""
    _store(builder, x, address)


@_instructions(types.float32, types.int64)
def load_scalar_bf16(builder: Any, address: Any) -> Any:
    """Return the bfloat16 number at `address` as a float."""
    wide = builder.zext(_load(builder, address, _I16), _I32)
    return builder.bitcast(builder.shl(wide, _I32(16)), _F32)


@_instructions(types.float32, types.int64)
def load_scalar_fp16(builder: Any, address: Any) -> Any:
    """Return the float16 number at `address` as a float."""
    return builder.fpext(_load(builder, address, _F16), _F32)


@_instructions(types.float32, vec)
def first(builder: Any, x: Any) -> Any:
    """Return lane 0."""
    return builder.extract_element(x, _I32(0))


@_instructions(types.int64, types.int64)
def load_int32(builder: Any, address: Any) -> Any:
    """Return the int32 at `address`, as int64."""
    return builder.sext(_load(builder, address, _I32), _I64)


@_instructions(types.int64, types.int64)
def load_int64(builder: Any, address: Any) -> Any:
    """Return the int64 at `address`."""
    return _load(builder, address, _I64)


@_instructions(types.none, types.int64, types.int64)
def store_int64(builder: Any, address: Any, x: Any) -> None:
    """Write one int64 to `address`."""
    _store(builder, x, address, 8)


@_instructions(types.none, types.int64, types.int64)
def store_int32(builder: Any, address: Any, x: Any) -> None:
    """Write the low half of an int64 to `address`."""
    _store(builder, builder.trunc(x, _I32), address)


@_instructions(types.int64, types.int64, types.int64)
def fetch_add(builder: Any, address: Any, step: Any) -> Any:
    """Atomically add to the int64 at `address`; return what it was."""
    return builder.atomic_rmw("add", builder.inttoptr(address, _I64.as_pointer()), step, "monotonic")


@_instructions(vec, types.int64)
def load_bf16(builder: Any, address: Any) -> Any:
    """Return 16 bfloat16 numbers as floats."""
    wide = builder.zext(_load(builder, address, _HVEC), _IVEC)
    return builder.bitcast(builder.shl(wide, _integers(16)), _VEC)


@_instructions(vec, vec)
def round_bf16(builder: Any, x: Any) -> Any:
    """Round to bfloat16, to nearest even; NaN stays NaN."""
    bits = builder.bitcast(x, _IVEC)
    odd = builder.and_(builder.lshr(bits, _integers(16)), _integers(1))
    rounded = builder.add(builder.add(bits, odd), _integers(0x7FFF))
    rounded = builder.bitcast(builder.and_(rounded, _integers(0xFFFF0000)), _VEC)
    return builder.select(builder.fcmp_unordered("uno", x, x), x, rounded)


@_instructions(types.none, types.int64, vec)
def store_bf16(builder: Any, address: Any, x: Any) -> None:
    """Write numbers that `round_bf16` returned as 16 bfloat16 numbers."""
    high = builder.lshr(builder.bitcast(x, _IVEC), _integers(16))
    _store(builder, builder.trunc(high, _HVEC), address, 2)


@_instructions(vec, types.int64)
def load_fp16(builder: Any, address: Any) -> Any:
    """Return 16 float16 numbers as floats."""
    return builder.fpext(_load(builder, address, _FP16), _VEC)


@_instructions(types.none, types.int64, vec)
def store_fp16(builder: Any, address: Any, x: Any) -> None:
    """Write 16 floats as float16, rounded to nearest even."""
    _store(builder, builder.fptrunc(x, _FP16), address, 2)


@_instructions(vec, vec)
def round_fp16(builder: Any, x: Any) -> Any:
    """Round to float16."""
    return builder.fpext(builder.fptrunc(x, _FP16), _VEC)


@_instructions(vec, types.float32)
def splat(builder: Any, x: Any) -> Any:
    """Return a vector with `x` in every lane."""
    lane_0 = builder.insert_element(ir.Constant(_VEC, ir.Undefined), x, _I32(0))
    return _shuffle(builder, lane_0, lane_0, [0] * LANES)


def _arithmetic(python_operator: Any, instruction: str) -> None:
    """Let compiled code write `x + y` for two vectors."""

    @_instructions(vec, vec, vec)
    def apply(builder: Any, x: Any, y: Any) -> Any:
        return getattr(builder, instruction)(x, y)

    @overload(python_operator)
    def typed(x, y):  # type: ignore[no-untyped-def]  # numba compares this signature with the lambda's
        if isinstance(x, Vec) and isinstance(y, Vec):
            return lambda x, y: apply(x, y)
        return None


_arithmetic(operator.add, "fadd")
_arithmetic(operator.sub, "fsub")
_arithmetic(operator.mul, "fmul")
_arithmetic(operator.truediv, "fdiv")


@_instructions(vec, vec, vec, vec)
def fma(builder: Any, x: Any, y: Any, z: Any) -> Any:
    """Return x·y + z, fused where the machine can."""
    return _call(builder, "llvm.fmuladd.v16f32", _VEC, [x, y, z])


@_instructions(vec, vec, vec, vec, vec)
def where_less(builder: Any, x: Any, y: Any, below: Any, otherwise: Any) -> Any:
    """Return `below` in lanes where x < y, else `otherwise` (also where either is NaN)."""
    return builder.select(builder.fcmp_ordered("<", x, y), below, otherwise)


@_instructions(types.float32, vec)
def total(builder: Any, x: Any) -> Any:
    """Return the sum of the lanes."""
    start = ir.Constant(_F32, -0.0)
    return _call(builder, "llvm.vector.reduce.fadd.v16f32", _F32, [start, x], fastmath=("reassoc",))


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


@_instructions(vec, types.UniTuple(vec, LANES))
def totals(builder: Any, rows: Any) -> Any:
    """Return sixteen sums at once: lane i is the sum of the lanes of the i-th vector of the tuple.

    A tree of 15 additions; sixteen calls of `total` would cost four times the instructions.
    """
    values = [builder.extract_value(rows, i) for i in range(LANES)]
    for left, right in _TREE:
        values = [
            builder.fadd(_shuffle(builder, x, y, left), _shuffle(builder, x, y, right))
            for x, y in zip(values[::2], values[1::2], strict=True)
        ]
    return values[0]


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


@_instructions(vec, types.int64)
def load_quad(builder: Any, address: Any) -> Any:
    """Return the four floats at `address`, repeated four times."""
    four = _load(builder, address, ir.VectorType(_F32, 4))
    return _shuffle(builder, four, four, [0, 1, 2, 3] * 4)


@_instructions(types.none, types.int64, vec)
def store_quad(builder: Any, address: Any, x: Any) -> None:
    """Write lanes 0-3 to `address`."""
    _store(builder, _shuffle(builder, x, x, [0, 1, 2, 3]), address)


@_instructions(vec, vec, vec)
def scale_by_power(builder: Any, x: Any, shifted: Any) -> Any:
    """Return x·2^n where `shifted` is n + 1.5·2^23, whose low mantissa bits hold n."""
    bits = builder.shl(builder.bitcast(shifted, _IVEC), _integers(23))
    return builder.fmul(x, builder.bitcast(builder.add(bits, _integers(127 << 23)), _VEC))
