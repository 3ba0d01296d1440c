"""How many pieces of a context a decode graph may read, by batch size. FlashAttention itself is on GPUs only."""

from types import SimpleNamespace

import pytest
import torch
from support.flash import import_mla_flash


@pytest.fixture
def mla_flash(monkeypatch):
    return import_mla_flash(monkeypatch)


@pytest.mark.parametrize(
    ("rows", "window", "expected"),
    [(1, 1, 128), (32, 1, 128), (33, 1, 32), (256, 1, 32), (1, 4, 128), (8, 4, 128), (16, 4, 64), (32, 6, 32)],
)
def test_few_requests_may_be_read_in_more_pieces(mla_flash, rows, window, expected):
    builder = object.__new__(mla_flash.SplitFlashAttnMLAMetadataBuilder)
    attention = SimpleNamespace(flash_attn_max_num_splits_for_cuda_graph=32)
    builder.vllm_config = SimpleNamespace(attention_config=attention)
    builder.use_full_cuda_graph, builder.max_cudagraph_size, builder.fa_aot_schedule = True, 256, False
    starts = torch.arange(rows + 1) * window
    built = builder._build_decode(
        block_table_tensor=torch.zeros(rows, 3),
        seq_lens_device=torch.ones(rows),
        max_seq_len=9,
        query_start_loc_cpu=starts,
        query_start_loc_device=starts,
        num_decode_tokens=rows * window,
        max_query_len=window,
        dcp_tot_seq_lens_device=None,
    )
    assert built.max_num_splits == expected


def test_it_is_flash_attention_to_vllm(mla_flash):
    backend = mla_flash.SplitFlashAttnMLABackend
    assert backend.get_name() == "FLASH_ATTN_MLA"
    assert backend.get_builder_cls() is mla_flash.SplitFlashAttnMLAMetadataBuilder


def test_results_of_splits_take_no_more_memory_than_in_graphs_of_vllm(mla_flash):
    """Up to the size of the largest graph vLLM allows as many splits as for its own of 512 tokens."""
    for rows in (1, 32, 33, 600, 8192):
        for window in (1, 3, 64, 512):
            pieces = mla_flash.splits(rows, rows * window, 32)
            assert 1 <= pieces <= 128
            assert pieces * rows * window <= max(32 * 512, rows * window)
    assert mla_flash.splits(8192, 8192, 32) == 2
    assert mla_flash.splits(512, 512, 32) == 32
    assert mla_flash.splits(8192, 8192, 1) == 1
