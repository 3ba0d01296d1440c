"""The rows of a step in one launch: the same numbers as the torch code that serves CPUs."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from triton_case import DEVICE
from vllm.v1.attention.backend import CommonAttentionMetadata

from kimi_vllm.cache.manager import KDAStateSpec
from kimi_vllm.cache.metadata import KDAMetadataBuilder, _RowBuffers
from kimi_vllm.kernels.contract import DecodeRows, WindowRows
from kimi_vllm.kernels.cuda.rows import step_rows, window_rows

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


WINDOW = 4


def expected_windows(table, lengths, query, num_windows, base):
    """Row by row in Python: window rows, prefill rows and the new `base`."""
    slot_at = partial(expected_slot, num_slots=len(base))
    base, before, windows, prefills = base.tolist(), base.tolist(), [], []
    starts = [0]
    for row, (end, new) in enumerate(zip(lengths, query, strict=True)):
        starts.append(starts[-1] + new)
        context = end - new
        read = slot_at(table[row], context - 1) if new else 0
        fold = min(max(context - before[read], 0), WINDOW) if read else 0
        if row >= num_windows:
            prefills.append((starts[row] - starts[num_windows], context, fold))
            for entry in range(context // 64, (end - 1) // 64 + 1 if new else 0):
                if slot := slot_at(table[row], entry * 64):
                    base[slot] = min((entry + 1) * 64, end)
            continue
        if not new or not end:
            windows.append((0, 0, 0, 0, 0))
            continue
        write, last = (slot_at(table[row], at) for at in (context, end - 1))
        windows.append((context, read, write, last if last != write else 0, fold))
        for slot in {write, last} - {0}:
            base[slot] = context
    return starts, windows, prefills, base


def check_window_rows(table, lengths, query, num_windows, base):
    """Compare with Python; all buffers are longer than the step."""
    most, num_prefills = len(lengths) + 2, len(lengths) - num_windows
    ints = torch.full((8, most), -7, dtype=torch.int32, device=DEVICE)
    position = torch.full((most,), -7, dtype=torch.int64, device=DEVICE)
    rows = WindowRows(ints[0], position, *ints[1:5])
    starts = torch.tensor([0, *query], device=DEVICE).cumsum(0).int()
    seq_lens, ours = torch.tensor(lengths, dtype=torch.int32, device=DEVICE), base.to(DEVICE, copy=True)
    window_rows(table.to(DEVICE), seq_lens, starts, num_windows, 64, WINDOW, ours, rows, *ints[5:])
    expected_starts, windows, prefills, expected_base = expected_windows(table, lengths, query, num_windows, base)
    assert rows.cu_seqlens.tolist() == expected_starts[: num_windows + 1] + [-7] * (most - num_windows - 1)
    columns = (position, rows.read_slot, rows.write_slot, rows.second_slot, rows.num_fold)
    found = list(zip(*(column[:num_windows].tolist() for column in columns), strict=True))
    assert found == windows
    assert all((column[num_windows:] == -7).all() for column in columns)
    cu_seqlens, context_len, num_fold = ints[5:]
    total = expected_starts[-1] - expected_starts[num_windows]
    assert cu_seqlens[: num_prefills + 1].tolist() == [first for first, _, _ in prefills] + [total]
    assert context_len[:num_prefills].tolist() == [context for _, context, _ in prefills]
    assert num_fold[:num_prefills].tolist() == [fold for _, _, fold in prefills]
    assert all((late[num_prefills + 1 :] == -7).all() for late in (cu_seqlens, context_len, num_fold))
    assert ours.tolist() == expected_base


def busy_tables(count, width, generator):
    """Slots that no other row has, and some entries of none; as many of them as the rows need."""
    slots = torch.randperm(count * width, generator=generator).view(count, width).int() + 1
    return torch.where(torch.rand(count, width, generator=generator) < 0.2, 0, slots)


@pytest.mark.parametrize(("num_windows", "num_prefills"), [(1, 0), (3, 2), (127, 1), (129, 0), (0, 2)])
def test_windows_find_their_slots_and_how_far_these_lag(num_windows, num_prefills):
    generator = torch.Generator().manual_seed(num_windows)
    count, width = num_windows + num_prefills, 6
    table = busy_tables(count, width, generator)
    slots = count * width - 2  # the last two are outside
    query = torch.randint(0, WINDOW + 1, (num_windows,), generator=generator).tolist()
    query += torch.randint(5, 200, (num_prefills,), generator=generator).tolist()
    # Lengths around a boundary, so that windows begin and end on either side of it.
    contexts = torch.randint(58, 70, (count,), generator=generator).tolist()
    lengths = [context + new for context, new in zip(contexts, query, strict=True)]
    base = torch.full((slots,), -100, dtype=torch.int64)
    for row, context in zip(table, contexts, strict=True):
        read = expected_slot(row, context - 1, num_slots=slots)
        base[read] = context - int(torch.randint(0, WINDOW + 1, (), generator=generator))
    check_window_rows(table, lengths, query, num_windows, base)


def test_padded_windows_touch_nothing():
    table = torch.full((4, 3), 5, dtype=torch.int32)
    table[0] = torch.tensor([1, 2, 3])
    # A window that runs in its block's last token, a row of no tokens, and two of no length.
    check_window_rows(table, [64, 70, 0, 0], [1, 0, 0, 3], 4, torch.arange(50).long())


def test_a_fresh_row_reads_nothing_and_an_impossible_lag_is_cut():
    table = torch.arange(1, 13, dtype=torch.int32).view(4, 3)
    base = torch.zeros(50, dtype=torch.int64)
    base[7], base[10] = 9000, 3  # after more than the row has, and far behind it
    check_window_rows(table, [3, 67, 12, 70], [3, 3, 2, 65], 3, base)


def test_a_slot_named_twice_keeps_the_later_state():
    table = torch.tensor([[2, 2, 2, 3] + [4] * 200], dtype=torch.int32)
    base = torch.full((50,), 10**12, dtype=torch.int64)
    base[2] = 60
    check_window_rows(table, [64 * 190 + 7], [64 * 190 - 55], 0, base)


STEPS = {
    0: [([60, 5, 0, 63], [1, 1, 70, 20]), ([64, 6, 70, 83], [1, 1, 1, 1]), ([65, 7, 71, 0], [1, 1, 1, 0])],
    WINDOW: [
        ([60, 5, 0, 63], [1, 4, 70, 20]),
        ([61, 7, 70, 83], [4, 2, 5, 9]),
        ([63, 8, 75, 92], [4, 4, 4, 4]),
        ([66, 12, 76, 0], [3, 1, 1, 0]),
    ],
}
"""Contexts and new tokens of four rows, step after step; the last row is padding in the end."""


@pytest.mark.parametrize("window", STEPS)
def test_a_builder_says_on_a_gpu_what_it_says_on_a_cpu(window):
    spec = KDAStateSpec(block_size=64, num_kv_heads=1, head_size=8, dtype=torch.float32, window=window)
    config = SimpleNamespace(
        compilation_config=SimpleNamespace(static_forward_context={}, max_cudagraph_capture_size=16),
        scheduler_config=SimpleNamespace(max_num_seqs=9),
    )
    builders, devices = [], ("cpu", DEVICE)
    for device in devices:
        pool = SimpleNamespace(num_slots=NUM_SLOTS, base=torch.zeros(NUM_SLOTS, dtype=torch.int64, device=device))
        config.compilation_config.static_forward_context["a"] = SimpleNamespace(home=SimpleNamespace(pool=pool))
        builders.append(KDAMetadataBuilder(spec, ["a"], config, torch.device("cpu")))
        pool.base[[1, 7, 19]] = torch.tensor([57, 5, 63], device=device)
    builders[1]._buffers = _RowBuffers(config, 64, torch.device(DEVICE))
    table = torch.arange(1, 25, dtype=torch.int32).view(4, 6)
    for contexts, lengths in STEPS[window]:
        one, other = (
            builder.build(0, told(contexts, lengths, table, device))
            for builder, device in zip(builders, devices, strict=True)
        )
        assert (one.num_decodes, one.num_tokens) == (other.num_decodes, other.num_tokens)
        for kind in ("decode", "windows", "prefill"):
            ours, theirs = getattr(one, kind), getattr(other, kind)
            assert (ours is None) == (theirs is None), kind
            for name in () if ours is None else ours.__slots__:
                expected, found = getattr(ours, name), getattr(theirs, name)
                same = torch.equal(expected, found.cpu()) if isinstance(expected, torch.Tensor) else expected == found
                assert same, (kind, name, expected, found)
        assert torch.equal(builders[0]._pool.base, builders[1]._pool.base.cpu())


def told(contexts, lengths, table, device):
    """Return a step as vLLM describes it."""
    starts = torch.tensor([0, *lengths]).cumsum(0).int()
    return CommonAttentionMetadata(
        query_start_loc=starts.to(device),
        query_start_loc_cpu=starts,
        seq_lens=(torch.tensor(contexts) + torch.tensor(lengths)).int().to(device),
        num_reqs=len(lengths),
        num_actual_tokens=int(starts[-1]),
        max_query_len=max(lengths),
        max_seq_len=400,
        block_table_tensor=table.to(device),
        slot_mapping=starts,
    )
