"""FlashAttention's MLA decode with more splits of the context where few requests decode.

A CUDA graph fixes in how many pieces a context may be read, and vLLM takes one number for all graphs, 32, which bounds
their buffers. A single long request then keeps 32 of Hopper's 132 multiprocessors busy, and 23 requests of 128K tokens
read at 2.7 TB/s; with 128 pieces one request and 20 of them read at 4 (kernels/NOTES.md). Large batches need no pieces.
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
    """Pieces in which the context of each of so many requests may be read; `otherwise` is vLLM's number."""
    return max(_MOST_SPLITS, otherwise) if num_requests <= _FEW_REQUESTS else otherwise


class SplitFlashAttnMLAMetadataBuilder(FlashAttnMLAMetadataBuilder):
    """vLLM's builder, with a bound for each batch size."""

    def _build_decode(self, *args: Any, num_decode_tokens: int, **kwargs: Any) -> FlashAttnMLADecodeMetadata:
        option = self.vllm_config.attention_config.flash_attn_max_num_splits_for_cuda_graph
        self.max_num_splits = splits(num_decode_tokens, option)
        return super()._build_decode(*args, num_decode_tokens=num_decode_tokens, **kwargs)


class SplitFlashAttnMLABackend(FlashAttnMLABackend):
    """vLLM's backend with the builder above."""

    @staticmethod
    def get_builder_cls() -> type[SplitFlashAttnMLAMetadataBuilder]:
        """The builder above."""
        return SplitFlashAttnMLAMetadataBuilder
