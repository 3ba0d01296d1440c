"""The executable spec of Kimi Delta Attention: every formula once, plainly, in the precision of its inputs.

Equation numbers are those of the Kimi Linear report (arXiv 2510.26692). `kda_recurrent` is Eq. 1, `kda_chunk`
its chunkwise form (Eq. 6-9). `kda_decode`, `kda_prefill` and `kda_verify` are what the kernels are compared with; they
run on any device, in float32 or, given float64 tensors, in float64. Letters are those of `contract.py`.

Rounding points, the same in every implementation: the convolution's output is rounded to the dtype of `qkv`,
and so is the recurrence's output before its RMS norm. Everything else stays in the working precision.
"""

from __future__ import annotations

from contextlib import suppress
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, einsum

from kimi_vllm.kernels.contract import NULL_SLOT, Activations, DecodeRows, Pools, PrefillRows, Weights, WindowRows

# A development dependency: annotations stay strings unless the tests' import hook evaluates them.
with suppress(ImportError):
    from jaxtyping import Float, Int

L2_EPS = 1e-6
CHUNK = 64
SUB_CHUNK = 16


def short_conv(
    x: Float[Tensor, "T channels"],
    history: Float[Tensor, "past channels"],
    weight: Float[Tensor, "W channels"],
) -> Float[Tensor, "T channels"]:
    """Convolve each channel causally over the last W tokens, then apply SiLU (section 4).

    Args:
        x: Projections of the new tokens.
        history: The W-1 projections before them, oldest first; zeros before the start of a sequence.
        weight: Row W-1 multiplies the current token, row 0 the oldest.

    Returns:
        One row per new token.
    """
    padded = torch.cat([history, x])
    windows = padded.unfold(0, len(weight), 1)  # [T, channels, W]
    return F.silu(einsum("tcw,wc->tc", windows, weight))


def log_decay(
    gate: Float[Tensor, "T H K"], A_log: Float[Tensor, " H"], dt_bias: Float[Tensor, "H K"]
) -> Float[Tensor, "T H K"]:
    """Return log a_t = -exp(A_log)·softplus(gate + dt_bias), natural log, never positive.

    torch's softplus is log1p(exp(x)), and x itself above 20: it neither overflows nor loses small values.
    """
    return -A_log.exp()[:, None] * F.softplus(gate + dt_bias)


def l2_normalise(x: Float[Tensor, "T H K"]) -> Float[Tensor, "T H K"]:
    """Return x / sqrt(sum x² + 1e-6) over the channels of a head."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + L2_EPS)


def gated_rms_norm(
    x: Float[Tensor, "T H V"], out_gate: Float[Tensor, "T H V"], weight: Float[Tensor, " V"], eps: float
) -> Float[Tensor, "T H V"]:
    """Normalise each head, then multiply by the sigmoid of the raw output gate (Eq. 10)."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight * torch.sigmoid(out_gate)


def kda_recurrent(
    q: Float[Tensor, "T H K"],
    k: Float[Tensor, "T H K"],
    v: Float[Tensor, "T H V"],
    g: Float[Tensor, "T H K"],
    beta: Float[Tensor, "T H"],
    state: Float[Tensor, "H V K"],
) -> tuple[Float[Tensor, "T H V"], Float[Tensor, "H V K"]]:
    """Run one sequence token by token: decay, correct, write, then read (Eq. 1).

    Args:
        q, k: Normalised; `q` also carries the scale K^-0.5.
        v: Values.
        g: Log decay per channel, <= 0.
        beta: Write strength in [0, 1].
        state: The state before the first token; not modified.

    Returns:
        The outputs, and the state after the last token.
    """
    outputs = v.new_empty(v.shape)
    for t in range(len(q)):
        state = state * g[t].exp()[:, None, :]
        error = v[t] - einsum("hvk,hk->hv", state, k[t])
        state = state + einsum("h,hv,hk->hvk", beta[t], error, k[t])
        outputs[t] = einsum("hvk,hk->hv", state, q[t])
    return outputs, state


def kda_chunk(
    q: Float[Tensor, "T H K"],
    k: Float[Tensor, "T H K"],
    v: Float[Tensor, "T H V"],
    g: Float[Tensor, "T H K"],
    beta: Float[Tensor, "T H"],
    state: Float[Tensor, "H V K"],
) -> tuple[Float[Tensor, "T H V"], Float[Tensor, "H V K"]]:
    """Run one sequence in chunks of 64 tokens (Eq. 6-9); arguments and results as `kda_recurrent`.

    The reciprocal cumulative decay of Eq. 6 is never formed: `decayed_scores` keeps every exponent <= 0.
    """
    outputs = v.new_empty(v.shape)
    for start in range(0, len(q), CHUNK):
        rows = slice(start, start + CHUNK)
        b_q, b_k, b_v, b_beta = q[rows], k[rows], v[rows], beta[rows]
        cum = g[rows].cumsum(0)
        scores_kk = decayed_scores(b_k, b_k, cum).tril(-1)
        scores_qk = decayed_scores(b_q, b_k, cum).tril()
        M = inverse_unit_lower(b_beta.T[:, :, None] * scores_kk) * b_beta.T[:, None, :]  # Eq. 6
        w = einsum("hij,jhk->ihk", M, cum.exp() * b_k)  # Eq. 7
        u = einsum("hij,jhv->ihv", M, b_v)
        u = u - einsum("ihk,hvk->ihv", w, state)
        from_state = einsum("ihk,hvk->ihv", cum.exp() * b_q, state)
        outputs[rows] = from_state + einsum("hij,jhv->ihv", scores_qk, u)  # Eq. 9
        k_to_end = (cum[-1] - cum).exp() * b_k
        state = cum[-1].exp()[:, None, :] * state + einsum("ihv,ihk->hvk", u, k_to_end)  # Eq. 8
    return outputs, state


def decayed_scores(
    rows: Float[Tensor, "C H K"], columns: Float[Tensor, "C H K"], cum: Float[Tensor, "C H K"]
) -> Float[Tensor, "H C C"]:
    """Return scores[h, i, j] = sum_k rows[i]·columns[j]·exp(cum[i] - cum[j]) for j <= i, zero above.

    Secondary chunking (section 3.2) without a reciprocal: blocks below the diagonal refer both sides to the
    row block's first token, so that both factors are <= 1; blocks on the diagonal take the exponent of the
    difference.
    """
    length = len(cum)
    scores = cum.new_zeros(cum.shape[1], length, length)
    for start in range(0, length, SUB_CHUNK):
        block = slice(start, min(start + SUB_CHUNK, length))
        later = cum[block][:, None] - cum[block][None]  # [i, j, H, K]
        causal = torch.ones(later.shape[:2], dtype=torch.bool, device=cum.device).tril()[:, :, None, None]
        decay = later.masked_fill(~causal, float("-inf")).exp()
        scores[:, block, block] = einsum("ihk,ijhk,jhk->hij", rows[block], decay, columns[block])
        left = rows[block] * (cum[block] - cum[start]).exp()
        right = columns[:start] * (cum[start] - cum[:start]).exp()
        scores[:, block, :start] = einsum("ihk,jhk->hij", left, right)
    return scores


def inverse_unit_lower(A: Float[Tensor, "H C C"]) -> Float[Tensor, "H C C"]:
    """Return (I + A)^-1 for strictly lower triangular A, row by row (forward substitution)."""
    inverse = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device).repeat(len(A), 1, 1)
    for i in range(1, A.shape[-1]):
        inverse[:, i, :i] = -einsum("hj,hjm->hm", A[:, i, :i], inverse[:, :i, :i])
    return inverse


class Features(NamedTuple):
    """What the recurrence consumes, made from the projections."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor


def features(x: Activations, history: Float[Tensor, "past channels"], weights: Weights) -> Features:
    """Turn projections into q, k, v, log decay and write strength (section 4), in the dtype of `history`."""
    T, H = x.beta.shape
    work = history.dtype
    mixed = short_conv(x.qkv.to(work), history, weights.conv_weight.to(work)).to(x.qkv.dtype).to(work)
    q, k, v = mixed.view(T, 3, H, -1).unbind(1)
    g = log_decay(x.gate.to(work).view(T, H, -1), weights.A_log.to(work), weights.dt_bias.to(work).view(H, -1))
    q = l2_normalise(q) * q.shape[-1] ** -0.5
    return Features(q, l2_normalise(k), v, g, torch.sigmoid(x.beta.to(work)))


def working_dtype(qkv: Tensor, pools: Pools) -> torch.dtype:
    """Return float64 if the activations or the states are float64, else float32."""
    return torch.promote_types(torch.promote_types(qkv.dtype, pools.cut.state_dtype), torch.float32)


def fold(state: Float[Tensor, "H V K"], records: Float[Tensor, "t H 3 D"]) -> Float[Tensor, "H V K"]:
    """Advance a state by tokens of which their records are known: ``S·d + u k^T`` is what Eq. 1 made of each."""
    for record in records.to(state.dtype):
        u, k, d = record.unbind(1)
        state = state * d[:, None, :] + einsum("hv,hk->hvk", u, k)
    return state


def load_slot(
    pools: Pools, slot: int, position: int, num_past: int, work: torch.dtype, num_fold: int = 0
) -> tuple[Float[Tensor, "H V K"], Float[Tensor, "past channels"]]:
    """Return the state of `slot` with `num_fold` records folded, and the `num_past` projections before `position`.

    Both are zeros for `NULL_SLOT`, whatever memory holds, and so is the history where there was no token.
    """
    cut = pools.cut
    state = torch.zeros(cut.H, cut.D, cut.D, dtype=work, device=pools.memory.device)
    history = state.new_zeros(num_past, 3 * cut.H * cut.D)
    if slot != NULL_SLOT:
        kept, ring = pools.load(slot)
        state = kept.to(work)
        if num_fold:
            state = fold(state, pools.load_records(slot)[:num_fold])
        for row, past in enumerate(range(position - num_past, position)):
            if past >= 0:
                history[row] = ring[past % cut.R]
    return state, history


def store_slot(
    pools: Pools, slot: int, position: int, state: Float[Tensor, "H V K"], history: Float[Tensor, "past channels"]
) -> Float[Tensor, "H V K"]:
    """Write the state before `position`, and the last projections before it into their ring columns.

    Returns:
        The state as it was rounded.
    """
    _, ring = pools.load(slot)
    for row, past in enumerate(range(position - len(history), position)):
        if past >= 0:
            ring[past % pools.cut.R] = history[row].to(ring.dtype)
    rounded = state.to(pools.cut.state_dtype)
    pools.store(slot, rounded, ring)
    return rounded


def flag_nonfinite(
    nonfinite: Int[Tensor, "S F"] | None,
    slot: int,
    outputs: Float[Tensor, "T H V"],
    state: Float[Tensor, "H V K"] | None,
    token: int = 0,
) -> None:
    """Set a flag of a slot whose state, or an output of this step on the way to it, is infinite or NaN."""
    finite = outputs.isfinite().all() and (state is None or state.isfinite().all())
    if nonfinite is not None and not finite:
        nonfinite[slot, token] = 1


def kda_decode(x: Activations, weights: Weights, pools: Pools, rows: DecodeRows, out: Tensor) -> None:
    """Advance every row's sequence by one token; see `contract.KdaDecode`."""
    work = working_dtype(x.qkv, pools)
    num_past = len(weights.conv_weight) - 1
    out.zero_()
    slots = zip(rows.read_slot.tolist(), rows.write_slot.tolist(), rows.position.tolist(), strict=True)
    for n, (read, write, p) in enumerate(slots):
        if write == NULL_SLOT:
            continue
        token = x.tokens(n, n + 1)
        state, history = load_slot(pools, read, p, num_past, work)
        o, state = kda_recurrent(*features(token, history, weights), state)
        o = o.to(x.qkv.dtype).to(work)
        # Of a fresh row no history exists, whatever its position says: those columns become zeros.
        stored = store_slot(pools, write, p + 1, state, torch.cat([history, token.qkv.to(work)])[1:])
        flag_nonfinite(pools.nonfinite, write, o, stored)
        out[n : n + 1] = finish(o, token, weights)


def kda_prefill(x: Activations, weights: Weights, pools: Pools, rows: PrefillRows, out: Tensor) -> None:
    """Run every sequence over its new tokens; see `contract.KdaPrefill`."""
    work = working_dtype(x.qkv, pools)
    num_past, block_size = len(weights.conv_weight) - 1, rows.block_size
    out.zero_()
    bounds = rows.cu_seqlens.tolist()
    num_fold = [0] * len(rows.context_len) if rows.num_fold is None else rows.num_fold.tolist()
    for n, context in enumerate(rows.context_len.tolist()):
        begin, end = bounds[n], context + bounds[n + 1] - bounds[n]
        if end == context:
            continue
        tokens = x.tokens(begin, bounds[n + 1])
        read = int(rows.slot_table[n, (context - 1) // block_size]) if context > 0 else NULL_SLOT
        state, history = load_slot(pools, read, context, num_past, work, num_fold[n])
        inputs = features(tokens, history, weights)
        padded = torch.cat([history, tokens.qkv.to(work)])
        o = torch.empty_like(inputs.v)
        start = context
        for block in range(context // block_size, (end - 1) // block_size + 1):
            stop = min((block + 1) * block_size, end)
            piece = slice(start - context, stop - context)
            o[piece], state = kda_recurrent(*Features(*(feature[piece] for feature in inputs)), state)
            o[piece] = o[piece].to(x.qkv.dtype).to(work)
            slot = int(rows.slot_table[n, block])
            if slot != NULL_SLOT:
                stored = store_slot(pools, slot, stop, state, padded[piece.stop : piece.stop + num_past])
                flag_nonfinite(pools.nonfinite, slot, o[: piece.stop], stored)
            start = stop
        out[begin : bounds[n + 1]] = finish(o, tokens, weights)


def kda_verify(x: Activations, weights: Weights, pools: Pools, rows: WindowRows, out: Tensor) -> None:
    """Run every row over a window of which a prefix may turn out to be the sequence's; see `contract.KdaVerify`.

    What is written is the state before the window, and of each token the record of what it does to the state:
    ``u = beta (v - (S·d) k)``, k and d, so that the state after it is ``S·d + u k^T``.
    """
    work = working_dtype(x.qkv, pools)
    num_past = len(weights.conv_weight) - 1
    out.zero_()
    bounds = rows.cu_seqlens.tolist()
    columns = (rows.position, rows.read_slot, rows.write_slot, rows.second_slot, rows.num_fold)
    for n, (p, read, write, second, count) in enumerate(zip(*(each.tolist() for each in columns), strict=True)):
        if write == NULL_SLOT or bounds[n] == bounds[n + 1]:
            continue
        tokens = x.tokens(bounds[n], bounds[n + 1])
        state, history = load_slot(pools, read, p, num_past, work, count)
        inputs = features(tokens, history, weights)
        length, before = len(inputs.q), state
        records = state.new_empty(length, state.shape[0], 3, state.shape[2])
        o = torch.empty_like(inputs.v)
        for t in range(length):
            decay = inputs.g[t].exp()
            error = inputs.v[t] - einsum("hvk,hk->hv", state * decay[:, None, :], inputs.k[t])
            records[t] = torch.stack([inputs.beta[t][:, None] * error, inputs.k[t], decay], 1)
            o[t : t + 1], state = kda_recurrent(*Features(*(feature[t : t + 1] for feature in inputs)), state)
        o = o.to(x.qkv.dtype).to(work)
        # The first column that the next window can need is that of the token W - 2 before this one.
        kept = torch.cat([history, tokens.qkv.to(work)])[1:]
        for slot in {write, second} - {NULL_SLOT}:
            stored = store_slot(pools, slot, p + length, before, kept)
            pools.store_records(slot, records)
            for t in range(length):
                flag_nonfinite(pools.nonfinite, slot, o[t : t + 1], None if t else stored, t)
        out[bounds[n] : bounds[n + 1]] = finish(o, tokens, weights)


def finish(o: Float[Tensor, "T H V"], x: Activations, weights: Weights) -> Float[Tensor, "T gates"]:
    """Apply the gated norm to the rounded outputs of the recurrence; the result has the dtype of the activations."""
    normed = gated_rms_norm(o, x.out_gate.to(o.dtype).view(o.shape), weights.norm_weight.to(o.dtype), weights.norm_eps)
    return normed.flatten(1).to(x.qkv.dtype)
