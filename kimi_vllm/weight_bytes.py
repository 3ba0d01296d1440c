"""A model's parameters: their shapes, and their bytes on one worker, quantised or not."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch

from kimi_vllm.geometry import KimiGeometry, input_filling
from kimi_vllm.quantization import WeightFormat

_VOCAB_MULTIPLE = 64
_UNSUFFIXED = ("A_log", "dt_bias", "e_score_correction_bias")

Kind = Literal["linear", "experts", "plain", "router", "float32"]


@dataclass(frozen=True, slots=True)
class Weight:
    """A matrix or a vector, or one per expert.

    Attributes:
        name: Checkpoint name without ``.weight``; of experts the first one's.
        outputs, inputs: Shape on one worker; a vector has one input.
        kind: "linear" and "experts" may be quantised, "plain" has the model's dtype, "router" that of
            `precision.router_dtype`, "float32" is always float32.
        count: Number of experts that have one.
    """

    name: str
    outputs: int
    inputs: int
    kind: Kind
    count: int = 1

    @property
    def tensors(self) -> Iterator[str]:
        """Names in an unquantised checkpoint."""
        suffix = "" if self.name.endswith(_UNSUFFIXED) else ".weight"
        yield from (self.name.replace(".experts.0.", f".experts.{expert}.") + suffix for expert in range(self.count))


@lru_cache(maxsize=1)
def checkpoint_shapes(geometry: KimiGeometry) -> dict[str, tuple[int, int]]:
    """Name to ``(outputs, inputs)`` of every tensor of an unquantised checkpoint; a vector has one input."""
    return {name: (each.outputs, each.inputs) for each in weights(geometry, 1, 1) for name in each.tensors}


def num_parameters(geometry: KimiGeometry) -> int:
    """Number of parameters in the model's checkpoint."""
    return sum(weight.count * weight.outputs * weight.inputs for weight in weights(geometry, 1, 1))


def weight_bytes(
    geometry: KimiGeometry,
    itemsize: int,
    router_itemsize: int,
    ranks: int,
    expert_ranks: int,
    quantization: WeightFormat | None = None,
    first_layer: int = 0,
    *,
    absorbed: bool = False,
) -> int:
    """Bytes of all parameters on one worker.

    Args:
        geometry: The model, or a pipeline stage as a geometry of fewer layers.
        itemsize: Bytes per element of the model's dtype.
        router_itemsize: Bytes per element of the router's weights.
        ranks: Tensor-parallel size.
        expert_ranks: Workers over which the routed experts are split.
        quantization: How linear layers are stored.
        first_layer: Number of the stage's first layer, by which `quantization` may name it.
        absorbed: Whether vLLM's MLA keeps its up-projections a second time, absorbed for decodes.
    """
    itemsizes = {"router": router_itemsize, "float32": torch.float32.itemsize}
    total = 0
    for weight in weights(geometry, ranks, expert_ranks, first_layer):
        stored = None
        if quantization is not None and (weight.kind == "linear" or weight.kind == "experts"):
            stored = quantization.stored(weight.name, weight.kind)
        each = weight.outputs * weight.inputs * itemsizes.get(weight.kind, itemsize)
        total += weight.count * (each if stored is None else stored.nbytes(weight.outputs, weight.inputs))
    if absorbed:
        heads, up = geometry.num_attention_heads // ranks, geometry.qk_nope_head_dim + geometry.v_head_dim
        total += (geometry.num_layers - sum(geometry.kda)) * heads * up * geometry.kv_lora_rank * itemsize
    # Padding: of the embeddings by vLLM, of KDA's input projection by us.
    total += 2 * (-geometry.vocab_size % _VOCAB_MULTIPLE) // ranks * geometry.hidden_size * itemsize
    columns = input_filling(geometry.linear_num_heads // ranks, quantised=quantization is not None)
    for layer, is_kda in enumerate(geometry.kda, first_layer):
        name = f"model.layers.{layer}.self_attn.b_proj"
        stored = None if quantization is None else quantization.stored(name, "linear")
        bits = 8 * itemsize if stored is None else stored.bits
        total += is_kda * columns * geometry.hidden_size * bits // 8
    return total


def weights(geometry: KimiGeometry, ranks: int, expert_ranks: int, first_layer: int = 0) -> Iterator[Weight]:
    """Every parameter on one worker; arguments as `weight_bytes`."""
    hidden = geometry.hidden_size
    yield Weight("model.embed_tokens", geometry.vocab_size // ranks, hidden, "plain")
    yield Weight("lm_head", geometry.vocab_size // ranks, hidden, "plain")
    yield Weight("model.norm", hidden, 1, "plain")
    for layer, (is_kda, is_sparse) in enumerate(zip(geometry.kda, geometry.sparse, strict=True), first_layer):
        prefix = f"model.layers.{layer}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield Weight(prefix + norm, hidden, 1, "plain")
        yield from (_kda if is_kda else _mla)(geometry, ranks, f"{prefix}self_attn.")
        if not is_sparse or geometry.moe is None:
            yield from _mlp(f"{prefix}mlp.", hidden, geometry.intermediate_size // ranks)
            continue
        moe, name = geometry.moe, f"{prefix}block_sparse_moe."
        yield Weight(f"{name}gate", moe.num_experts, hidden, "router")
        yield Weight(f"{name}gate.e_score_correction_bias", moe.num_experts, 1, "float32")
        # Whole experts on a worker, or a slice of each: the same bytes, except for scales.
        inner = moe.intermediate_size // expert_ranks
        for matrix, shape in {"w1": (inner, hidden), "w2": (hidden, inner), "w3": (inner, hidden)}.items():
            yield Weight(f"{name}experts.0.{matrix}", *shape, "experts", moe.num_experts)
        if moe.num_shared_experts:
            yield from _mlp(f"{name}shared_experts.", hidden, moe.num_shared_experts * moe.intermediate_size // ranks)


def _kda(geometry: KimiGeometry, ranks: int, prefix: str) -> Iterator[Weight]:
    hidden, heads, head_dim = geometry.hidden_size, geometry.linear_num_heads // ranks, geometry.linear_head_dim
    width = heads * head_dim
    columns = dict.fromkeys(("q_proj", "k_proj", "v_proj"), width) | {"f_a_proj": head_dim, "g_a_proj": head_dim}
    for name, outputs in (columns | {"b_proj": heads}).items():
        yield Weight(prefix + name, outputs, hidden, "linear")
    yield Weight(f"{prefix}o_proj", hidden, width, "linear")
    for name in ("f_b_proj", "g_b_proj"):
        yield Weight(prefix + name, width, head_dim, "plain")
    for name in ("q_conv1d", "k_conv1d", "v_conv1d"):
        yield Weight(prefix + name, width, geometry.conv_width, "float32")
    for name, length in {"A_log": heads, "dt_bias": width, "o_norm": head_dim}.items():
        yield Weight(prefix + name, length, 1, "float32")


def _mla(geometry: KimiGeometry, ranks: int, prefix: str) -> Iterator[Weight]:
    hidden, heads, rank = geometry.hidden_size, geometry.num_attention_heads // ranks, geometry.kv_lora_rank
    query, low_rank = heads * geometry.qk_head_dim, geometry.q_lora_rank
    if low_rank is None:
        yield Weight(f"{prefix}q_proj", query, hidden, "linear")
    else:
        yield Weight(f"{prefix}q_a_proj", low_rank, hidden, "linear")
        yield Weight(f"{prefix}q_a_layernorm", low_rank, 1, "plain")
        yield Weight(f"{prefix}q_b_proj", query, low_rank, "linear")
    yield Weight(f"{prefix}kv_a_proj_with_mqa", geometry.latent_dim, hidden, "linear")
    yield Weight(f"{prefix}kv_a_layernorm", rank, 1, "plain")
    yield Weight(f"{prefix}kv_b_proj", heads * (geometry.qk_nope_head_dim + geometry.v_head_dim), rank, "linear")
    yield Weight(f"{prefix}o_proj", hidden, heads * geometry.v_head_dim, "linear")


def _mlp(prefix: str, hidden: int, intermediate: int) -> Iterator[Weight]:
    yield Weight(f"{prefix}gate_proj", intermediate, hidden, "linear")
    yield Weight(f"{prefix}up_proj", intermediate, hidden, "linear")
    yield Weight(f"{prefix}down_proj", hidden, intermediate, "linear")
