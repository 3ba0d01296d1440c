"""Matrix products of a few rows on CUDA: a decode step of a small batch, bound by reading the weights once.

One program owns ROWS outputs and walks K; products are on CUDA cores, since for a handful of rows tensor cores would
wait for memory all the same. Sums are float32 in a fixed order, so a row's result does not depend on the other rows.
FP8 weights meet activations as they are: quantising those too would read no byte less, and take a launch before it.
"""
# mypy: disallow-untyped-defs=false, disallow-incomplete-defs=false

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kimi_vllm.kernels.cuda import launch
from kimi_vllm.kernels.cuda.scales import Scales


@triton.jit(do_not_specialize=["scale_row", "scale_column"], do_not_specialize_on_alignment=["x_ptr", "out_ptr"])
def _skinny(
    x_ptr, weight_ptr, scale_ptr, out_ptr, num_outputs, x_stride, out_stride, scale_row, scale_column,
    M: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr,
    SCALED: tl.constexpr, BLOCK: tl.constexpr, launch_pdl: tl.constexpr,
):  # fmt: skip
    """Multiply M rows of x with ROWS rows of the weights."""
    first = tl.program_id(0) * ROWS
    n = first + tl.arange(0, ROWS)
    k = tl.arange(0, STEP)
    row_ptrs = weight_ptr + n[:, None].to(tl.int64) * K + k[None, :]
    inside = (n < num_outputs)[:, None]
    # Weights are nobody's output: the first of them may come before the kernel ahead has ended.
    w = tl.load(row_ptrs, mask=inside & (k < K)[None, :], other=0.0, eviction_policy="evict_first")  # [ROWS, STEP]
    if launch_pdl:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    totals = tl.zeros((M, ROWS, STEP), tl.float32)
    m = tl.arange(0, M)
    for start in tl.static_range(0, K, STEP):
        there = start + k < K
        a = tl.load(x_ptr + m[:, None] * x_stride + start + k[None, :], mask=there[None, :], other=0.0).to(tl.float32)
        if BLOCK > 0:
            a *= block_scales(scale_ptr, first, start + k, there, scale_row, scale_column, BLOCK)[None, :]
        here = w
        if start + STEP < K:
            ahead = inside & (start + STEP + k < K)[None, :]
            w = tl.load(row_ptrs + start + STEP, mask=ahead, other=0.0, eviction_policy="evict_first")
        totals += a[:, None, :] * here.to(tl.float32)[None, :, :]
    y = tl.sum(totals, axis=2)  # [M, ROWS]
    if SCALED and BLOCK == 0:
        y *= tl.load(scale_ptr + n * scale_row, mask=n < num_outputs, other=0.0)[None, :]
    y_ptrs = out_ptr + m[:, None] * out_stride + n[None, :]
    tl.store(y_ptrs, y.to(out_ptr.dtype.element_ty), mask=(n < num_outputs)[None, :])


@triton.jit
def block_scales(scale_ptr, first, k, there, row_stride, column_stride, BLOCK: tl.constexpr):
    """Load the scales of inputs k for a program's outputs, which lie in one block: ROWS divides BLOCK."""
    return tl.load(scale_ptr + first // BLOCK * row_stride + k // BLOCK * column_stride, mask=there, other=0.0)


def skinny_linear(
    x: Tensor, weight: Tensor, out: Tensor, config: launch.Skinny, scales: Scales | None = None
) -> Tensor:
    """Write ``x @ (scales * weight).T`` for a few rows of `x`; see `launch.skinny` for which.

    Args:
        x: ``[M, K]`` with M a power of two; its last dimension contiguous.
        weight: ``[N, K]`` contiguous, of any floating dtype.
        out: ``[M, N]``, written, in any floating dtype.
        config: launch parameters; its rows divide a block of `scales`.
        scales: of quantised weights.
    """
    _skinny[(triton.cdiv(weight.shape[0], config.rows),)](
        x, weight, weight if scales is None else scales.values, out, weight.shape[0], x.stride(0), out.stride(0),
        *(scales.strides if scales else (0, 0)),
        M=x.shape[0], K=weight.shape[1], ROWS=config.rows, STEP=config.step,
        SCALED=scales is not None, BLOCK=scales.block if scales else 0,
        num_warps=config.warps, **launch.pdl(x.device),
    )  # fmt: skip
    return out
