"""One step for `LatentAttention`: where latents are written, and which pages each request reads."""

from dataclasses import dataclass

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.utils.math_utils import cdiv
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.utils import split_decodes_and_prefills
from vllm.v1.kv_cache_interface import AttentionSpec

from kimi_vllm.cache.metadata import OwnKernels

MAX_GRAPH_ELEMENTS = 1 << 28
"""Maximum latent elements of all sequences at full length for which decode steps are captured in CUDA graphs."""


@dataclass(frozen=True, slots=True)
class LatentMetadata:
    """One step for the MLA group, decodes first.

    Attributes:
        blocks, offsets: ``[T]`` int64; where each token's latent is written.
        fresh_blocks: Blocks that get their first token in this step.
        decode_tables, decode_lens: ``[N, B]`` and ``[N]``; the lengths include the current token. Entries past a
            sequence's end repeat its first block.
        decode_bias: ``[N, 1, B · block_size]`` fp32; 0 for a sequence's tokens, -inf past its end.
        prefills: Per request: first and last token in the step, context before it, row of the block table.
    """

    num_decodes: int
    num_tokens: int
    blocks: Tensor
    offsets: Tensor
    fresh_blocks: Tensor
    decode_tables: Tensor
    decode_lens: Tensor
    decode_bias: Tensor
    prefills: list[tuple[int, int, int, Tensor]]


@dataclass(frozen=True, slots=True)
class DeviceDecodes:
    """A step of decodes only on a GPU, in tensors that vLLM reuses, so that CUDA graphs find the next step in them.

    Attributes:
        tables: ``[N, B]``; block table rows of maximum width.
        lengths: ``[N]``; the current token included, 0 for a padded row.
        places: ``[N]`` int64; where each token's latent is written, -1 for a padded row.
    """

    tables: Tensor
    lengths: Tensor
    places: Tensor


class LatentMetadataBuilder(AttentionMetadataBuilder[LatentMetadata | DeviceDecodes]):
    """Builds the metadata of a step once."""

    reorder_batch_threshold = 1

    @classmethod
    def get_cudagraph_support(cls, vllm_config: VllmConfig, kv_cache_spec: AttentionSpec) -> AttentionCGSupport:
        """Graphs of decode steps, unless too large: a graph reads every page that a request could have."""
        most = vllm_config.scheduler_config.max_num_seqs * vllm_config.model_config.max_model_len
        if most * kv_cache_spec.head_size > MAX_GRAPH_ELEMENTS:
            return AttentionCGSupport.NEVER
        return AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    def __init__(
        self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> LatentMetadata | DeviceDecodes:
        """Describe the step; tables are cut to the blocks in use."""
        step = common_attn_metadata
        block_size = self.kv_cache_spec.block_size
        num_decodes, *_ = split_decodes_and_prefills(step, decode_threshold=1)
        if num_decodes == step.num_reqs and self.device.type != "cpu":
            rows = slice(num_decodes)
            return DeviceDecodes(step.block_table_tensor[rows], step.seq_lens[rows], step.slot_mapping[rows])
        tables = step.block_table_tensor[: step.num_reqs].long()
        seq_lens = step.seq_lens[: step.num_reqs].tolist()
        starts = step.query_start_loc_cpu.tolist()
        prefills = []
        for row in range(num_decodes, step.num_reqs):
            first, end = starts[row], starts[row + 1]
            if end > first:
                context, table = seq_lens[row] - (end - first), tables[row, : cdiv(seq_lens[row], block_size)]
                prefills.append((first, end, context, table))
        places = step.slot_mapping[: step.num_actual_tokens].long()
        blocks, offsets = places.div(block_size, rounding_mode="floor"), places.remainder(block_size)
        decode_lens = step.seq_lens[:num_decodes].long()
        decode_tables, decode_bias = self._decode_view(tables[:num_decodes], decode_lens)
        return LatentMetadata(
            num_decodes=num_decodes,
            num_tokens=step.num_actual_tokens,
            blocks=blocks,
            offsets=offsets,
            fresh_blocks=blocks[offsets == 0],
            decode_tables=decode_tables,
            decode_lens=decode_lens,
            decode_bias=decode_bias,
            prefills=prefills,
        )

    def _decode_view(self, tables: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        block_size = self.kv_cache_spec.block_size
        # A padded row of the batch has length 0 and sees one latent, so that no row is empty.
        lengths = lengths.clamp(min=1)[:, None]
        longest = int(lengths.max()) if len(lengths) else 1
        tables = tables[:, : cdiv(longest, block_size)]
        owned = torch.arange(tables.shape[1], device=tables.device) * block_size < lengths
        unseen = torch.arange(tables.shape[1] * block_size, device=tables.device) >= lengths
        bias = torch.zeros(unseen.shape, device=tables.device).masked_fill_(unseen, -torch.inf)[:, None]
        return torch.where(owned, tables, tables[:, :1]), bias


class LatentBackend(OwnKernels, AttentionBackend):
    """What vLLM needs to know about this attention."""

    @staticmethod
    def get_name() -> str:
        """Name in vLLM's logs."""
        return "KIMI_MLA_TORCH"

    @staticmethod
    def get_builder_cls() -> type[LatentMetadataBuilder]:
        """See `LatentMetadataBuilder`."""
        return LatentMetadataBuilder

    @classmethod
    def is_mla(cls) -> bool:
        """Yes."""
        return True
