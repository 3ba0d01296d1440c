"""What a KDA layer hands its kernels, and what the kernels promise: the same for the reference, the CPU and CUDA.

`reference.py` is the executable form of what stands here in words. Letters, here and in every kernel:

    T tokens of the step    N sequences    H heads    K key channels    V value channels (K == V == D)
    W conv width            R ring columns S slots    P blocks of a slot    B slot-table columns    C chunk length

A *window* is some tokens of a sequence of which only a prefix may turn out to be the sequence's (speculative decoding).
A slot of pools with a window holds, beside its state, a record of each token of the window that was run from it. Who
reads the slot *folds* the records of those that turned out to be the sequence's.

Every tensor of a call is on one device. Kernels do not check their arguments: a layer calls those of
`checks.py` once, before it serves, with what vLLM's profiling run brings. What a later step brings anew is its rows,
and these refuse a wrong dtype when they are made, once for all layers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kimi_vllm.kernels.cut import RECORD_VECTORS, Cut

HEAD_SIZES = (64, 128)
CONV_WIDTHS = range(2, 9)
ACTIVATION_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
STATE_DTYPES = {"cpu": (torch.float32,), "cuda": ACTIVATION_DTYPES}

MAX_WINDOW = {"cpu": 16, "cuda": 8}
"""Most tokens of a window. On CUDA a kernel of 8 compiles in 10 s, one of 16 in 90."""

NULL_SLOT = 0
"""The slot that holds nobody's state: never read, never written; as a write slot it marks a padded row."""


# Tensors have no order and no plain equality, so records are compared by identity.
@dataclass(frozen=True, slots=True, eq=False)
class Activations:
    """The projections of a step's tokens. Each may be a slice of a wider tensor: its last dimension is contiguous.

    Attributes:
        qkv: ``[T, 3·H·D]`` float32, bfloat16 or float16: q, k and v before the short convolution.
        gate: ``[T, H·K]`` in the dtype of `qkv`: raw output of f_b. The log decay is formed in float32 inside.
        beta: ``[T, H]`` in the dtype of `qkv`: raw logits of the write strength.
        out_gate: ``[T, H·V]`` in the dtype of `qkv`: raw logits of the output gate.
    """

    qkv: Tensor
    gate: Tensor
    beta: Tensor
    out_gate: Tensor

    def tokens(self, start: int, stop: int) -> Activations:
        """Return a view of the tokens from `start` up to `stop`."""
        some = slice(start, stop)
        return Activations(self.qkv[some], self.gate[some], self.beta[some], self.out_gate[some])


@dataclass(frozen=True, slots=True, eq=False)
class Weights:
    """The weights of one layer that its kernels apply. All are contiguous.

    Attributes:
        conv_weight: ``[W, 3·H·D]`` float32, 2 <= W <= 8; tap W-1 multiplies the current token.
        A_log: ``[H]`` float32, logarithm of the decay rate of a head.
        dt_bias: ``[H·K]`` float32, added to the gate.
        norm_weight: ``[V]`` float32, of the output norm.
        norm_eps: added to the mean square of the output norm.
    """

    conv_weight: Tensor
    A_log: Tensor
    dt_bias: Tensor
    norm_weight: Tensor
    norm_eps: float


@dataclass(frozen=True, slots=True, eq=False)
class Pools:
    """The slots of one layer: where each lies in memory that it shares with the KV cache.

    State and ring are float32 on CPUs; float32, bfloat16 or float16 on CUDA.

    Attributes:
        memory: ``[B, block_bytes]`` uint8, contiguous: all blocks.
        pages: ``[S, P]`` int32, contiguous; the blocks of each slot, in the order of its units. Row 0, of the null
            slot, is never used.
        cut: How a state lies in its blocks.
        first_unit: Number of the layer's first unit in a state.
        nonfinite: ``[S, F]`` int32 contiguous, or None; F is `Cut.flags`. Entry 0 is set to 1 at a written slot whose
            state is infinite or NaN, or an output of the step on the way to it, before its norm; never cleared. Of a
            window, entry t is set where the output of its token t is. A kernel may set it as well where an output's
            square exceeds float32.
    """

    memory: Tensor
    pages: Tensor
    cut: Cut
    first_unit: int
    nonfinite: Tensor | None = None

    def units(self, slot: int) -> tuple[Tensor, Tensor]:
        """Return in which blocks this layer's units of a slot lie, and as which unit of the block: ``[H·pieces]``."""
        cut = self.cut
        number = torch.arange(self.first_unit, self.first_unit + cut.H * cut.pieces, device=self.pages.device)
        return self.pages[slot].long()[number // cut.units], number % cut.units

    def load(self, slot: int) -> tuple[Tensor, Tensor]:
        """Return copies of a slot's state ``[H, V, K]`` and ring ``[R, 3·H·D]``."""
        cut = self.cut
        pieces = self._every_unit()[self.units(slot)]  # [H·pieces, unit_bytes]
        state = pieces[:, : cut.state_bytes].contiguous().view(cut.state_dtype)
        ring = pieces[:, cut.state_bytes : cut.state_bytes + cut.ring_bytes].contiguous().view(cut.conv_dtype)
        by_head = ring.view(cut.H, cut.R, 3, cut.D)
        return state.view(cut.H, cut.D, cut.D), by_head.permute(1, 2, 0, 3).reshape(cut.R, -1)

    def load_records(self, slot: int) -> Tensor:
        """Return a copy of a slot's records ``[window, H, 3, D]`` float32: u, k and d of each token."""
        cut = self.cut
        pieces = self._every_unit()[self.units(slot)][:, cut.state_bytes + cut.ring_bytes :].contiguous()
        by_head = pieces.view(torch.float32).view(cut.H, cut.pieces * cut.records, RECORD_VECTORS, cut.D)
        return by_head[:, : cut.window].transpose(0, 1).contiguous()

    def store_records(self, slot: int, records: Tensor) -> None:
        """Write the first records of a slot, ``[up to window, H, 3, D]``, and nothing beside them."""
        cut, every, places = self.cut, self._every_unit(), self.units(slot)
        pieces = every[places]
        kept = pieces[:, cut.state_bytes + cut.ring_bytes :].clone(memory_format=torch.contiguous_format)
        by_head = kept.view(torch.float32).view(cut.H, cut.pieces * cut.records, RECORD_VECTORS, cut.D)
        by_head[:, : len(records)] = records.transpose(0, 1)
        pieces[:, cut.state_bytes + cut.ring_bytes :] = by_head.view(len(pieces), -1).view(torch.uint8)
        every[places] = pieces

    def store(self, slot: int, state: Tensor | None = None, ring: Tensor | None = None) -> None:
        """Write a slot's state ``[H, V, K]``, its ring ``[R, 3·H·D]``, or both, and nothing beside them."""
        cut, every, places = self.cut, self._every_unit(), self.units(slot)
        pieces = every[places]
        if state is not None:
            rows = state.to(cut.state_dtype).contiguous().view(len(pieces), -1)
            pieces[:, : cut.state_bytes] = rows.view(torch.uint8)
        if ring is not None:
            by_head = ring.to(cut.conv_dtype).view(cut.R, 3, cut.H, cut.D).permute(2, 0, 1, 3)
            vectors = by_head.contiguous().view(len(pieces), -1).view(torch.uint8)
            pieces[:, cut.state_bytes : cut.state_bytes + cut.ring_bytes] = vectors
        every[places] = pieces

    def dense(self) -> tuple[Tensor, Tensor]:
        """Return copies of all rings ``[S, R, 3·H·D]`` and all states ``[S, H, V, K]``, for tests and benchmarks."""
        slots = [self.load(slot) for slot in range(len(self.pages))]
        return torch.stack([ring for _, ring in slots]), torch.stack([state for state, _ in slots])

    def _every_unit(self) -> Tensor:
        used = self.memory[:, : self.cut.units * self.cut.unit_bytes]
        every: Tensor = used.unflatten(1, (self.cut.units, self.cut.unit_bytes))
        return every


@dataclass(frozen=True, slots=True, eq=False)
class DecodeRows:
    """Sequences with one new token each. All are ``[N]`` and contiguous.

    No row may read or write a slot that another row writes.

    Attributes:
        read_slot: int32. `NULL_SLOT`: a fresh sequence, nothing is read.
        write_slot: int32. Equal to `read_slot`: a plain step. Different: read there, write here; the write slot is
            complete afterwards, the read slot unchanged. `NULL_SLOT`: a padded row, zeros out, nothing touched.
        position: int64, 0-based position of the row's token in its sequence.

    Raises:
        ValueError: a dtype is another one.
    """

    read_slot: Tensor
    write_slot: Tensor
    position: Tensor

    def __post_init__(self) -> None:
        _require_dtype(torch.int32, read_slot=self.read_slot, write_slot=self.write_slot)
        _require_dtype(torch.int64, position=self.position)


@dataclass(frozen=True, slots=True, eq=False)
class PrefillRows:
    """Sequences with several new tokens each, packed one after another.

    Attributes:
        cu_seqlens: ``[N + 1]`` int32 contiguous; sequence n owns tokens ``cu_seqlens[n]`` up to ``cu_seqlens[n + 1]``.
            Empty sequences are skipped. Output rows beyond ``cu_seqlens[N]`` become zeros.
        context_len: ``[N]`` int32 contiguous, tokens of the sequence computed before this step.
        slot_table: ``[N, B]`` int32; entry j is the slot of the state after token ``min((j + 1)·block_size, end)``
            with ``end = context + new``. Read: entry ``(context - 1) // block_size`` if context > 0; 0 there means a
            zero state. Written: the nonzero entries from ``context // block_size`` to ``(end - 1) // block_size``, in
            this order, so that a slot named twice keeps the later state. Other entries may be stale: they are never
            used. A sequence may overwrite the slot it read; no other sequence may read or write it.
        block_size: tokens per entry of the table; on CUDA a multiple of 64.
        num_fold: ``[N]`` int32 contiguous, records to fold into the state that is read; None: none of any.

    Raises:
        ValueError: a dtype is another one.
    """

    cu_seqlens: Tensor
    context_len: Tensor
    slot_table: Tensor
    block_size: int
    num_fold: Tensor | None = None

    def __post_init__(self) -> None:
        index = {"cu_seqlens": self.cu_seqlens, "context_len": self.context_len, "slot_table": self.slot_table}
        _require_dtype(torch.int32, **index)
        if self.num_fold is not None:
            _require_dtype(torch.int32, num_fold=self.num_fold)


@dataclass(frozen=True, slots=True, eq=False)
class WindowRows:
    """Sequences with a window of new tokens each, packed one after another. All are contiguous.

    No row may read or write a slot that another row writes.

    Attributes:
        cu_seqlens: ``[N + 1]`` int32; row n owns tokens ``cu_seqlens[n]`` up to ``cu_seqlens[n + 1]``, at most the
            window of the pools. Output rows beyond ``cu_seqlens[N]`` become zeros.
        position: ``[N]`` int64, of each row's first token in its sequence.
        read_slot: ``[N]`` int32. `NULL_SLOT`: a fresh sequence, nothing is read.
        write_slot: ``[N]`` int32. Afterwards it is complete: the state before the window, its records and the
            convolution's history. Equal to `read_slot` or not; a read slot that is not written stays as it was.
            `NULL_SLOT`: a padded row, zeros out, nothing touched.
        second_slot: ``[N]`` int32. Unless it is `NULL_SLOT` it becomes equal to the write slot: the window ends in
            another block than it begins in, and which of the two the next step reads is not known yet.
        num_fold: ``[N]`` int32, records of the read slot to fold: tokens between its state and `position`.

    Raises:
        ValueError: a dtype is another one.
    """

    cu_seqlens: Tensor
    position: Tensor
    read_slot: Tensor
    write_slot: Tensor
    second_slot: Tensor
    num_fold: Tensor

    def __post_init__(self) -> None:
        slots = {"read_slot": self.read_slot, "write_slot": self.write_slot, "second_slot": self.second_slot}
        _require_dtype(torch.int32, cu_seqlens=self.cu_seqlens, num_fold=self.num_fold, **slots)
        _require_dtype(torch.int64, position=self.position)


class KdaDecode(Protocol):
    """One token more of every sequence: convolution, gate, state update and gated norm in one pass."""

    def __call__(self, x: Activations, weights: Weights, pools: Pools, rows: DecodeRows, out: Tensor) -> None:
        """Advance every row's sequence by one token: Eq. 1 and 10 of arXiv 2510.26692.

        On CUDA the kernel reads rows, weights and pools before the one launched just ahead of it has ended: that one
        may write activations, not these. In a layer a matrix product lies between.

        Args:
            x: N tokens, one a row.
            weights: The layer's weights.
            pools: The layer's slots; only write slots change, and their flags.
            rows: the slots and the position of each token.
            out: ``[N, H·V]`` in the dtype of the activations, written.

        Cost:
            Reads and writes ``2·N·H·V·K·sizeof(state)`` bytes of state (4.2 MB per row with H=32, D=128 in float32).

        Raises:
            IndexError: on CPU, a slot outside the pools; such rows are skipped. On CUDA they are padded rows and
                nothing is raised: the host would have to wait for the device.
        """


class KdaPrefill(Protocol):
    """Several tokens more of every sequence."""

    def __call__(self, x: Activations, weights: Weights, pools: Pools, rows: PrefillRows, out: Tensor) -> None:
        """Run every sequence over its new tokens and export its state at block boundaries and at its end.

        The history of a token before position 0 is zeros by the position test, never by memory content.

        Args:
            x: the packed tokens.
            weights: The layer's weights.
            pools: The layer's slots; only those that the rows' table says are written change, and their flags.
            rows: the sequences.
            out: ``[T, H·V]`` in the dtype of the activations, written.

        Raises:
            ValueError: on CUDA, a block size that is not a multiple of 64.
            IndexError: on CPU, a needed slot outside the pools, or outside the table; it counts as 0. On CUDA it
                counts as 0 too, and nothing is raised.
        """


class KdaVerify(Protocol):
    """A window more of every sequence, of which a prefix may turn out to be the sequence's."""

    def __call__(self, x: Activations, weights: Weights, pools: Pools, rows: WindowRows, out: Tensor) -> None:
        """Run every row over its window, and keep what each of its tokens does to the state beside the state.

        The state that is written is the one *before* the window. On CPUs the output of a token, and the state after
        the tokens that count, are bit by bit those of as many decode steps. On CUDA they are to rounding, which
        depends on the number of rows too; and rows, weights and pools are read early, as `KdaDecode` says.

        Args:
            x: the packed tokens.
            weights: The layer's weights.
            pools: The layer's slots; only write slots and second slots change, and their flags.
            rows: the slots, and the position of each row's first token.
            out: ``[T, H·V]`` in the dtype of the activations, written.

        Cost:
            Reads and writes the state once whatever the window: that of a decode step, and
            ``2·N·H·window·3·D·4`` bytes of records; on CUDA as much again of a scratch, with four vectors a token for
            three.

        Raises:
            IndexError: on CPU, a slot outside the pools; it counts as 0. On CUDA it counts as 0 too, and nothing is
                raised.
        """


@dataclass(frozen=True, slots=True)
class Backend:
    """One platform's implementation.

    Attributes:
        name: A name for people to read.
        kda_decode: one token more of every sequence.
        kda_prefill: several tokens more of every sequence.
        kda_verify: a window more of every sequence.
        prepare: ``prepare(head_dim, windows=False)`` compiles what heads of so many channels need, `kda_verify` or
            `kda_decode` among it, as far as that alone decides it.
    """

    name: str
    kda_decode: KdaDecode
    kda_prefill: KdaPrefill
    kda_verify: KdaVerify
    prepare: Callable[..., None]


def _require_dtype(dtype: torch.dtype, **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype != dtype:
            raise ValueError(f"{name} is {tensor.dtype}; it must be {dtype}")
