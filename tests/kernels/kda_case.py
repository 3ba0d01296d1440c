"""One step's arguments for the kernels, on poisoned pools, and the float64 answer to compare with."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from kimi_vllm.kernels import dispatch, reference

POISON = (float("nan"), 1e30)


def relative_error(x: Tensor, gold: Tensor) -> float:
    """Return max |x - gold| / max |gold|; infinite if either holds a NaN."""
    if x.numel() == 0:
        return 0.0
    error = (x.double() - gold.double()).abs().max() / gold.double().abs().max().clamp_min(1e-30)
    return float(error) if torch.isfinite(error) else float("inf")


def same_bits(x: Tensor, y: Tensor) -> bool:
    """Return whether two tensors are equal bit by bit, NaN included."""
    return torch.equal(x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8))


@dataclass
class Case:
    """Activations of T tokens, weights of one layer, and pools in which every slot is poisoned until used."""

    T: int
    H: int = 2
    D: int = 64
    W: int = 4
    R: int = 8
    S: int = 8
    dtype: torch.dtype = torch.float32
    seed: int = 0
    A: float | None = None
    gate_mean: float = 0.0
    tensors: dict[str, Any] = field(default_factory=dict)
    generator: torch.Generator = field(default_factory=torch.Generator)

    def __post_init__(self) -> None:
        if self.tensors:
            return
        self.generator.manual_seed(self.seed)
        T, H, D, W = self.T, self.H, self.D, self.W
        # One merged projection, as in the layer: every activation is a slice with a long row stride.
        merged = self.random(T, 5 * H * D + H + 3).to(self.dtype)
        qkv, gate, out_gate, beta, _ = merged.split([3 * H * D, H * D, H * D, H, 3], dim=1)
        A_log = torch.rand(H, generator=self.generator) * 2.7 if self.A is None else torch.full((H,), self.A).log()
        state_pool = torch.empty(self.S, 3, H, D, D)[:, 1]
        conv_pool = torch.empty(self.S, self.R, 3 * H * D)
        for slot in range(self.S):
            state_pool[slot] = conv_pool[slot] = POISON[slot % 2]
        self.tensors = {
            "qkv": qkv,
            "gate": (gate + self.gate_mean).to(self.dtype),
            "beta": beta,
            "out_gate": out_gate,
            "conv_weight": self.random(W, 3 * H * D) * 0.5,
            "A_log": A_log,
            "dt_bias": self.random(H * D) - 3.0,
            "norm_weight": 1.0 + 0.1 * self.random(D),
            "norm_eps": 1e-5,
            "conv_pool": conv_pool,
            "state_pool": state_pool,
        }

    def random(self, *shape: int) -> Tensor:
        """Return normal random numbers from this case's own generator."""
        return torch.randn(*shape, generator=self.generator)

    def fill(self, slot: int, position: int) -> None:
        """Give a slot a state and the history that tokens from `position` on need; the rest stays poison."""
        self.state_pool[slot] = 0.3 * self.random(self.H, self.D, self.D)
        for past in range(max(0, position - self.W + 1), position):
            self.conv_pool[slot, past % self.R] = self.random(3 * self.H * self.D)

    @property
    def state_pool(self) -> Tensor:
        """The state pool, ``[S, H, V, K]`` with a slot stride of three layers."""
        pool: Tensor = self.tensors["state_pool"]
        return pool

    @property
    def conv_pool(self) -> Tensor:
        """The conv pool, ``[S, R, 3·H·D]``."""
        pool: Tensor = self.tensors["conv_pool"]
        return pool

    def copy(self, dtype: torch.dtype | None = None) -> Case:
        """Return an independent copy; in float64, for instance, when `dtype` says so."""
        tensors = {
            name: (value.clone() if dtype is None else value.to(dtype, copy=True))
            if isinstance(value, Tensor)
            else value
            for name, value in self.tensors.items()
        }
        return replace(self, tensors=tensors)

    def rows(self, start: int, stop: int) -> Case:
        """Return a view of some tokens, on the same pools."""
        part = dict(self.tensors)
        for name in ("qkv", "gate", "beta", "out_gate"):
            part[name] = part[name][start:stop]
        return replace(self, T=stop - start, tensors=part)

    def decode(self, read: list[int], write: list[int], position: list[int], *, spec: bool = False) -> Tensor:
        """Run one decode step on this case's pools, by the kernels or (`spec`) by the reference."""
        out = self.tensors["qkv"].new_empty(self.T, self.H * self.D)
        operation = reference.kda_decode if spec else dispatch.kda_decode
        operation(
            **self.tensors,
            read_slot=torch.tensor(read, dtype=torch.int32),
            write_slot=torch.tensor(write, dtype=torch.int32),
            position=torch.tensor(position, dtype=torch.int64),
            out=out,
        )
        return out

    def prefill(
        self,
        lengths: list[int],
        context: list[int],
        table: list[list[int]],
        block_size: int = 1 << 20,
        *,
        spec: bool = False,
    ) -> Tensor:
        """Run one prefill step on this case's pools, by the kernels or (`spec`) by the reference."""
        out = self.tensors["qkv"].new_empty(self.T, self.H * self.D)
        operation = reference.kda_prefill if spec else dispatch.kda_prefill
        operation(
            **self.tensors,
            cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
            context_len=torch.tensor(context, dtype=torch.int32),
            slot_table=torch.tensor(table or [[0]], dtype=torch.int32)[: len(table)],
            block_size=block_size,
            out=out,
        )
        return out

    def history(self, slot: int, position: int) -> Tensor:
        """Return the columns the token at `position` needs from a slot, ``[up to W-1, 3·H·D]``."""
        columns = [past % self.R for past in range(max(0, position - self.W + 1), position)]
        return self.conv_pool[slot, columns]


def assert_matches(ours: Case, gold: Case, written: dict[int, int], before: Case, tolerance: float = 1e-5) -> None:
    """Compare what a step left in the pools.

    Args:
        ours, gold: The pools after the step.
        written: Slot to the position its next token has; no other slot may have changed by a bit.
        before: The pools before the step.
        tolerance: On the states; conv columns are copies and must be equal.
    """
    for slot, position in written.items():
        assert relative_error(ours.state_pool[slot], gold.state_pool[slot]) <= tolerance, f"state of slot {slot}"
        assert torch.equal(ours.history(slot, position).double(), gold.history(slot, position).double()), slot
    untouched = [slot for slot in range(ours.S) if slot not in written]
    assert same_bits(ours.state_pool[untouched], before.state_pool[untouched])
    assert same_bits(ours.conv_pool[untouched], before.conv_pool[untouched])
