"""FlashAttention's MLA decode with more splits of the context for small batches.

A CUDA graph fixes the maximum number of splits, and vLLM uses 32 for all graphs. A single long request then occupies 32
of Hopper's 132 multiprocessors, and 23 requests of 128K tokens read at 2.7 TB/s; with 128 splits, 1 and 20 requests
read at 4 TB/s (kernels/NOTES.md). Large batches need no splits.
"""

from typing import Any

from vllm.v1.attention.backends.mla.flashattn_mla import (
    FlashAttnMLABackend,
    FlashAttnMLADecodeMetadata,
    FlashAttnMLAMetadataBuilder,
)

_MOST_SPLITS = 128  # of the kernel
_FEW_REQUESTS = 32


def splits(num_requests: int, otherwise: int) -> int:
    """Maximum splits per context for `num_requests` requests; `otherwise` is vLLM's number."""
    return max(_MOST_SPLITS, otherwise) if num_requests <= _FEW_REQUESTS else otherwise


class SplitFlashAttnMLAMetadataBuilder(FlashAttnMLAMetadataBuilder):
    """The builder of vLLM with a maximum per batch size."""

    def _build_decode(self, *args: Any, num_decode_tokens: int, **kwargs: Any) -> FlashAttnMLADecodeMetadata:
        option = self.vllm_config.attention_config.flash_attn_max_num_splits_for_cuda_graph
        self.max_num_splits = splits(num_decode_tokens, option)
        return super()._build_decode(*args, num_decode_tokens=num_decode_tokens, **kwargs)


class SplitFlashAttnMLABackend(FlashAttnMLABackend):
    """The backend of vLLM with the builder above."""

    @staticmethod
    def get_builder_cls() -> type[SplitFlashAttnMLAMetadataBuilder]:
        """See `SplitFlashAttnMLAMetadataBuilder`."""
        return SplitFlashAttnMLAMetadataBuilder
