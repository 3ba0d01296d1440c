"""FlashAttention's MLA decode with more splits of the context for small batches.

A CUDA graph fixes the maximum number of splits, and vLLM uses 32 for all graphs. A single long request then occupies 32
of Hopper's 132 multiprocessors, and 23 requests of 128K tokens read at 2.7 TB/s; with 128 splits, 1 and 20 requests
read at 4 TB/s (kernels/NOTES.md). Large batches need no splits.
"""

from typing import Any

from torch import Tensor
from vllm.v1.attention.backends.mla.flashattn_mla import (
    FlashAttnMLABackend,
    FlashAttnMLADecodeMetadata,
    FlashAttnMLAMetadataBuilder,
)

_MOST_SPLITS = 128  # of the kernel
_FEW_REQUESTS = 32
_MANY_TOKENS = 512
"""Of the largest graph that vLLM captures on Hopper. Results of 32 splits take 1 GiB there, with 32 heads of 512."""


def splits(num_requests: int, num_tokens: int, otherwise: int) -> int:
    """Maximum splits of a request's context; `otherwise` is vLLM's number.

    The kernel splits a context once for all tokens of a window, and keeps a result per token and split: these take no
    more memory than those of as many requests with one token each, and never more than in vLLM's own graphs.
    """
    if num_tokens > _MANY_TOKENS:
        return max(1, otherwise * _MANY_TOKENS // num_tokens)
    if num_requests > _FEW_REQUESTS:
        return otherwise
    return max(min(_MOST_SPLITS, _MOST_SPLITS * _FEW_REQUESTS // num_tokens), otherwise)


class SplitFlashAttnMLAMetadataBuilder(FlashAttnMLAMetadataBuilder):
    """The builder of vLLM with a maximum per batch size."""

    def _build_decode(
        self, *args: Any, seq_lens_device: Tensor, num_decode_tokens: int, **kwargs: Any
    ) -> FlashAttnMLADecodeMetadata:
        option = self.vllm_config.attention_config.flash_attn_max_num_splits_for_cuda_graph
        self.max_num_splits = splits(len(seq_lens_device), num_decode_tokens, option)
        return super()._build_decode(
            *args, seq_lens_device=seq_lens_device, num_decode_tokens=num_decode_tokens, **kwargs
        )


class SplitFlashAttnMLABackend(FlashAttnMLABackend):
    """The backend of vLLM with the builder above."""

    @staticmethod
    def get_builder_cls() -> type[SplitFlashAttnMLAMetadataBuilder]:
        """See `SplitFlashAttnMLAMetadataBuilder`."""
        return SplitFlashAttnMLAMetadataBuilder
