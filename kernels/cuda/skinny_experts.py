"""The routed experts of a decode step of one or a few tokens on CUDA: chosen, then two launches that read each once.

Nothing is sorted by expert: with few tokens hardly two of them meet in one, so every (token, expert) pair is a product
of one row on CUDA cores, as in skinny.py. Sums are float32 in a fixed order, so no token depends on the others.
"""
# mypy: disallow-untyped-defs=false, disallow-incomplete-defs=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kimi_vllm.kernels.cuda import launch


@triton.jit(do_not_specialize_on_alignment=["logits_ptr", "weights_ptr", "ids_ptr"])
def _choose_experts(
    logits_ptr, bias_ptr, weights_ptr, ids_ptr, experts, scaling,
    BLOCK: tl.constexpr, TOP_K: tl.constexpr, TOP_BLOCK: tl.constexpr, NORMALISE: tl.constexpr,
    launch_pdl: tl.constexpr,
):  # fmt: skip
    """Choose the TOP_K experts of the largest biased scores for one token, and their weights."""
    token = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, BLOCK)
    offset = tl.load(bias_ptr + e, mask=e < experts, other=float("-inf"))
    if launch_pdl:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    score = 1 / (1 + tl.exp(-tl.load(logits_ptr + token * experts + e, mask=e < experts, other=0.0)))
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


@triton.jit(do_not_specialize_on_alignment=["x_ptr", "ids_ptr", "out_ptr"])
def _experts_up(
    x_ptr, w13_ptr, ids_ptr, out_ptr, inner, x_stride,
    K: tl.constexpr, TOP_K: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr, launch_pdl: tl.constexpr,
):  # fmt: skip
    """Compute ROWS channels of ``silu(gate x) * (up x)`` for one token and expert."""
    pair = tl.program_id(1)
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, STEP)
    if launch_pdl:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    expert = tl.load(ids_ptr + pair).to(tl.int64)
    token_ptr = x_ptr + (pair // TOP_K).to(tl.int64) * x_stride
    inside = (n < inner)[:, None]
    gate_ptrs = w13_ptr + (expert * 2 * inner + n[:, None]) * K + k[None, :]
    up_ptrs = gate_ptrs + inner.to(tl.int64) * K
    gate, up = tl.zeros((ROWS, STEP), tl.float32), tl.zeros((ROWS, STEP), tl.float32)
    for start in tl.static_range(0, K, STEP):
        mask = inside & (start + k < K)[None, :]
        g = tl.load(gate_ptrs + start, mask=mask, other=0.0, eviction_policy="evict_first")
        u = tl.load(up_ptrs + start, mask=mask, other=0.0, eviction_policy="evict_first")
        a = tl.load(token_ptr + start + k, mask=start + k < K, other=0.0).to(tl.float32)[None, :]
        gate += a * g.to(tl.float32)
        up += a * u.to(tl.float32)
    z = tl.sum(gate, axis=1)  # [ROWS]
    y = z / (1 + tl.exp(-z)) * tl.sum(up, axis=1)
    tl.store(out_ptr + pair.to(tl.int64) * inner + n, y.to(out_ptr.dtype.element_ty), mask=n < inner)


@triton.jit(do_not_specialize_on_alignment=["ids_ptr", "weights_ptr", "out_ptr"])
def _experts_down(
    act_ptr, w2_ptr, ids_ptr, weights_ptr, out_ptr, hidden,
    I: tl.constexpr, TOP_K: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr, launch_pdl: tl.constexpr,
):  # fmt: skip
    """Compute ROWS channels of the weighted sum over one token's experts."""
    token = tl.program_id(1)
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, STEP)
    inside = (n < hidden)[:, None]
    # The kernel ahead let this one start after it had waited itself, so ids are there; its own output is not yet.
    row_ptrs = w2_ptr + (tl.load(ids_ptr + token * TOP_K).to(tl.int64) * hidden + n[:, None]) * I + k[None, :]
    w = tl.load(row_ptrs, mask=inside & (k < I)[None, :], other=0.0, eviction_policy="evict_first")
    if launch_pdl:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    totals = tl.zeros((ROWS, STEP), tl.float32)
    for j in tl.static_range(TOP_K):
        pair = token.to(tl.int64) * TOP_K + j
        scale = tl.load(weights_ptr + pair)
        for start in tl.static_range(0, I, STEP):
            here = w
            if start + STEP < I:
                w = tl.load(
                    row_ptrs + start + STEP, mask=inside & (start + STEP + k < I)[None, :], other=0.0,
                    eviction_policy="evict_first",
                )  # fmt: skip
            elif j + 1 < TOP_K:
                row_ptrs = w2_ptr + (tl.load(ids_ptr + pair + 1).to(tl.int64) * hidden + n[:, None]) * I + k[None, :]
                w = tl.load(row_ptrs, mask=inside & (k < I)[None, :], other=0.0, eviction_policy="evict_first")
            a = tl.load(act_ptr + pair * I + start + k, mask=start + k < I, other=0.0).to(tl.float32) * scale
            totals += a[None, :] * here.to(tl.float32)
    y = tl.sum(totals, axis=1)  # [ROWS]
    tl.store(out_ptr + token.to(tl.int64) * hidden + n, y.to(out_ptr.dtype.element_ty), mask=n < hidden)


def choose_experts(
    logits: Tensor, bias: Tensor, top_k: int, *, normalise: bool, scaling: float
) -> tuple[Tensor, Tensor]:
    """Choose each token's experts by ``sigmoid(logits) + bias`` and weight them by ``sigmoid(logits)``.

    Args:
        logits: ``[M, E]`` float32 contiguous.
        bias: ``[E]`` float32.
        top_k: experts of a token, at most E.
        normalise: whether a token's weights sum to `scaling`; else each is multiplied by it.

    Returns:
        Weights ``[M, top_k]`` float32 and experts ``[M, top_k]`` int32, the best first.
    """
    tokens, experts = logits.shape
    weights = logits.new_empty(tokens, top_k)
    ids = logits.new_empty(tokens, top_k, dtype=torch.int32)
    _choose_experts[(tokens,)](
        logits, bias, weights, ids, experts, scaling,
        BLOCK=triton.next_power_of_2(experts), TOP_K=top_k, TOP_BLOCK=triton.next_power_of_2(top_k),
        NORMALISE=normalise, num_warps=1, **launch.pdl(logits.device),
    )  # fmt: skip
    return weights, ids


def skinny_experts(
    x: Tensor, w13: Tensor, w2: Tensor, weights: Tensor, ids: Tensor, config: launch.SkinnyExperts
) -> Tensor:
    """``sum_j weights[t, j] * w2[e] @ (silu(gate[e] @ x[t]) * (up[e] @ x[t]))`` with ``e = ids[t, j]``.

    Args:
        x: ``[M, hidden]``; its last dimension contiguous.
        w13: ``[E, 2 * intermediate, hidden]`` contiguous, gates before ups.
        w2: ``[E, hidden, intermediate]`` contiguous.
        weights: ``[M, top_k]`` float32 contiguous.
        ids: ``[M, top_k]`` int32 or int64 contiguous, each in [0, E).
        config: launch parameters.

    Returns:
        ``[M, hidden]`` in the dtype of `x`.
    """
    tokens, top_k = ids.shape
    hidden, inner = w2.shape[1:]
    act, out = x.new_empty(tokens * top_k, inner), x.new_empty(tokens, hidden)
    pdl = launch.pdl(x.device)
    _experts_up[(triton.cdiv(inner, config.up.rows), tokens * top_k)](
        x, w13, ids, act, inner, x.stride(0),
        K=hidden, TOP_K=top_k, ROWS=config.up.rows, STEP=config.up.step, num_warps=config.up.warps, **pdl,
    )  # fmt: skip
    _experts_down[(triton.cdiv(hidden, config.down.rows), tokens)](
        act, w2, ids, weights, out, hidden,
        I=inner, TOP_K=top_k, ROWS=config.down.rows, STEP=config.down.step, num_warps=config.down.warps, **pdl,
    )  # fmt: skip
    return out
