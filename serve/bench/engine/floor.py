"""The least time of a decode step: what must cross the memory bus, over the rate at which it can.

A step of N sequences with contexts of L tokens reads every dense weight once (attention, shared experts, routers, the
dense MLP, norms and the output head; of the embedding only N rows, left out), of each MoE layer the experts that any of
its tokens chose, the latents of the context in the MLA layers, and reads and writes the KDA states:

    bytes(N, L) = w·(dense + touched(N)·expert) + N·(L·latents + 2·state)
    touched(N)  = E·(1 - (1 - k/E)^N)      experts of a layer that N tokens choose k of E from at random
    latents     = w·layers_MLA·(rank + rope)
    state       = layers_KDA·(s·H·K·V + w·(width - 1)·3·H·K)      matrix in s bytes, convolution window in w

    time(N, L)  = bytes / (peak · ACHIEVABLE)

ACHIEVABLE is part of the floor: nothing reaches the bandwidth on the data sheet. An H200 copies at 4.24 of its 4.8 TB/s
(kernels/bench/results/h200.jsonl) and reads a little faster. With 0.9 the 48B model at batch 1 takes 1.47 ms at a
context of 4K, 1.70 at 128K and 3.42 at 1M; without it 1.32, 1.53 and 3.07.
"""

from dataclasses import dataclass

from kimi_vllm.geometry import KimiGeometry
from kimi_vllm.quantization import WeightFormat
from kimi_vllm.weight_bytes import weights as worker_weights

ACHIEVABLE = 0.9
"""Share of the peak bandwidth that a kernel which only reads can have."""


PEAKS_TBPS = {"H200": 4.8, "H100 80GB": 3.35, "H100 PCIe": 2.0}
"""Memory bandwidth on the data sheet, by a part of the device's name, in 10^12 bytes per second."""


@dataclass(frozen=True, slots=True)
class StepBytes:
    """What one decode step must read and write, in bytes."""

    weights: int
    kv: int
    state: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.kv + self.state


def step_bytes(
    geometry: KimiGeometry,
    batch: int,
    context: int,
    itemsize: int = 2,
    state_itemsize: int = 4,
    ranks: int = 1,
    quantization: WeightFormat | None = None,
) -> StepBytes:
    """Bytes that one worker moves in a decode step; see the module's formula.

    Args:
        batch: sequences that decode.
        context: tokens behind each.
        itemsize: bytes per element of weights and latents.
        state_itemsize: bytes per element of the recurrent state.
        ranks: tensor-parallel size. Every worker reads the latents of all tokens.
        quantization: how linear layers are stored, if not in `itemsize` bytes.
    """
    num_kda = sum(geometry.kda)
    heads, dim = geometry.linear_num_heads // ranks, geometry.linear_head_dim
    state = num_kda * (state_itemsize * heads * dim * dim + itemsize * (geometry.conv_width - 1) * 3 * heads * dim)
    latents = itemsize * (geometry.num_layers - num_kda) * geometry.latent_dim
    weights = 0
    for weight in worker_weights(geometry, ranks, ranks):
        if weight.name == "model.embed_tokens":
            continue
        share = 1.0
        if weight.kind == "experts" and geometry.moe is not None:
            moe = geometry.moe
            share -= (1 - moe.num_experts_per_token / moe.num_experts) ** batch
        each = weight.outputs * weight.inputs * itemsize
        if quantization is not None and (weight.kind == "linear" or weight.kind == "experts"):
            stored = quantization.stored(weight.name, weight.kind)
            each = each if stored is None else stored.nbytes(weight.outputs, weight.inputs)
        weights += round(share * weight.count * each)
    return StepBytes(weights, batch * context * latents, batch * 2 * state)


def peak_tbps() -> float:
    """The peak of this machine's device, or 0 if it is not known."""
    import torch

    name = torch.cuda.get_device_name(0) if torch.cuda.is_available() else ""
    return next((peak for part, peak in PEAKS_TBPS.items() if part in name), 0.0)


def floor_ms(moved: StepBytes, bandwidth_tbps: float) -> float:
    """The floor of a decode step in milliseconds, for a peak bandwidth in 10^12 bytes per second."""
    return moved.total / (bandwidth_tbps * 1e9 * ACHIEVABLE)
