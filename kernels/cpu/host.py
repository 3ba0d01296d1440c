"""KDA on the CPU: the host side of the compiled loops.

The loops run on torch's own OpenMP threads, entered through ``GOMP_parallel`` of the library torch itself
uses. A second thread pool (numba's) would spin against torch's on the same cores, would start with the
affinity of whatever thread called it first - one core, in vLLM's CPU worker - and could not be entered from
two Python threads at once. NOTES.md has the numbers.
"""

from __future__ import annotations

import ctypes
import struct
import threading
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from kimi_vllm.kernels import checks
from kimi_vllm.kernels.contract import Activations, DecodeRows, Pools, PrefillRows, Weights, WindowRows
from kimi_vllm.kernels.cpu.head import NUM_FIELDS, Field, scratch_bytes
from kimi_vllm.kernels.cpu.math import BF16, FP16, FP32
from kimi_vllm.kernels.cpu.worker import DECODE, PREFILL, VERIFY, compile_worker
from kimi_vllm.kernels.cut import Cut

_DTYPES = {torch.float32: FP32, torch.bfloat16: BF16, torch.float16: FP16}

# Below this many state elements a step costs less than waking the other threads.
_SERIAL_ELEMENTS = 256 * 1024

_thread = threading.local()


def describe() -> str:
    """Return the backend's name for people to read."""
    threads = "torch's OpenMP threads" if _parallel() is not None else "one thread: torch has no OpenMP here"
    return f"numba, {threads}"


def prepare(head_dim: int, windows: bool = False) -> None:
    """Compile the operations of heads of this size, with windows or without; or load them from the cache."""
    for kind in (VERIFY if windows else DECODE, PREFILL):
        _worker(kind, head_dim)


def kda_decode(x: Activations, weights: Weights, pools: Pools, rows: DecodeRows, out: Tensor) -> None:
    """Advance every row by one token; see `contract.KdaDecode`."""
    N = x.qkv.shape[0]
    if N == 0:
        return
    if not _as_compiled(x, pools, out):
        checks.check_decode(x, weights, pools, rows, out)
    addresses = (rows.read_slot.data_ptr(), rows.write_slot.data_ptr(), rows.position.data_ptr())
    _launch(DECODE, pools, _layer_fields(x, weights, pools, out, N) + addresses, N)


def kda_prefill(x: Activations, weights: Weights, pools: Pools, rows: PrefillRows, out: Tensor) -> None:
    """Run every sequence over its new tokens; see `contract.KdaPrefill`."""
    T, N = x.qkv.shape[0], rows.context_len.shape[0]
    if T == 0:
        return
    if not _as_compiled(x, pools, out):
        checks.check_prefill(x, weights, pools, rows, out)
    table = rows.slot_table
    fields = _layer_fields(x, weights, pools, out, N)
    fields += (0, 0, 0, rows.cu_seqlens.data_ptr(), rows.context_len.data_ptr())
    fields += (table.data_ptr(), 4 * table.stride(0), table.shape[1], rows.block_size, T)
    fields += (0 if rows.num_fold is None else rows.num_fold.data_ptr(),)
    _launch(PREFILL, pools, fields, T)


def kda_verify(x: Activations, weights: Weights, pools: Pools, rows: WindowRows, out: Tensor) -> None:
    """Run every row over its window; see `contract.KdaVerify`."""
    T, N = x.qkv.shape[0], rows.position.shape[0]
    if T == 0:
        return
    if not _as_compiled(x, pools, out):
        checks.check_windows(x, weights, pools, rows, out)
    fields = _layer_fields(x, weights, pools, out, N)
    fields += (rows.read_slot.data_ptr(), rows.write_slot.data_ptr(), rows.position.data_ptr())
    fields += (rows.cu_seqlens.data_ptr(), 0, 0, 0, 0, 0, T, rows.num_fold.data_ptr(), rows.second_slot.data_ptr())
    _launch(VERIFY, pools, fields, T)


def _as_compiled(x: Activations, pools: Pools, out: Tensor) -> bool:
    """Return whether elements have the sizes that the loops count in.

    The loops know addresses only and would run past the end of a tensor of narrower elements, so this is asked on
    every call. Nothing else can change between calls: shapes follow from the model, and rows check their dtypes.
    """
    dtype = x.qkv.dtype
    return bool(
        x.gate.dtype == x.beta.dtype == x.out_gate.dtype == out.dtype == dtype
        and pools.cut.conv_dtype == pools.cut.state_dtype == torch.float32
        and pools.pages.dtype == torch.int32
        and (pools.nonfinite is None or pools.nonfinite.dtype == torch.int32)
    )


def _layer_fields(x: Activations, weights: Weights, pools: Pools, out: Tensor, N: int) -> tuple[int, ...]:
    """Return the parameters both operations share, in the order of `Field`."""
    size = x.qkv.element_size()
    cut, (S, P) = pools.cut, pools.pages.shape
    return (
        x.qkv.data_ptr(), x.qkv.stride(0) * size,
        x.gate.data_ptr(), x.gate.stride(0) * size,
        x.beta.data_ptr(), x.beta.stride(0) * size,
        x.out_gate.data_ptr(), x.out_gate.stride(0) * size,
        out.data_ptr(), out.stride(0) * size, _DTYPES[x.qkv.dtype],
        weights.conv_weight.data_ptr(), weights.conv_weight.shape[0], weights.A_log.data_ptr(),
        weights.dt_bias.data_ptr(), weights.norm_weight.data_ptr(), _float_bits(weights.norm_eps),
        cut.H, cut.D, N,
        *_cut_fields(cut), pools.first_unit, pools.memory.data_ptr(), pools.pages.data_ptr(), 4 * P, S,
        0 if pools.nonfinite is None else pools.nonfinite.data_ptr(),
    )  # fmt: skip


@lru_cache(maxsize=8)
def _cut_fields(cut: Cut) -> tuple[int, ...]:
    """Return the parameters from `Field.R` to `Field.BLOCK_BYTES`."""
    return cut.R, cut.pieces, cut.vectors, cut.records, cut.flags, cut.units, cut.unit_bytes, cut.block_bytes


def _launch(kind: int, pools: Pools, fields: tuple[int, ...], tokens: int) -> None:
    """Run one worker per thread on a parameter block.

    Raises:
        IndexError: a task met a slot outside the pools or the table.
    """
    H, D = pools.cut.H, pools.cut.D
    threads = torch.get_num_threads() if tokens * H * D * D > _SERIAL_ELEMENTS else 1
    scratch, stride = _scratch(threads, D)
    head = Field.SCRATCH.value
    params = _Params(*fields[:head], scratch, stride, *fields[head:])
    address, worker = _worker(kind, D)
    parallel = _parallel()
    if threads == 1 or parallel is None:
        worker(params)
    else:
        parallel(address, params, threads, 0)
    if params[_BAD_SLOT]:
        S = len(pools.pages)
        raise IndexError(f"a slot is not among the {S} of the pools, or a sequence outgrows its slot table")


_Params = ctypes.c_int64 * NUM_FIELDS
_BAD_SLOT = Field.BAD_SLOT.value


@cache
def _worker(kind: int, D: int) -> tuple[int, Any]:
    """Return the compiled worker as an address and as a callable."""
    address = compile_worker(kind, D)
    return address, ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address)


@cache
def _parallel() -> Any:
    """Return ``GOMP_parallel(function, data, threads, flags)`` of torch's OpenMP library, if it has one.

    torch loads its dependencies into the global namespace, so the process-wide symbol is the one torch
    resolved, also when another OpenMP runtime was preloaded.
    """
    function = getattr(ctypes.CDLL(None), "GOMP_parallel", None)
    if function is not None:
        function.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
        function.restype = None
    return function


def _scratch(threads: int, D: int) -> tuple[int, int]:
    """Return the address of this Python thread's scratch memory and the bytes between two workers."""
    stride = scratch_bytes(D)
    memory: Tensor | None = getattr(_thread, "memory", None)
    if memory is None or memory.numel() < threads * stride + 64:
        memory = _thread.memory = torch.empty(threads * stride + 64, dtype=torch.uint8)
    return (memory.data_ptr() + 63) // 64 * 64, stride


@lru_cache(maxsize=8)
def _float_bits(value: float) -> int:
    """Return the bits of a float32."""
    return int(struct.unpack("<i", struct.pack("<f", value))[0])
