"""One step's arguments for the kernels, on poisoned pools, and the float64 answer to compare with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from kimi_vllm.kernels import checks, reference
from kimi_vllm.kernels.bench.layer import scattered
from kimi_vllm.kernels.contract import Activations, DecodeRows, Pools, PrefillRows, Weights, WindowRows
from kimi_vllm.kernels.dispatch import load_backend

Record = TypeVar("Record", Activations, Weights, Pools, DecodeRows, PrefillRows)

POISON = (float("nan"), 1e30)
TOLERANCE = 1e-5


def relative_error(x: Tensor, gold: Tensor) -> float:
    """Return max |x - gold| / max |gold|; infinite if either holds a NaN."""
    if x.numel() == 0:
        return 0.0
    error = (x.double() - gold.double()).abs().max() / gold.double().abs().max().clamp_min(1e-30)
    return float(error) if torch.isfinite(error) else float("inf")


def rms_error(x: Tensor, gold: Tensor) -> float:
    """Return the root mean square of x - gold relative to that of gold; infinite if either holds a NaN."""
    if x.numel() == 0:
        return 0.0
    error = (x.double() - gold.double()).norm() / gold.double().norm().clamp_min(1e-30)
    return float(error) if torch.isfinite(error) else float("inf")


def same_bits(x: Tensor, y: Tensor) -> bool:
    """Return whether two tensors are equal bit by bit, NaN included."""
    return torch.equal(x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8))


def copy_of(x: Tensor, dtype: torch.dtype | None = None, device: str | None = None) -> Tensor:
    """Return a copy with the same strides and offset; `clone` would close the gaps between the rows of a slice."""
    if x.numel() == 0:
        return x.to(dtype=dtype, device=device, copy=True)
    extent = 1 + x.storage_offset() + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
    memory = torch.empty(extent, dtype=dtype or x.dtype, device=device or x.device)
    return memory.as_strided(x.shape, x.stride(), x.storage_offset()).copy_(x)


def mapped(record: Record, change: Callable[[Tensor], Tensor]) -> Record:
    """Return the record with every tensor changed."""
    values = {each.name: getattr(record, each.name) for each in fields(record)}
    return type(record)(**{name: change(x) if isinstance(x, Tensor) else x for name, x in values.items()})


def converted(record: Record, dtype: torch.dtype | None = None, device: str | None = None) -> Record:
    """Return a copy with the strides of the original; only floating point numbers change their dtype."""
    return mapped(record, lambda x: copy_of(x, dtype if x.is_floating_point() else None, device))


def copied(pools: Pools, dtype: torch.dtype | None = None) -> Pools:
    """Return pools of their own, with the same slots, and the same memory around them unless the dtype changes."""
    if dtype is None:
        return replace(pools, memory=pools.memory.clone())
    conv, state = pools.dense()
    wide = scattered(conv.to(dtype), state.to(dtype), pieces=pools.cut.pieces, window=pools.cut.window)
    for slot in range(len(pools.pages)) if pools.cut.window else ():
        wide.store_records(slot, pools.load_records(slot))
    return wide


def decode_rows(read: list[int], write: list[int], position: list[int], device: str = "cpu") -> DecodeRows:
    """Return the rows of a decode step."""
    read_slot, write_slot = (torch.tensor(slots, dtype=torch.int32, device=device) for slots in (read, write))
    return DecodeRows(read_slot, write_slot, torch.tensor(position, dtype=torch.int64, device=device))


def prefill_rows(
    lengths: list[int], context: list[int], table: list[list[int]], block_size: int = 1 << 20, device: str = "cpu"
) -> PrefillRows:
    """Return the rows of a prefill step of sequences with so many new tokens and so many before them."""
    return PrefillRows(
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32),
        context_len=torch.tensor(context, dtype=torch.int32, device=device),
        slot_table=torch.tensor(table or [[0]], dtype=torch.int32, device=device)[: len(table)],
        block_size=block_size,
    )


def window_rows(
    lengths: list[int],
    position: list[int],
    read: list[int],
    write: list[int],
    second: list[int],
    num_fold: list[int],
    device: str = "cpu",
) -> WindowRows:
    """Return the rows of a step of windows of such lengths."""
    slots = torch.tensor([read, write, second, num_fold], dtype=torch.int32, device=device)
    return WindowRows(
        torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32),
        torch.tensor(position, dtype=torch.int64, device=device),
        *slots.unbind(),
    )


class CheckedCpu:
    """The kernels of CPUs, their arguments checked on every call."""

    @staticmethod
    def kda_decode(*arguments: Any) -> None:
        """Check and run a decode step."""
        checks.check_decode(*arguments)
        load_backend("cpu").kda_decode(*arguments)

    @staticmethod
    def kda_prefill(*arguments: Any) -> None:
        """Check and run a prefill step."""
        checks.check_prefill(*arguments)
        load_backend("cpu").kda_prefill(*arguments)

    @staticmethod
    def kda_verify(*arguments: Any) -> None:
        """Check and run a step of windows."""
        checks.check_windows(*arguments)
        load_backend("cpu").kda_verify(*arguments)


@dataclass
class Case:
    """Activations of T tokens, weights of one layer, and pools in which every slot is poisoned until used.

    Attributes:
        T, H, D, W, R, S: As in `contract`.
        dtype, state_dtype: Of the activations, and of the pools.
        A, gate_mean: What all exp(A_log) are, if given, and the mean of the raw gates.
        filling: Columns of the merged projection that belong to nobody; odd ones leave rows unaligned.
        device: Where all tensors are.
        pieces: Units of a head.
        window: Records of a head.
        kernels: Has `kda_decode`, `kda_prefill` and `kda_verify`, which `decode`, `prefill` and `verify` call.
        x, weights, pools: Made from the above unless given. Activations are slices with a long row stride, as in
            the layer, and slots are scattered over memory that holds three layers.
    """

    T: int
    H: int = 2
    D: int = 64
    W: int = 4
    R: int = 8
    S: int = 8
    dtype: torch.dtype = torch.float32
    state_dtype: torch.dtype = torch.float32
    seed: int = 0
    A: float | None = None
    gate_mean: float = 0.0
    filling: int = 3
    device: str = "cpu"
    pieces: int = 2
    window: int = 0
    kernels: Any = CheckedCpu
    generator: torch.Generator = field(default_factory=torch.Generator)
    x: Activations = None  # type: ignore[assignment]
    weights: Weights = None  # type: ignore[assignment]
    pools: Pools = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if self.pools is not None:
            return
        self.generator.manual_seed(self.seed)
        T, H, D, W = self.T, self.H, self.D, self.W
        merged = self.random(T, 5 * H * D + H + self.filling)
        merged[:, 3 * H * D : 4 * H * D] += self.gate_mean
        merged = merged.to(self.dtype).to(self.device)
        qkv, gate, out_gate, beta, _ = merged.split([3 * H * D, H * D, H * D, H, self.filling], dim=1)
        self.x = Activations(qkv, gate, beta, out_gate)
        A_log = torch.rand(H, generator=self.generator) * 2.7 if self.A is None else torch.full((H,), self.A).log()
        weights = (self.random(W, 3 * H * D) * 0.5, A_log, self.random(H * D) - 3.0, 1.0 + 0.1 * self.random(D))
        self.weights = Weights(*(weight.to(self.device) for weight in weights), norm_eps=1e-5)
        poison = torch.tensor(POISON, dtype=self.state_dtype, device=self.device).repeat(self.S)[: self.S, None, None]
        conv, state = poison.expand(-1, self.R, 3 * H * D), poison[..., None].expand(-1, H, D, D)
        self.pools = scattered(conv, state, pieces=self.pieces, window=self.window)

    def random(self, *shape: int) -> Tensor:
        """Return normal random numbers from this case's own generator."""
        return torch.randn(*shape, generator=self.generator)

    def fill(self, slot: int, position: int) -> None:
        """Give a slot a state and the history that tokens from `position` on need; the rest stays poison."""
        _, ring = self.pools.load(slot)
        state = (0.3 * self.random(self.H, self.D, self.D)).to(self.device)
        for past in range(max(0, position - self.W + 1), position):
            ring[past % self.R] = self.random(3 * self.H * self.D).to(self.device)
        self.pools.store(slot, state, ring)

    @property
    def state(self) -> Tensor:
        """A copy of the states of all slots, ``[S, H, V, K]``."""
        return self.pools.dense()[1]

    @property
    def conv(self) -> Tensor:
        """A copy of the rings of all slots, ``[S, R, 3·H·D]``."""
        return self.pools.dense()[0]

    def copy(self, dtype: torch.dtype | None = None) -> Case:
        """Return an independent copy; in float64, for instance, when `dtype` says so."""
        x, weights = converted(self.x, dtype), converted(self.weights, dtype)
        return replace(self, x=x, weights=weights, pools=copied(self.pools, dtype))

    def rows(self, start: int, stop: int) -> Case:
        """Return a view of some tokens, on the same pools."""
        return replace(self, T=stop - start, x=self.x.tokens(start, stop))

    def flags(self) -> Tensor:
        """Return cleared flags for every slot."""
        return torch.zeros(self.S, self.pools.cut.flags, dtype=torch.int32, device=self.device)

    def decode(
        self,
        read: list[int],
        write: list[int],
        position: list[int],
        *,
        spec: bool = False,
        nonfinite: Tensor | None = None,
    ) -> Tensor:
        """Run one decode step on this case's pools, by the kernels or (`spec`) by the reference."""
        kernels = reference if spec else self.kernels
        return self._run(kernels.kda_decode, decode_rows(read, write, position, self.device), nonfinite)

    def prefill(
        self,
        lengths: list[int],
        context: list[int],
        table: list[list[int]],
        block_size: int = 1 << 20,
        *,
        num_fold: list[int] | None = None,
        spec: bool = False,
        nonfinite: Tensor | None = None,
    ) -> Tensor:
        """Run one prefill step on this case's pools, by the kernels or (`spec`) by the reference."""
        kernels = reference if spec else self.kernels
        rows = prefill_rows(lengths, context, table, block_size, self.device)
        if num_fold is not None:
            rows = replace(rows, num_fold=torch.tensor(num_fold, dtype=torch.int32, device=self.device))
        return self._run(kernels.kda_prefill, rows, nonfinite)

    def verify(
        self,
        lengths: list[int],
        position: list[int],
        read: list[int],
        write: list[int],
        second: list[int],
        num_fold: list[int],
        *,
        spec: bool = False,
        nonfinite: Tensor | None = None,
    ) -> Tensor:
        """Run one step of windows on this case's pools, by the kernels or (`spec`) by the reference."""
        kernels = reference if spec else self.kernels
        rows = window_rows(lengths, position, read, write, second, num_fold, self.device)
        return self._run(kernels.kda_verify, rows, nonfinite)

    def _run(self, operation: Callable[..., None], rows: Any, nonfinite: Tensor | None) -> Tensor:
        """Call an operation with a poisoned output, whose rows have a gap that must stay as it is."""
        width = self.H * self.D
        wide = self.x.qkv.new_full((self.T, width + 3), float("nan"))
        operation(self.x, self.weights, replace(self.pools, nonfinite=nonfinite), rows, wide[:, :width])
        assert wide[:, width:].isnan().all()
        return wide[:, :width].contiguous()

    def history(self, slot: int, position: int) -> Tensor:
        """Return the columns the token at `position` needs from a slot, ``[up to W-1, 3·H·D]``."""
        columns = [past % self.R for past in range(max(0, position - self.W + 1), position)]
        return self.pools.load(slot)[1][columns]


@dataclass(frozen=True)
class Tolerance:
    """How far a kernel may be from the spec in float64.

    Attributes:
        out, state: Greatest error of the output and of a written state.
        column: Greatest relative error of the conv columns. They are copies: only a rounding may excuse one.
        error: What measures the first two.
    """

    out: float = TOLERANCE
    state: float = TOLERANCE
    column: float = 0.0
    error: Callable[[Tensor, Tensor], float] = relative_error


def check_decode(
    case: Case, read: list[int], write: list[int], position: list[int], tolerance: Tolerance | None = None
) -> Tensor:
    """Run a decode step by kernel and spec on copies; compare everything; return the kernel's output."""
    tolerance = tolerance or Tolerance()
    ours, gold = case.copy(), case.copy(torch.float64)
    flags, expected_flags = case.flags(), case.flags()
    out = ours.decode(read, write, position, nonfinite=flags)
    expected = gold.decode(read, write, position, spec=True, nonfinite=expected_flags)
    assert tolerance.error(out, expected) <= tolerance.out
    assert torch.equal(flags, expected_flags)
    written = {slot: p + 1 for slot, p in zip(write, position, strict=True) if slot}
    assert_matches(ours, gold, written, case, tolerance)
    return out


def check_prefill(
    case: Case,
    lengths: list[int],
    context: list[int],
    table: list[list[int]],
    block: int = 1 << 20,
    tolerance: Tolerance | None = None,
) -> Case:
    """Run a prefill step by kernel and spec on copies; compare everything; return the kernel's pools."""
    tolerance = tolerance or Tolerance()
    ours, gold = case.copy(), case.copy(torch.float64)
    flags, expected_flags = case.flags(), case.flags()
    out = ours.prefill(lengths, context, table, block, nonfinite=flags)
    expected = gold.prefill(lengths, context, table, block, spec=True, nonfinite=expected_flags)
    assert tolerance.error(out, expected) <= tolerance.out
    assert torch.equal(flags, expected_flags)
    assert not out[sum(lengths) :].any()
    written = {}
    for row, start, length in zip(table, context, lengths, strict=True):
        for entry in range(start // block, (start + length - 1) // block + 1 if length else 0):
            if row[entry]:
                written[row[entry]] = min((entry + 1) * block, start + length)
    assert_matches(ours, gold, written, case, tolerance)
    return ours


def check_no_sequence(case: Case) -> None:
    """Rows that belong to nobody become zeros, and nothing else changes, where there is no sequence at all."""
    for spec in (True, False):
        ours = case.copy()
        assert not ours.prefill([], [], [], 64, spec=spec).any()
        assert same_bits(ours.pools.memory, case.pools.memory)


def assert_matches(ours: Case, gold: Case, written: dict[int, int], before: Case, tolerance: Tolerance) -> None:
    """Compare what a step left in the pools.

    Args:
        ours, gold: The pools after the step.
        written: Slot to the position its next token has; no other slot may have changed by a bit.
        before: The pools before the step.
        tolerance: On the states and the conv columns.
    """
    for slot, position in written.items():
        error = tolerance.error(ours.pools.load(slot)[0], gold.pools.load(slot)[0])
        assert error <= tolerance.state, f"state of slot {slot}: {error}"
        columns = gold.history(slot, position).to(ours.pools.cut.conv_dtype)
        assert relative_error(ours.history(slot, position), columns) <= tolerance.column, slot
    # Neither other slots nor other layers, nor any byte that belongs to nobody.
    expected = copied(before.pools)
    for slot in written:
        expected.store(slot, *ours.pools.load(slot))
    assert same_bits(ours.pools.memory, expected.memory)
