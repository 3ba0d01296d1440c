"""One step, described once for all KDA layers: which rows decode, which prefill, which slots each reads and writes.

`manager.py` puts slot ids into the rows of the group's block table. For a request at position p and blocks of b tokens,
the state after token p - 1 is in slot ``row[(p - 1) // b]``, and the state after token p goes to ``row[p // b]``. They
differ exactly when p is the first token of a block: the kernel reads one slot and writes another, without a copy.

Entries before the read slot may be stale, because worker rows are append-only. No kernel uses them.

With speculative decoding a step computes a window of tokens before it is known which of them count. A slot holds the
state before its last window (after `StatePool.base` tokens) and the window's records; whoever reads it at position p
folds p - base of them. In which block the next step will find itself is not known either, so a window that ends in
another block than it begins in goes to the slots of both. The one that is left behind lags: it is a checkpoint all the
same, with the records up to its boundary.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.attention.backends.utils import split_decodes_and_prefills
from vllm.v1.kv_cache_interface import AttentionSpec
from vllm.v1.kv_cache_layout import KVCacheLayout

from kimi_vllm.cache.manager import KDAStateSpec
from kimi_vllm.cache.slots import NULL_SLOT
from kimi_vllm.cache.window import window_of
from kimi_vllm.kernels.contract import DecodeRows, PrefillRows, WindowRows


@dataclass(frozen=True, slots=True)
class KDAMetadata:
    """A step. Tokens are ordered decodes (or windows) first, then prefills, then padding.

    Attributes:
        num_decodes: Tokens of decode rows or of windows.
        num_tokens: Tokens of the step without padding.
        windows: With speculative decoding, in the place of `decode`.
    """

    num_decodes: int
    num_tokens: int
    decode: DecodeRows | None
    prefill: PrefillRows | None
    windows: WindowRows | None = None


def most_prefills(num_tokens: int, max_num_seqs: int, window: int = 0) -> int:
    """Return the most sequences that can all be prefills in a step: each has more tokens than a decode or a window."""
    return max(1, min(max_num_seqs, num_tokens // (1 + max(1, window))))


def rehearsal(
    num_tokens: int, num_sequences: int, block_size: int, device: torch.device, window: int = 0
) -> KDAMetadata:
    """A step of new sequences of equal length that leaves no state.

    Decodes if each has one token, or windows if that suffices, else prefills.

    Args:
        num_tokens, num_sequences: Size of the step; at least one token per sequence.
        window: See `window.window_of`.
    """
    null = torch.zeros(num_sequences, dtype=torch.int32, device=device)
    if num_tokens == num_sequences and not window:
        return KDAMetadata(num_tokens, num_tokens, DecodeRows(null, null, null.long()), None)
    # Made on the device: a graph may be under capture.
    cu_seqlens = (torch.arange(num_sequences + 1, device=device) * num_tokens // num_sequences).int()
    if num_tokens <= num_sequences * window:
        windows = WindowRows(cu_seqlens, null.long(), null, null, null, null)
        return KDAMetadata(num_tokens, num_tokens, None, None, windows)
    packed = PrefillRows(cu_seqlens, null, null[:, None], block_size, null if window else None)
    return KDAMetadata(0, num_tokens, None, packed)


class KDAMetadataBuilder(AttentionMetadataBuilder[KDAMetadata]):
    """Builds `KDAMetadata`, once per step for the whole state group."""

    reorder_batch_threshold: int = 1

    @classmethod
    def get_cudagraph_support(cls, vllm_config: VllmConfig, kv_cache_spec: AttentionSpec) -> AttentionCGSupport:
        """Graphs of decode steps, or of windows of equal length. They hold the addresses of `_RowBuffers`."""
        uniform = AttentionCGSupport.UNIFORM_BATCH
        return uniform if window_of(vllm_config) else AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    def __init__(
        self, kv_cache_spec: KDAStateSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        member = vllm_config.compilation_config.static_forward_context[layer_names[0]]
        self._pool = member.home.pool
        self.block_size = kv_cache_spec.block_size
        self.window = kv_cache_spec.window
        # vLLM puts rows of so many tokens before longer ones.
        self.reorder_batch_threshold = max(1, self.window)
        self._buffers = None if device.type == "cpu" else _RowBuffers(vllm_config, self.block_size, device)

    @property
    def num_slots(self) -> int:
        """Slot ids, the null slot included."""
        return int(self._pool.num_slots)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> KDAMetadata:
        """Describe the step, on device tensors only, without synchronising."""
        step = common_attn_metadata
        if self._buffers is not None:
            return self._build_on_device(step, self._buffers)
        if self.window:
            return self._build_windows(step)
        num_decodes, num_prefills, num_decode_tokens, _ = split_decodes_and_prefills(step, decode_threshold=1)
        table = step.block_table_tensor[: step.num_reqs]
        seq_lens = step.seq_lens[: step.num_reqs]
        decode = prefill = None
        if num_decodes:
            decode = self._decode_rows(table[:num_decodes], seq_lens[:num_decodes])
        if num_prefills:
            starts = step.query_start_loc[num_decodes : step.num_reqs + 1]
            query_lens = starts[1:] - starts[:-1]
            prefill = PrefillRows(
                cu_seqlens=(starts - num_decode_tokens).to(torch.int32),
                context_len=(seq_lens[num_decodes:] - query_lens).to(torch.int32),
                slot_table=self._slots(table[num_decodes:]).contiguous(),
                block_size=self.block_size,
            )
        return KDAMetadata(num_decodes, step.num_actual_tokens, decode, prefill)

    def _build_on_device(self, step: CommonAttentionMetadata, buffers: "_RowBuffers") -> KDAMetadata:
        """On a GPU, where the host does not know how many tokens counted: one launch, in which bases advance too."""
        num_rows, _, num_row_tokens, _ = split_decodes_and_prefills(step, decode_threshold=max(1, self.window))
        described = (
            step.block_table_tensor[: step.num_reqs],
            step.seq_lens[: step.num_reqs],
            step.query_start_loc[: step.num_reqs + 1],
        )
        if self.window:
            windows, prefill = buffers.fill_windows(*described, num_rows, self.window, self._pool.base)
            return KDAMetadata(num_row_tokens, step.num_actual_tokens, None, prefill, windows)
        decode, prefill = buffers.fill(*described, num_rows, self.num_slots)
        return KDAMetadata(num_rows, step.num_actual_tokens, decode, prefill)

    def _build_windows(self, step: CommonAttentionMetadata) -> KDAMetadata:
        """A step with speculative decoding, on a CPU: rows of up to `window` tokens, then longer ones.

        Advances the bases of the slots that the step writes: all layers fold by what this says.

        Raises:
            RuntimeError: A slot lags by more than its records.
        """
        num_rows, num_prefills, num_window_tokens, _ = split_decodes_and_prefills(step, decode_threshold=self.window)
        table, starts = step.block_table_tensor[: step.num_reqs], step.query_start_loc[: step.num_reqs + 1]
        lengths = starts[1:] - starts[:-1]
        end = step.seq_lens[: step.num_reqs].to(torch.int64)
        context = end - lengths
        read, write, last = self._entries(table, torch.stack((context - 1, context, end - 1)))
        base = self._pool.base
        fold = torch.where(read > 0, context - base[read.long()], 0).to(torch.int32)
        if ((fold < 0) | (fold > self.window)).any():
            raise RuntimeError(f"states lag by {fold.tolist()} tokens, and have records of {self.window}")
        windows = prefill = None
        if num_rows:
            some = slice(num_rows)
            busy = lengths[some] > 0
            first, second = torch.where(busy, write[some], NULL_SLOT), torch.where(busy, last[some], NULL_SLOT)
            base[first.long()] = base[second.long()] = context[some]
            second = torch.where(second == first, NULL_SLOT, second)
            bounds = starts[: num_rows + 1].to(torch.int32)
            windows = WindowRows(bounds, context[some], read[some].contiguous(), first, second, fold[some])
        if num_prefills:
            late = slice(num_rows, step.num_reqs)
            slots = self._slots(table[late]).contiguous()
            prefill = PrefillRows(
                cu_seqlens=(starts[num_rows:] - num_window_tokens).to(torch.int32),
                context_len=context[late].to(torch.int32),
                slot_table=slots,
                block_size=self.block_size,
                num_fold=fold[late],
            )
            boundary = torch.arange(1, slots.shape[1] + 1) * self.block_size
            stop = torch.minimum(boundary, end[late, None])
            written = (slots > 0) & (boundary > context[late, None]) & (boundary - self.block_size < end[late, None])
            # A slot that went along is named twice, and its later state counts.
            base.scatter_reduce_(0, slots[written].long(), stop[written], "amax", include_self=False)
        return KDAMetadata(num_window_tokens, step.num_actual_tokens, None, prefill, windows)

    def _decode_rows(self, table: Tensor, seq_lens: Tensor) -> DecodeRows:
        # A padded row has length 0, hence position -1: both of its slots must be the null slot.
        position = seq_lens.to(torch.int64) - 1
        # Both at once: on the host the number of operations counts, not their size.
        read_slot, write_slot = self._entries(table, torch.stack((position - 1, position)))
        return DecodeRows(read_slot, write_slot, position)

    def _entries(self, table: Tensor, position: Tensor) -> Tensor:
        """The slots ``[P, N]`` at P positions of each row."""
        column = position.clamp(min=0).div_(self.block_size, rounding_mode="floor")
        slot = table.gather(1, column.T).T.contiguous()
        known = (slot < self.num_slots).logical_and_(position >= 0)
        return torch.where(known, slot, NULL_SLOT).to(torch.int32)

    def _slots(self, entries: Tensor) -> Tensor:
        # vLLM's warm-up makes up block ids regardless of groups; those out of range are padding.
        return torch.where(entries < self.num_slots, entries, NULL_SLOT).to(torch.int32)


class _RowBuffers:
    """The rows of a step on a GPU, always at the same addresses, which CUDA graphs hold."""

    def __init__(self, vllm_config: VllmConfig, block_size: int, device: torch.device) -> None:
        # vLLM pads a step to the size of a captured graph, which can exceed max_num_seqs.
        captured = vllm_config.compilation_config.max_cudagraph_capture_size or 0
        most = max(vllm_config.scheduler_config.max_num_seqs, captured)
        self._block_size = block_size

        def zeros(dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(most + 1, dtype=dtype, device=device)

        read_slot, write_slot, position = zeros(), zeros(), zeros(torch.int64)
        self._decode = DecodeRows(read_slot, write_slot, position)
        self._windows = WindowRows(zeros(), position, read_slot, write_slot, zeros(), zeros())
        self._cu_seqlens, self._context_len, self._late_fold = zeros(), zeros(), zeros()

    def fill(
        self, table: Tensor, seq_lens: Tensor, starts: Tensor, num_decodes: int, num_slots: int
    ) -> tuple[DecodeRows | None, PrefillRows | None]:
        """Write the step's rows in one launch. Prefill kernels check the bounds of the table's slots themselves."""
        from kimi_vllm.kernels.cuda.rows import step_rows

        rows, block_size = self._decode, self._block_size
        step_rows(
            table, seq_lens, starts, num_decodes, block_size, num_slots, rows, self._cu_seqlens, self._context_len
        )
        decode = None
        if num_decodes:
            some = slice(num_decodes)
            decode = DecodeRows(rows.read_slot[some], rows.write_slot[some], rows.position[some])
        return decode, self._prefill(table[num_decodes:])

    def fill_windows(
        self, table: Tensor, seq_lens: Tensor, starts: Tensor, num_windows: int, window: int, base: Tensor
    ) -> tuple[WindowRows | None, PrefillRows | None]:
        """The same with speculative decoding. Advances the bases of the slots that the step writes."""
        from kimi_vllm.kernels.cuda.rows import window_rows

        rows, late = self._windows, (self._cu_seqlens, self._context_len, self._late_fold)
        window_rows(table, seq_lens, starts, num_windows, self._block_size, window, base, rows, *late)
        windows = None
        if num_windows:
            some = slice(num_windows)
            windows = WindowRows(
                rows.cu_seqlens[: num_windows + 1],
                rows.position[some],
                rows.read_slot[some],
                rows.write_slot[some],
                rows.second_slot[some],
                rows.num_fold[some],
            )
        return windows, self._prefill(table[num_windows:], self._late_fold)

    def _prefill(self, table: Tensor, num_fold: Tensor | None = None) -> PrefillRows | None:
        if not (count := len(table)):
            return None
        late = None if num_fold is None else num_fold[:count]
        return PrefillRows(self._cu_seqlens[: count + 1], self._context_len[:count], table, self._block_size, late)


class OwnKernels:
    """Mixed into backends that only tell vLLM how to build the metadata of layers, which call their kernels."""

    @staticmethod
    def get_impl_cls() -> type[Any]:
        """There is none.

        Raises:
            TypeError: Always.
        """
        raise TypeError("these layers call their own kernels")

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        """Any: kernels find pages and slots one by one."""
        return [MultipleOf(1)]


class KDAStateBackend(OwnKernels, AttentionBackend):
    """The state group, whose block size is only the spacing of boundaries."""

    @staticmethod
    def get_name() -> str:
        """Name in vLLM's logs."""
        return "KIMI_KDA_STATE"

    @staticmethod
    def get_builder_cls() -> type[KDAMetadataBuilder]:
        """See `KDAMetadataBuilder`."""
        return KDAMetadataBuilder

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """All layers of a block side by side, so that a block can hold a part of a state instead of tokens."""
        return KVCacheLayout.BLNHC, KVCacheLayout.BLHNC

    @classmethod
    def is_ssm(cls) -> bool:
        """True keeps this group out of vLLM's choice of an attention block size."""
        return True
