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

from kimi_vllm.kernels.cpu.head import NUM_FIELDS, Field, scratch_bytes
from kimi_vllm.kernels.cpu.math import BF16, FP16, FP32
from kimi_vllm.kernels.cpu.worker import compile_worker

_DTYPES = {torch.float32: FP32, torch.bfloat16: BF16, torch.float16: FP16}

# Below this many state elements a step costs less than waking the other threads.
_SERIAL_ELEMENTS = 256 * 1024

_thread = threading.local()


def describe() -> str:
    """Return the backend's name for people to read."""
    threads = "torch's OpenMP threads" if _parallel() is not None else "one thread: torch has no OpenMP here"
    return f"numba, {threads}"


def prepare(head_dim: int) -> None:
    """Compile both operations for heads of this size, or load them from the cache."""
    for decode in (True, False):
        _worker(decode, head_dim)


def kda_decode(
    qkv: Tensor,
    gate: Tensor,
    beta: Tensor,
    out_gate: Tensor,
    conv_weight: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    norm_weight: Tensor,
    norm_eps: float,
    conv_pool: Tensor,
    state_pool: Tensor,
    read_slot: Tensor,
    write_slot: Tensor,
    position: Tensor,
    out: Tensor,
    nonfinite: Tensor | None = None,
) -> None:
    """Advance every row by one token; arguments as `dispatch.kda_decode`."""
    N = qkv.shape[0]
    if N == 0:
        return
    if read_slot.dtype != torch.int32 or write_slot.dtype != torch.int32 or position.dtype != torch.int64:
        raise ValueError("read_slot and write_slot must be int32, position int64")
    fields = _shared_fields(
        qkv,
        gate,
        beta,
        out_gate,
        conv_weight,
        A_log,
        dt_bias,
        norm_weight,
        norm_eps,
        conv_pool,
        state_pool,
        nonfinite,
        out,
        N,
    )
    fields += (read_slot.data_ptr(), write_slot.data_ptr(), position.data_ptr())
    H, D = state_pool.shape[1], state_pool.shape[3]
    _launch(True, D, fields, N * H * D * D)


def kda_prefill(
    qkv: Tensor,
    gate: Tensor,
    beta: Tensor,
    out_gate: Tensor,
    conv_weight: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    norm_weight: Tensor,
    norm_eps: float,
    conv_pool: Tensor,
    state_pool: Tensor,
    cu_seqlens: Tensor,
    context_len: Tensor,
    slot_table: Tensor,
    block_size: int,
    out: Tensor,
    nonfinite: Tensor | None = None,
) -> None:
    """Run every sequence over its new tokens; arguments as `dispatch.kda_prefill`."""
    T, N = qkv.shape[0], context_len.shape[0]
    if T == 0:
        return
    for name, tensor in (
        ("cu_seqlens", cu_seqlens),
        ("context_len", context_len),
        ("slot_table", slot_table),
    ):
        if tensor.dtype != torch.int32:
            raise ValueError(f"{name} is {tensor.dtype}; it must be torch.int32")
    fields = _shared_fields(
        qkv,
        gate,
        beta,
        out_gate,
        conv_weight,
        A_log,
        dt_bias,
        norm_weight,
        norm_eps,
        conv_pool,
        state_pool,
        nonfinite,
        out,
        N,
    )
    table_row, table_width = slot_table.stride(0), slot_table.shape[1]
    fields += (0, 0, 0, cu_seqlens.data_ptr(), context_len.data_ptr())
    fields += (slot_table.data_ptr(), 4 * table_row, table_width, block_size, T)
    H, D = state_pool.shape[1], state_pool.shape[3]
    _launch(False, D, fields, T * H * D * D)


def _shared_fields(
    qkv: Tensor,
    gate: Tensor,
    beta: Tensor,
    out_gate: Tensor,
    conv_weight: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    norm_weight: Tensor,
    norm_eps: float,
    conv_pool: Tensor,
    state_pool: Tensor,
    nonfinite: Tensor | None,
    out: Tensor,
    N: int,
) -> tuple[int, ...]:
    """Return the parameters both operations share, in the order of `Field`."""
    if conv_pool.dtype != torch.float32 or state_pool.dtype != torch.float32:
        raise ValueError(
            f"conv_pool and state_pool are {conv_pool.dtype} and {state_pool.dtype}; the CPU kernels keep "
            "both in float32: set state_dtype to float32"
        )
    if out.dtype != qkv.dtype:
        raise ValueError(f"out is {out.dtype} and qkv {qkv.dtype}; they must be equal")
    if nonfinite is not None and nonfinite.dtype != torch.int32:
        raise ValueError(f"nonfinite is {nonfinite.dtype}; it must be torch.int32")
    size = qkv.element_size()
    S, H, _, D = state_pool.shape
    return (
        qkv.data_ptr(),
        qkv.stride(0) * size,
        gate.data_ptr(),
        gate.stride(0) * size,
        beta.data_ptr(),
        beta.stride(0) * size,
        out_gate.data_ptr(),
        out_gate.stride(0) * size,
        out.data_ptr(),
        out.stride(0) * size,
        _DTYPES[qkv.dtype],
        conv_weight.data_ptr(),
        conv_weight.shape[0],
        A_log.data_ptr(),
        dt_bias.data_ptr(),
        norm_weight.data_ptr(),
        _float_bits(norm_eps),
        H,
        D,
        N,
        conv_pool.data_ptr(),
        conv_pool.stride(0) * 4,
        conv_pool.stride(1) * 4,
        conv_pool.shape[1],
        state_pool.data_ptr(),
        state_pool.stride(0) * 4,
        state_pool.stride(1) * 4,
        S,
        0 if nonfinite is None else nonfinite.data_ptr(),
    )


def _launch(decode: bool, D: int, fields: tuple[int, ...], state_elements: int) -> None:
    """Run one worker per thread on a parameter block.

    Raises:
        IndexError: a task met a slot outside the pools or the table.
    """
    threads = torch.get_num_threads() if state_elements > _SERIAL_ELEMENTS else 1
    scratch, stride = _scratch(threads, D)
    head = Field.SCRATCH.value
    params = _Params(*fields[:head], scratch, stride, *fields[head:])
    address, worker = _worker(decode, D)
    parallel = _parallel()
    if threads == 1 or parallel is None:
        worker(params)
    else:
        parallel(address, params, threads, 0)
    if params[_BAD_SLOT]:
        raise IndexError(
            f"a slot is not among the {fields[_SLOTS]} of the pools, or a sequence outgrows its slot table"
        )


_Params = ctypes.c_int64 * NUM_FIELDS
_BAD_SLOT, _SLOTS = Field.BAD_SLOT.value, Field.S.value


@cache
def _worker(decode: bool, D: int) -> tuple[int, Any]:
    """Return the compiled worker as an address and as a callable."""
    address = compile_worker(decode, D)
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
