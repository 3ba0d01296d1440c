"""Which attention backends of vLLM's read pages of our blocks as they lie."""

import pytest
from vllm.v1.attention.backend import MultipleOf

from kimi_vllm.layers.mla import WITH_DRAFTS, check_block_size, check_drafts


def backend(*sizes):
    """One whose kernels take such pages."""
    methods = {
        "get_name": staticmethod(lambda: "SOME_MLA"),
        "get_supported_kernel_block_sizes": staticmethod(lambda kv_cache_spec=None: list(sizes)),
    }
    return type("Backend", (), methods)


@pytest.mark.parametrize(
    ("sizes", "block_size"), [((MultipleOf(16),), 64), ((MultipleOf(64),), 128), ((64,), 64), ((32, 64), 64)]
)
def test_pages_of_a_size_that_the_kernels_take(sizes, block_size):
    check_block_size(backend(*sizes), block_size)


@pytest.mark.parametrize(
    ("sizes", "block_size"), [((64,), 128), ((32, 64), 128), ((128,), 64), ((MultipleOf(128),), 64)]
)
def test_blocks_that_vllm_cannot_split_are_refused(sizes, block_size):
    with pytest.raises(ValueError, match=rf"--block-size {block_size}: SOME_MLA reads pages of .* --attention-backend"):
        check_block_size(backend(*sizes), block_size)


def test_backends_that_have_not_run_with_drafts_are_refused():
    with pytest.raises(ValueError, match=r"--speculative-config: .* SOME_MLA, only with FLASH_ATTN_MLA and FLASHMLA\."):
        check_drafts(backend(64))
    served = backend(64)
    served.get_name = staticmethod(lambda: WITH_DRAFTS[0])
    check_drafts(served)
