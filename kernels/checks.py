"""Whether the arguments of a kernel call are as `contract.py` says, by shapes, dtypes and strides; not by values."""

from __future__ import annotations

import torch
from torch import Tensor

from kimi_vllm.kernels.contract import (
    ACTIVATION_DTYPES,
    CONV_WIDTHS,
    HEAD_SIZES,
    MAX_WINDOW,
    STATE_DTYPES,
    Activations,
    DecodeRows,
    Pools,
    PrefillRows,
    Weights,
    WindowRows,
)


def check_decode(x: Activations, weights: Weights, pools: Pools, rows: DecodeRows, out: Tensor) -> None:
    """Check the arguments of a decode step without looking at their values.

    Raises:
        ValueError: names the tensor, what it is and what it must be.
    """
    _check_layer(x, weights, pools, out)
    N = x.qkv.shape[0]
    _expect("read_slot", rows.read_slot, (N,), (torch.int32,))
    _expect("write_slot", rows.write_slot, (N,), (torch.int32,))
    _expect("position", rows.position, (N,), (torch.int64,))


def check_prefill(x: Activations, weights: Weights, pools: Pools, rows: PrefillRows, out: Tensor) -> None:
    """Check the arguments of a prefill step without looking at their values.

    Raises:
        ValueError: names the tensor, what it is and what it must be.
    """
    _check_layer(x, weights, pools, out)
    N = rows.context_len.shape[0] if rows.context_len.dim() == 1 else -1
    _expect("context_len", rows.context_len, (N,), (torch.int32,))
    _expect("cu_seqlens", rows.cu_seqlens, (N + 1,), (torch.int32,))
    if rows.slot_table.dim() != 2 or rows.slot_table.shape[1] == 0:
        raise ValueError(f"slot_table has shape {list(rows.slot_table.shape)}; it must be [{N}, B] with B >= 1")
    _expect("slot_table", rows.slot_table, (N, rows.slot_table.shape[1]), (torch.int32,), contiguous=False)
    if rows.block_size < 1:
        raise ValueError(f"block_size is {rows.block_size}; it must be at least 1 token")
    if rows.num_fold is not None:
        _expect("num_fold", rows.num_fold, (N,), (torch.int32,))


def check_windows(x: Activations, weights: Weights, pools: Pools, rows: WindowRows, out: Tensor) -> None:
    """Check the arguments of a step of windows without looking at their values.

    Raises:
        ValueError: names the tensor, what it is and what it must be.
    """
    _check_layer(x, weights, pools, out)
    window, R, W = pools.cut.window, pools.cut.R, weights.conv_weight.shape[0]
    most = MAX_WINDOW["cuda" if x.qkv.is_cuda else "cpu"]
    if not 1 <= window <= most:
        raise ValueError(f"the pools have a window of {window} tokens; it must be 1 to {most}")
    if W - 2 + window > R:
        raise ValueError(f"the conv ring has {R} columns; a window of {window} needs at least {W - 2 + window}")
    N = rows.position.shape[0] if rows.position.dim() == 1 else -1
    _expect("position", rows.position, (N,), (torch.int64,))
    _expect("cu_seqlens", rows.cu_seqlens, (N + 1,), (torch.int32,))
    for name in ("read_slot", "write_slot", "second_slot", "num_fold"):
        _expect(name, getattr(rows, name), (N,), (torch.int32,))


def _check_layer(x: Activations, weights: Weights, pools: Pools, out: Tensor) -> None:
    """Check what all operations share."""
    cut, S = pools.cut, pools.pages.shape[0]
    H, D, R = cut.H, cut.D, cut.R
    if D not in HEAD_SIZES:
        raise ValueError(f"heads have {D} channels; the kernels support {HEAD_SIZES}")
    W = weights.conv_weight.shape[0]
    if W not in CONV_WIDTHS:
        raise ValueError(f"conv_weight has {W} taps; the kernels support 2 to 8")
    if R < W:
        raise ValueError(f"the conv ring has {R} columns; a convolution of width {W} needs at least {W}")
    fp32 = (torch.float32,)
    _expect("conv_weight", weights.conv_weight, (W, 3 * H * D), fp32)
    _expect("A_log", weights.A_log, (H,), fp32)
    _expect("dt_bias", weights.dt_bias, (H * D,), fp32)
    _expect("norm_weight", weights.norm_weight, (D,), fp32)

    T, same = x.qkv.shape[0], (x.qkv.dtype,)
    _expect("qkv", x.qkv, (T, 3 * H * D), ACTIVATION_DTYPES, contiguous=False)
    _expect("beta", x.beta, (T, H), same, contiguous=False)
    for name, tensor in (("gate", x.gate), ("out_gate", x.out_gate), ("out", out)):
        _expect(name, tensor, (T, H * D), same, contiguous=False)

    kept = STATE_DTYPES.get(x.qkv.device.type, ACTIVATION_DTYPES)
    for name, dtype in (("state", cut.state_dtype), ("conv ring", cut.conv_dtype)):
        if dtype not in kept:
            allowed = " or ".join(map(str, kept))
            raise ValueError(f"the {name} is {dtype}; it must be {allowed} on {x.qkv.device.type}: set state_dtype")
    if not 1 <= cut.pieces <= D or cut.pieces & (cut.pieces - 1) or 3 * R % cut.pieces:
        raise ValueError(f"a head in {cut.pieces} pieces; it must be a power of two that divides {3 * R}, at most {D}")
    if cut.unit_bytes % 16 or cut.block_bytes % 16:
        raise ValueError(f"units and blocks have {cut.unit_bytes} and {cut.block_bytes} bytes; both must divide by 16")
    if not cut.units:
        raise ValueError(f"a block has {cut.block_bytes} bytes; it must hold a unit of {cut.unit_bytes}")
    _expect("pools.memory", pools.memory, (pools.memory.shape[0], cut.block_bytes), (torch.uint8,))
    first, last = pools.first_unit, pools.first_unit + H * cut.pieces - 1
    if first < 0 or pools.pages.dim() != 2 or last // cut.units >= pools.pages.shape[1]:
        shape = list(pools.pages.shape)
        raise ValueError(f"pools.pages has shape {shape}; a layer needs units {first} to {last}, {cut.units} a block")
    _expect("pools.pages", pools.pages, tuple(pools.pages.shape), (torch.int32,))
    if pools.nonfinite is not None:
        _expect("pools.nonfinite", pools.nonfinite, (S, cut.flags), (torch.int32,))


def _expect(
    name: str,
    tensor: Tensor,
    shape: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...],
    *,
    contiguous: bool = True,
) -> None:
    """Raise ValueError unless the tensor has this shape, one of these dtypes and unit stride at the end."""
    if tensor.shape != shape:
        raise ValueError(f"{name} has shape {list(tensor.shape)}; it must be {list(shape)}")
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name} is {tensor.dtype}; it must be {' or '.join(map(str, dtypes))}")
    if contiguous and not tensor.is_contiguous():
        raise ValueError(f"{name} has strides {tensor.stride()}; it must be contiguous")
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        raise ValueError(f"{name} has strides {tensor.stride()}; its last dimension must be contiguous")
