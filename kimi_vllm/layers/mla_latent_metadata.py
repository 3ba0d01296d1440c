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
from kimi_vllm.cache.window import window_of

MAX_GRAPH_ELEMENTS = 1 << 28
"""Most elements of the latents or the scores of all sequences at full length for which CUDA graphs are captured."""


@dataclass(frozen=True, slots=True)
class LatentMetadata:
    """One step for the MLA group, decodes first.

    Attributes:
        blocks, offsets: ``[T]`` int64; where each token's latent is written.
        fresh_blocks: Blocks that get their first token in this step.
        decode_tables, decode_lens: ``[N, B]`` and ``[N]``; the lengths include the step's tokens. Entries past a
            sequence's end repeat its first block.
        decode_bias: ``[N, t, B · block_size]`` fp32, for the up to t tokens of a row; 0 for what a token sees, -inf
            behind it.
        windows: None where every row has one token, as without speculative decoding. Else ``[N, t]``, which token of
            the step each row's are, its last repeated; and where among these each token stands.
        prefills: Per request: first and last token in the step, context before it, row of the block table.
    """

    num_decode_tokens: int
    num_tokens: int
    blocks: Tensor
    offsets: Tensor
    fresh_blocks: Tensor
    decode_tables: Tensor
    decode_lens: Tensor
    decode_bias: Tensor
    windows: tuple[Tensor, Tensor] | None
    prefills: list[tuple[int, int, int, Tensor]]


@dataclass(frozen=True, slots=True)
class DeviceDecodes:
    """A step on a GPU of rows with t tokens each, in tensors that vLLM reuses, so that CUDA graphs find the next step.

    Attributes:
        tables: ``[N, B]``; block table rows of maximum width.
        lengths: ``[N]``; the current tokens included, 0 for a padded row.
        places: ``[N·t]`` int64; where each token's latent is written, -1 for those of padded rows.
    """

    tables: Tensor
    lengths: Tensor
    places: Tensor


class LatentMetadataBuilder(AttentionMetadataBuilder[LatentMetadata | DeviceDecodes]):
    """Builds the metadata of a step once."""

    reorder_batch_threshold: int = 1

    @classmethod
    def get_cudagraph_support(cls, vllm_config: VllmConfig, kv_cache_spec: AttentionSpec) -> AttentionCGSupport:
        """Graphs of decode steps or windows, unless too large: a graph reads every page that a request could have."""
        most = vllm_config.scheduler_config.max_num_seqs * vllm_config.model_config.max_model_len
        heads: int = vllm_config.model_config.get_num_attention_heads(vllm_config.parallel_config)
        if most * max(kv_cache_spec.head_size, heads * window_of(vllm_config)) > MAX_GRAPH_ELEMENTS:
            return AttentionCGSupport.NEVER
        uniform = AttentionCGSupport.UNIFORM_BATCH
        return uniform if window_of(vllm_config) else AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    def __init__(
        self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        # Of all groups' thresholds the least counts, and states want windows before longer rows.
        self.reorder_batch_threshold = max(1, window_of(vllm_config))

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> LatentMetadata | DeviceDecodes:
        """Describe the step; tables are cut to the blocks in use."""
        step = common_attn_metadata
        block_size = self.kv_cache_spec.block_size
        num_decodes, _, num_decode_tokens, _ = split_decodes_and_prefills(
            step, decode_threshold=self.reorder_batch_threshold
        )
        if num_decodes == step.num_reqs and self.device.type != "cpu" and (width := _common_length(step)):
            rows = slice(num_decodes)
            places = step.slot_mapping[: num_decodes * width]
            return DeviceDecodes(step.block_table_tensor[rows], step.seq_lens[rows], places)
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
        seen, windows = decode_lens[:, None], None
        if num_decode_tokens > num_decodes:
            seen, windows = _windows(decode_lens, step.query_start_loc[: num_decodes + 1].long(), num_decode_tokens)
        decode_tables, decode_bias = self._decode_view(tables[:num_decodes], seen)
        return LatentMetadata(
            num_decode_tokens=num_decode_tokens,
            num_tokens=step.num_actual_tokens,
            blocks=blocks,
            offsets=offsets,
            fresh_blocks=blocks[offsets == 0],
            decode_tables=decode_tables,
            decode_lens=decode_lens,
            decode_bias=decode_bias,
            windows=windows,
            prefills=prefills,
        )

    def _decode_view(self, tables: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        """Tables and bias of rows whose tokens see so many latents each, ``[N, t]``."""
        block_size = self.kv_cache_spec.block_size
        # A padded row of the batch has length 0 and sees one latent, so that no row is empty.
        seen = seen.clamp(min=1)
        longest = int(seen.max()) if len(seen) else 1
        tables = tables[:, : cdiv(longest, block_size)]
        owned = torch.arange(tables.shape[1], device=tables.device) * block_size < seen[:, -1:]
        unseen = torch.arange(tables.shape[1] * block_size, device=tables.device) >= seen[..., None]
        bias = torch.zeros(unseen.shape, device=tables.device).masked_fill_(unseen, -torch.inf)
        return torch.where(owned, tables, tables[:, :1]), bias


def _common_length(step: CommonAttentionMetadata) -> int:
    """How many tokens each row has that is not padded; 0 if they differ."""
    counts = step.query_start_loc_cpu[1 : step.num_reqs + 1] - step.query_start_loc_cpu[: step.num_reqs]
    first = int(counts[0])
    busy = counts > 0
    return first if (counts[busy] == first).all() and not (busy[1:] & ~busy[:-1]).any() else 0


def _windows(lengths: Tensor, starts: Tensor, num_tokens: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """How many latents each token of windows sees, ``[N, t]``, and `LatentMetadata.windows`.

    Args:
        lengths: ``[N]``, the tokens of each sequence with its window.
        starts: ``[N + 1]``, where the windows begin in the step.
    """
    counts = starts[1:] - starts[:-1]
    widest = int(counts.max())
    token = torch.minimum(torch.arange(widest, device=starts.device), (counts - 1).clamp(min=0)[:, None])
    row = torch.repeat_interleave(counts, output_size=num_tokens)
    places = row * widest + torch.arange(num_tokens, device=starts.device) - starts[row]
    index = (starts[:-1, None] + token).clamp(max=num_tokens - 1)  # a padded row has no token
    return lengths[:, None] - counts[:, None] + 1 + token, (index, places)


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
