"""A KDA layer with random numbers for the benchmarks, and what the float64 spec says about a step of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kimi_vllm.kernels import reference
from kimi_vllm.kernels.contract import Activations, DecodeRows, Pools, PrefillRows, Weights
from kimi_vllm.kernels.cut import Cut


@dataclass(frozen=True, slots=True)
class Layer:
    """The tokens of one step, and the weights and slots of the layer that takes it.

    Attributes:
        x: columns of one projection, as in the layer.
        weights: gates as the released model initialises them, four taps.
        pools: every slot in use, in blocks as the released model has them: fifteen half-heads and a gap.
    """

    x: Activations
    weights: Weights
    pools: Pools

    @classmethod
    def random(
        cls, T: int, num_slots: int, H: int, D: int, dtypes: tuple[torch.dtype, torch.dtype, torch.dtype], ring: int,
        device: str = "cpu", seed: int = 0,
    ) -> Layer:  # fmt: skip
        """Return T tokens and a layer.

        Args:
            T: tokens.
            num_slots: slots, the null slot included.
            H, D: heads and their size.
            dtypes: Dtypes of the activations, the conv pool and the state pool.
            ring: columns of the conv pool.
            device: where all tensors are.
            seed: Seed of the random numbers.
        """
        generator = torch.Generator(device).manual_seed(seed)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device)

        width, filling = H * D, -H % 16 + 16
        projected = random(T, 5 * width + H + filling).to(dtypes[0])
        qkv, gate, out_gate, beta, _ = projected.split([3 * width, width, width, H, filling], dim=1)
        A_log = (torch.rand(H, generator=generator, device=device) * 15 + 1).log()
        weights = Weights(random(4, 3 * width) * 0.5, A_log, random(width) - 4, 1 + 0.1 * random(D), norm_eps=1e-5)
        conv, state = random(num_slots, ring, 3 * width).to(dtypes[1]), 0.1 * random(num_slots, H, D, D).to(dtypes[2])
        pools = scattered(conv, state, units=15, layer=0, layers=1, gap=1536)
        return cls(Activations(qkv, gate, beta, out_gate), weights, pools)

    @property
    def inputs(self) -> tuple[Activations, Weights, Pools]:
        """The first three arguments of every kernel."""
        return self.x, self.weights, self.pools

    def copy(self) -> Layer:
        """Return the same layer with pools of its own."""
        return replace(self, pools=replace(self.pools, memory=self.pools.memory.clone()))

    def double(self, num_heads: int, slots: Sequence[int]) -> Layer:
        """Return the first heads of the layer in float64, and of its slots these, as slots 1 and so on."""
        x, weights, pools = self.inputs
        H = pools.cut.H

        def part(tensor: Tensor, groups: int = 1) -> Tensor:
            some: Tensor = tensor.double().unflatten(-1, (groups, H, -1))[..., :num_heads, :]
            return some.flatten(-3)

        states, rings = zip(*(pools.load(slot) for slot in slots), strict=True)
        null_state, null_ring = torch.zeros_like(states[0]), torch.zeros_like(rings[0])
        return Layer(
            Activations(part(x.qkv, 3), part(x.gate), part(x.beta), part(x.out_gate)),
            Weights(
                part(weights.conv_weight, 3),
                part(weights.A_log),
                part(weights.dt_bias),
                weights.norm_weight.double(),
                weights.norm_eps,
            ),
            scattered(
                part(torch.stack([null_ring, *rings]), 3),
                torch.stack([null_state, *states])[:, :num_heads].double(),
                pieces=1,
            ),
        )


def scattered(
    conv: Tensor,
    state: Tensor,
    *,
    pieces: int = 2,
    units: int = 3,
    layer: int = 1,
    layers: int = 3,
    gap: int = 16,
    window: int = 0,
) -> Pools:
    """Return slots that hold these rings and states, in blocks in random order, with NaN wherever nothing is kept.

    Args:
        conv, state: ``[S, R, 3·H·D]`` and ``[S, H, V, K]``.
        pieces, units: Units of a head, and of a block.
        layer, layers: Which layer of a state it is, and how many there are; the others hold NaN.
        gap: Bytes of a block behind its units; fewer than a unit.
        window: Records of a head, all of them NaN.
    """
    S, H, _, D = state.shape
    cut = Cut(H, D, conv.shape[1], state.dtype, conv.dtype, pieces, block_bytes=0, window=window)
    cut = replace(cut, block_bytes=units * cut.unit_bytes + gap)
    P = cut.blocks(layers)
    order = torch.randperm(S * P + 3, generator=torch.Generator().manual_seed(S))[: S * P]
    memory = torch.full((S * P + 3, cut.block_bytes), 0xFF, dtype=torch.uint8, device=state.device)  # NaN in any dtype
    pages = order.view(S, P).to(torch.int32).to(state.device)
    pools = Pools(memory, pages, cut, first_unit=layer * H * pieces)
    for slot in range(S):
        pools.store(slot, state[slot], conv[slot])
    return pools


def plain_rows(slots: Tensor, position: Tensor) -> DecodeRows:
    """Return the rows of running sequences, which read and write the same slots ``[N]`` int32."""
    return DecodeRows(slots, slots, position)


def fresh_rows(lengths: Sequence[int], device: str = "cpu") -> PrefillRows:
    """Return the rows of new sequences of such lengths, whose states go to the slots from 1 on."""
    N = len(lengths)
    return PrefillRows(
        cu_seqlens=torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32),
        context_len=torch.zeros(N, dtype=torch.int32, device=device),
        slot_table=torch.arange(1, N + 1, dtype=torch.int32, device=device)[:, None],
        block_size=1 << 20,
    )


def expected_decode(layer: Layer, slots: Tensor, position: Tensor) -> Tensor:
    """Return what a decode step on these slots must put out, in float64; the layer's own pools are not changed."""
    gold = layer.double(layer.pools.cut.H, slots.tolist())  # only the slots of this step, for memory
    own = torch.arange(1, len(slots) + 1, dtype=torch.int32, device=slots.device)
    out = torch.empty(gold.x.gate.shape, dtype=torch.float64, device=slots.device)
    reference.kda_decode(*gold.inputs, plain_rows(own, position), out)
    return out


def expected_prefill(layer: Layer, rows: PrefillRows, num_heads: int) -> Tensor:
    """Return what a prefill step must put out for the first heads, in float64: the spec walks token by token."""
    gold = layer.double(min(num_heads, layer.pools.cut.H), range(1, len(layer.pools.pages)))
    out = torch.empty(gold.x.gate.shape, dtype=torch.float64, device=rows.cu_seqlens.device)
    reference.kda_prefill(*gold.inputs, rows, out)
    return out
