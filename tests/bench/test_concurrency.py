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


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize(("prompt", "each"), [(1024, 1 + 3), (4096, 3 + 3)])
def test_in_tree_holds_a_page_per_group_of_states_beside_those_of_attention(caching, prompt, each):
    row = run_in_tree(16 * IN_TREE_PAGE, 64, prompt, LONGEST, caching)
    assert (row.blocks, row.block_tokens) == (16, 1920)
    assert row.running == 15 // each


def test_with_caching_in_tree_needs_two_states_while_a_prompt_crosses_a_block():
    assert [run_in_tree(13 * IN_TREE_PAGE, 64, 4096, LONGEST, caching).running for caching in (True, False)] == [1, 2]


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize(("prompt", "each"), [(1024, 1 + 2 * 3), (4096, 3 + 2 * 3)])
def test_in_tree_holds_another_state_per_draft(caching, prompt, each):
    row = run_in_tree(22 * IN_TREE_PAGE, 64, prompt, LONGEST, caching, drafts=1)
    assert row.block_tokens == 1920
    assert row.running == 21 // each
    planned = InTree.of(geometry_of(concurrency._configure(LONGEST, caching, 2).model_config), 2, 2, 1, drafts=1)
    assert (planned.page, planned.request_bytes(prompt)) == (IN_TREE_PAGE, each * IN_TREE_PAGE)


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


@pytest.mark.parametrize(("drafts", "block_size"), [(0, ALIGN_BLOCK), (1, ALIGN_BLOCK), (3, 2048)])
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
