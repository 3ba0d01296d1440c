"""A stack of KDA layers around the Triton kernels, projections included, against the same stack around the spec."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from kda_case import converted, decode_rows, prefill_rows
from torch import Tensor
from triton_case import DEVICE, ON_GPU, triton_case

from kimi_vllm.kernels import reference
from kimi_vllm.kernels.bench.layer import scattered
from kimi_vllm.kernels.contract import Activations, DecodeRows, Pools, PrefillRows, Weights

pytestmark = pytest.mark.triton

W, R, SLOTS = 4, 4, 6


@dataclass
class Layer:
    """One layer's weights, as `kimi_vllm/layers/kda.py` holds them: one input product, f_b and g_b as one batch."""

    H: int
    D: int
    in_proj: Tensor
    low_rank: Tensor
    o_proj: Tensor
    weights: Weights

    @classmethod
    def random(cls, hidden: int, H: int, D: int, generator: torch.Generator) -> Layer:
        """Return a layer with weights of the size that keeps activations near one."""

        def weight(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(DEVICE) * shape[-1] ** -0.5

        width = H * D
        return cls(
            H,
            D,
            weight(3 * width + 2 * D + H + -H % 16, hidden),
            weight(2, width, D),
            weight(hidden, width),
            Weights(
                conv_weight=weight(W, 3 * width) * width**0.5,
                A_log=(torch.rand(H, generator=generator) * 15 + 1).log().to(DEVICE),
                dt_bias=weight(width) * width**0.5 - 4,
                norm_weight=torch.ones(D, device=DEVICE),
                norm_eps=1e-5,
            ),
        )

    def to(self, dtype: torch.dtype) -> Layer:
        """Return the layer in another dtype; what the kernels keep in float32 follows only to float64."""
        weights = converted(self.weights, dtype) if dtype == torch.float64 else self.weights
        return Layer(self.H, self.D, self.in_proj.to(dtype), self.low_rank.to(dtype), self.o_proj.to(dtype), weights)

    def forward(self, x: Tensor, step: Callable[..., None], pools: Pools, rows: DecodeRows | PrefillRows) -> Tensor:
        """``[T, hidden]`` to ``[T, hidden]``, with a residual connection."""
        width = self.H * self.D
        normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
        qkv, low_rank, beta, _ = (normed @ self.in_proj.T).split([3 * width, 2 * self.D, self.H, -self.H % 16], dim=1)
        gate, out_gate = torch.bmm(low_rank.unflatten(1, (2, -1)).transpose(0, 1), self.low_rank.transpose(1, 2))
        out = torch.full_like(gate, float("nan"))
        step(Activations(qkv, gate, beta, out_gate), self.weights, pools, rows, out)
        return x + out @ self.o_proj.T


@dataclass
class Stack:
    """Layers with their pools, run by one pair of operations."""

    layers: list[Layer]
    pools: list[Pools]
    kernels: Any

    @classmethod
    def of(cls, layers: list[Layer], kernels: Any, dtype: torch.dtype, state: torch.dtype) -> Stack:
        """Return the layers in `dtype`, with poisoned pools in `state`."""
        pools = [
            scattered(
                torch.full((SLOTS, R, 3 * x.H * x.D), float("nan"), dtype=state, device=DEVICE),
                torch.full((SLOTS, x.H, x.D, x.D), float("nan"), dtype=state, device=DEVICE),
            )
            for x in layers
        ]
        return cls([layer.to(dtype) for layer in layers], pools, kernels)

    def run(self, x: Tensor, lengths: list[int], context: list[int], slots: list[int]) -> Tensor:
        """Run one step, a decode step if every sequence has one token and a past, over all layers."""
        x = x.to(self.layers[0].in_proj.dtype)
        step, rows = self.kernels.kda_prefill, prefill_rows(lengths, context, [[slot] for slot in slots], device=DEVICE)
        if max(lengths) == 1 and min(context) > 0:
            step, rows = self.kernels.kda_decode, decode_rows(slots, slots, context, DEVICE)
        for layer, pools in zip(self.layers, self.pools, strict=True):
            x = layer.forward(x, step, pools, rows)
        return x


@pytest.mark.parametrize(
    ("num_layers", "hidden", "H", "D", "T", "dtype", "tolerance"),
    [
        (2, 64, 1, 64, 21, torch.float32, 1e-5),
        pytest.param(20, 2304, 32, 128, 300, torch.float32, 1e-4, marks=ON_GPU),
        pytest.param(20, 2304, 32, 128, 300, torch.bfloat16, 3e-2, marks=ON_GPU),
    ],
    ids=["2-layers-fp32", "20-layers-fp32", "20-layers-bf16"],
)
def test_layers_prefill_and_decode_as_the_spec(
    num_layers: int, hidden: int, H: int, D: int, T: int, dtype: torch.dtype, tolerance: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    layers = [Layer.random(hidden, H, D, generator) for _ in range(num_layers)]
    ours = Stack.of(layers, triton_case(0).kernels, dtype, torch.float32)
    gold = Stack.of(layers, reference, torch.float64, torch.float64)
    lengths, context, slots = [T, 3, T // 2], [0, 0, 0], [4, 1, 2]
    for _ in range(3):
        x = torch.randn(sum(lengths), hidden, generator=generator).to(DEVICE)
        result = ours.run(x, lengths, context, slots)
        expected = gold.run(x, lengths, context, slots)
        error = float((result.double() - expected).norm() / expected.norm())
        assert error <= tolerance
        context = [past + length for past, length in zip(context, lengths, strict=True)]
        lengths = [1, 1, 1]
