"""Multi-head latent attention without rotation (NoPE): the projections around the attention itself.

The latent is ``[kv_lora_rank | qk_rope_head_dim]``; the second part keeps its name from rotated MLA and is used as is.
"""

from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import AttentionConfig, VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import MLAAttention
from vllm.model_executor.layers.attention.mla_attention import MLACommonBackend
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import ColumnParallelLinear, ReplicatedLinear, RowParallelLinear
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionBackend, MultipleOf
from vllm.v1.attention.selector import get_attn_backend

from kimi_vllm.cache.window import window_of
from kimi_vllm.geometry import KimiGeometry
from kimi_vllm.layers.mla_latent import LatentAttention

logger = init_logger("vllm.kimi_vllm")

LATENT_NORM_EPS = 1e-6
"""Eps of both latent norms: the released modeling code builds them with the default."""

WITH_DRAFTS = ("FLASH_ATTN_MLA", "FLASHMLA")
"""vLLM's attention backends that have run with speculative decoding."""


class KimiMLA(nn.Module):
    """One MLA layer of one tensor-parallel rank: query heads are split over ranks, the latent is on all of them.

    Args:
        prefix: Name in the checkpoint, ``model.layers.{i}.self_attn``.
    """

    def __init__(self, geometry: KimiGeometry, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        self.geometry = geometry
        hidden, heads = geometry.hidden_size, geometry.num_attention_heads
        self.local_heads = heads // get_tensor_model_parallel_world_size()
        linear: dict[str, Any] = {"bias": False, "quant_config": vllm_config.quant_config}

        def column(inputs: int, outputs: int, name: str) -> ColumnParallelLinear:
            return ColumnParallelLinear(inputs, outputs, prefix=f"{prefix}.{name}", **linear)

        def replicated(outputs: int, name: str) -> ReplicatedLinear:
            return ReplicatedLinear(hidden, outputs, prefix=f"{prefix}.{name}", **linear)

        query_width = heads * geometry.qk_head_dim
        if geometry.q_lora_rank is None:
            self.q_proj = column(hidden, query_width, "q_proj")
        else:
            self.q_a_proj = replicated(geometry.q_lora_rank, "q_a_proj")
            self.q_a_layernorm = RMSNorm(geometry.q_lora_rank, eps=LATENT_NORM_EPS)
            self.q_b_proj = column(geometry.q_lora_rank, query_width, "q_b_proj")
        self.kv_a_proj_with_mqa = replicated(geometry.latent_dim, "kv_a_proj_with_mqa")
        self.kv_a_layernorm = RMSNorm(geometry.kv_lora_rank, eps=LATENT_NORM_EPS)
        self.kv_b_proj = column(
            geometry.kv_lora_rank, heads * (geometry.qk_nope_head_dim + geometry.v_head_dim), "kv_b_proj"
        )
        self.o_proj = RowParallelLinear(heads * geometry.v_head_dim, hidden, prefix=f"{prefix}.o_proj", **linear)
        self._drafts = window_of(vllm_config) > 0
        build = LatentAttention if uses_latent_attention(geometry, vllm_config) else _vllm_attention
        self.attn = build(geometry, vllm_config, self.local_heads, self.kv_b_proj, f"{prefix}.attn")

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Attend over one step's tokens: ``[T, hidden]`` to ``[T, hidden]``."""
        if self.geometry.q_lora_rank is None:
            query, _ = self.q_proj(hidden_states)
        else:
            low_rank, _ = self.q_a_proj(hidden_states)
            query, _ = self.q_b_proj(self.q_a_layernorm(low_rank))
        compressed, _ = self.kv_a_proj_with_mqa(hidden_states)
        if self._drafts:
            # A draft may be NaN, be rejected, and be multiplied by 0 all the same by tokens before it.
            sick = ~compressed.isfinite().all(-1, keepdim=True)
            compressed = compressed.masked_fill(sick, 0)
        kv, shared_key = compressed.split([self.geometry.kv_lora_rank, self.geometry.qk_rope_head_dim], dim=-1)
        kv = self.kv_a_layernorm(kv.contiguous())
        if isinstance(self.attn, LatentAttention):
            attended = self.attn(query, torch.cat([kv, shared_key], dim=-1))
        else:
            width = self.local_heads * self.geometry.v_head_dim
            query = query.view(-1, self.local_heads, self.geometry.qk_head_dim)
            attended = self.attn(query, kv, shared_key.unsqueeze(1), output_shape=(query.shape[0], width))
        if self._drafts:
            attended = attended.masked_fill(sick, torch.nan)  # but if it counts, it has to be seen
        mixed: Tensor = self.o_proj(attended)[0]
        return mixed


def uses_latent_attention(geometry: KimiGeometry, vllm_config: VllmConfig) -> bool:
    """Whether `LatentAttention` serves: on CPUs, and on GPUs in float32 and for latent sizes that vLLM's MLA lacks."""
    if current_platform.is_cpu():
        return True
    sizes = MLACommonBackend.get_supported_head_sizes()
    if vllm_config.model_config.dtype == torch.float32:
        lacking = "float32"
    elif geometry.latent_dim not in sizes:
        lacking = f"latents of {geometry.latent_dim} elements, only of {sizes}"
    else:
        return False
    logger.warning_once("kimi-vllm: MLA runs in torch and is slow, because vLLM's does not support %s.", lacking)
    return True


def _vllm_attention(
    geometry: KimiGeometry, vllm_config: VllmConfig, heads: int, kv_b_proj: ColumnParallelLinear, prefix: str
) -> MLAAttention:
    return MLAAttention(
        num_heads=heads,
        scale=geometry.qk_head_dim**-0.5,
        qk_nope_head_dim=geometry.qk_nope_head_dim,
        qk_rope_head_dim=geometry.qk_rope_head_dim,
        v_head_dim=geometry.v_head_dim,
        q_lora_rank=geometry.q_lora_rank,
        kv_lora_rank=geometry.kv_lora_rank,
        kv_b_proj=kv_b_proj,
        cache_config=vllm_config.cache_config,
        quant_config=vllm_config.quant_config,
        prefix=prefix,
        attn_backend=_backend(geometry, vllm_config, heads),
    )


def _backend(geometry: KimiGeometry, vllm_config: VllmConfig, heads: int) -> type[AttentionBackend]:
    """The backend that vLLM selects; of FlashAttention our variant, unless the user set the number of splits.

    Raises:
        ValueError: See `check_block_size` and `check_drafts`.
    """
    dtype, cached = vllm_config.model_config.dtype, vllm_config.cache_config.cache_dtype
    chosen: type[AttentionBackend] = get_attn_backend(
        geometry.latent_dim, dtype, cached, use_mla=True, use_sparse=False, num_heads=heads
    )
    if any(geometry.kda):
        check_block_size(chosen, vllm_config.cache_config.block_size)
    if window_of(vllm_config):
        check_drafts(chosen)
    default = AttentionConfig().flash_attn_max_num_splits_for_cuda_graph
    if vllm_config.attention_config.flash_attn_max_num_splits_for_cuda_graph != default:
        return chosen
    from vllm.v1.attention.backends.mla.flashattn_mla import FlashAttnMLABackend

    from kimi_vllm.layers.mla_flash import SplitFlashAttnMLABackend

    return SplitFlashAttnMLABackend if chosen is FlashAttnMLABackend else chosen


def check_block_size(backend: type[AttentionBackend], block_size: int) -> None:
    """Check that the kernels of a backend take pages as large as a block.

    vLLM splits blocks for kernels that take smaller pages only, but not where all layers of a block lie side by side.

    Raises:
        ValueError: They do not.
    """
    sizes = backend.get_supported_kernel_block_sizes()
    if not any(block_size % size.base == 0 if isinstance(size, MultipleOf) else block_size == size for size in sizes):
        raise ValueError(
            f"--block-size {block_size}: {backend.get_name()} reads pages of {' or '.join(map(str, sizes))} tokens, "
            "and blocks that states share with the KV cache are not split. Drop the option, or choose another "
            "--attention-backend."
        )


def check_drafts(backend: type[AttentionBackend]) -> None:
    """Check that a backend has run with speculative decoding.

    Raises:
        ValueError: It has not.
    """
    if (name := backend.get_name()) not in WITH_DRAFTS:
        raise ValueError(
            f"--speculative-config: drafts have not run with the attention backend {name}, only with "
            f"{' and '.join(WITH_DRAFTS)}. Drop the option, or choose another --attention-backend."
        )
