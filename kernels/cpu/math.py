"""Exponentials, gates and rounding on sixteen-lane vectors, for the loops of the CPU kernels.

All are built from `exp`, whose relative error is below 2e-7 (`tests/kernels/test_cpu_math.py`), and let NaN
through.
"""
# mypy: disallow-untyped-defs=false
# Compiled functions have numba's types; vectors exist nowhere else.

from __future__ import annotations

import math

import numpy as np
from numba import njit

from kimi_vllm.kernels.cpu.simd import (
    fma,
    load,
    load_bf16,
    load_fp16,
    load_scalar,
    load_scalar_bf16,
    load_scalar_fp16,
    round_bf16,
    round_fp16,
    scale_by_power,
    splat,
    store,
    store_bf16,
    store_fp16,
    where_less,
)

FP32, BF16, FP16 = 0, 1, 2
"""How compiled code names the dtype of the activations."""

_f = np.float32
_ZERO, _ONE, _TWO, _MINUS_ONE = _f(0), _f(1), _f(2), _f(-1)
_LOG2_E = _f(1 / math.log(2))
# The high part has nine bits, so that its product with an exponent is exact.
_MINUS_LN2_HIGH, _MINUS_LN2_LOW = _f(-0.693359375), _f(0.693359375 - math.log(2))
# Adding it leaves the rounded number in the low bits of the mantissa.
_SHIFT = _f(1.5 * 2**23)
_EXP_LOW, _EXP_HIGH = _f(-87.0), _f(88.0)
_I2, _I3, _I4, _I5, _I6, _I7 = (_f(1 / math.factorial(n)) for n in range(2, 8))
_R3, _R5, _R7, _R9, _R11, _R13, _R15 = (_f(1 / n) for n in range(3, 17, 2))


@njit(forceinline=True)
def exp(x):
    """Return e^x; zero below -87, e^88 above 88."""
    clamped = where_less(splat(_EXP_HIGH), x, splat(_EXP_HIGH), x)
    shifted = fma(clamped, splat(_LOG2_E), splat(_SHIFT))
    n = shifted - splat(_SHIFT)
    r = fma(n, splat(_MINUS_LN2_LOW), fma(n, splat(_MINUS_LN2_HIGH), clamped))
    p = fma(r, splat(_I7), splat(_I6))
    p = fma(r, p, splat(_I5))
    p = fma(r, p, splat(_I4))
    p = fma(r, p, splat(_I3))
    p = fma(r, p, splat(_I2))
    p = fma(r, p, splat(_ONE))
    p = fma(r, p, splat(_ONE))
    return where_less(x, splat(_EXP_LOW), splat(_ZERO), scale_by_power(p, shifted))


@njit(forceinline=True)
def sigmoid(x):
    """Return 1 / (1 + e^-x)."""
    return splat(_ONE) / (splat(_ONE) + exp(splat(_ZERO) - x))


@njit(forceinline=True)
def softplus(x):
    """Return max(x, 0) + log1p(e^-|x|), which neither overflows nor loses small values.

    log1p(y) = 2 artanh(y / (2 + y)); with y <= 1 eight terms of the series leave 4e-9.
    """
    negated = splat(_ZERO) - x
    y = exp(where_less(x, negated, x, negated))
    s = y / (splat(_TWO) + y)
    square = s * s
    p = fma(square, splat(_R15), splat(_R13))
    p = fma(square, p, splat(_R11))
    p = fma(square, p, splat(_R9))
    p = fma(square, p, splat(_R7))
    p = fma(square, p, splat(_R5))
    p = fma(square, p, splat(_R3))
    p = fma(square, p, splat(_ONE))
    return fma(splat(_TWO) * s, p, where_less(splat(_ZERO), x, x, splat(_ZERO)))


@njit(forceinline=True)
def decay(gate, bias, minus_rate):
    """Return exp(-exp(A_log)·softplus(gate + bias)), the decay of Eq. 1; `minus_rate` is -exp(A_log)."""
    return exp(splat(minus_rate) * softplus(gate + bias))


@njit(forceinline=True)
def load_as(base, index, dtype):
    """Return elements `index` to `index` + 15 of an activation row as floats."""
    if dtype == BF16:
        return load_bf16(base + 2 * index)
    if dtype == FP16:
        return load_fp16(base + 2 * index)
    return load(base + 4 * index)


@njit(forceinline=True)
def load_scalar_as(base, index, dtype):
    """Return element `index` of an activation row as a float."""
    if dtype == BF16:
        return load_scalar_bf16(base + 2 * index)
    if dtype == FP16:
        return load_scalar_fp16(base + 2 * index)
    return load_scalar(base + 4 * index)


@njit(forceinline=True)
def round_as(x, dtype):
    """Round to the dtype of the activations."""
    if dtype == BF16:
        return round_bf16(x)
    if dtype == FP16:
        return round_fp16(x)
    return x


@njit(forceinline=True)
def store_as(base, index, x, dtype):
    """Write elements `index` to `index` + 15 of an activation row."""
    if dtype == BF16:
        store_bf16(base + 2 * index, round_bf16(x))
    elif dtype == FP16:
        store_fp16(base + 2 * index, x)
    else:
        store(base + 4 * index, x)
