"""Every Triton kernel compiles for sm_90 through the functions that launch it, without a GPU and without running.

The arguments are of the released model's shape and have no memory. What the interpreter takes a compiler may refuse,
and only a compiler says what spills.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import JITFunction, driver

from kimi_vllm.kernels.contract import MAX_WINDOW, Activations, DecodeRows, Pools, PrefillRows, Weights, WindowRows
from kimi_vllm.kernels.cuda import decode, launch, prefill, rows, skinny, skinny_experts, verify
from kimi_vllm.kernels.cuda.math import INTERPRETED
from kimi_vllm.kernels.cuda.scales import Scales
from kimi_vllm.kernels.cut import Cut

pytestmark = pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")

MAX_DECODE_STACK = 32
"""Bytes: what Triton 3.9 spills of decode at 128 registers (NOTES.md)."""


class Nowhere:
    """What Triton asks of a driver before it compiles, for a Hopper that is not there."""

    def get_current_device(self) -> str:
        return "nowhere"

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


Kernels = dict[str, CompiledKernel]


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[Kernels]:
    """Let launches compile only; what they made, by the kernel's name."""
    found: Kernels = {}
    launched = JITFunction.run

    def run(self: JITFunction, *args: object, warmup: bool, **kwargs: object) -> None:
        found[self.__name__] = launched(self, *args, warmup=True, **kwargs)

    monkeypatch.setattr(JITFunction, "run", run)
    monkeypatch.setattr(driver, "_active", Nowhere())
    monkeypatch.setattr(launch, "pdl", lambda device: {"launch_pdl": True})
    yield found
    for module in (decode, prefill, rows, skinny, skinny_experts, verify):
        for kernel in vars(module).values():
            if isinstance(kernel, JITFunction):
                kernel.device_caches.pop("nowhere", None)


def stack_bytes(kernel: CompiledKernel, folder: Path) -> int:
    """Return the size of a kernel's stack: none of ours has one but for what it spills."""
    file = folder / "kernel.cubin"
    file.write_bytes(kernel.asm["cubin"])
    tool = triton.knobs.nvidia.cuobjdump.path
    listed = subprocess.run([tool, "-res-usage", file], capture_output=True, text=True, check=True).stdout
    return int(re.findall(r"STACK:(\d+)", listed)[0])


def empty(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def layer(
    T: int,
    window: int = 0,
    H: int = 32,
    D: int = 128,
    dtype: torch.dtype = torch.bfloat16,
    state_dtype: torch.dtype = torch.float32,
) -> tuple[Activations, Weights, Pools, Tensor]:
    """Return the arguments of every kernel but its rows; activations are columns of one projection, as in the layer."""
    width, work = H * D, torch.float32
    qkv, gate, out_gate, beta, _ = empty(T, 5 * width + H + 16, dtype=dtype).split(
        [3 * width, width, width, H, 16], dim=1
    )
    weights = Weights(*(empty(*shape, dtype=work) for shape in ((4, 3 * width), (H,), (width,), (D,))), norm_eps=1e-5)
    cut = Cut.fewest_blocks(20, H, D, max(4, 2 + window), state_dtype, dtype, 516096, window)
    memory, pages = empty(1000, cut.block_bytes, dtype=torch.uint8), empty(300, cut.blocks(20))
    pools = Pools(memory, pages, cut, H * cut.pieces, empty(300, cut.flags))
    return Activations(qkv, gate, beta, out_gate), weights, pools, empty(T, width, dtype=dtype)


def decode_rows(N: int) -> DecodeRows:
    return DecodeRows(empty(N), empty(N), empty(N, dtype=torch.int64))


def window_rows(N: int) -> WindowRows:
    return WindowRows(empty(N + 1), empty(N, dtype=torch.int64), empty(N), empty(N), empty(N), empty(N))


STEPS = pytest.mark.parametrize(
    ("N", "state_dtype"), [(1, torch.float32), (64, torch.float32), (64, torch.bfloat16)], ids=str
)


@STEPS
def test_decode(N: int, state_dtype: torch.dtype, compiled: Kernels, tmp_path: Path) -> None:
    *inputs, out = layer(N, state_dtype=state_dtype)
    decode.kda_decode(*inputs, decode_rows(N), out)
    assert stack_bytes(compiled["_decode"], tmp_path) <= MAX_DECODE_STACK
    # `step.replay` rounds as the compiler makes `step.delta_rule` round, which is only so where it fuses.
    assert compiled["_decode"].metadata.enable_fp_fusion


@STEPS
def test_windows_of_four_spill_nothing(N: int, state_dtype: torch.dtype, compiled: Kernels, tmp_path: Path) -> None:
    *inputs, out = layer(4 * N, 4, state_dtype=state_dtype)
    verify.kda_verify(*inputs, window_rows(N), out)
    assert stack_bytes(compiled["_verify"], tmp_path) == 0


@pytest.mark.parametrize(
    ("D", "window"), [(64, 4), pytest.param(128, MAX_WINDOW["cuda"], marks=pytest.mark.slow)], ids=["D64", "longest"]
)
def test_windows(D: int, window: int, compiled: Kernels) -> None:
    *inputs, out = layer(window, window, D=D)
    verify.kda_verify(*inputs, window_rows(1), out)
    assert set(compiled) == {"_verify"}


@pytest.mark.parametrize(
    ("T", "D", "window", "dtype"),
    [
        (4, 128, 4, torch.bfloat16),
        (512, 128, 4, torch.bfloat16),
        pytest.param(512, 64, 0, torch.float32, marks=pytest.mark.slow),
    ],
    ids=["extend", "chunked", "exact"],
)
def test_prefill(T: int, D: int, window: int, dtype: torch.dtype, compiled: Kernels) -> None:
    *inputs, out = layer(T, window, D=D, dtype=dtype)
    step = PrefillRows(empty(2), empty(1), empty(1, 20), 64, empty(1) if window else None)
    prefill.kda_prefill(*inputs, step, out)
    chunked = {"chunk_features", "intra_chunk", "inter_chunk"} | ({"_norm"} if D == 128 else set())
    assert set(compiled) == (chunked if T > launch.EXTEND_TOKENS else {"extend"})


def test_rows(compiled: Kernels) -> None:
    table, seq_lens, starts = empty(9, 20), empty(9), empty(10)
    rows.step_rows(table, seq_lens, starts, 5, 64, 300, decode_rows(5), empty(5), empty(4))
    base = empty(300, dtype=torch.int64)
    rows.window_rows(table, seq_lens, starts, 5, 64, 4, base, window_rows(5), empty(5), empty(4), empty(4))
    assert set(compiled) == {"_step_rows", "_window_rows"}


def test_products_of_few_rows(compiled: Kernels) -> None:
    x, weight = empty(1, 4096, dtype=torch.bfloat16), empty(2304, 4096, dtype=torch.bfloat16)
    config = launch.skinny(1, *weight.shape)
    assert config is not None
    skinny.skinny_linear(x, weight, empty(1, 2304, dtype=torch.bfloat16), config)
    weights, ids = skinny_experts.choose_experts(
        empty(1, 256, dtype=torch.float32), empty(256, dtype=torch.float32), 8, normalise=True, scaling=2.4
    )
    experts = launch.skinny_experts(1, 2304, 1024)
    assert experts is not None
    w13, w2 = empty(256, 2048, 2304, dtype=torch.bfloat16), empty(256, 2304, 1024, dtype=torch.bfloat16)
    skinny_experts.skinny_experts(x[:, :2304], w13, w2, weights, ids, experts)
    assert set(compiled) == {"_skinny", "_choose_experts", "_experts_up", "_experts_down"}


@pytest.mark.parametrize(
    ("shape", "block"), [((1, 1), 0), ((2304, 1), 0), ((18, 32), 128)], ids=["tensor", "channel", "block"]
)
def test_products_of_few_rows_with_fp8_weights(shape: tuple[int, int], block: int, compiled: Kernels) -> None:
    stored, wide = torch.float8_e4m3fn, torch.float32
    x, weight = empty(1, 4096, dtype=torch.bfloat16), empty(2304, 4096, dtype=stored)
    config = launch.skinny(1, *weight.shape, fp8=True)
    assert config is not None
    scales = Scales(empty(*shape, dtype=wide), block)
    skinny.skinny_linear(x, weight, empty(1, 2304, dtype=torch.bfloat16), config, scales)
    experts = launch.skinny_experts(1, 2304, 1024, fp8=True)
    assert experts is not None
    up, down = ((16, 18), (18, 8)) if block else ((1, 1), (1, 1)) if shape == (1, 1) else ((2048, 1), (2304, 1))
    both = Scales(empty(256, *up, dtype=wide), block), Scales(empty(256, *down, dtype=wide), block)
    w13, w2 = empty(256, 2048, 2304, dtype=stored), empty(256, 2304, 1024, dtype=stored)
    chosen = empty(1, 8, dtype=wide), empty(1, 8)
    own = tuple(Scales(empty(*size, dtype=wide), block) for size in (up, down))
    shared = skinny_experts.SharedExpert(empty(2048, 2304, dtype=stored), empty(2304, 1024, dtype=stored), own)
    assert shared.like(w13, w2, both)
    skinny_experts.skinny_experts(x[:, :2304], w13, w2, *chosen, experts, both, shared)
    assert set(compiled) == {"_skinny", "_experts_up", "_experts_down"}
