"""The routed experts of a decode step on CUDA: chosen, and for one or a few tokens two launches that read each once.

Nothing is sorted by expert: with few tokens hardly two of them meet in one, so every (token, expert) pair is a product
of one row on CUDA cores, as in skinny.py. A shared expert is one more pair of each token, the last and of weight 1.
Sums are float32 in a fixed order, so no token depends on the others.
"""
# mypy: disallow-untyped-defs=false, disallow-incomplete-defs=false

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kimi_vllm.kernels.cuda import launch
from kimi_vllm.kernels.cuda.scales import Scales
from kimi_vllm.kernels.cuda.skinny import block_scales


@dataclass(frozen=True, slots=True)
class SharedExpert:
    """An expert of every token.

    Attributes:
        w13: ``[2 * intermediate, hidden]`` contiguous.
        w2: ``[hidden, intermediate]`` contiguous.
        scales: of both, if they are quantised.
    """

    w13: Tensor
    w2: Tensor
    scales: tuple[Scales, Scales] | None = None

    def like(self, w13: Tensor, w2: Tensor, scales: tuple[Scales, Scales] | None) -> bool:
        """Whether routed experts are of the same size, dtype and form."""
        own = [(each.block, each.strides) for each in self.scales or ()]
        same = (self.w13.shape, self.w2.shape) == (w13.shape[1:], w2.shape[1:])
        alike = (self.w13.dtype, self.w2.dtype) == (w13.dtype, w2.dtype)
        return same and alike and own == [(each.block, each.strides) for each in scales or ()]


@triton.jit(do_not_specialize_on_alignment=["logits_ptr", "padding_ptr", "weights_ptr", "ids_ptr"])
def _choose_experts(
    logits_ptr, bias_ptr, padding_ptr, weights_ptr, ids_ptr, experts, scaling,
    BLOCK: tl.constexpr, TOP_K: tl.constexpr, TOP_BLOCK: tl.constexpr, NORMALISE: tl.constexpr,
    PADDED: tl.constexpr, launch_pdl: tl.constexpr,
):  # fmt: skip
    """Choose the TOP_K experts of the largest biased scores for one token, and their weights."""
    token = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, BLOCK)
    offset = tl.load(bias_ptr + e, mask=e < experts, other=float("-inf"))
    if launch_pdl:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    chooser = token
    if PADDED:
        chooser = tl.where(tl.load(padding_ptr + token) != 0, 0, token)
    score = 1 / (1 + tl.exp(-tl.load(logits_ptr + chooser * experts + e, mask=e < experts, other=0.0)))
    biased = score + offset
    place = tl.arange(0, TOP_BLOCK)
    chosen, weight = tl.zeros((TOP_BLOCK,), tl.int32), tl.zeros((TOP_BLOCK,), tl.float32)
    for j in tl.static_range(TOP_K):
        # A row of padding can be NaN, of which no index is the largest; whichever comes must be an expert.
        best = tl.minimum(tl.argmax(biased, axis=0), experts - 1)
        weight = tl.where(place == j, tl.sum(tl.where(e == best, score, 0.0), axis=0), weight)
        chosen = tl.where(place == j, best, chosen)
        biased = tl.where(e == best, float("-inf"), biased)
    if NORMALISE:
        weight /= tl.sum(weight, axis=0)
    tl.store(weights_ptr + token * TOP_K + place, weight * scaling, mask=place < TOP_K)
    tl.store(ids_ptr + token * TOP_K + place, chosen, mask=place < TOP_K)


@triton.jit(
    do_not_specialize=["scale_expert", "scale_row", "scale_column"],
    do_not_specialize_on_alignment=["x_ptr", "ids_ptr", "out_ptr"],
)
def _experts_up(
    x_ptr, w13_ptr, shared_ptr, scale_ptr, shared_scale_ptr, ids_ptr, out_ptr, inner, x_stride,
    scale_expert, scale_row, scale_column,
    K: tl.constexpr, TOP_K: tl.constexpr, PAIRS: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr,
    SCALED: tl.constexpr, BLOCK: tl.constexpr, launch_pdl: tl.constexpr,
):  # fmt: skip
    """Compute ROWS channels of ``silu(gate x) * (up x)`` for one token and expert."""
    pair = tl.program_id(1)
    first = tl.program_id(0) * ROWS
    n = first + tl.arange(0, ROWS)
    k = tl.arange(0, STEP)
    if launch_pdl:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    token, place = (pair // PAIRS).to(tl.int64), pair % PAIRS
    if place < TOP_K:
        expert = tl.load(ids_ptr + token * TOP_K + place).to(tl.int64)
        shared_ptr = w13_ptr + expert * 2 * inner * K
        shared_scale_ptr = scale_ptr + expert * scale_expert
    scale_ptr = shared_scale_ptr
    token_ptr = x_ptr + token * x_stride
    inside = (n < inner)[:, None]
    gate_ptrs = shared_ptr + n[:, None].to(tl.int64) * K + k[None, :]
    up_ptrs = gate_ptrs + inner.to(tl.int64) * K
    gate, up = tl.zeros((ROWS, STEP), tl.float32), tl.zeros((ROWS, STEP), tl.float32)
    for start in tl.static_range(0, K, STEP):
        there = start + k < K
        mask = inside & there[None, :]
        g = tl.load(gate_ptrs + start, mask=mask, other=0.0, eviction_policy="evict_first")
        u = tl.load(up_ptrs + start, mask=mask, other=0.0, eviction_policy="evict_first")
        a = tl.load(token_ptr + start + k, mask=there, other=0.0).to(tl.float32)
        b = a
        if BLOCK > 0:
            a *= block_scales(scale_ptr, first, start + k, there, scale_row, scale_column, BLOCK)
            b *= block_scales(scale_ptr, inner + first, start + k, there, scale_row, scale_column, BLOCK)
        gate += a[None, :] * g.to(tl.float32)
        up += b[None, :] * u.to(tl.float32)
    z, y = tl.sum(gate, axis=1), tl.sum(up, axis=1)  # [ROWS]
    if SCALED and BLOCK == 0:
        z *= tl.load(scale_ptr + n * scale_row, mask=n < inner, other=0.0)
        y *= tl.load(scale_ptr + (inner + n) * scale_row, mask=n < inner, other=0.0)
    y *= z / (1 + tl.exp(-z))
    tl.store(out_ptr + pair.to(tl.int64) * inner + n, y.to(out_ptr.dtype.element_ty), mask=n < inner)


@triton.jit(
    do_not_specialize=["scale_expert", "scale_row", "scale_column"],
    do_not_specialize_on_alignment=["ids_ptr", "weights_ptr", "out_ptr"],
)
def _experts_down(
    act_ptr, w2_ptr, shared_ptr, scale_ptr, shared_scale_ptr, ids_ptr, weights_ptr, out_ptr, hidden,
    scale_expert, scale_row, scale_column,
    I: tl.constexpr, TOP_K: tl.constexpr, PAIRS: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr,
    SCALED: tl.constexpr, BLOCK: tl.constexpr, launch_pdl: tl.constexpr,
):  # fmt: skip
    """Compute ROWS channels of the weighted sum over one token's experts."""
    token = tl.program_id(1)
    first = tl.program_id(0) * ROWS
    n = first + tl.arange(0, ROWS)
    k = tl.arange(0, STEP)
    inside = (n < hidden)[:, None]
    # The kernel ahead let this one start after it had waited itself, so ids are there; its own output is not yet.
    row_ptrs = w2_ptr + (tl.load(ids_ptr + token * TOP_K).to(tl.int64) * hidden + n[:, None]) * I + k[None, :]
    w = tl.load(row_ptrs, mask=inside & (k < I)[None, :], other=0.0, eviction_policy="evict_first")
    if launch_pdl:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    totals = tl.zeros((ROWS, STEP), tl.float32)
    for j in tl.static_range(PAIRS):
        weight, expert_scale_ptr = 1.0, shared_scale_ptr
        if j < TOP_K:
            weight = tl.load(weights_ptr + token * TOP_K + j)
            if SCALED:
                expert_scale_ptr = scale_ptr + tl.load(ids_ptr + token * TOP_K + j).to(tl.int64) * scale_expert
        if SCALED and BLOCK == 0:
            factor = tl.load(expert_scale_ptr + n * scale_row, mask=n < hidden, other=0.0)
        pair = token.to(tl.int64) * PAIRS + j
        for start in tl.static_range(0, I, STEP):
            here = w
            if start + STEP < I:
                w = tl.load(
                    row_ptrs + start + STEP, mask=inside & (start + STEP + k < I)[None, :], other=0.0,
                    eviction_policy="evict_first",
                )  # fmt: skip
            elif j + 1 < PAIRS:
                if j + 1 < TOP_K:
                    expert_ptr = w2_ptr + tl.load(ids_ptr + token * TOP_K + j + 1).to(tl.int64) * hidden * I
                else:
                    expert_ptr = shared_ptr
                row_ptrs = expert_ptr + n[:, None].to(tl.int64) * I + k[None, :]
                w = tl.load(row_ptrs, mask=inside & (k < I)[None, :], other=0.0, eviction_policy="evict_first")
            a = tl.load(act_ptr + pair * I + start + k, mask=start + k < I, other=0.0).to(tl.float32) * weight
            if BLOCK > 0:
                a *= block_scales(expert_scale_ptr, first, start + k, start + k < I, scale_row, scale_column, BLOCK)
            if SCALED and BLOCK == 0:
                totals += (factor[:, None] * a[None, :]) * here.to(tl.float32)
            else:
                totals += a[None, :] * here.to(tl.float32)
    y = tl.sum(totals, axis=1)  # [ROWS]
    tl.store(out_ptr + token.to(tl.int64) * hidden + n, y.to(out_ptr.dtype.element_ty), mask=n < hidden)


def choose_experts(
    logits: Tensor, bias: Tensor, top_k: int, *, normalise: bool, scaling: float, padding: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Choose each token's experts by ``sigmoid(logits) + bias`` and weight them by ``sigmoid(logits)``.

    Rows of padding choose what the first row chooses, so that they add no expert to those that are read.

    Args:
        logits: ``[M, E]`` float32 contiguous.
        bias: ``[E]`` float32.
        top_k: experts of a token, at most E.
        normalise: whether a token's weights sum to `scaling`; else each is multiplied by it.
        padding: ``[M]`` bool, which rows fill up a CUDA graph; None if none does.

    Returns:
        Weights ``[M, top_k]`` float32 and experts ``[M, top_k]`` int32, the best first.
    """
    tokens, experts = logits.shape
    weights = logits.new_empty(tokens, top_k)
    ids = logits.new_empty(tokens, top_k, dtype=torch.int32)
    _choose_experts[(tokens,)](
        logits, bias, logits if padding is None else padding, weights, ids, experts, scaling,
        BLOCK=triton.next_power_of_2(experts), TOP_K=top_k, TOP_BLOCK=triton.next_power_of_2(top_k),
        NORMALISE=normalise, PADDED=padding is not None, num_warps=1, **launch.pdl(logits.device),
    )  # fmt: skip
    return weights, ids


def skinny_experts(
    x: Tensor,
    w13: Tensor,
    w2: Tensor,
    weights: Tensor,
    ids: Tensor,
    config: launch.SkinnyExperts,
    scales: tuple[Scales, Scales] | None = None,
    shared: SharedExpert | None = None,
) -> Tensor:
    """``sum_j weights[t, j] * w2[e] @ (silu(gate[e] @ x[t]) * (up[e] @ x[t]))`` with ``e = ids[t, j]``.

    Args:
        x: ``[M, hidden]``; its last dimension contiguous.
        w13: ``[E, 2 * intermediate, hidden]`` contiguous, gates before ups.
        w2: ``[E, hidden, intermediate]`` contiguous.
        weights: ``[M, top_k]`` float32 contiguous.
        ids: ``[M, top_k]`` int32 or int64 contiguous, each in [0, E).
        config: launch parameters; their rows divide a block of `scales`.
        scales: of quantised weights, `w13` and `w2`; a block of outputs does not hold both gates and ups.
        shared: an expert of the same size and dtype, and with scales of the same form, that all tokens add.

    Returns:
        ``[M, hidden]`` in the dtype of `x`.
    """
    tokens, top_k = ids.shape
    hidden, inner = w2.shape[1:]
    pairs = top_k + (shared is not None)
    act, out = x.new_empty(tokens * pairs, inner), x.new_empty(tokens, hidden)
    pdl = launch.pdl(x.device)
    up, down = scales or (None, None)
    shared = shared or SharedExpert(w13, w2, scales)
    shared_up, shared_down = shared.scales or (None, None)
    _experts_up[(triton.cdiv(inner, config.up.rows), tokens * pairs)](
        x, w13, shared.w13, *(each.values if each else w13 for each in (up, shared_up)), ids, act, inner, x.stride(0),
        *_strides(up), K=hidden, TOP_K=top_k, PAIRS=pairs, ROWS=config.up.rows, STEP=config.up.step,
        SCALED=up is not None, BLOCK=up.block if up else 0, num_warps=config.up.warps, **pdl,
    )  # fmt: skip
    _experts_down[(triton.cdiv(hidden, config.down.rows), tokens)](
        act, w2, shared.w2, *(each.values if each else w2 for each in (down, shared_down)), ids, weights, out, hidden,
        *_strides(down), I=inner, TOP_K=top_k, PAIRS=pairs, ROWS=config.down.rows, STEP=config.down.step,
        SCALED=down is not None, BLOCK=down.block if down else 0, num_warps=config.down.warps, **pdl,
    )  # fmt: skip
    return out


def _strides(scales: Scales | None) -> tuple[int, int, int]:
    return (scales.values.stride(0), *scales.strides) if scales else (0, 0, 0)
