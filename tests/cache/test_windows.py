"""Windows of tokens that may be taken back: what rows read, write and fold, and what is sick of them."""

from types import SimpleNamespace

import pytest
import torch
from test_manager import BLOCK as MANAGER_BLOCK
from test_manager import Request, make_manager, schedule
from test_metadata import step
from vllm.v1.attention.backend import AttentionCGSupport

from kimi_vllm.cache import guard
from kimi_vllm.cache.contagion import Access, Step
from kimi_vllm.cache.manager import KDAStateSpec
from kimi_vllm.cache.metadata import KDAMetadataBuilder, most_prefills, rehearsal
from kimi_vllm.cache.scheduler import _that_count

BLOCK, WINDOW = 8, 4


@pytest.fixture
def pool():
    return SimpleNamespace(num_slots=20, base=torch.zeros(20, dtype=torch.int64))


@pytest.fixture
def builder(pool):
    spec = KDAStateSpec(block_size=BLOCK, num_kv_heads=1, head_size=8, dtype=torch.float32, window=WINDOW)
    name = "model.layers.0.kda_state"
    member = SimpleNamespace(home=SimpleNamespace(pool=pool))
    config = SimpleNamespace(compilation_config=SimpleNamespace(static_forward_context={name: member}))
    return KDAMetadataBuilder(spec, [name], config, torch.device("cpu"))


@pytest.mark.parametrize(
    ("start", "tokens", "row", "base", "read", "write", "second", "fold"),
    [
        (0, 3, [5, 0, 0], 9, 0, 5, 0, 0),  # a fresh one reads nothing, whatever was there
        (2, 4, [5, 0, 0], 1, 5, 5, 0, 1),
        (6, 4, [5, 6, 0], 2, 5, 5, 6, 4),  # it ends in another block than it begins in
        (6, 1, [5, 6, 0], 4, 5, 5, 0, 2),
        (7, 4, [5, 5, 0], 4, 5, 5, 0, 3),  # its slot goes along
        (8, 4, [5, 6, 0], 6, 5, 6, 0, 2),  # it begins a block: the slot that it leaves lags
        (9, 4, [99, 6, 0], 6, 6, 6, 0, 3),  # an entry behind the read slot is stale
    ],
)
def test_a_window(builder, pool, start, tokens, row, base, read, write, second, fold):
    pool.base[row[0] % 20] = pool.base[read] = base
    built = builder.build(0, step([tokens], [start + tokens], [row]))
    assert (built.num_decodes, built.decode, built.prefill) == (tokens, None, None)
    rows = built.windows
    assert rows.cu_seqlens.tolist() == [0, tokens]
    assert rows.position.tolist() == [start]
    assert (rows.read_slot.tolist(), rows.write_slot.tolist()) == ([read], [write])
    assert (rows.second_slot.tolist(), rows.num_fold.tolist()) == ([second], [fold])
    assert pool.base[write] == start
    assert not second or pool.base[second] == start


def test_windows_come_apart_from_prefills(builder, pool):
    pool.base[1], pool.base[4], pool.base[9] = 5, 14, 8
    table = [[1, 0, 0, 0], [2, 0, 0, 0], [0, 4, 0, 7], [9, 3, 6, 0]]
    built = builder.build(0, step([4, 1, 13, 9], [10, 1, 29, 17], table))
    assert built.num_decodes == 5
    assert built.windows.num_fold.tolist() == [1, 0]
    prefill = built.prefill
    assert prefill.cu_seqlens.tolist() == [0, 13, 22]
    assert prefill.context_len.tolist() == [16, 8]
    assert prefill.num_fold.tolist() == [2, 0]
    # The end of a block, or of the sequence; a slot that is only read stays as it was.
    assert pool.base[[7, 3, 6, 4, 9]].tolist() == [29, 16, 17, 14, 8]


def test_padding_finds_the_null_slot(builder):
    built = builder.build(0, step([2, 0, 1], [2, 0, 6], [[4, 0, 0], [7, 0, 0], [1000, 2000, 0]]))
    assert built.windows.write_slot.tolist() == [4, 0, 0]
    assert built.windows.read_slot.tolist() == [0, 0, 0]
    assert built.windows.num_fold.tolist() == [0, 0, 0]


@pytest.mark.parametrize("base", [2, 8])
def test_a_state_without_the_records_is_an_error(builder, pool, base):
    pool.base[5] = base
    with pytest.raises(RuntimeError, match="states lag by"):
        builder.build(0, step([1], [8], [[5, 0, 0]]))


@pytest.mark.parametrize(("tokens", "kind"), [(3, "windows"), (12, "windows"), (13, "prefill")])
def test_a_rehearsal(tokens, kind):
    built = rehearsal(tokens, 3, BLOCK, torch.device("cpu"), WINDOW)
    rows = getattr(built, kind)
    assert rows.cu_seqlens[-1] == tokens
    assert rows.num_fold.tolist() == [0] * 3
    assert [getattr(built, name) is None for name in ("decode", "prefill", "windows")].count(True) == 2


@pytest.mark.parametrize(
    ("tokens", "most", "window", "expected"),
    [(8192, 256, 0, 256), (256, 256, 0, 128), (8192, 256, 4, 256), (2048, 256, 8, 227), (5, 8, 4, 1)],
)
def test_what_is_profiled_is_a_prefill_of_as_many_sequences_as_can_be(tokens, most, window, expected):
    """Also where so many tokens would do for decodes or windows of all sequences."""
    sequences = most_prefills(tokens, most, window)
    built = rehearsal(tokens, sequences, BLOCK, torch.device("cpu"), window)
    assert (sequences, built.prefill is None, built.num_decodes) == (expected, False, 0)


def test_the_first_sick_token_of_each_slot_is_told(monkeypatch):
    monkeypatch.setattr(guard, "get_tensor_model_parallel_world_size", lambda: 1)
    flags = torch.zeros(6, WINDOW, dtype=torch.int32)
    flags[2, 1:] = 1
    flags[4, 0] = 1
    assert guard.take_flags(flags)() == [(2, 1), (4, 0)]
    assert not flags.any()


@pytest.mark.parametrize("drafts", [0, 3])
def test_graphs_of_whole_steps_are_of_windows(drafts):
    graphs = AttentionCGSupport.UNIFORM_BATCH if drafts else AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    assert KDAMetadataBuilder.get_cudagraph_support(SimpleNamespace(num_speculative_tokens=drafts), None) == graphs


@pytest.mark.parametrize(("token", "sampled", "expected"), [(0, 1, {3}), (1, 1, set()), (2, 2, set()), (2, 3, {3})])
def test_only_tokens_that_count_make_a_request_sick(token, sampled, expected):
    access = Access(3, (3,), lambda: (set(), set()), 0)
    sent = SimpleNamespace(scheduled_spec_decode_tokens={"a": [7, 7, 7]})
    result = SimpleNamespace(req_id_to_index={"a": 0}, sampled_token_ids=[[5] * sampled])
    assert _that_count([(3, token), (8, 0)], Step((), {"a": access, "b": access}), sent, result) == expected | {8}


def test_a_boundary_is_kept_until_it_is_published():
    """Drafts that count carry a request past a boundary before the cache is told of it."""
    request = Request("a", list(range(MANAGER_BLOCK * 3)))
    retired = []
    for window in (0, WINDOW):
        manager = make_manager()
        manager.kv_cache_spec = SimpleNamespace(window=window)
        assert schedule(manager, request, 0, MANAGER_BLOCK)
        assert schedule(manager, request, MANAGER_BLOCK, MANAGER_BLOCK + 1)
        manager.num_cached_block["a"] = 0
        manager.remove_skipped_blocks("a", MANAGER_BLOCK + 2)
        retired.append(manager.req_to_blocks["a"][0].is_null)
    assert retired == [True, False]
