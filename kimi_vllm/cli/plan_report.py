"""What `kimi-vllm plan` says: how many requests fit, beside an all-MLA model and beside vLLM's own padded cache."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from kimi_vllm.geometry import GeometryError, KimiGeometry
from kimi_vllm.planning import (
    Costs,
    Demand,
    Sizing,
    allowance,
    best_concurrency,
    cache_bytes,
    memory_needed,
    size,
)
from kimi_vllm.quantization import WeightFormat
from kimi_vllm.weight_bytes import num_parameters


@dataclass(frozen=True, slots=True)
class InTree:
    """The same model in vLLM's own hybrid cache, where one state is padded to one page of attention.

    After `_align_hybrid_block_size` and the grouping of layers in vLLM 0.32: the attention block grows in steps of 128
    tokens until a page is as large as a state, and KDA layers form groups as large as the MLA group. With prefix
    caching a request holds two states of each group, without it one.

    Attributes:
        block_size: tokens per block.
        page: bytes of one block of one group.
        mla_groups, kda_groups: groups of layers.
        states: blocks a request holds per KDA group, whatever its length.
    """

    block_size: int
    page: int
    mla_groups: int
    kda_groups: int
    states: int

    @classmethod
    def of(
        cls, geometry: KimiGeometry, itemsize: int, cache_itemsize: int, ranks: int, *, prefix_caching: bool
    ) -> "InTree":
        """Sizes for one worker. There states are always float32, convs in the model's dtype and one column shorter."""
        num_kda, heads = sum(geometry.kda), geometry.linear_num_heads // ranks
        num_mla, dim = geometry.num_layers - num_kda, geometry.linear_head_dim
        token = geometry.latent_dim * cache_itemsize
        state = heads * dim * (dim * torch.float32.itemsize + 3 * (geometry.conv_width - 1) * itemsize)
        block_size = 128 * -(-state // (128 * token))
        few, many = sorted((num_kda, num_mla))
        group = many if many < 1.5 * few else few
        return cls(
            block_size, group * block_size * token, -(-num_mla // group), -(-num_kda // group), 1 + prefix_caching
        )

    def request_bytes(self, tokens: int) -> int:
        """Bytes a request of so many tokens holds."""
        return (self.mla_groups * -(-tokens // self.block_size) + self.kda_groups * self.states) * self.page


@dataclass(frozen=True)
class Plan:
    """A sizing and what it is compared with, all for one worker."""

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

    @cached_property
    def costs(self) -> Costs:
        """What things weigh."""
        return Costs.of(
            self.geometry,
            self.itemsize,
            self.demand.block_size,
            ranks=self.ranks,
            state_dtype=self.state_dtype,
            cache_itemsize=self.cache_itemsize,
            gpu_dtype=self.gpu_dtype,
            quantization=self.quantization,
        )

    @cached_property
    def available(self) -> int:
        """Bytes for state and KV cache."""
        return cache_bytes(self.memory, self.utilization, self.costs)

    @cached_property
    def sizing(self) -> Sizing:
        """The engine's division. Raises PlanError when nothing fits."""
        return size(self.costs, self.demand, self.available)

    @cached_property
    def in_tree(self) -> InTree:
        """What vLLM's own cache would hold."""
        caching = self.demand.prefix_caching
        return InTree.of(self.geometry, self.itemsize, self.cache_itemsize, self.ranks, prefix_caching=caching)

    @property
    def break_even(self) -> int:
        """Tokens below which the state outweighs what all-MLA would hold in the place of KDA."""
        return self.costs.slot // (sum(self.geometry.kda) * self.geometry.latent_dim * self.cache_itemsize)

    def row(self, tokens: int) -> dict[str, Any]:
        """Bytes of one request of so many tokens, and how many fit at once, three ways."""
        sizing, costs, demand = self.sizing, self.costs, self.demand
        pages = demand.blocks(tokens)
        mla_page = self.geometry.num_layers * self.geometry.latent_dim * self.cache_itemsize * demand.block_size
        ours, all_mla, in_tree = costs.slot + pages * costs.page, pages * mla_page, self.in_tree.request_bytes(tokens)
        return {
            "tokens": tokens,
            "bytes": {"ours": ours, "all_mla": all_mla, "in_tree": in_tree},
            "concurrency": {
                "as_started": sizing.concurrency(tokens),
                "best": best_concurrency(costs, demand, self.available, tokens),
                "all_mla": max(0, self.available - mla_page) // all_mla,
                "in_tree": max(0, self.available - self.in_tree.page) // in_tree,
            },
        }

    def to_dict(self) -> dict[str, Any]:
        """The whole plan as plain values, for --json."""
        return {
            "model": self.model,
            "parameters": num_parameters(self.geometry),
            "quantization": None if self.quantization is None else self.quantization.method,
            "tensor_parallel_size": self.ranks,
            "state_dtype": _name(self.state_dtype),
            "memory": self.memory,
            "available": self.available,
            "sizing": self.sizing.to_dict(),
            "contexts": [self.row(tokens) for tokens in self.contexts],
            "break_even_tokens": self.break_even,
            "in_tree_block_size": self.in_tree.block_size,
            "out_of_memory": {
                "longest_context": self.sizing.longest(1),
                "least_memory": memory_needed(self.costs, self.demand, self.utilization),
            },
        }


def read_model(path: Path) -> tuple[KimiGeometry, torch.dtype, int | None, WeightFormat | None]:
    """Geometry, dtype, longest context and quantisation of a config.json, or of a folder that has one.

    Raises:
        GeometryError: no such file, no JSON, or not a model that is served.
        QuantizationError: see `WeightFormat.of_checkpoint`.
    """
    file = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise GeometryError(f"--model {path}: expected a config.json or a folder with one ({error}).") from error
    dtype = getattr(torch, str(config.get("dtype") or config.get("torch_dtype")), torch.bfloat16)
    longest = config.get("model_max_length") or config.get("max_position_embeddings")
    return KimiGeometry.from_config(config), dtype, longest, WeightFormat.of_config(config)


def show(plan: Plan) -> None:
    """Print the plan for people."""
    console = Console(highlight=False, soft_wrap=True)
    demand, least = plan.demand, memory_needed(plan.costs, plan.demand, plan.utilization)
    devices = f"{plan.ranks} device" + "s" * (plan.ranks > 1)
    console.print(
        f"{plan.model}: {num_parameters(plan.geometry):,} parameters on {devices} of {plan.memory / 1e9:.1f} GB "
        f"({_gib(plan.memory)} GiB), {plan.utilization:.0%} of it used.\n"
        f"Of each, {_gib(allowance(plan.memory))} GiB are set aside for activations and graphs, an assumption; "
        f"{_gib(plan.available)} GiB are left for state and KV cache.\n",
        markup=False,
    )
    console.print(plan.sizing.table(), markup=False)
    if plan.sizing.live < demand.max_num_seqs:
        console.print(
            f"  --max-num-seqs {demand.max_num_seqs} does not fit; the engine lowers it to {plan.sizing.live}."
        )
    table = Table(box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    table.add_column("\ncontext", no_wrap=True)
    sizes, counts = ("ours\nGiB", "all-MLA\nGiB", "\nsaved", "in-tree\nGiB"), ("so", "at best", "all-MLA", "in-tree")
    for title in (*sizes, *(f"fit\n{count}" for count in counts)):
        table.add_column(title, justify="right", no_wrap=True)
    for tokens in plan.contexts:
        row = plan.row(tokens)
        ours, all_mla, in_tree = row["bytes"].values()
        saved = f"{1 - ours / all_mla:.1%}"
        fit = (f"{count:,}" for count in row["concurrency"].values())
        table.add_row(_tokens(tokens), _gib(ours), _gib(all_mla), saved, _gib(in_tree), *fit)
    console.print(table)
    console.print(
        "GiB: state and KV cache of one request. fit: requests at once, with memory divided so as above, or at best, "
        "with --max-num-seqs set to just that number and no checkpoints.\n"
        f"all-MLA: were all {plan.geometry.num_layers} layers MLA; below {plan.break_even:,} tokens that needs less. "
        f"in-tree: vLLM's own cache, whose blocks are {plan.in_tree.block_size:,} tokens here.\n"
        f"Out of memory begins: a request beyond {plan.sizing.longest(1):,} tokens is refused; more requests than "
        f"fit wait, or preempt each other as they grow; below {least / 1e9:.1f} GB the engine does not start.",
        markup=False,
    )


def draw(plan: Plan, file: Path) -> None:
    """Plot requests that fit at once against the context; the file's ending chooses the format. Needs matplotlib."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    rows = [plan.row(tokens) for tokens in plan.contexts]
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    labels = {
        "best": "kimi-vllm, at best",
        "as_started": "kimi-vllm, as started",
        "in_tree": "in-tree",
        "all_mla": "all-MLA",
    }
    for key, label in labels.items():
        axes.plot(plan.contexts, [row["concurrency"][key] for row in rows], marker="o", label=label)
    axes.set(
        xscale="log",
        yscale="symlog",
        ylim=(0, None),
        xlabel="tokens per request",
        ylabel="requests at once",
        title=plan.model,
    )
    axes.set_xticks(plan.contexts, [f"{tokens:,}" for tokens in plan.contexts], minor=False)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file)
    plt.close(figure)


def _gib(count: int) -> str:
    return f"{count / 2**30:.3f}" if count < 2**30 else f"{count / 2**30:.2f}"


def _tokens(count: int) -> str:
    for unit, name in ((2**20, "M"), (2**10, "K")):
        if count % unit == 0:
            return f"{count // unit}{name}"
    return f"{count:,}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
