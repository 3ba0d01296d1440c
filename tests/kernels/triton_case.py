"""Cases for the Triton kernels: CUDA tensors or, in Triton's interpreter, CPU tensors; and what the first may cost."""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from mmap import mmap
from tempfile import TemporaryFile
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from kda_case import Case, Tolerance, rms_error
from triton.runtime import JITFunction

from kimi_vllm.kernels.bench.layer import scattered
from kimi_vllm.kernels.contract import Pools
from kimi_vllm.kernels.cuda import decode, launch, prefill, verify
from kimi_vllm.kernels.cuda.math import INTERPRETED

DEVICE = "cpu" if INTERPRETED else "cuda"
ON_GPU = pytest.mark.gpu

HEADS = [(1, 64), (2, 128), pytest.param(32, 128, marks=ON_GPU)]
HEAD_IDS = ["H1-D64", "H2-D128", "H32-D128"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
EXTREME_GATES = {"fast": (16.0, 6.0), "slow": (1.0, -20.0), "mix": (16.0, -20.0)}

# The interpreter cuts numbers off where it should round them to bfloat16, also the copies in the conv ring.
_CUT = 2.0**-7 if INTERPRETED else 0.0
LOOSE = Tolerance(out=5e-3, state=5e-3, error=rms_error)


def triton_case(
    T: int,
    H: int = 2,
    D: int = 64,
    *,
    exact: bool | None = None,
    decode_config: launch.Decode | None = None,
    prefill_config: launch.Prefill | None = None,
    windows_config: launch.Windows | None = None,
    conv_dtype: torch.dtype | None = None,
    **options: Any,
) -> Case:
    """Return a case for the Triton kernels; `exact` and the launch parameters as the kernels take them.

    Rings have the dtype of the states unless `conv_dtype` is another one.
    """
    kernels = SimpleNamespace(
        kda_decode=partial(decode.kda_decode, config=decode_config),
        kda_prefill=partial(prefill.kda_prefill, exact=exact, config=prefill_config),
        kda_verify=partial(verify.kda_verify, config=windows_config),
    )
    case = Case(T, H, D, device=DEVICE, kernels=kernels, **options)
    if conv_dtype is not None:
        conv, state = case.pools.dense()
        case.pools = scattered(conv.to(conv_dtype), state, pieces=case.pieces, window=case.window)
    return case


def tolerance_of(dtype: torch.dtype, state_dtype: torch.dtype) -> Tolerance:
    """Return what numbers of two bytes excuse: 1e-5 where there are none."""
    if dtype == state_dtype == torch.float32:
        return Tolerance()
    return Tolerance(
        out=5e-3 if dtype != torch.float32 else 1e-5,
        state=5e-3,
        column=_CUT if state_dtype == torch.bfloat16 != dtype else 0.0,
        error=rms_error,
    )


PIECES = pytest.mark.parametrize("pieces", [1, 4], ids="pieces{}".format)
"""Other cases have two."""
POOL_DTYPES = pytest.mark.parametrize(
    ("state_dtype", "conv_dtype"),
    [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float16, torch.float16)],
    ids=["fp32-bf16", "bf16-fp32", "fp16-fp16"],
)
"""Of states and of rings, which have the dtype of the activations."""


def far_away(pools: Pools) -> Pools:
    """Return the same slots behind 34 GiB of memory that nobody touches, past 2^31 steps of 16 bytes."""
    near, size = pools.memory, pools.cut.block_bytes
    skipped = (34 << 30) // size
    length = (skipped + len(near)) * size
    if DEVICE == "cpu":
        with TemporaryFile() as file:  # with holes: only what is touched takes room
            file.truncate(length)
            memory = torch.frombuffer(mmap(file.fileno(), length), dtype=torch.uint8).view(-1, size)
    else:
        memory = torch.empty(length, dtype=torch.uint8, device=DEVICE).view(-1, size)
    memory[skipped:] = near
    return replace(pools, memory=memory, pages=pools.pages + skipped)


def without_null_blocks(pools: Pools) -> Pools:
    """Return the same slots, except that the null slot's row of the page table names blocks that do not exist."""
    pages = pools.pages.clone()
    pages[0] = 2**31 - 1
    return replace(pools, pages=pages)


def compiled_kernels() -> int:
    """Return how many variants of our kernels Triton has compiled in this process."""
    modules = [module for name, module in sys.modules.items() if name.startswith("kimi_vllm.kernels.")]
    kernels = {id(x): x for module in modules for x in vars(module).values() if isinstance(x, JITFunction)}
    return sum(len(cache[0]) for kernel in kernels.values() for cache in kernel.device_caches.values())
