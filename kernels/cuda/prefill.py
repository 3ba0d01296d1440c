"""Prefill on CUDA: packed sequences of any lengths, in chunks of 64 tokens, three or four launches per layer.

The first (`prefill_features.py`) turns projections into features, for blocks of 16 tokens; the second
(`prefill_intra.py`) does what can be done inside a chunk; both for all chunks at once. The third, here, walks the
chunks of each sequence with the state in registers (Eq. 8 and 9)::

    v' = u - w S    o = qg S + qk v'    S = decay*S + kg^T v'

It reads the first state from the pool by slot, folds the records that count, and writes the states at block ends
where the table has a slot, and the last one, and with each the convolution's history. A program that owns a whole
head also applies the gated norm; heads split along their value channels, which is faster wherever it was measured,
leave the norm to a fourth. Steps of a few tokens take one launch instead (`extend.py`). Nothing is planned on the
host or waits for the device.
"""
# mypy: disallow-untyped-defs=false, disallow-incomplete-defs=false

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl
from torch import Tensor

from kimi_vllm.kernels.contract import Activations, Pools, PrefillRows, Weights
from kimi_vllm.kernels.cuda import launch
from kimi_vllm.kernels.cuda.extend import extend_sequences
from kimi_vllm.kernels.cuda.math import everywhere, gated_rms_norm
from kimi_vllm.kernels.cuda.prefill_features import BLOCK, CHUNK, SLACK, chunk_features, first_chunk
from kimi_vllm.kernels.cuda.prefill_intra import intra_chunk
from kimi_vllm.kernels.cuda.slots import (
    export_history,
    head_places,
    matrix_rows,
    record_ptr,
    records_to_fold,
    slot_or_null,
)
from kimi_vllm.kernels.cuda.step import replay

_CHUNK, _BLOCK, _SLACK = CHUNK.value, BLOCK.value, SLACK.value
_CHUNKS = 192
"""Most chunks of the workspace, unless a group or a prompt needs more: 0.44 GiB for 32 heads of 128 in bfloat16."""
_GROUP = 32
"""Sequences that a group may have however many tokens a step has."""


@triton.jit(
    do_not_specialize=["num_sequences", "num_tokens", "table_stride", "table_width", "first_unit"],
    do_not_specialize_on_alignment=["slot_table_ptr"],
)
def inter_chunk(
    qkv_ptr, out_gate_ptr, out_ptr, norm_weight_ptr, norm_eps, ring_ptr, state_ptr, memory_ptr, pages_ptr,
    cu_seqlens_ptr, context_len_ptr, slot_table_ptr, block_size, num_fold_ptr,
    w_in_ptr, u_in_ptr, qg_in_ptr, kg_in_ptr, qk_in_ptr, decay_in_ptr,
    num_sequences, num_tokens, num_slots, pages_stride, first_unit, table_stride, table_width,
    qkv_stride, out_gate_stride, out_stride, nonfinite_ptr,
    H: tl.constexpr, D: tl.constexpr, BV: tl.constexpr, W: tl.constexpr, R: tl.constexpr,
    BLOCK_STEPS: tl.constexpr, UNIT_STEPS: tl.constexpr, UNITS: tl.constexpr, PIECES: tl.constexpr, RING: tl.constexpr,
    WINDOW: tl.constexpr, RECORDS: tl.constexpr, FIRST_RECORD: tl.constexpr, FLAGS: tl.constexpr,
    STAGES: tl.constexpr, EXACT: tl.constexpr, launch_pdl: tl.constexpr,
):  # fmt: skip
    """Walk one sequence with BV value channels of one head; the last programs clear rows behind those of the group."""
    program = tl.program_id(0)
    first = (program % (D // BV)) * BV
    head = (program // (D // BV)) % H
    n = program // (D // BV * H)
    i, k, v = tl.arange(0, CHUNK), tl.arange(0, D), tl.arange(0, BV)
    PRECISION: tl.constexpr = "tf32x3" if EXACT else "tf32"
    group_begin, begin = tl.load(cu_seqlens_ptr), tl.load(cu_seqlens_ptr + n)
    if n == num_sequences:
        if launch_pdl:
            tl.extra.cuda.gdc_wait()
            tl.extra.cuda.gdc_launch_dependents()
        for start in range(begin, num_tokens, CHUNK):
            rows = (start + i).to(tl.int64)[:, None]
            zeros = tl.zeros((CHUNK, BV), out_ptr.dtype.element_ty)
            tl.store(out_ptr + rows * out_stride + (head * D + first + v)[None, :], zeros, mask=rows < num_tokens)
        return
    length = tl.load(cu_seqlens_ptr + n + 1) - begin
    context = tl.load(context_len_ptr + n)
    end = context + length
    table_ptr = slot_table_ptr + n.to(tl.int64) * table_stride
    read = tl.full((), 0, tl.int32)
    if context > 0:
        read = slot_or_null(table_ptr, (context - 1) // block_size, table_width, num_slots)
    unit = first_unit + head * PIECES
    places = head_places(pages_ptr, read, pages_stride, unit, BLOCK_STEPS, UNIT_STEPS, UNITS, PIECES)
    source_ptrs = state_ptr + matrix_rows(state_ptr, places, first + v, D, PIECES)[None, :] + k[:, None]
    state = tl.load(source_ptrs, mask=everywhere(read > 0, (D, BV)), other=0.0)
    state = state.to(tl.float32)  # [D, BV], keys first: the transposed rows of the pool
    if num_fold_ptr is not None:
        for t in range(0, records_to_fold(num_fold_ptr, n, read, WINDOW)):
            u_ptr = record_ptr(memory_ptr, places, t, D, PIECES, RECORDS, FIRST_RECORD)
            past_u = tl.load(u_ptr + first + v)[None, :]
            state = replay(state, past_u, tl.load(u_ptr + D + k)[:, None], tl.load(u_ptr + 2 * D + k)[:, None])
    if launch_pdl:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    grid = context // CHUNK
    num_chunks = tl.where(length > 0, (end - 1) // CHUNK - grid + 1, 0)
    chunk_head = first_chunk(begin - group_begin, n).to(tl.int64) * H + head
    operand = w_in_ptr.dtype.element_ty
    tile = i[:, None] * D + k[None, :]  # [CHUNK, D]
    spoiled = tl.zeros((CHUNK, BV), tl.float32)
    for c in tl.range(0, num_chunks, num_stages=STAGES):
        here = chunk_head + c * H
        w = tl.load(w_in_ptr + here * (CHUNK * D) + tile)
        u = tl.load(u_in_ptr + here * (CHUNK * D) + i[:, None] * D + (first + v)[None, :])
        qg = tl.load(qg_in_ptr + here * (CHUNK * D) + tile)
        kg = tl.load(kg_in_ptr + here * (CHUNK * D) + tile)
        qk = tl.load(qk_in_ptr + here * (CHUNK * CHUNK) + i[:, None] * CHUNK + i[None, :])
        decay = tl.load(decay_in_ptr + here * D + k)
        # Eq. 8 and 9. All operands of a chunk come from the second launch; only the state is of the chunk before.
        right = state.to(operand)
        written = (u.to(tl.float32) - tl.dot(w, right, input_precision=PRECISION)).to(operand)  # [CHUNK, BV]
        o = tl.dot(qg, right, input_precision=PRECISION)  # [CHUNK, BV]
        state = tl.dot(tl.trans(kg), written, state * decay[:, None], input_precision=PRECISION)
        o = tl.dot(qk, written, o, input_precision=PRECISION)
        if nonfinite_ptr is not None:
            spoiled += o * 0.0  # zero as long as outputs are finite

        # Chunks lie on the grid of absolute positions: the first and the last can be shorter.
        position = tl.maximum(context, (grid + c) * CHUNK)
        stop = tl.minimum((grid + c + 1) * CHUNK, end)
        rows = (begin + position - context + i).to(tl.int64)[:, None]
        mask = rows < begin + stop - context
        o = o.to(out_ptr.dtype.element_ty)
        if BV == D:
            o = o.to(tl.float32)
            inverse_rms = tl.rsqrt(tl.sum(o * o, axis=1) / D + norm_eps)[:, None]
            z = tl.load(out_gate_ptr + rows * out_gate_stride + (head * D + v)[None, :], mask=mask, other=0.0)
            weight = tl.load(norm_weight_ptr + v)[None, :]
            o = gated_rms_norm(o, inverse_rms, weight, z.to(tl.float32)).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + rows * out_stride + (head * D + first + v)[None, :], o, mask=mask)

        # The state at the end of a block, or of the sequence, goes to the pool where the table has a slot for it.
        if (stop == end) | (stop % block_size == 0):
            slot = slot_or_null(table_ptr, (stop - 1) // block_size, table_width, num_slots)
            if slot > 0:
                targets = head_places(pages_ptr, slot, pages_stride, unit, BLOCK_STEPS, UNIT_STEPS, UNITS, PIECES)
                target_ptrs = state_ptr + matrix_rows(state_ptr, targets, first + v, D, PIECES)[None, :] + k[:, None]
                tl.store(target_ptrs, state.to(state_ptr.dtype.element_ty))
                export_history(
                    slot, read, stop, context, (begin + stop - context).to(tl.int64), head, first + v,
                    qkv_ptr, qkv_stride, ring_ptr, pages_ptr, pages_stride, unit,
                    H, D, W, R, BLOCK_STEPS, UNIT_STEPS, UNITS, PIECES, RING,
                )  # fmt: skip
                if nonfinite_ptr is not None:
                    stored = state.to(state_ptr.dtype.element_ty).to(tl.float32)
                    total = tl.sum(tl.sum(stored * 0.0, axis=0), axis=0) + tl.sum(tl.sum(spoiled, axis=0), axis=0)
                    tl.store(nonfinite_ptr + slot * FLAGS, 1, mask=(total == 0.0) == 0)


@triton.jit(do_not_specialize=["num_rows"])
def _norm(
    out_ptr, out_gate_ptr, norm_weight_ptr, norm_eps, num_rows, out_stride, out_gate_stride,
    H: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, launch_pdl: tl.constexpr,
):  # fmt: skip
    """Apply the gated norm in place to ROWS heads of packed rows."""
    index = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row, head = index // H, index % H
    mask = (row < num_rows)[:, None]
    v = tl.arange(0, D)[None, :]
    weight = tl.load(norm_weight_ptr + v)
    z = tl.load(out_gate_ptr + (row * out_gate_stride + head * D)[:, None] + v, mask=mask, other=0.0).to(tl.float32)
    if launch_pdl:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    here_ptrs = out_ptr + (row * out_stride + head * D)[:, None] + v
    o = tl.load(here_ptrs, mask=mask, other=0.0).to(tl.float32)
    inverse_rms = tl.rsqrt(tl.sum(o * o, axis=1) / D + norm_eps)[:, None]
    tl.store(here_ptrs, gated_rms_norm(o, inverse_rms, weight, z).to(out_ptr.dtype.element_ty), mask=mask)


def kda_prefill(
    x: Activations,
    weights: Weights,
    pools: Pools,
    rows: PrefillRows,
    out: Tensor,
    exact: bool | None = None,
    config: launch.Prefill | None = None,
) -> None:
    """Run every sequence over its new tokens; see `contract.KdaPrefill`.

    Args:
        x, weights, pools, rows, out: as there.
        exact: True: float32 operands, every exponent taken, decays of at least e^-25 per token, error below 1e-5 of
            the largest output (1e-6 with the gates of trained models). False: bfloat16 operands and decays of at
            least e^-10 per token, error about 3e-3. None: exact for float32 activations.
        config: launch parameters; from the checked-in table if None.

    Raises:
        ValueError: the block size is not a multiple of 64: states exist at ends of chunks.
    """
    T, N, device = x.qkv.shape[0], rows.context_len.shape[0], x.qkv.device
    if N == 0:
        out.zero_()  # the kernels look up each row's sequence
        return
    if T == 0:
        return
    if rows.block_size % _CHUNK:
        raise ValueError(
            f"block_size is {rows.block_size}; on {device.type} it must be a multiple of {_CHUNK}: set --block-size"
        )
    if T <= launch.EXTEND_TOKENS and exact is None and config is None:
        extend_sequences(x, weights, pools, rows, out)
        return
    exact = x.qkv.dtype == torch.float32 if exact is None else exact
    H, D = pools.cut.H, pools.cut.D
    group = sequences_at_once(T, N)
    config = config or launch.prefill(group * H, D, exact)
    chunks = _most_chunks(T, group)
    q, k, down, v, scores, blocks, decay = _workspace(workspace_chunks(T, N) * H, D, exact, device)
    ring, state = launch.typed(pools)
    memory = None if rows.num_fold is None else launch.records(pools)
    table = rows.slot_table
    slots = (*pools.pages.shape, pools.first_unit, table.stride(0), table.shape[1])
    form = {"EXACT": exact, **launch.pdl(device)}
    sizes = {"W": weights.conv_weight.shape[0], **launch.sizes(pools.cut), **form}
    splits = D // config.value_block
    for first in range(0, N, group):
        some = min(group, N - first)
        part = rows if some == N else _sequences(rows, first, first + some)
        index = (part.cu_seqlens, part.context_len, part.slot_table, part.block_size)
        chunk_features[(chunks * _CHUNK // _BLOCK * H,)](
            x.qkv, x.gate, x.beta, weights.conv_weight, weights.A_log, weights.dt_bias, ring, pools.pages,
            *index, q, k, down, v, blocks,
            some, *slots, x.qkv.stride(0), x.gate.stride(0), x.beta.stride(0),
            **sizes, num_warps=config.features_warps, num_stages=1,
        )  # fmt: skip
        intra_chunk[(chunks * H,)](
            x.beta, *index[:2], q, k, down, v, blocks, scores, decay, some, x.beta.stride(0),
            H=H, D=D, **form, num_warps=config.intra_warps, num_stages=1,
        )  # fmt: skip
        # From here on q, k, down and v hold what the second launch made of them: qg, w, kg and u. Rows behind the
        # group's are nobody's if it is the last.
        inter_chunk[(splits * H * (some + 1),)](
            x.qkv, x.out_gate, out, weights.norm_weight, weights.norm_eps, ring, state, memory, pools.pages,
            *index, part.num_fold, k, v, q, down, scores, decay,
            some, T if first + some == N else 0, *slots,
            x.qkv.stride(0), x.out_gate.stride(0), out.stride(0), pools.nonfinite,
            **sizes, **launch.window_sizes(pools.cut), FLAGS=pools.cut.flags,
            BV=config.value_block, STAGES=config.inter_stages, num_warps=config.inter_warps,
        )  # fmt: skip
    if splits > 1:
        rows_per_program = 2048 // D
        _norm[(triton.cdiv(T * H, rows_per_program),)](
            out, x.out_gate, weights.norm_weight, weights.norm_eps, T, out.stride(0), x.out_gate.stride(0),
            H=H, D=D, ROWS=rows_per_program, num_warps=4, **launch.pdl(device),
        )  # fmt: skip


def sequences_at_once(T: int, N: int) -> int:
    """Return how many of N sequences with T new tokens in all share the workspace; the others follow in groups.

    The workspace is as large as its bound on chunks, which counts nearly two for each sequence, however short. vLLM
    sets aside what its largest step takes, so without groups all memory would hold fewer requests for the sake of
    steps of hundreds of short prompts.
    """
    # Multiples of four: rows of a group begin where pointers are aligned.
    allowed: int = max(_GROUP, (_CHUNKS * _CHUNK - T) // _SLACK // 4 * 4)
    groups = -(-N // allowed)
    return min(N, -(-N // groups // 4) * 4)


def _sequences(rows: PrefillRows, first: int, last: int) -> PrefillRows:
    """Return the sequences from first to last; their rows still count from the step's first token."""
    return dataclasses.replace(
        rows,
        cu_seqlens=rows.cu_seqlens[first : last + 1],
        context_len=rows.context_len[first:last],
        slot_table=rows.slot_table[first:last],
        num_fold=None if rows.num_fold is None else rows.num_fold[first:last],
    )


def _most_chunks(T: int, N: int) -> int:
    """Return the bound on the chunks of N sequences with T new tokens in all; see `first_chunk`."""
    bound: int = (T + _SLACK * N) // _CHUNK
    return bound


def workspace_chunks(T: int, N: int) -> int:
    """Return the chunks of the workspace: no fewer for more tokens or sequences, so that the largest step needs most.

    A group can need fewer. But what vLLM sets aside is what a step of the most tokens and sequences takes.
    """
    return min(_most_chunks(T, N), max(_CHUNKS, _most_chunks(T, _GROUP)))


def _workspace(chunk_heads: int, D: int, exact: bool, device: torch.device) -> tuple[Tensor, ...]:
    """Return what the launches hand one another, per chunk and head: four tiles, scores, and decays in float32.

    Tiles are ``[64, D]`` and scores ``[64, 64]``; the decays are of four blocks and of the whole chunk, ``[D]`` each.
    """
    # Triton's interpreter, the only way to run this on a CPU, multiplies the bits of bfloat16 as integers.
    operand = torch.float32 if exact or device.type == "cpu" else torch.bfloat16
    tile, scores = chunk_heads * _CHUNK * D, chunk_heads * _CHUNK * _CHUNK
    blocks, decay = chunk_heads * _CHUNK // _BLOCK * D, chunk_heads * D
    # One piece for each dtype, so that the allocator is asked twice and not seven times.
    operands = torch.empty(4 * tile + scores, dtype=operand, device=device).split([tile] * 4 + [scores])
    return *operands, *torch.empty(blocks + decay, dtype=torch.float32, device=device).split([blocks, decay])
