"""Rows of the block table become read and write slots, decodes apart from prefills."""

from types import SimpleNamespace

import pytest
import torch

from kimi_vllm.cache.manager import KDAStateSpec
from kimi_vllm.cache.metadata import KDAMetadataBuilder

BLOCK = 4


@pytest.fixture
def builder():
    spec = KDAStateSpec(block_size=BLOCK, num_kv_heads=1, head_size=8, dtype=torch.float32)
    name = "model.layers.0.kda_state"
    member = SimpleNamespace(home=SimpleNamespace(pool=SimpleNamespace(num_slots=20)))
    config = SimpleNamespace(compilation_config=SimpleNamespace(static_forward_context={name: member}))
    return KDAMetadataBuilder(spec, [name], config, torch.device("cpu"))


def step(query_lens, seq_lens, table, num_actual_tokens=None):
    from vllm.v1.attention.backend import CommonAttentionMetadata

    starts = torch.tensor([0, *query_lens]).cumsum(0).int()
    return CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=torch.tensor(seq_lens, dtype=torch.int32),
        num_reqs=len(query_lens),
        num_actual_tokens=num_actual_tokens or int(starts[-1]),
        max_query_len=max(query_lens),
        max_seq_len=max(seq_lens),
        block_table_tensor=torch.tensor(table, dtype=torch.int32),
        slot_mapping=torch.zeros(int(starts[-1]), dtype=torch.int64),
    )


@pytest.mark.parametrize(
    ("length", "row", "read", "write"),
    [
        (1, [5, 0, 0], 0, 5),  # first token of a request reads nothing
        (2, [5, 0, 0], 5, 5),
        (4, [5, 0, 0], 5, 5),
        (5, [5, 6, 0], 5, 6),  # first token of a block: read there, write here
        (6, [99, 6, 0], 6, 6),  # an entry behind the read slot is stale
        (9, [99, 6, 7], 6, 7),
    ],
)
def test_a_decode_reads_the_state_before_its_token(builder, length, row, read, write):
    rows = builder.build(0, step([1], [length], [row])).decode
    assert (rows.read_slot.tolist(), rows.write_slot.tolist()) == ([read], [write])
    assert rows.position.tolist() == [length - 1]
    assert (rows.read_slot.dtype, rows.position.dtype) == (torch.int32, torch.int64)


def test_decodes_come_apart_from_prefills(builder):
    built = builder.build(0, step([1, 1, 3, 6], [7, 1, 3, 10], [[1, 2, 0], [3, 0, 0], [4, 0, 0], [0, 5, 6]]))
    assert built.num_decodes == 2
    assert built.num_tokens == 11
    assert built.decode.write_slot.tolist() == [2, 3]
    assert built.prefill.cu_seqlens.tolist() == [0, 3, 9]
    assert built.prefill.context_len.tolist() == [0, 4]
    assert built.prefill.slot_table.tolist() == [[4, 0, 0], [0, 5, 6]]


def test_padded_and_made_up_rows_find_the_null_slot(builder):
    built = builder.build(0, step([1, 1, 1], [3, 0, 5], [[4, 0, 0], [7, 0, 0], [1000, 2000, 0]]))
    assert built.decode.write_slot.tolist() == [4, 0, 0]
    assert built.decode.read_slot.tolist() == [4, 0, 0]
