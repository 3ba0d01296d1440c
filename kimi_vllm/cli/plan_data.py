"""What fits: states and KV cache in one memory, an all-MLA model in the same memory, and vLLM's own padded cache."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from kimi_vllm.cache.capacity import Capacity
from kimi_vllm.geometry import GeometryError, KimiGeometry
from kimi_vllm.kernels.contract import MAX_WINDOW
from kimi_vllm.planning import Costs, Demand, PlanError, afforded, cache_bytes, check_one_fits, memory_needed
from kimi_vllm.quantization import WeightFormat
from kimi_vllm.weight_bytes import num_parameters


@dataclass(frozen=True, slots=True)
class InTree:
    """The same model in vLLM's own hybrid cache, which pads a state to a page of attention.

    As `_align_hybrid_block_size` and the grouping of layers in vLLM 0.32 do: the attention block grows in steps of 128
    tokens until a page is as large as a state, and KDA layers form groups as large as the MLA group. A running request
    holds a block of each KDA group, another for each draft (`MambaSpec.num_speculative_blocks`), and with prefix
    caching one more while its prompt crosses a block.

    Attributes:
        block_size: Tokens per block.
        page: Bytes of one block of one group.
        mla_groups, kda_groups: Groups of layers.
        states: States of a request.
    """

    block_size: int
    page: int
    mla_groups: int
    kda_groups: int
    states: int

    @classmethod
    def of(cls, geometry: KimiGeometry, itemsize: int, cache_itemsize: int, ranks: int, drafts: int = 0) -> "InTree":
        """Sizes for one worker. States are float32; convs have the dtype of the model, W - 1 columns and the drafts."""
        num_kda, heads = sum(geometry.kda), geometry.linear_num_heads // ranks
        num_mla, dim = geometry.num_layers - num_kda, geometry.linear_head_dim
        token = geometry.latent_dim * cache_itemsize
        state = heads * dim * (dim * torch.float32.itemsize + 3 * (geometry.conv_width - 1 + drafts) * itemsize)
        block_size = 128 * -(-state // (128 * token))
        few, many = sorted((num_kda, num_mla))
        group = many if many < 1.5 * few else few
        return cls(block_size, group * block_size * token, -(-num_mla // group), -(-num_kda // group), 1 + drafts)

    def request_bytes(self, tokens: int) -> int:
        """Bytes held by a request of `tokens` tokens."""
        return (self.mla_groups * -(-tokens // self.block_size) + self.states * self.kda_groups) * self.page


@dataclass(frozen=True)
class Plan:
    """What fits, and the alternatives, all for one worker."""

    model: str
    geometry: KimiGeometry
    itemsize: int
    gpu_dtype: torch.dtype | None
    quantization: WeightFormat | None
    cache_itemsize: int
    ranks: int
    state_dtype: torch.dtype
    memory: int
    utilization: float
    demand: Demand
    contexts: tuple[int, ...]
    lengths: Mapping[int, float]
    speculative_tokens: int = 0
    cache_memory: int | None = None

    @cached_property
    def costs(self) -> Costs:
        """Bytes of weights and of a block, and the blocks of a state."""
        return Costs.of(
            self.geometry,
            self.itemsize,
            self.demand.block_size,
            ranks=self.ranks,
            state_dtype=self.state_dtype,
            cache_itemsize=self.cache_itemsize,
            gpu_dtype=self.gpu_dtype,
            quantization=self.quantization,
            window=1 + self.speculative_tokens if self.speculative_tokens else 0,
        )

    @cached_property
    def available(self) -> int:
        """Bytes for state and KV cache."""
        if self.cache_memory is not None:
            return self.cache_memory
        return cache_bytes(self.memory, self.utilization, self.costs.weights)

    @cached_property
    def capacity(self) -> Capacity:
        """The blocks that the engine would have; on a CPU no more than the sequences can fill."""
        capacity = afforded([self.costs], [self.available], self.demand.block_size)
        most = self.demand.most(self.costs.state_blocks)
        return capacity if self.gpu_dtype is not None else replace(capacity, blocks=min(capacity.blocks, most))

    @cached_property
    def in_tree(self) -> InTree:
        """The same model in vLLM's own cache."""
        return InTree.of(self.geometry, self.itemsize, self.cache_itemsize, self.ranks, self.speculative_tokens)

    def check(self) -> None:
        """Raise PlanError if no request of full length fits, or the KV cache has a dtype that is not served."""
        if self.cache_itemsize != self.itemsize and self.gpu_dtype in (None, torch.float32):
            raise PlanError(
                "--kv-cache-dtype fp8: kimi-vllm on CPUs and in float32 keeps latents in the model's dtype."
            )
        device, devices = ("cpu", "CPUs") if self.gpu_dtype is None else ("cuda", "GPUs")
        most = MAX_WINDOW[device] - 1
        if self.speculative_tokens > most:
            raise PlanError(f"--speculative-tokens {self.speculative_tokens}: at most {most} on {devices}.")
        remedy = "raise --gpu-memory-utilization or --tensor-parallel-size"
        weights = self.costs.weights if self.cache_memory is None else None
        if self.cache_memory is not None:
            remedy = "raise --kv-cache-memory-bytes"
        check_one_fits(self.capacity, self.demand, self.costs.block, remedy, weights)

    @property
    def state_fill(self) -> float:
        """Share of a state's blocks that it fills; 1 for a model without states."""
        blocks = self.costs.state_blocks
        return self.costs.state / (blocks * self.costs.block) if blocks else 1.0

    @property
    def break_even(self) -> int:
        """Tokens below which the KDA state is larger than MLA latents in its place."""
        held = self.costs.state_blocks * self.costs.block
        return held // (sum(self.geometry.kda) * self.geometry.latent_dim * self.cache_itemsize)

    @property
    def average(self) -> dict[str, float]:
        """Requests that run at once on average, if those that run have the lengths in the shares that were given."""
        in_tree = sum(share * self.in_tree.request_bytes(tokens) for tokens, share in self.lengths.items())
        fits = {
            "ours": self.capacity.average(self.lengths),
            "in_tree": max(0, self.available - self.in_tree.page) / in_tree,
        }
        return {name: min(self.demand.max_num_seqs, count) for name, count in fits.items()}

    def row(self, tokens: int) -> dict[str, Any]:
        """Bytes of one request of `tokens` tokens, and how many fit at once, for each alternative."""
        capacity, block_size = self.capacity, self.demand.block_size
        mla_page = self.geometry.num_layers * self.geometry.latent_dim * self.cache_itemsize * block_size
        held = {
            "ours": capacity.held(tokens) * self.costs.block,
            "all_mla": -(-tokens // block_size) * mla_page,
            "in_tree": self.in_tree.request_bytes(tokens),
        }
        fits = {
            "ours": capacity.concurrency(tokens),
            "all_mla": max(0, self.available - mla_page) // held["all_mla"],
            "in_tree": max(0, self.available - self.in_tree.page) // held["in_tree"],
        }
        concurrency = {name: min(self.demand.max_num_seqs, count) for name, count in fits.items()}
        return {"tokens": tokens, "bytes": held, "concurrency": concurrency}

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain values."""
        return {
            "model": self.model,
            "parameters": num_parameters(self.geometry),
            "quantization": None if self.quantization is None else self.quantization.method,
            "tensor_parallel_size": self.ranks,
            "speculative_tokens": self.speculative_tokens,
            "state_dtype": str(self.state_dtype).removeprefix("torch."),
            "memory": self.memory,
            "available": self.available,
            "costs": asdict(self.costs),
            "state_fill": self.state_fill,
            "capacity": asdict(self.capacity) | {"tokens": self.capacity.tokens},
            "contexts": [self.row(tokens) for tokens in self.contexts],
            "lengths": {str(tokens): share for tokens, share in self.lengths.items()},
            "average_concurrency": self.average if self.lengths else None,
            "break_even_tokens": self.break_even,
            "in_tree_block_size": self.in_tree.block_size,
            "out_of_memory": {
                "longest_context": self.demand.max_model_len,
                "least_memory": memory_needed(self.costs, self.demand, self.utilization),
            },
        }


def read_model(path: Path) -> tuple[KimiGeometry, torch.dtype, int | None, WeightFormat | None]:
    """Geometry, dtype, longest context and quantisation of a config.json, or of a folder with one.

    Raises:
        GeometryError: The file is missing, not JSON, or of a model that is not served.
        QuantizationError: See `WeightFormat.of_checkpoint`.
    """
    file = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise GeometryError(f"--model {path}: expected a config.json or a folder with one ({error}).") from error
    dtype = getattr(torch, str(config.get("dtype") or config.get("torch_dtype")), torch.bfloat16)
    longest = config.get("model_max_length") or config.get("max_position_embeddings")
    return KimiGeometry.from_config(config), dtype, longest, WeightFormat.of_config(config)
