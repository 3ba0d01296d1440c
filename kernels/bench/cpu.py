"""The CPU kernels against the same step in plain torch ops, and against the memory's own speed.

Providers: `numba` is the kernel; `torch` the same step in torch ops, for prefill the chunk form; `floor`
touches the state once, in place, and computes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, einsum

from kimi_vllm.kernels import reference
from kimi_vllm.kernels.bench.common import Row, largest_error, measure, require
from kimi_vllm.kernels.bench.layer import Layer, expected_decode, expected_prefill, fresh_rows, plain_rows
from kimi_vllm.kernels.contract import Activations, DecodeRows, Pools, PrefillRows, Weights
from kimi_vllm.kernels.dispatch import load_backend

DECODE_CASES = [
    *({"N": N, "H": 32, "D": 128} for N in (1, 4, 16, 64)),
    *({"N": N, "H": 2, "D": 64} for N in (1, 8)),
]
PREFILL_CASES = [
    *({"T": T, "H": 32, "D": 128} for T in (16, 64, 512, 2048)),
    {"T": 30, "H": 2, "D": 64},
]
RING = 8
CHECKED_HEADS = 4
"""Heads of a prefill that are compared: they say as much as thirty-two."""
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def rows(dtype: torch.dtype) -> Iterator[Row]:
    """Verify and time every case.

    Raises:
        WrongResult: a provider disagrees with the spec.
    """
    for case in DECODE_CASES:
        yield from _decode_rows(case, dtype)
    for case in PREFILL_CASES:
        yield from _prefill_rows(case, dtype)


def _random_layer(T: int, num_slots: int, case: dict[str, int], dtype: torch.dtype) -> Layer:
    return Layer.random(T, num_slots + 1, case["H"], case["D"], (dtype, torch.float32, torch.float32), RING)


def _decode_rows(case: dict[str, int], dtype: torch.dtype) -> Iterator[Row]:
    N, H, D = case["N"], case["H"], case["D"]
    layer = _random_layer(N, N, case, dtype)
    slots, position = torch.arange(1, N + 1, dtype=torch.int32), torch.full((N,), 100)
    step, expected = plain_rows(slots, position), expected_decode(layer, slots, position)
    out = torch.empty(N, H * D, dtype=dtype)
    dense = _Dense(*layer.pools.dense())
    providers: dict[str, Callable[..., object]] = {"numba": load_backend("cpu").kda_decode, "torch": dense.decode}
    for name, provider in providers.items():
        provider(*layer.inputs, step, out)
        require(f"{name} decode {case}", largest_error(out, expected), TOLERANCE[dtype])
    providers["floor"] = lambda *_: dense.state[1:].mul_(1.0)
    for name, provider in providers.items():
        times = measure(partial(provider, *layer.inputs, step, out))
        yield Row("kda_decode", name, case, _dtypes(dtype), *times, state_bytes=8 * N * H * D * D)


def _prefill_rows(case: dict[str, int], dtype: torch.dtype) -> Iterator[Row]:
    T, H, D = case["T"], case["H"], case["D"]
    layer, step = _random_layer(T, 1, case, dtype), fresh_rows([T])
    expected = expected_prefill(layer, step, CHECKED_HEADS)
    out = torch.empty(T, H * D, dtype=dtype)
    dense = _Dense(*layer.pools.dense())
    providers: dict[str, Callable[..., object]] = {"numba": load_backend("cpu").kda_prefill, "torch": dense.prefill}
    for name, provider in providers.items():
        provider(*layer.inputs, step, out)
        require(f"{name} prefill {case}", largest_error(out[:, : expected.shape[1]], expected), TOLERANCE[dtype])
    for name, provider in providers.items():
        times = measure(partial(provider, *layer.inputs, step, out))
        yield Row("kda_prefill", name, case, _dtypes(dtype), *times)


def _dtypes(dtype: torch.dtype) -> dict[str, str]:
    return {"act": str(dtype).removeprefix("torch."), "state": "float32"}


@dataclass(frozen=True, slots=True, eq=False)
class _Dense:
    """The same step in torch ops, on slots that lie side by side.

    Attributes:
        conv: ``[S, R, 3·H·D]`` float32.
        state: ``[S, H, V, K]`` float32.
    """

    conv: Tensor
    state: Tensor

    def decode(self, x: Activations, weights: Weights, _: Pools, rows: DecodeRows, out: Tensor) -> None:
        """Run a decode step of running sequences, batched over the rows."""
        N, H = x.beta.shape
        W, R = len(weights.conv_weight), self.conv.shape[1]
        self.conv[rows.write_slot, rows.position % R] = x.qkv.float()
        columns = (rows.position[:, None] + torch.arange(1 - W, 1)) % R
        window = self.conv[rows.read_slot[:, None], columns]  # [N, W, 3·H·D]
        mixed = torch.nn.functional.silu((window * weights.conv_weight).sum(1)).to(x.qkv.dtype).float()
        q, k, v = mixed.view(N, 3, H, -1).unbind(1)
        q, k = reference.l2_normalise(q) * q.shape[-1] ** -0.5, reference.l2_normalise(k)
        g = reference.log_decay(x.gate.float().view(N, H, -1), weights.A_log, weights.dt_bias.view(H, -1))
        state = self.state[rows.read_slot] * g.exp()[:, :, None, :]
        error = x.beta.float().sigmoid()[:, :, None] * (v - einsum("nhvk,nhk->nhv", state, k))
        state += error[..., None] * k[:, :, None, :]
        self.state[rows.write_slot] = state
        o = einsum("nhvk,nhk->nhv", state, q).to(x.qkv.dtype).float()
        out.copy_(reference.finish(o, x, weights))

    def prefill(self, x: Activations, weights: Weights, _: Pools, rows: PrefillRows, out: Tensor) -> None:
        """Run one new sequence, to slot 1: the chunk form, batched over the heads."""
        T, num_past, R = len(x.qkv), len(weights.conv_weight) - 1, self.conv.shape[1]
        history = x.qkv.new_zeros(num_past, x.qkv.shape[1], dtype=torch.float32)
        inputs = reference.features(x, history, weights)
        o, self.state[1] = reference.kda_chunk(*inputs, torch.zeros_like(self.state[1]))
        self.conv[1, torch.arange(T - num_past, T) % R] = x.qkv[-num_past:].float()
        out.copy_(reference.finish(o.to(x.qkv.dtype).float(), x, weights))
