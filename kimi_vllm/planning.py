"""Arithmetic over the blocks that states and KV cache share: how many there are, and how many requests they serve.

vLLM makes blocks of the memory that is left. A block holds a few tokens of all MLA layers, or some units of a state, so
a request holds blocks for its tokens and as many for its state as `Cut` says. All numbers are per worker.
Pure: no vLLM, and torch only for the sizes of its dtypes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch

from kimi_vllm.cache.capacity import Capacity
from kimi_vllm.cache.layout import StateLayout, block_bytes, ring_columns
from kimi_vllm.geometry import KimiGeometry
from kimi_vllm.kernels.cut import Cut
from kimi_vllm.precision import conv_dtype, router_dtype
from kimi_vllm.quantization import WeightFormat
from kimi_vllm.weight_bytes import weight_bytes

_ALLOWANCE = 9 * 2**29
_ALLOWANCE_SHARE = 18


class PlanError(ValueError):
    """What was asked does not fit into memory. Says what is needed, what is there, and which option changes it."""


@dataclass(frozen=True, slots=True)
class Costs:
    """What one worker's memory is used for.

    Attributes:
        weights: Bytes of all parameters, in the dtypes in which we hold them.
        block: Bytes of one block of tokens, all MLA layers together.
        state_blocks: Blocks of one state; 0 for a model without KDA.
        state: Bytes of these blocks that the state fills.
    """

    weights: int
    block: int
    state_blocks: int
    state: int

    @classmethod
    def of(
        cls,
        geometry: KimiGeometry,
        itemsize: int,
        block_size: int,
        *,
        ranks: int = 1,
        expert_ranks: int | None = None,
        state_dtype: torch.dtype = torch.float32,
        cache_itemsize: int | None = None,
        gpu_dtype: torch.dtype | None = None,
        quantization: WeightFormat | None = None,
        first_layer: int = 0,
        window: int = 0,
    ) -> Self:
        """The costs of a model, or of one pipeline stage given as a geometry of fewer layers.

        Args:
            itemsize: Bytes per weight.
            block_size: Tokens per block.
            ranks: Tensor-parallel size. Heads and states are split over ranks; MLA latents are not.
            expert_ranks: Workers over which the routed experts are split. Default: `ranks`.
            state_dtype: Dtype of the recurrent matrix.
            cache_itemsize: Bytes per cached latent element. Default: `itemsize`.
            gpu_dtype: The model's dtype on a GPU; None on a CPU. See `precision`.
            quantization: How linear layers are stored. Default: in the model's dtype.
            first_layer: Number of the pipeline stage's first layer, by which `quantization` may name it.
            window: See `window.window_of`.

        Raises:
            ValueError: The heads do not divide over the ranks, or a block is smaller than any part of a head.
            PlanError: There is no MLA layer beside which states could be kept, or the state dtype is not float32 on a
                CPU.
        """
        if gpu_dtype is None and state_dtype != torch.float32:
            raise PlanError(f"kimi.state_dtype: on CPUs states are float32, not {state_dtype}. Drop the option.")
        num_kda = sum(geometry.kda)
        num_mla = geometry.num_layers - num_kda
        if not num_mla:
            raise PlanError(
                "a pipeline stage with KDA layers needs at least one MLA layer. Use fewer --pipeline-parallel-size "
                "stages, or set VLLM_PP_LAYER_PARTITION."
            )
        device, dtype = ("cpu", torch.float32) if gpu_dtype is None else ("cuda", gpu_dtype)
        cache_itemsize = cache_itemsize or itemsize
        layout = None
        if num_kda:
            layout = StateLayout.of(
                geometry,
                num_kda,
                num_mla,
                tensor_parallel_size=ranks,
                block_size=block_size,
                cache_itemsize=cache_itemsize,
                state_dtype=state_dtype,
                conv_dtype=conv_dtype(device, dtype),
                window=window,
            )
        return cls(
            weights=weight_bytes(
                geometry,
                itemsize,
                router_dtype(device, dtype).itemsize,
                ranks,
                expert_ranks or ranks,
                quantization,
                first_layer,
                absorbed=gpu_dtype in (torch.bfloat16, torch.float16),
            ),
            block=block_bytes(geometry, num_mla, block_size, cache_itemsize),
            state_blocks=layout.blocks if layout else 0,
            state=layout.state_bytes if layout else 0,
        )


def least_block_size(
    geometry: KimiGeometry,
    natural: int,
    cache_itemsize: int,
    state_dtype: torch.dtype = torch.float32,
    gpu_dtype: torch.dtype | None = None,
    window: int = 0,
) -> int:
    """Tokens per block: `natural`, doubled until a block holds the smallest part of a KDA head.

    Only tiny models need more than `natural`, because their latents are small beside a head.

    Args:
        geometry: A model, or one pipeline stage with layers of both kinds.
        cache_itemsize, state_dtype, gpu_dtype, window: See `Costs.of`.
    """
    device, dtype = ("cpu", torch.float32) if gpu_dtype is None else ("cuda", gpu_dtype)
    shape = (geometry.linear_num_heads, geometry.linear_head_dim, ring_columns(geometry.conv_width, window))
    part = Cut.possible(*shape, state_dtype, conv_dtype(device, dtype), window=window)[-1].unit_bytes
    num_mla = geometry.num_layers - sum(geometry.kda)
    while block_bytes(geometry, num_mla, natural, cache_itemsize) < part:
        natural *= 2
    return natural


@dataclass(frozen=True, slots=True)
class Demand:
    """What the engine is asked to serve.

    Attributes:
        max_num_seqs: Maximum number of running requests.
        max_model_len: Tokens of the longest request.
        block_size: Tokens per block.
        prefix_caching: Whether requests resume from kept states: who does reads one state and writes another.
    """

    max_num_seqs: int
    max_model_len: int
    block_size: int
    prefix_caching: bool

    def least(self, state_blocks: int) -> int:
        """Blocks without which one request of `max_model_len` tokens would not run, the null block included."""
        return 1 + self._each(state_blocks)

    def most(self, state_blocks: int) -> int:
        """Blocks that all sequences can fill, the null block included."""
        return 1 + self.max_num_seqs * self._each(state_blocks)

    def _each(self, state_blocks: int) -> int:
        return (1 + self.prefix_caching) * state_blocks + -(-self.max_model_len // self.block_size)


def afforded(stages: Sequence[Costs], left: Sequence[int], block_size: int) -> Capacity:
    """The blocks that pipeline stages afford that have `left` bytes each beside their weights.

    A block's number is the same on all stages, so there are as many as on the poorest, and a state has as many
    everywhere as where it needs most.
    """
    blocks = min(count // costs.block for costs, count in zip(stages, left, strict=True))
    return Capacity(max(0, blocks), block_size, max(costs.state_blocks for costs in stages))


def allowance(memory: int) -> int:
    """Bytes reserved for activations, CUDA graphs and libraries: 4.5 GiB, or an eighteenth of a smaller memory.

    On one H100 the 48B model needed 3.94 GiB with steps of 8192 tokens and 222 sequences: 0.95 for CUDA and libraries,
    1.65 for activations and 1.34 for graphs. On a GPU it is `kimi-vllm plan`'s estimate; the engine measures.
    """
    return min(_ALLOWANCE, memory // _ALLOWANCE_SHARE)


def cache_bytes(memory: int, utilization: float, weights: int) -> int:
    """Bytes left for state and KV cache; negative if the weights do not fit."""
    return int(memory * utilization) - allowance(memory) - weights


def check_one_fits(
    capacity: Capacity, demand: Demand, block_bytes: int, remedy: str, weights: int | None = None
) -> None:
    """Refuse a memory that does not hold one request of `max_model_len`.

    Args:
        block_bytes: Bytes of a block.
        remedy: What gives more memory.
        weights: Bytes of the weights beside which the blocks are; None if they do not count.

    Raises:
        PlanError: It does not.
    """
    if capacity.blocks < (least := demand.least(capacity.state_blocks)):
        needed, there = _size(least * block_bytes), _size(capacity.blocks * block_bytes)
        beside = "" if weights is None else f" beside weights of {_size(weights)}"
        raise PlanError(
            f"--max-model-len {demand.max_model_len}: one request with its state needs {least:,} blocks "
            f"({needed}), and there are {capacity.blocks:,} ({there}){beside}. "
            f"Lower --max-model-len, or {remedy}."
        )


def memory_needed(costs: Costs, demand: Demand, utilization: float) -> int:
    """Memory of the smallest device that holds the weights and one request of `max_model_len`."""
    used = costs.weights + demand.least(costs.state_blocks) * costs.block
    small = used / (utilization - 1 / _ALLOWANCE_SHARE)
    return round(small if allowance(int(small)) < _ALLOWANCE else (used + _ALLOWANCE) / utilization)


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.2f} MiB"
