"""How memory is divided before anything is loaded: weights, state slots, KV cache, and how many requests that serves.

The engine and `kimi-vllm plan` both call `size`, so the plan is what the engine does. All bytes are per worker.
Pure arithmetic: no vLLM, and torch only for the sizes of its dtypes.
"""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

import torch

from kimi_vllm.cache.layout import SlotLayout
from kimi_vllm.cache.slots import MIN_SLOTS
from kimi_vllm.geometry import KimiGeometry
from kimi_vllm.options import KimiOptions
from kimi_vllm.precision import conv_dtype, router_dtype
from kimi_vllm.quantization import WeightFormat
from kimi_vllm.weight_bytes import weight_bytes

_ALLOWANCE = 9 * 2**29
_ALLOWANCE_SHARE = 18


class PlanError(ValueError):
    """What was asked does not fit into memory. Says what is needed, what is there, and which option changes it."""


@dataclass(frozen=True, slots=True)
class Costs:
    """Bytes on one worker.

    Attributes:
        weights: All parameters, in the dtypes in which we hold them.
        slot: KDA state of one request; 0 for a model without KDA.
        page: One block of the KV cache, all MLA layers together.
    """

    weights: int
    slot: int
    page: int

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
    ) -> Self:
        """The costs of a model, or of one pipeline stage given as a geometry of fewer layers.

        Args:
            itemsize: Bytes per weight.
            block_size: Tokens per block of the KV cache.
            ranks: Tensor-parallel size. Heads and states are split over ranks; MLA latents are not.
            expert_ranks: Workers over which the routed experts are split. Default: `ranks`.
            state_dtype: Dtype of the recurrent matrix.
            cache_itemsize: Bytes per cached latent element. Default: `itemsize`.
            gpu_dtype: The model's dtype on a GPU; None on a CPU. See `precision`.
            quantization: How linear layers are stored. Default: in the model's dtype.
            first_layer: Number of the pipeline stage's first layer, by which `quantization` may name it.

        Raises:
            ValueError: The heads do not divide over the ranks.
            PlanError: There is no MLA layer beside which states could be kept, or the state dtype is not float32 on a
                CPU.
        """
        if gpu_dtype is None and state_dtype != torch.float32:
            raise PlanError(f"kimi.state_dtype: on CPUs states are float32, not {state_dtype}. Drop the option.")
        num_kda = sum(geometry.kda)
        if num_kda == geometry.num_layers:
            raise PlanError(
                "a pipeline stage with KDA layers needs at least one MLA layer. Use fewer --pipeline-parallel-size "
                "stages, or set VLLM_PP_LAYER_PARTITION."
            )
        device, dtype = ("cpu", torch.float32) if gpu_dtype is None else ("cuda", gpu_dtype)
        dtypes = {"state_dtype": state_dtype, "conv_dtype": conv_dtype(device, dtype)}
        layout = SlotLayout.of(geometry, num_kda, ranks, **dtypes)
        latent = geometry.latent_dim * (cache_itemsize or itemsize)
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
            slot=layout.slot_bytes,
            page=(geometry.num_layers - num_kda) * latent * block_size,
        )

    @classmethod
    def heaviest(cls, stages: Sequence[Self]) -> Self:
        """The maximum of each cost: all workers must agree on one division."""
        return cls(*(max(values) for values in zip(*((s.weights, s.slot, s.page) for s in stages), strict=True)))


@dataclass(frozen=True, slots=True)
class Demand:
    """What the engine is asked to serve.

    Attributes:
        max_num_seqs: Maximum number of running requests.
        max_model_len: Tokens of the longest request.
        block_size: Tokens per block of the KV cache.
        prefix_caching: Whether states are kept for later requests.
        checkpoint_share: See `KimiOptions`.
        state_slots: Slots set by the user; None to choose.
        typical_tokens: See `KimiOptions`. A slot without KV cache is useless: the request would be preempted.
        num_pages: Blocks of the KV cache set by the user; None to choose.
        fill: Whether to use all memory, as usual on a GPU, or no more than the sequences can fill.
        any_length: Whether `max_model_len` may still be lowered to what fits (``--max-model-len auto``).
    """

    max_num_seqs: int
    max_model_len: int
    block_size: int
    prefix_caching: bool
    checkpoint_share: float
    state_slots: int | None = None
    typical_tokens: int = KimiOptions().typical_tokens
    num_pages: int | None = None
    fill: bool = True
    any_length: bool = False

    def blocks(self, tokens: int) -> int:
        """Blocks that hold `tokens` tokens."""
        return -(-tokens // self.block_size)


@dataclass(frozen=True, slots=True)
class Sizing:
    """The division of memory.

    Attributes:
        live: Slots for running requests, and so the maximum that run at once. The null slot is not counted.
        checkpoints: Further slots. Idle live slots hold checkpoints too.
        num_pages: Blocks of the KV cache, vLLM's null block included.
    """

    costs: Costs
    demand: Demand
    live: int
    checkpoints: int
    num_pages: int

    @property
    def state_slots(self) -> int:
        """Slots that requests and checkpoints share."""
        return self.live + self.checkpoints

    @property
    def state_bytes(self) -> int:
        """Bytes of the state pool, its null slot included."""
        return (1 + self.state_slots) * self.costs.slot

    @property
    def kv_bytes(self) -> int:
        """Bytes of the KV cache, its null block included."""
        return self.num_pages * self.costs.page

    @property
    def kv_tokens(self) -> int:
        """Tokens the KV cache holds."""
        return (self.num_pages - 1) * self.demand.block_size

    def concurrency(self, tokens: int) -> int:
        """Requests of `tokens` tokens that run at once without preemption."""
        return min(self.live, (self.num_pages - 1) // self.demand.blocks(tokens))

    def longest(self, requests: int) -> int:
        """Tokens that each of `requests` concurrent requests can have; at most `max_model_len`."""
        return min(self.demand.max_model_len, (self.num_pages - 1) // requests * self.demand.block_size)

    def table(self) -> str:
        """The log message of the engine at start."""
        steps = sorted({1, min(8, self.live), self.live})
        longest = ", ".join(f"{self.longest(count):,} for {count:,}" for count in steps)
        return f"""kimi-vllm memory per worker:
  weights           {_bytes(self.costs.weights)}, estimated
  state slots       {_bytes(self.costs.slot)} each, {_bytes(self.state_bytes)} in total with the null slot
    live            {self.live:,} running requests (--max-num-seqs)
    checkpoints     {self.checkpoints:,} cached prefixes, plus those in idle live slots
  KV cache          {_bytes(self.kv_bytes)}: {self.kv_tokens:,} tokens in blocks of {self.demand.block_size}
  longest contexts  {longest} concurrent requests"""

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        more = ("state_slots", "state_bytes", "kv_bytes", "kv_tokens")
        return asdict(self) | {name: getattr(self, name) for name in more}


def allowance(memory: int) -> int:
    """Bytes reserved for activations, CUDA graphs and libraries: 4.5 GiB, or an eighteenth of a smaller memory.

    On one H100 the 48B model needed 3.94 GiB with steps of 8192 tokens and 222 sequences: 0.95 for CUDA and libraries,
    1.65 for activations and 1.34 for graphs. A worker that has less free memory warns and shrinks its KV cache.
    """
    return min(_ALLOWANCE, memory // _ALLOWANCE_SHARE)


def cache_bytes(memory: int, utilization: float, costs: Costs) -> int:
    """Bytes left for state and KV cache; negative if the weights do not fit."""
    return int(memory * utilization) - allowance(memory) - costs.weights


def size(costs: Costs, demand: Demand, available: int) -> Sizing:
    """Divide `available` bytes, those of `cache_bytes`, between state slots and KV cache.

    Live slots come first, each with KV cache for `typical_tokens`, up to one per sequence; then checkpoints within
    their share; the KV cache gets the rest. Numbers set by the user are kept.

    Raises:
        PlanError: Two slots and one request of `max_model_len` do not fit.
    """
    longest = 1 if demand.any_length else demand.blocks(demand.max_model_len)
    if demand.state_slots is not None:
        live = min(demand.max_num_seqs, demand.state_slots)
        checkpoints = demand.state_slots - live
    else:
        live, checkpoints = _slots(costs, demand, available, longest)
    pages = demand.num_pages
    if pages is None:
        pages = (available - (1 + live + checkpoints) * costs.slot) // costs.page
        if not demand.fill:
            pages = min(pages, 1 + live * demand.blocks(demand.max_model_len))
    sizing = Sizing(costs, demand, live, checkpoints, pages)
    # vLLM checks pages set by the user itself, and without its null block.
    if live < 1 or pages < longest + (demand.num_pages is None):
        slots = (1 + (demand.state_slots or MIN_SLOTS - 1)) * costs.slot
        needed = slots + (1 + longest) * costs.page
        raise PlanError(
            f"--max-model-len {demand.max_model_len}: one request and its state slots need {_gib(needed)}, and "
            f"{_gib(max(0, available))} are left beside weights of {_gib(costs.weights)}. Lower --max-model-len or "
            "kimi.state_slots, raise --gpu-memory-utilization or --tensor-parallel-size, or set both kimi.state_slots "
            "and --kv-cache-memory-bytes if this estimate is wrong."
        )
    return sizing


def _slots(costs: Costs, demand: Demand, available: int, longest: int) -> tuple[int, int]:
    share = int(max(0, available) * demand.checkpoint_share) if demand.prefix_caching else 0
    left = available - share - costs.slot
    if demand.num_pages is not None:
        live = _fit(left - demand.num_pages * costs.page, costs.slot)
    else:
        typical = demand.blocks(min(demand.typical_tokens, demand.max_model_len)) * costs.page
        # The longest request must fit whatever the number of slots, or vLLM refuses to start once all is loaded.
        live = min(_fit(left - costs.page, costs.slot + typical), _fit(left - (1 + longest) * costs.page, costs.slot))
    live = min(live, demand.max_num_seqs)
    # A checkpoint needs at least one page of its own. Where memory is not filled, one checkpoint per sequence.
    useful = _fit(left - live * costs.slot, costs.page) if demand.fill else live
    checkpoints = min(_fit(share, costs.slot), max(0, useful))
    # A request that resumes from a checkpoint reads one slot and writes another.
    return live, max(checkpoints, MIN_SLOTS - 1 - live) if live > 0 else 0


def best_concurrency(costs: Costs, demand: Demand, available: int, tokens: int) -> int:
    """Requests of `tokens` tokens that fit with one slot each and no checkpoints."""
    left = available - costs.slot - costs.page
    return max(0, _fit(left, costs.slot + demand.blocks(tokens) * costs.page))


def memory_needed(costs: Costs, demand: Demand, utilization: float) -> int:
    """Memory of the smallest device that holds the weights, two slots and one request of `max_model_len`."""
    cache = MIN_SLOTS * costs.slot + (1 + demand.blocks(demand.max_model_len)) * costs.page
    small = (costs.weights + cache) / (utilization - 1 / _ALLOWANCE_SHARE)
    return round(small if allowance(int(small)) < _ALLOWANCE else (costs.weights + cache + _ALLOWANCE) / utilization)


def _fit(available: int, each: int) -> int:
    return available // each if each else sys.maxsize


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"


def _bytes(count: int) -> str:
    unit, name = (2**30, "GiB") if count >= 2**30 else (2**20, "MiB")
    return f"{count:,} B ({count / unit:.2f} {name})"
