"""Latent attention in torch over vLLM's paged cache: any block size and latent width, chunked prefill, prefix caching.

It serves CPUs, and float32 on GPUs, for which vLLM has no MLA. vLLM's MLA for CPUs takes 576-wide latents and 16-token
blocks, and no context before the current chunk. This one gathers latents through the block table tile by tile with a
running softmax, so its memory does not grow with the context. Decodes run in latent space (key and value projections
absorbed into query and output); prefills expand each tile to keys and values once for all queries.
"""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from vllm.compilation.breakable_cudagraph import eager_break_during_capture
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.layers.linear import ColumnParallelLinear
from vllm.utils.math_utils import cdiv
from vllm.utils.torch_utils import direct_register_custom_op
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.kv_cache_interface import MLAAttentionSpec

from kimi_vllm.geometry import KimiGeometry
from kimi_vllm.layers.mla_latent_metadata import DeviceDecodes, LatentBackend, LatentMetadata

TILE_ELEMENTS, GPU_TILE_ELEMENTS = 1 << 22, 1 << 26
"""Scores or gathered latent elements per tile: 16 MiB in fp32 on a CPU, to stay in the last-level cache; on a GPU
enough to amortise launches."""
FLASH_DEVICES = ("cpu",)
"""Where torch has flash attention for every dtype and head size that also returns the log-sum-exp."""


class RunningSoftmax:
    """Softmax-weighted sums of values that arrive in tiles, for a fixed set of query rows.

    Args:
        rows: Shape of the query rows, such as ``(N, H)``.
        dim: Length of a value.
        device: Device of scores and values.
    """

    def __init__(self, rows: tuple[int, ...], dim: int, device: torch.device | str = "cpu") -> None:
        self.maximum = torch.full(rows, -torch.inf, dtype=torch.float32, device=device)
        self.total = torch.zeros(rows, dtype=torch.float32, device=device)
        self.weighted = torch.zeros(*rows, dim, dtype=torch.float32, device=device)

    def add(self, scores: Tensor, values: Tensor, rows: Any = ...) -> None:
        """Add a tile: fp32 `scores` ``[..., t]`` and `values` ``[..., t, dim]`` for the given rows.

        Every row must see at least one finite score.
        """
        maximum = torch.maximum(self.maximum[rows], scores.amax(-1))
        decay = (self.maximum[rows] - maximum).exp()
        weights = (scores - maximum[..., None]).exp()
        self.maximum[rows] = maximum
        self.total[rows] = self.total[rows] * decay + weights.sum(-1)
        self.weighted[rows] = self.weighted[rows] * decay[..., None] + (weights.to(values.dtype) @ values).float()

    def result(self) -> Tensor:
        """The averages, ``[..., dim]`` fp32."""
        return self.weighted / self.total[..., None]


class LatentAttention(nn.Module, AttentionLayerBase):
    """Paged latent cache, decode and prefill of one MLA layer.

    Args:
        num_heads: Query heads on this rank.
        kv_b_proj: ``[R]`` to ``[H·(nope + v)]``; expands latents to keys and values.
        prefix: Name under which vLLM binds the cache.

    Raises:
        ValueError: A cache dtype that this attention does not serve.
    """

    def __init__(
        self,
        geometry: KimiGeometry,
        vllm_config: VllmConfig,
        num_heads: int,
        kv_b_proj: ColumnParallelLinear,
        prefix: str,
    ) -> None:
        super().__init__()
        if vllm_config.cache_config.cache_dtype not in ("auto", "bfloat16", "float16"):
            raise ValueError(
                f"--kv-cache-dtype {vllm_config.cache_config.cache_dtype}: kimi-vllm on CPUs and in float32 keeps "
                "latents in the model's dtype (auto)."
            )
        self.prefix = prefix
        self.num_heads = num_heads
        self.rank, self.nope, self.value = geometry.kv_lora_rank, geometry.qk_nope_head_dim, geometry.v_head_dim
        self.latent_dim = geometry.latent_dim
        self.scale = geometry.qk_head_dim**-0.5
        self._kv_b_proj = [kv_b_proj]  # in a list, so that nn.Module does not adopt the layer twice
        self._expand: Tensor | None = None
        self.kv_cache = torch.tensor([])
        vllm_config.compilation_config.static_forward_context[prefix] = self

    def get_attn_backend(self) -> type[AttentionBackend]:
        """The backend above."""
        return LatentBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> MLAAttentionSpec:
        """One latent per token, on every rank."""
        block_size, dtype = vllm_config.cache_config.block_size, vllm_config.model_config.dtype
        return MLAAttentionSpec(block_size, num_kv_heads=1, max_tp_shards=1, head_size=self.latent_dim, dtype=dtype)

    def forward(self, query: Tensor, latent: Tensor) -> Tensor:
        """Attend: query ``[T, H·(nope + rope)]`` and latent ``[T, R + rope]`` to ``[T, H·v]``."""
        out = query.new_empty(query.shape[0], self.num_heads * self.value)
        torch.ops.vllm.kimi_latent_attention(query, latent, out, self.prefix)
        return out

    def attend(self, query: Tensor, latent: Tensor, out: Tensor, step: LatentMetadata | DeviceDecodes) -> None:
        """Write the step's latents to the cache, then attend over it. Padding rows of `out` become zeros."""
        if isinstance(step, DeviceDecodes):
            self._attend_decodes(query, latent, out, step)
            return
        num_tokens = step.num_tokens
        if len(step.fresh_blocks):
            # Attention weights past a sequence's end are 0, but 0 · NaN left by the page's last owner would be NaN.
            self.kv_cache[step.fresh_blocks] = 0
        self.kv_cache[step.blocks, 0, step.offsets] = latent[:num_tokens]
        query = query.view(-1, self.num_heads, self.nope + self.latent_dim - self.rank)
        heads = out.view(-1, self.num_heads, self.value)
        if decodes := step.num_decode_tokens:
            heads[:decodes] = self._decode(query[:decodes], step)
        prefill = self._prefill_flash if query.device.type in FLASH_DEVICES else self._prefill
        for first, end, context, table in step.prefills:
            heads[first:end] = prefill(query[first:end], context, table)
        heads[num_tokens:] = 0

    def _attend_decodes(self, query: Tensor, latent: Tensor, out: Tensor, step: DeviceDecodes) -> None:
        """`attend` with shapes that do not depend on the step's contents."""
        rows, tokens = len(step.lengths), len(step.places)
        places = step.places.clamp(min=0)  # padded rows write to the null page
        blocks, offsets = places.div(self._block_size, rounding_mode="floor"), places.remainder(self._block_size)
        fresh = blocks.masked_fill(offsets != 0, 0)
        self.kv_cache.index_fill_(0, fresh, 0)  # as `attend`; the null page may be cleared
        self.kv_cache[blocks, 0, offsets] = latent[:tokens]
        latents = self.kv_cache[step.tables, 0].flatten(1, 2)
        position = torch.arange(latents.shape[1], device=latents.device)
        later = torch.arange(tokens // rows, device=latents.device).flip(0)
        unseen = position >= (step.lengths[:, None] - later).clamp(min=1)[..., None]  # [N, t, L]
        # Past a sequence's end there may be NaN, which a weight of 0 does not remove.
        latents = latents.masked_fill(unseen[:, -1, :, None], 0)
        query = self._absorbed(query[:tokens].view(tokens, self.num_heads, -1)).view(rows, -1, self.latent_dim)
        scores = torch.bmm(query, latents.transpose(1, 2)).float().mul_(self.scale)
        scores.unflatten(1, (-1, self.num_heads)).masked_fill_(unseen[:, :, None], -torch.inf)
        averages = torch.bmm(scores.softmax(-1).to(latents.dtype), latents[..., : self.rank])
        averages = averages.view(tokens, self.num_heads, self.rank)
        values = torch.bmm(averages.transpose(0, 1), self._projections[1]).transpose(0, 1)
        heads = out.view(-1, self.num_heads, self.value)
        heads[:tokens] = values.masked_fill((step.places < 0)[:, None, None], 0)
        heads[tokens:] = 0

    def forget_projections(self) -> None:
        """Call after the weights of `kv_b_proj` have changed."""
        self._expand = None

    @property
    def _block_size(self) -> int:
        return self.kv_cache.shape[2]

    def _tile(self, elements: int) -> int:
        """Tokens per tile, in whole blocks, at `elements` per token."""
        most = TILE_ELEMENTS if self.kv_cache.device.type == "cpu" else GPU_TILE_ELEMENTS
        return max(1, most // elements // self._block_size) * self._block_size

    @property
    def _projections(self) -> tuple[Tensor, Tensor]:
        """W_UK ``[H, nope, R]`` and W_UV ``[H, R, v]``, read out of the projection, quantised or not."""
        if self._expand is None:
            dtype = self.kv_cache.dtype
            columns, _ = self._kv_b_proj[0](torch.eye(self.rank, dtype=dtype, device=self.kv_cache.device))
            self._expand = columns.view(self.rank, self.num_heads, self.nope + self.value).permute(1, 0, 2)
            self._expand = self._expand.contiguous()
        keys, values = self._expand.split([self.nope, self.value], dim=-1)
        return keys.transpose(1, 2), values

    def _decode(self, query: Tensor, step: LatentMetadata) -> Tensor:
        query, bias = self._absorbed(query), step.decode_bias
        if step.windows is not None:
            # All tokens of a row at once: the latents are gathered once for them.
            query = query[step.windows[0]].flatten(1, 2)  # [N, t·H, R + rope]
        rows, per_row = query.shape[:2]
        tile = self._tile(rows * max(self.latent_dim, per_row)) // self._block_size
        num_blocks = step.decode_tables.shape[1]
        if num_blocks <= tile:
            scores, values = self._decode_tile(query, step.decode_tables, bias)
            averages = scores.softmax(-1).to(values.dtype) @ values
        else:
            softmax = RunningSoftmax((rows, per_row), self.rank, query.device)
            for first in range(0, num_blocks, tile):
                start, end = first * self._block_size, (first + tile) * self._block_size
                active = torch.nonzero(step.decode_lens > start)[:, 0] if start else slice(None)
                tables = step.decode_tables[active, first : first + tile]
                softmax.add(*self._decode_tile(query[active], tables, bias[active, :, start:end]), active)
            averages = softmax.result().to(query.dtype)
        if step.windows is not None:
            averages = averages.unflatten(1, (-1, self.num_heads)).flatten(0, 1)[step.windows[1]]
        return torch.bmm(averages.transpose(0, 1), self._projections[1]).transpose(0, 1)  # [N, H, v]

    def _absorbed(self, query: Tensor) -> Tensor:
        """Queries ``[N, H, nope + rope]`` in latent space, ``[N, H, R + rope]``."""
        absorbed = torch.bmm(query[..., : self.nope].transpose(0, 1), self._projections[0]).transpose(0, 1)
        return torch.cat([absorbed, query[..., self.nope :]], dim=-1)

    def _decode_tile(self, query: Tensor, tables: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Scores ``[N, H, t]`` of absorbed queries against the latents in the given blocks, and their values."""
        latents = self.kv_cache[tables, 0].flatten(1, 2)
        if bias.shape[1] > 1:  # tokens of a window
            bias = bias.repeat_interleave(self.num_heads, dim=1)
        if query.dtype == torch.float32:
            scores = torch.baddbmm(bias, query, latents.transpose(1, 2), alpha=self.scale)
        else:
            scores = torch.bmm(query, latents.transpose(1, 2)).float().mul_(self.scale).add_(bias)
        return scores, latents[..., : self.rank]

    def _prefill(self, query: Tensor, context: int, table: Tensor) -> Tensor:
        num_queries = query.shape[0]
        length = context + num_queries
        query = query.transpose(0, 1) * self.scale  # [H, n, nope + rope]
        tile = self._tile(self.num_heads * num_queries)
        if length <= tile:
            scores, values = self._prefill_tile(query, context, table, 0, length)
            return (scores.softmax(-1).to(values.dtype) @ values).transpose(0, 1)
        softmax = RunningSoftmax((self.num_heads, num_queries), self.value, query.device)
        for start in range(0, length, tile):
            end = min(start + tile, length)
            # Queries before the tile see none of it.
            first = max(0, start - context)
            scores, values = self._prefill_tile(query[:, first:], context + first, table, start, end)
            softmax.add(scores, values, (slice(None), slice(first, None)))
        return softmax.result().to(query.dtype).transpose(0, 1)

    def _prefill_flash(self, query: Tensor, context: int, table: Tensor) -> Tensor:
        """Tiles of the context, then the chunk; scores stay inside torch's kernel."""
        width = max(query.shape[2], self.value)  # of queries, keys and values alike
        tile = self._tile(2 * self.num_heads * width)
        query = pad(query.transpose(0, 1), (0, width - query.shape[2]))[None]
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        result, before = torch.zeros(query.shape), torch.full(query.shape[:3], -torch.inf)
        for start, end in pairwise([*range(0, context, tile), context, context + query.shape[2]]):
            both = (pad(x, (0, width - x.shape[2]))[None] for x in self._keys_values(self._latents(table, start, end)))
            averages, weight = flash(query, *both, is_causal=start == context, scale=self.scale)
            total = torch.logaddexp(before, weight)
            result = result * (before - total).exp()[..., None] + averages * (weight - total).exp()[..., None]
            before = total
        return result[0, ..., : self.value].to(query.dtype).transpose(0, 1)

    def _latents(self, table: Tensor, start: int, end: int) -> Tensor:
        """Latents ``[end - start, R + rope]`` of a request's tokens."""
        blocks = table[start // self._block_size : cdiv(end, self._block_size)]
        return self.kv_cache[blocks, 0].flatten(0, 1)[start % self._block_size :][: end - start]

    def _prefill_tile(self, query: Tensor, position: int, table: Tensor, start: int, end: int) -> tuple[Tensor, Tensor]:
        """Scores ``[H, n, t]`` of queries from `position` on against tokens start..end, and their values."""
        keys, values = self._keys_values(self._latents(table, start, end))
        scores = torch.matmul(query, keys.transpose(1, 2)).float()
        if end > position + 1:
            seen = torch.arange(start, end, device=scores.device)
            seen = seen <= torch.arange(position, position + query.shape[1], device=scores.device)[:, None]
            scores.masked_fill_(~seen, -torch.inf)
        return scores, values

    def _keys_values(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Latents ``[t, R + rope]`` to keys ``[H, t, nope + rope]`` and values ``[H, t, v]``."""
        to_latent, from_latent = self._projections
        kv, shared_key = latents.split([self.rank, self.latent_dim - self.rank], dim=-1)
        keys = torch.matmul(kv, to_latent.transpose(1, 2))
        keys = torch.cat([keys, shared_key.expand(self.num_heads, -1, -1)], dim=-1)
        return keys, torch.matmul(kv, from_latent)


@eager_break_during_capture
def _latent_attention(query: Tensor, latent: Tensor, out: Tensor, layer_name: str) -> None:
    # An opaque op, so that a compiled graph holds neither the step's metadata nor the cache.
    context = get_forward_context()
    layer: LatentAttention = context.no_compile_layers[layer_name]
    if context.attn_metadata is None:
        # vLLM's profiling run: no request, no cache.
        out.zero_()
        return
    layer.attend(query, latent, out, context.attn_metadata[layer_name])


def _latent_attention_fake(query: Tensor, latent: Tensor, out: Tensor, layer_name: str) -> None:
    return


direct_register_custom_op(
    op_name="kimi_latent_attention", op_func=_latent_attention, mutates_args=["out"], fake_impl=_latent_attention_fake
)
