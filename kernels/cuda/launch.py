"""How the Triton kernels are launched: parameters from a checked-in table, chosen by shape, never tuned at run time.

A kernel that writes state cannot be tried twice on the same step, and a choice that depends on timing would make
results depend on the day. `tuned/sm90.json` holds what was fastest on Hopper; NOTES.md has the measurements.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kimi_vllm.kernels.contract import Pools
from kimi_vllm.kernels.cut import Cut

EXTEND_TOKENS = 4
"""Steps of at most this many tokens run token by token in one launch."""

SKINNY_ROWS = (1, 2, 4, 8)
"""Rows for which the table can have a product of few rows."""


@dataclass(frozen=True, slots=True)
class Decode:
    """Launch parameters of the decode kernel.

    Attributes:
        rows: value channels a program updates at a time.
        fold: vectors of a state row held by one thread.
        warps: warps per program.
        registers: at most so many a thread, so that more programs share a multiprocessor; None: as many as it takes.
    """

    rows: int
    fold: int
    warps: int
    registers: int | None = None


@dataclass(frozen=True, slots=True)
class Windows:
    """Launch parameters of the kernel of windows.

    Attributes:
        rows, columns: of the tile of a head's matrix that a program updates at a time; rows at least 16.
        warps: warps per program.
        registers: as `Decode.registers`.
    """

    rows: int
    columns: int
    warps: int
    registers: int | None = None


@dataclass(frozen=True, slots=True)
class Prefill:
    """Launch parameters of the prefill kernels.

    Attributes:
        features_warps, intra_warps: warps of the kernels inside blocks and inside chunks.
        value_block: value channels per program of the kernel across chunks; the whole head fuses the norm.
        inter_warps, inter_stages: its warps, and how many chunks are loaded ahead.
    """

    features_warps: int
    intra_warps: int
    value_block: int
    inter_warps: int
    inter_stages: int


@dataclass(frozen=True, slots=True)
class Skinny:
    """Launch parameters of the product of a few rows.

    Attributes:
        rows: outputs per program.
        step: inputs multiplied at a time.
        warps: warps per program.
    """

    rows: int
    step: int
    warps: int


@dataclass(frozen=True, slots=True)
class SkinnyExperts:
    """Launch parameters of the experts of a few tokens: the products up to their inner channels, and down again."""

    up: Skinny
    down: Skinny


@cache
def _table() -> dict[str, list[dict[str, Any]]]:
    """Return the rules by kernel; of each list the first that fits counts."""
    table: dict[str, list[dict[str, Any]]] = json.loads((Path(__file__).parents[1] / "tuned" / "sm90.json").read_text())
    return table


@cache
def decode(heads: int, head_dim: int, state_dtype: torch.dtype) -> Decode:
    """Return the launch parameters for a batch with this many heads in all."""
    return Decode(**_first_fit("decode", heads, head_dim, state_dtype.itemsize))


@cache
def windows(heads: int, head_dim: int, state_dtype: torch.dtype) -> Windows:
    """Return the launch parameters for windows with this many heads in all."""
    return Windows(**_first_fit("windows", heads, head_dim, state_dtype.itemsize))


@cache
def prefill(heads: int, head_dim: int, exact: bool) -> Prefill:
    """Return the launch parameters for sequences with this many heads in all."""
    return Prefill(**_first_fit("prefill_exact" if exact else "prefill", heads, head_dim, 0))


@cache
def skinny(tokens: int, outputs: int, inputs: int, fp8: bool = False) -> Skinny | None:
    """Return the launch parameters for a product of so many rows; None where vLLM's is faster or nobody measured."""
    for rule in _table()["skinny"]:
        shaped = rule.get("min_inputs", 0) <= inputs <= rule.get("max_inputs", inputs)
        few = tokens == rule["tokens"] and outputs * inputs <= rule["max_weights"]
        if few and shaped and fp8 == rule.get("fp8", False):
            return Skinny(**rule["launch"])
    return None


@cache
def skinny_experts(tokens: int, hidden: int, inner: int, fp8: bool = False) -> SkinnyExperts | None:
    """Return the launch parameters for the experts of so many tokens; None where vLLM's are faster."""
    for rule in _table()["skinny_experts"]:
        few = tokens <= rule["max_tokens"] and hidden * inner <= rule["max_weights"]
        if few and fp8 == rule.get("fp8", False):
            return SkinnyExperts(Skinny(**rule["up"]), Skinny(**rule["down"]))
    return None


@cache
def routed_tokens() -> int:
    """Return for how many tokens our kernel chooses experts; for more vLLM's does."""
    return int(_table()["routing"][0]["max_tokens"])


def batch_sizes(heads: int, most: int) -> list[int]:
    """Return numbers of sequences up to `most` that between them meet all launch parameters.

    Args:
        heads: Of one sequence.
    """
    last = {rule["max_heads"] // heads for rules in _table().values() for rule in rules if "max_heads" in rule}
    return sorted({1, most} | {count for count in last if 1 <= count <= most})


def _first_fit(kernel: str, heads: int, head_dim: int, state_bytes: int) -> dict[str, int]:
    for rule in _table()[kernel]:
        few_enough = heads <= rule.get("max_heads", heads)
        if few_enough and head_dim == rule["head_dim"] and state_bytes == rule.get("state_bytes", state_bytes):
            return dict(rule["launch"])
    raise LookupError(f"tuned/sm90.json has no rule for {kernel}, {head_dim} channels, {state_bytes} bytes")


@cache
def sizes(cut: Cut) -> dict[str, int]:
    """Return the sizes that kernels take of a cut, which slots.py describes."""
    return {
        "H": cut.H,
        "D": cut.D,
        "R": cut.R,
        "BLOCK_STEPS": cut.block_bytes // 16,
        "UNIT_STEPS": cut.unit_bytes // 16,
        "UNITS": cut.units,
        "PIECES": cut.pieces,
        "RING": cut.state_bytes // cut.conv_dtype.itemsize,
    }


@cache
def window_sizes(cut: Cut) -> dict[str, int]:
    """Return what kernels that read or write records take beside `sizes`; slots.py describes it."""
    return {
        "WINDOW": cut.window,
        "RECORDS": cut.records,
        "FIRST_RECORD": (cut.state_bytes + cut.ring_bytes) // torch.float32.itemsize,
    }


def records(pools: Pools) -> Tensor:
    """Return the memory as records."""
    return pools.memory.view(torch.float32)


def typed(pools: Pools) -> tuple[Tensor, Tensor]:
    """Return the memory as rings and as states."""
    return pools.memory.view(pools.cut.conv_dtype), pools.memory.view(pools.cut.state_dtype)


@cache
def pdl(device: torch.device) -> dict[str, bool]:
    """Return whether launches may overlap the end of the kernel before them (programmatic dependent launch)."""
    return {"launch_pdl": device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9}
