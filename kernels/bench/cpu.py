"""The CPU kernels against the same step in plain torch ops, and against the memory's own speed.

Providers: `numba` is the kernel; `torch` the same step in torch ops, for prefill the chunk form; `floor`
touches the state once, in place, and computes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, einsum

from kimi_vllm.kernels import reference
from kimi_vllm.kernels.bench.common import Row, measure, require_equal
from kimi_vllm.kernels.dispatch import kda_decode, kda_prefill

DECODE_CASES = [
    *({"N": N, "H": 32, "D": 128} for N in (1, 4, 16, 64)),
    *({"N": N, "H": 2, "D": 64} for N in (1, 8)),
]
PREFILL_CASES = [
    *({"T": T, "H": 32, "D": 128} for T in (16, 64, 512, 2048)),
    {"T": 30, "H": 2, "D": 64},
]
CONV_WIDTH, RING = 4, 8
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def rows(dtype: torch.dtype) -> Iterator[Row]:
    """Verify and time every case.

    Raises:
        WrongResult: a provider disagrees with the spec.
    """
    with torch.inference_mode():
        for case in DECODE_CASES:
            yield from _decode_rows(case, dtype)
        for case in PREFILL_CASES:
            yield from _prefill_rows(case, dtype)


def _arguments(T: int, num_slots: int, H: int, D: int, dtype: torch.dtype) -> dict[str, Any]:
    """Return activations, weights and pools, with gates as the released model initialises them."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "qkv": random(T, 3 * H * D).to(dtype),
        "gate": random(T, H * D).to(dtype),
        "beta": random(T, H).to(dtype),
        "out_gate": random(T, H * D).to(dtype),
        "conv_weight": random(CONV_WIDTH, 3 * H * D) * 0.5,
        "A_log": (torch.rand(H, generator=generator) * 15 + 1).log(),
        "dt_bias": random(H * D) - 4,
        "norm_weight": 1 + 0.1 * random(D),
        "norm_eps": 1e-5,
        "conv_pool": random(num_slots + 1, RING, 3 * H * D),
        "state_pool": 0.1 * random(num_slots + 1, H, D, D),
    }


def _copy(arguments: dict[str, Any], dtype: torch.dtype | None = None) -> dict[str, Any]:
    return {
        name: value.to(dtype or value.dtype, copy=True) if isinstance(value, Tensor) else value
        for name, value in arguments.items()
    }


def _first_heads(arguments: dict[str, Any], num_heads: int) -> dict[str, Any]:
    """Return the same step of a layer that has only the first heads."""
    H = arguments["state_pool"].shape[1]

    def per_head(tensor: Tensor, parts: int = 1) -> Tensor:
        heads: Tensor = tensor.unflatten(-1, (parts, H, -1))[..., :num_heads, :]
        return heads.flatten(-3)

    part = dict(arguments)
    for name in ("gate", "out_gate", "dt_bias", "beta", "A_log"):
        part[name] = per_head(arguments[name])
    for name in ("qkv", "conv_weight", "conv_pool"):
        part[name] = per_head(arguments[name], 3)
    part["state_pool"] = arguments["state_pool"][:, :num_heads]
    return part


def _decode_rows(case: dict[str, int], dtype: torch.dtype) -> Iterator[Row]:
    N, H, D = case["N"], case["H"], case["D"]
    arguments = _arguments(N, N, H, D, dtype)
    slots = torch.arange(1, N + 1, dtype=torch.int32)
    index: dict[str, Any] = {"read_slot": slots, "write_slot": slots, "position": torch.full((N,), 100)}
    expected = torch.empty(N, H * D, dtype=torch.float64)
    reference.kda_decode(**_copy(arguments, torch.float64), **index, out=expected)
    out = torch.empty(N, H * D, dtype=dtype)
    providers: dict[str, Callable[..., object]] = {"numba": kda_decode, "torch": _torch_decode}
    for name, provider in providers.items():
        provider(**_copy(arguments), **index, out=out)
        require_equal(f"{name} decode {case}", out, expected, TOLERANCE[dtype])
    states = arguments["state_pool"][1:]
    providers["floor"] = lambda **_: states.mul_(1.0)
    for name, provider in providers.items():
        times = measure(partial(provider, **arguments, **index, out=out))
        yield Row("kda_decode", name, case, _dtypes(dtype), *times, state_bytes=8 * N * H * D * D)


def _prefill_rows(case: dict[str, int], dtype: torch.dtype) -> Iterator[Row]:
    T, H, D = case["T"], case["H"], case["D"]
    arguments = _arguments(T, 1, H, D, dtype)
    index: dict[str, Any] = {
        "cu_seqlens": torch.tensor([0, T], dtype=torch.int32),
        "context_len": torch.zeros(1, dtype=torch.int32),
        "slot_table": torch.ones(1, 1, dtype=torch.int32),
        "block_size": 1 << 20,
    }
    # The spec walks token by token in float64: four heads of a long prompt say as much as thirty-two.
    checked = min(H, 4)
    expected = torch.empty(T, checked * D, dtype=torch.float64)
    reference.kda_prefill(**_copy(_first_heads(arguments, checked), torch.float64), **index, out=expected)
    out = torch.empty(T, H * D, dtype=dtype)
    providers: dict[str, Callable[..., object]] = {"numba": kda_prefill, "torch": _torch_prefill}
    for name, provider in providers.items():
        provider(**_copy(arguments), **index, out=out)
        require_equal(f"{name} prefill {case}", out[:, : checked * D], expected, TOLERANCE[dtype])
    for name, provider in providers.items():
        times = measure(partial(provider, **arguments, **index, out=out))
        yield Row("kda_prefill", name, case, _dtypes(dtype), *times)


def _dtypes(dtype: torch.dtype) -> dict[str, str]:
    return {"act": str(dtype).removeprefix("torch."), "state": "float32"}


def _torch_decode(
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
) -> None:
    """Run a decode step of running sequences in torch ops, batched over the rows."""
    N, H = beta.shape
    W, R = len(conv_weight), conv_pool.shape[1]
    conv_pool[write_slot, position % R] = qkv.float()
    columns = (position[:, None] + torch.arange(1 - W, 1)) % R
    window = conv_pool[read_slot[:, None], columns]  # [N, W, 3·H·D]
    mixed = torch.nn.functional.silu((window * conv_weight).sum(1)).to(qkv.dtype).float()
    q, k, v = mixed.view(N, 3, H, -1).unbind(1)
    q, k = reference.l2_normalise(q) * q.shape[-1] ** -0.5, reference.l2_normalise(k)
    g = reference.log_decay(gate.float().view(N, H, -1), A_log, dt_bias.view(H, -1))
    state = state_pool[read_slot] * g.exp()[:, :, None, :]
    error = beta.float().sigmoid()[:, :, None] * (v - einsum("nhvk,nhk->nhv", state, k))
    state += error[..., None] * k[:, :, None, :]
    state_pool[write_slot] = state
    o = einsum("nhvk,nhk->nhv", state, q).to(qkv.dtype).float()
    o = reference.gated_rms_norm(o, out_gate.float().view(N, H, -1), norm_weight, norm_eps)
    out.copy_(o.view(N, -1))


def _torch_prefill(
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
    out: Tensor,
    **index: Any,
) -> None:
    """Run one new sequence in torch ops: the chunk form, batched over the heads."""
    T, H = beta.shape
    history = qkv.new_zeros(len(conv_weight) - 1, qkv.shape[1], dtype=torch.float32)
    x = reference.features(qkv, history, gate, beta, conv_weight, A_log, dt_bias, qkv.dtype)
    o, state = reference.kda_chunk(*x, state_pool.new_zeros(state_pool.shape[1:]))
    state_pool[1] = state
    reference.store_history(conv_pool, 1, T, torch.cat([history, qkv.float()])[T:])
    o = o.to(qkv.dtype).float()
    o = reference.gated_rms_norm(o, out_gate.float().view(T, H, -1), norm_weight, norm_eps)
    out.copy_(o.view(T, -1))
