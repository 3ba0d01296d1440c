"""Requests admitted by the real schedulers, against a calculation by hand; and vLLM's own caches, against its log."""

import logging
from types import SimpleNamespace
from unittest import mock

import pytest
from vllm.model_executor.layers.mamba.mamba_utils import MambaStateDtypeCalculator, MambaStateShapeCalculator
from vllm.model_executor.models import ModelRegistry
from vllm.platforms.interface import Platform
from vllm.v1.attention.backend import MultipleOf

from kimi_vllm.cli.plan_data import InTree
from kimi_vllm.geometry import geometry_of
from serve.bench.cache import concurrency
from serve.bench.cache.concurrency import run_in_tree, run_ours
from serve.bench.cache.replay import ALIGN_BLOCK, in_tree_scheduler

LONGEST = 4096
STATE, BLOCK, IN_TREE_PAGE = 86, 516_096, 7 * 1920 * 576 * 2


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize(
    ("max_num_seqs", "blocks", "running"),
    [
        (4, 1000, 4),  # as many as may run
        (20, 9 * (STATE + 17) - 1, 8),  # 1024 tokens are 16 blocks, and the answer begins the 17th
        (20, 7 * (STATE + 16), 6),  # seven prompts fit, and not one token more of each
    ],
)
def test_ours_runs_what_blocks_allow(caching, max_num_seqs, blocks, running):
    row = run_ours((1 + blocks) * BLOCK, max_num_seqs, 1024, 1024, caching)
    assert (row.blocks, row.block_tokens) == (1 + blocks, 64)
    assert (row.running, row.pages, row.preemptions) == (running, 17 * running, 0)


def test_what_fits_is_what_bytes_allow():
    row = run_ours((1 + 4 * (STATE + 17)) * BLOCK, 20, 1024, 1024, caching=False)
    assert row.fits == pytest.approx((1 + 4 * (STATE + 17)) * BLOCK / (43_909_120 + 17 * BLOCK))


def test_with_caching_in_tree_needs_two_states_while_a_prompt_crosses_a_block():
    assert [run_in_tree(13 * IN_TREE_PAGE, 64, 4096, LONGEST, caching).running for caching in (True, False)] == [1, 2]


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize(
    ("drafts", "block_size", "prompt", "each"),
    [
        (0, 1920, 1024, 1 + 3),
        (0, 1920, 4000, 3 + 3),
        (1, 1920, 1024, 1 + 2 * 3),
        (1, 1920, 4000, 3 + 2 * 3),
        (2, 2048, 1024, 1 + 3 * 3),
        (2, 2048, 4000, 2 + 3 * 3),
        (3, 2048, 1024, 1 + 4 * 3),
        (3, 2048, 4000, 2 + 4 * 3),
    ],
)
def test_in_tree_holds_pages_of_attention_and_a_state_per_draft_and_one_as_plan_says(
    drafts, block_size, prompt, each, caching
):
    """Five requests run in what five need beside the null block, and four in one block less."""
    page = 7 * block_size * 576 * 2
    planned = InTree.of(geometry_of(concurrency._configure(LONGEST, caching, 2).model_config), 2, 2, 1, drafts)
    assert (planned.page, planned.request_bytes(prompt)) == (page, each * page)
    # With caching the last to be admitted holds another state while its prompt crosses a block.
    enough = 1 + 5 * each + (3 if caching and prompt > block_size else 0)
    for blocks, running in ((enough, 5), (enough - 1, 4)):
        row = run_in_tree(blocks * page, 64, prompt, LONGEST, caching, drafts)
        assert (row.block_tokens, row.blocks, row.running) == (block_size, blocks, running)


def test_max_num_seqs_is_the_most_that_runs():
    assert run_in_tree(13 * IN_TREE_PAGE, 2, 1024, LONGEST, caching=False).running == 2


@pytest.mark.parametrize("caching", [True, False])
def test_in_tree_has_the_pages_that_vllm_logs_on_a_gpu(caching):
    with mock.patch.object(logging.Logger, "warning") as warned:
        config = concurrency._configure(131_072, caching, 256)
        scheduler = in_tree_scheduler(config, 37_127_946_240 + IN_TREE_PAGE - 1)
    assert any("padding layers" in call.args[0] and call.args[1] == 1 for call in warned.call_args_list)
    caches = scheduler.kv_cache_config
    assert caches.num_blocks == 2398
    assert {tensor.size for tensor in caches.kv_cache_tensors} == {37_127_946_240}
    assert sorted(len(group.layer_names) for group in caches.kv_cache_groups) == [6, 7, 7, 7]
    assert scheduler.cache_config.block_size == 1920


@pytest.mark.parametrize(("drafts", "block_size"), [(0, ALIGN_BLOCK), (1, ALIGN_BLOCK), (2, 2048), (3, 2048)])
def test_vllm_chooses_blocks_as_large_as_a_state(drafts, block_size):
    config = concurrency._configure(LONGEST, True, 2)
    model, linear = config.model_config, config.model_config.hf_config.linear_attn_config
    model.model_arch_config.is_deepseek_mla = True  # as on a GPU
    config.cache_config.block_size = 64
    shapes = MambaStateShapeCalculator.kda_state_shape(
        1, linear["num_heads"], linear["head_dim"], conv_kernel_size=4, num_spec=drafts
    )
    dtypes = MambaStateDtypeCalculator.kda_state_dtype(model.dtype, "auto", "auto")
    in_tree = SimpleNamespace(
        get_mamba_state_shape_from_config=lambda _: shapes, get_mamba_state_dtype_from_config=lambda _: dtypes
    )
    backend = SimpleNamespace(get_supported_kernel_block_sizes=lambda: [MultipleOf(64)])
    with (
        mock.patch.object(ModelRegistry, "resolve_model_cls", return_value=(in_tree, "")),
        mock.patch.object(Platform, "_find_non_ssm_backends", return_value=[backend]),
    ):
        Platform._align_hybrid_block_size(config, backend)
    planned = InTree.of(geometry_of(model), 2, 2, 1, drafts)
    assert config.cache_config.block_size == planned.block_size == block_size
    assert 7 * config.cache_config.mamba_page_size_padded == planned.page
