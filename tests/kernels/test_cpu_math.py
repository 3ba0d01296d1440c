"""The elementary functions of the CPU kernels against numpy in float64."""

from __future__ import annotations

import numpy as np
import pytest
from numba import njit

from kimi_vllm.kernels.cpu import math, simd


@njit
def _apply_exp(source, target, count):  # type: ignore[no-untyped-def]
    for i in range(0, 4 * count, 64):
        simd.store(target + i, math.exp(simd.load(source + i)))


@njit
def _apply_softplus(source, target, count):  # type: ignore[no-untyped-def]
    for i in range(0, 4 * count, 64):
        simd.store(target + i, math.softplus(simd.load(source + i)))


@njit
def _apply_sigmoid(source, target, count):  # type: ignore[no-untyped-def]
    for i in range(0, 4 * count, 64):
        simd.store(target + i, math.sigmoid(simd.load(source + i)))


@pytest.mark.parametrize(
    ("apply", "gold", "low", "high"),
    [
        (_apply_exp, np.exp, -86.9, 88.0),
        (_apply_softplus, lambda x: np.logaddexp(0.0, x), -86.0, 100.0),
        (_apply_sigmoid, lambda x: 1 / (1 + np.exp(-x)), -85.0, 100.0),
    ],
    ids=["exp", "softplus", "sigmoid"],
)
def test_elementary_functions_keep_seven_digits(apply, gold, low, high) -> None:  # type: ignore[no-untyped-def]
    x = np.concatenate([np.linspace(low, high, 1 << 18), np.linspace(-1, 1, 1 << 18)]).astype(np.float32)
    y = np.empty_like(x)
    apply(x.ctypes.data, y.ctypes.data, x.size)
    expected = gold(x.astype(np.float64))
    assert (np.abs(y - expected) / expected).max() <= 4e-7


def test_exp_saturates_and_lets_nan_through() -> None:
    x = np.array([-np.inf, -1e30, -88, 89, np.inf, np.nan] + [0.0] * 10, dtype=np.float32)
    y = np.empty_like(x)
    _apply_exp(x.ctypes.data, y.ctypes.data, x.size)
    assert y[:3].tolist() == [0, 0, 0]
    assert np.isfinite(y[3:5]).all()
    assert np.isnan(y[5])
