"""The rows of a step in one launch: the same numbers as the torch code that serves CPUs."""

from __future__ import annotations

import pytest
import torch
from triton_case import DEVICE

from kimi_vllm.kernels.contract import DecodeRows
from kimi_vllm.kernels.cuda.rows import step_rows

pytestmark = pytest.mark.triton

NUM_SLOTS = 50


def run(decode_lens, prefills, table, *, padding=0, block_size=64, num_slots=NUM_SLOTS):
    """`decode_lens` are lengths after the step; `prefills` are (context, new) pairs; padded decode rows come last."""
    query = [1] * len(decode_lens) + [new for _, new in prefills] + [0] * padding
    lengths = list(decode_lens) + [context + new for context, new in prefills] + [0] * padding
    starts = torch.tensor([0, *query], device=DEVICE).cumsum(0).int()
    num_decodes = len(decode_lens) + padding
    most = len(lengths)
    ints = torch.full((3, most + 2), -7, dtype=torch.int32, device=DEVICE)
    position = torch.full((most + 2,), -7, dtype=torch.int64, device=DEVICE)
    cu_seqlens = torch.full((most + 2,), -7, dtype=torch.int32, device=DEVICE)
    seq_lens = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    rows = DecodeRows(ints[0], ints[1], position)
    step_rows(table.to(DEVICE), seq_lens, starts, num_decodes, block_size, num_slots, rows, cu_seqlens, ints[2])
    return ints[0], ints[1], position, cu_seqlens, ints[2]


def expected_slot(row, position, block_size=64, num_slots=NUM_SLOTS):
    slot = int(row[position // block_size]) if position >= 0 else 0
    return slot if 0 < slot < num_slots else 0


@pytest.mark.parametrize("decodes", [1, 2, 127, 128, 129, 300])
def test_decodes_find_the_slots_before_and_after_their_token(decodes):
    generator = torch.Generator().manual_seed(decodes)
    # Slots up to 70 in a pool of 50: what vLLM makes up in its warm-up becomes the null slot.
    table = torch.randint(0, 70, (decodes, 9), generator=generator, dtype=torch.int32)
    lens = torch.randint(1, 9 * 64 + 1, (decodes,), generator=generator).tolist()
    lens[0] = 65  # the first token of a block
    read, write, position, *_ = run(lens, [], table)
    for n, length in enumerate(lens):
        assert position[n] == length - 1
        assert write[n] == expected_slot(table[n], length - 1)
        assert read[n] == expected_slot(table[n], length - 2)
    assert read[decodes:].tolist() == write[decodes:].tolist() == [-7, -7]


def test_padded_rows_find_the_null_slot_on_both_sides():
    read, write, position, *_ = run([1, 2], [], torch.full((4, 3), 5, dtype=torch.int32), padding=2)
    assert (read[:4].tolist(), write[:4].tolist()) == ([0, 5, 0, 0], [5, 5, 0, 0])
    assert position[:4].tolist() == [0, 1, -1, -1]


@pytest.mark.parametrize("decodes", [0, 3, 128])
def test_prefills_are_packed_behind_the_decodes(decodes):
    prefills = [(0, 5), (64, 64), (100, 1000)]
    table = torch.ones(decodes + 3, 20, dtype=torch.int32)
    read, _, _, cu_seqlens, context = run([7] * decodes, prefills, table)
    assert cu_seqlens[:4].tolist() == [0, 5, 69, 1069]
    assert context[:3].tolist() == [0, 64, 100]
    assert cu_seqlens[4:].unique().tolist() == context[3:].unique().tolist() == [-7]
    assert read[decodes:].unique().tolist() == [-7]


def test_rows_of_a_wider_table():
    wide = torch.arange(40, dtype=torch.int32).reshape(2, 20)
    read, write, *_ = run([130, 3], [], wide[:, :5])
    assert (read[:2].tolist(), write[:2].tolist()) == ([2, 20], [2, 20])
