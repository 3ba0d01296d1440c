"""The formulas of a KDA layer in Triton, each once, for the decode and the prefill kernels; float32 throughout.

`reference.py` has the same formulas in torch. Exponentials, logarithms and reciprocals are single instructions of
the device (relative error 2^-22, subnormals are zero): what Triton emits for them otherwise spends half of a
prefill's instructions on subnormal results. Triton's interpreter has no device, so it gets Triton's own.
"""
# mypy: disallow-untyped-defs=false, disallow-incomplete-defs=false
# mypy: disable-error-code="assignment"
# Triton's compiler reads these functions, not Python: a block of any shape has no Python type.

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
L2_EPS = tl.constexpr(1e-6)

INTERPRETED: bool = triton.knobs.runtime.interpret
"""Whether kernels run in Triton's interpreter: TRITON_INTERPRET=1 when this module was imported."""


if INTERPRETED:

    @triton.jit
    def exp2(x):
        """Return 2^x."""
        return tl.exp2(x)

    @triton.jit
    def log2(x):
        """Return the base-2 logarithm."""
        return tl.log2(x)

    @triton.jit
    def reciprocal(x):
        """Return 1/x."""
        return 1.0 / x

    @triton.jit
    def fused(x, y, z):
        """Return x·y + z, rounded twice: nothing that the interpreter runs is fused."""
        return x * y + z

    @triton.jit
    def prefetch(ptrs):
        """Do nothing: the interpreter has no cache."""

    @triton.jit
    def narrow(x, dtype: tl.constexpr):
        """Round to another dtype."""
        return x.to(dtype)

else:

    @triton.jit
    def exp2(x):
        """Return 2^x."""
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)

    @triton.jit
    def log2(x):
        """Return the base-2 logarithm."""
        return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)

    @triton.jit
    def reciprocal(x):
        """Return 1/x."""
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)

    @triton.jit
    def fused(x, y, z):
        """Return x·y + z, rounded once."""
        return tl.fma(x, y, z)

    @triton.jit
    def prefetch(ptrs):
        """Ask for what is read later."""
        tl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [ptrs], tl.int32, False, 1)

    @triton.jit
    def narrow(x, dtype: tl.constexpr):
        """Round to another dtype; to bfloat16 two at a time, where Triton would convert one by one."""
        if dtype == tl.bfloat16:
            return tl.inline_asm_elementwise("cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [x], tl.bfloat16, True, 2)
        else:
            return x.to(dtype)


@triton.jit
def sigmoid(x):
    """Return 1 / (1 + exp(-x))."""
    return reciprocal(1.0 + exp2(x * -LOG2E))


@triton.jit
def silu(x):
    """Return x·sigmoid(x)."""
    return x * sigmoid(x)


@triton.jit
def log2_decay(gate, rate, bias):
    """Return log2 a_t = -rate·softplus(gate + bias)·log2(e); `rate` is exp(A_log).

    log2(1+y) with y = exp(-|x|) does not overflow; below y = 0.01 its series keeps what 1+y would round away.
    """
    x = gate + bias
    y = exp2(tl.abs(x) * -LOG2E)
    series = y * (y * (y * (LOG2E / 3) - 0.5 * LOG2E) + LOG2E)
    log1p = tl.where(y < 0.01, series, log2(1.0 + y))
    return -rate * (tl.maximum(x, 0.0) * LOG2E + log1p)


@triton.jit
def inverse_norm(sum_of_squares):
    """Return the factor of the L2 norm of q and k."""
    return tl.rsqrt(sum_of_squares + L2_EPS)


@triton.jit
def gated_rms_norm(o, inverse_rms, weight, gate):
    """Return the normalised head times the sigmoid of the raw output gate (Eq. 10)."""
    return o * inverse_rms * weight * sigmoid(gate)


@triton.jit
def everywhere(condition, SHAPE: tl.constexpr):
    """Return a mask that is the scalar `condition` in every element; the interpreter takes no scalar mask."""
    return tl.full(SHAPE, 1, tl.int1) & condition


@triton.jit
def side_by_side(vectors, COUNT: tl.constexpr):
    """Return vectors ``[n]`` as the columns of a tile ``[n, COUNT]``; COUNT is 2, 4, 8 or 16."""
    LENGTH: tl.constexpr = vectors[0].shape[0]
    for step in tl.static_range(1, 5):
        if COUNT >> step > 0:
            joined = ()
            for i in tl.static_range(COUNT >> step):
                joined = joined + (tl.join(vectors[i], vectors[i + (COUNT >> step)]),)
            vectors = joined
    return tl.reshape(vectors[0], (LENGTH, COUNT))


@triton.jit
def scalars(x, COUNT: tl.constexpr):
    """Return the elements of a vector of COUNT, which is 2, 4, 8 or 16."""
    parts = (x,)
    for step in tl.static_range(4):
        if COUNT >> step > 1:
            evens, odds = (), ()
            for i in tl.static_range(1 << step):
                if COUNT >> step > 2:
                    even, odd = tl.split(tl.reshape(parts[i], (COUNT >> step + 1, 2)))
                else:
                    even, odd = tl.split(parts[i])
                evens, odds = evens + (even,), odds + (odd,)
            parts = evens + odds
    return parts


@triton.jit
def sums_of(vectors, FIRST: tl.constexpr, COUNT: tl.constexpr):
    """Return the sums of at most 16 of the vectors, from FIRST on."""
    LEFT: tl.constexpr = COUNT - FIRST
    WIDTH: tl.constexpr = 2 if LEFT <= 2 else 4 if LEFT <= 4 else 8 if LEFT <= 8 else 16
    some = ()
    for i in tl.static_range(FIRST, FIRST + WIDTH):
        some = some + (vectors[i if i < COUNT else FIRST],)
    return scalars(tl.sum(side_by_side(some, WIDTH), axis=0), WIDTH)


@triton.jit
def channel_sums(vectors, COUNT: tl.constexpr):
    """Return the sum of each of COUNT vectors, at least two; sixteen are taken in one round of barriers."""
    found = ()
    for first in tl.static_range(0, COUNT, 16):
        found = found + sums_of(vectors, first, COUNT)
    return found


@triton.jit
def add3(a, b, c, x, y, z):
    """Combine three sums at once, for `tl.reduce` over a tuple."""
    return a + x, b + y, c + z


@triton.jit
def largest(x):
    """Return the largest magnitude in a tile of three dimensions, by its first one."""
    return tl.max(tl.max(tl.abs(x), axis=2), axis=1)
