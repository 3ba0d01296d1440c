"""FlashAttention's MLA decode with as many splits of the context as a batch of that size can use.

A CUDA graph fixes how many pieces a context may be read in, and vLLM takes one number for all graphs, 32: a single
long request then keeps 32 of Hopper's 132 multiprocessors busy, while large batches get buffers they have no use for.
"""

from typing import Any

from vllm.v1.attention.backends.mla.flashattn_mla import (
    FlashAttnMLABackend,
    FlashAttnMLADecodeMetadata,
    FlashAttnMLAMetadataBuilder,
)

_MOST_SPLITS = 128  # of the kernel
_PIECES = 4 * 132  # several per multiprocessor, so that unequal requests even out
_HEADS_PER_TILE = 64


def splits(num_requests: int, num_heads: int) -> int:
    """Pieces in which the context of each of so many requests may be read."""
    tiles = num_requests * -(-num_heads // _HEADS_PER_TILE)
    return max(1, min(_MOST_SPLITS, -(-_PIECES // tiles)))


class SplitFlashAttnMLAMetadataBuilder(FlashAttnMLAMetadataBuilder):
    """vLLM's builder, with a bound for each batch size."""

    def _build_decode(self, *args: Any, num_decode_tokens: int, **kwargs: Any) -> FlashAttnMLADecodeMetadata:
        self.max_num_splits = splits(num_decode_tokens, self.num_heads)
        return super()._build_decode(*args, num_decode_tokens=num_decode_tokens, **kwargs)


class SplitFlashAttnMLABackend(FlashAttnMLABackend):
    """vLLM's backend with the builder above."""

    @staticmethod
    def get_builder_cls() -> type[SplitFlashAttnMLAMetadataBuilder]:
        """The builder above."""
        return SplitFlashAttnMLAMetadataBuilder
