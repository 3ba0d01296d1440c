"""The CPU kernels against the spec in float64: odd shapes, extremes, poisoned neighbours, forks, exports."""

from __future__ import annotations

import itertools
import os
import threading
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kda_case import TOLERANCE, Case, check_decode, check_no_sequence, check_prefill, relative_error, same_bits
from numba import cfunc
from sick_case import SICK_INPUTS, check_decode_flags, check_prefill_flags

from kimi_vllm.kernels.cpu import worker

LENGTHS = (1, 3, 15, 16, 17, 63, 64, 65, 129, 200)
HEADS = [(1, 64), (2, 128), (3, 64)]
HEAD_IDS = ["H1-D64", "H2-D128", "H3-D64"]
in_pieces = pytest.mark.parametrize("pieces", [1, 2, 4], ids="pieces{}".format)


@in_pieces
@pytest.mark.parametrize("W", [2, 3, 4, 8], ids="W{}".format)
@pytest.mark.parametrize(("H", "D"), HEADS, ids=HEAD_IDS)
def test_decode_matches_spec(H: int, D: int, W: int, pieces: int) -> None:
    check_five_rows(H, D, W, pieces)


@pytest.mark.parametrize(("W", "pieces"), [(2, 4), (3, 1), (4, 2), (8, 4)])
def test_decode_matches_spec_with_every_head(W: int, pieces: int) -> None:
    check_five_rows(32, 128, W, pieces)


def check_five_rows(H: int, D: int, W: int, pieces: int) -> None:
    case = Case(5, H, D, W=W, R=12, S=8, pieces=pieces)
    for slot, position in ((1, 40), (3, 1), (6, 7)):
        case.fill(slot, position)
    # A plain step, a padded row, a fresh sequence, a fork, a second plain step.
    check_decode(case, [1, 5, 0, 3, 6], [1, 0, 2, 4, 6], [40, 3, 0, 1, 7])


@pytest.mark.parametrize("N", [1, 3, 33], ids="N{}".format)
def test_decode_with_many_rows(N: int) -> None:
    case = Case(N, 2, 64, S=N + 2)
    slots = [1 + (7 * n) % 34 % (N + 1) if N == 33 else n + 1 for n in range(N)]
    for n, slot in enumerate(slots):
        case.fill(slot, n)
    check_decode(case, slots, slots, list(range(N)))


@pytest.mark.parametrize("T", LENGTHS, ids="T{}".format)
@pytest.mark.parametrize(("H", "D"), HEADS, ids=HEAD_IDS)
def test_prefill_matches_spec(H: int, D: int, T: int) -> None:
    check_prefill(Case(T, H, D), [T], [0], [[3]], 1 << 20)


def test_prefill_matches_spec_with_every_head() -> None:
    check_prefill(Case(65, 32, 128), [65], [0], [[3]], 1 << 20)


@pytest.mark.parametrize("W", [2, 3, 8], ids="W{}".format)
def test_prefill_with_other_convolution_widths(W: int) -> None:
    case = Case(40, W=W, R=8)
    case.fill(1, 5)
    check_prefill(case, [1, 2, 37], [5, 0, 0], [[1], [2], [3]], 1 << 20)


@in_pieces
def test_prefill_of_mixed_sequences(pieces: int) -> None:
    case = Case(122, S=12, pieces=pieces)
    case.fill(1, 16)
    case.fill(2, 29)
    lengths, context = [16, 0, 1, 65, 37], [16, 0, 0, 29, 0]
    table = [[1, 4, 0, 0, 0, 0], [9] * 6, [5, 9, 9, 9, 9, 9], [9, 2, 0, 6, 0, 7], [0, 8, 3, 9, 9, 9]]
    check_prefill(case, lengths, context, table, 16)  # tokens 119 to 121 belong to nobody


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_low_precision_activations_cost_no_more_than_their_own_rounding(dtype: torch.dtype) -> None:
    case = Case(47, 2, 128, dtype=dtype)
    gold = case.copy(torch.float64).prefill([47], [0], [[1]], spec=True)
    reference_error = relative_error(case.copy().prefill([47], [0], [[1]], spec=True), gold)
    ours = case.copy()
    assert relative_error(ours.prefill([47], [0], [[1]]), gold) <= 2 * reference_error
    steps = case.copy()
    rows = [steps.rows(t, t + 1).decode([1 if t else 0], [1], [t]) for t in range(47)]
    assert relative_error(torch.cat(rows), gold) <= 2 * reference_error
    assert relative_error(ours.state[1], steps.state[1]) <= TOLERANCE


@pytest.mark.parametrize("D", [64, 128], ids="D{}".format)
@pytest.mark.parametrize(("A", "gate_mean"), [(16.0, 6.0), (1.0, -20.0), (16.0, -20.0)], ids=["fast", "slow", "mix"])
def test_extreme_gates(A: float, gate_mean: float, D: int) -> None:
    case = Case(65, 2, D, A=A, gate_mean=gate_mean)
    case.fill(1, 4)
    check_prefill(case, [65], [4], [[1]], 1 << 20)
    decode = case.rows(0, 1)
    decode.fill(2, 9)
    check_decode(decode, [2], [2], [9])


def test_correlated_keys() -> None:
    case = Case(129, 2, 128)
    keys = case.x.qkv[:, 256:512]
    keys.copy_(0.9 * torch.randn(1, 256, generator=case.generator) + (1 - 0.9**2) ** 0.5 * keys)
    case.x.beta.fill_(2.944)  # its sigmoid is 0.95
    check_prefill(case, [129], [0], [[1]], 1 << 20)


@pytest.mark.parametrize("n", [1, 2, 15, 16, 33], ids="n{}".format)
def test_prefill_then_decode_equals_one_prefill(n: int) -> None:
    case = Case(n + 20, 3, 64)
    whole, pieces = case.copy(), case.copy()
    expected = whole.prefill([n + 20], [0], [[1]])
    out = [pieces.rows(0, n).prefill([n], [0], [[2]])]
    out += [pieces.rows(t, t + 1).decode([2], [2], [t]) for t in range(n, n + 20)]
    assert relative_error(torch.cat(out), expected) <= TOLERANCE
    assert relative_error(pieces.state[2], whole.state[1]) <= TOLERANCE


@settings(max_examples=15, deadline=None)
@given(
    cuts=st.lists(st.integers(1, 99), max_size=6, unique=True),
    block=st.integers(3, 120),
    W=st.integers(2, 8),
    pieces=st.sampled_from([1, 2, 4, 8]),
)
def test_chunked_prefill_in_any_chunks_equals_one_shot(cuts: list[int], block: int, W: int, pieces: int) -> None:
    case = Case(100, 1, 64, W=W, S=3, pieces=pieces)
    whole, pieces = case.copy(), case.copy()
    expected = whole.prefill([100], [0], [[1]])
    bounds = [0, *sorted(cuts), 100]
    table = [[2] * (99 // block + 1)]
    out = [pieces.rows(a, b).prefill([b - a], [a], table, block) for a, b in itertools.pairwise(bounds)]
    assert relative_error(torch.cat(out), expected) <= TOLERANCE
    assert relative_error(pieces.state[2], whole.state[1]) <= TOLERANCE
    assert torch.equal(pieces.history(2, 100), whole.history(1, 100))


@in_pieces
@pytest.mark.parametrize("end", [1, 15, 16, 17, 32, 47], ids="end{}".format)
def test_an_export_is_the_state_of_a_shorter_prefill(end: int, pieces: int) -> None:
    case = Case(48, S=5, pieces=pieces)
    exporting = case.copy()
    exporting.prefill([48], [0], [[1, 2, 3]], 16)
    shorter = case.rows(0, end).copy()
    shorter.prefill([end], [0], [[4]])
    if end % 16 == 0:
        slot = end // 16
        assert relative_error(exporting.state[slot], shorter.state[4]) <= TOLERANCE
        assert torch.equal(exporting.history(slot, end), shorter.history(4, end))
    continued, resumed = case.copy(), case.copy()
    continued.prefill([48], [0], [[0, 0, 3]], 16)
    resumed.rows(0, end).prefill([end], [0], [[2, 2, 3]], 16)
    resumed.rows(end, 48).prefill([48 - end], [end], [[2, 2, 3]], 16)
    assert relative_error(resumed.state[3], continued.state[3]) <= TOLERANCE


def test_a_slot_named_twice_keeps_the_later_state() -> None:
    check_prefill(Case(40), [40], [0], [[1, 2, 1]], 16)


def test_stale_table_entries_are_never_used() -> None:
    case = Case(10)
    case.fill(1, 20)
    garbage = -(2**31)
    check_prefill(case, [10], [20], [[garbage, 1, garbage, 2**31 - 1]], 16)


def test_a_context_in_the_null_slot_is_a_zero_state() -> None:
    case = Case(20)
    check_prefill(case, [20], [50], [[0, 0, 0, 0, 1]], 16)
    check_decode(Case(1), [0], [2], [7])


def test_sequences_without_slots_still_produce_output() -> None:
    check_prefill(Case(20), [20], [0], [[0, 0]], 16)


@in_pieces
def test_forks_leave_the_parent_alone_and_complete_the_child(pieces: int) -> None:
    case = Case(30, pieces=pieces)
    case.fill(1, 11)
    check_decode(case.rows(0, 1), [1], [2], [11])
    parent, child = case.copy(), case.copy()
    child.rows(0, 1).decode([1], [2], [11])
    assert same_bits(child.state[1], case.state[1])
    assert same_bits(child.conv[1], case.conv[1])
    for t in range(30):
        expected = parent.rows(t, t + 1).decode([1], [1], [11 + t])
        ours = expected if t == 0 else child.rows(t, t + 1).decode([2], [2], [11 + t])
        assert torch.equal(ours, expected)


@pytest.mark.parametrize(
    ("R", "pieces"), [(4, 4), (5, 1), (6, 2), (8, 8)], ids=["R4-pieces4", "R5-pieces1", "R6-pieces2", "R8-pieces8"]
)
def test_ring_wraps(R: int, pieces: int) -> None:
    case = Case(3 * R + 1, 1, 64, R=R, pieces=pieces)
    ours, gold = case.copy(), case.copy(torch.float64)
    for t in range(3 * R + 1):
        x, expected = (
            c.rows(t, t + 1).decode([1 if t else 0], [1], [t], spec=spec) for c, spec in ((ours, False), (gold, True))
        )
        assert relative_error(x, expected) <= TOLERANCE
    assert torch.equal(ours.conv[1].double(), gold.conv[1])


def test_fresh_rows_ignore_what_their_slot_held() -> None:
    # Every slot is full of NaN or 1e30 here, also columns of the ring that a fresh sequence has not reached.
    for slot in (1, 2):
        ours = Case(4)
        for t in range(4):
            out = ours.rows(t, t + 1).decode([slot if t else 0], [slot], [t])
            assert torch.isfinite(out).all()
        assert torch.isfinite(ours.state[slot]).all()


def test_decode_stays_close_over_two_thousand_steps() -> None:
    case = Case(2000, 1, 64, A=1.0, gate_mean=-1.0)
    steps = case.copy()
    out = [steps.rows(t, t + 1).decode([1 if t else 0], [1], [t]) for t in range(2000)]
    gold = case.copy(torch.float64)
    expected = gold.prefill([2000], [0], [[1]], spec=True)
    assert relative_error(torch.cat(out), expected) <= 1e-4
    assert relative_error(steps.state[1], gold.state[1]) <= 1e-4


def test_a_decode_row_does_not_depend_on_the_others() -> None:
    case = Case(9, 3, 128, S=12)
    for slot in range(1, 10):
        case.fill(slot, 5)
    together = case.copy()
    slots = list(range(1, 10))
    out = together.decode(slots, slots, [5] * 9)
    for n in (0, 4, 8):
        alone = case.copy()
        assert torch.equal(alone.rows(n, n + 1).decode([n + 1], [n + 1], [5])[0], out[n])
        assert torch.equal(alone.state[n + 1], together.state[n + 1])


@pytest.mark.parametrize("threads", [1, 2, 5], ids="threads{}".format)
def test_results_do_not_depend_on_the_number_of_threads(threads: int) -> None:
    case = Case(150, 8, 128)
    before = torch.get_num_threads()
    expected = case.copy().prefill([100, 50], [0, 0], [[1], [2]])
    try:
        torch.set_num_threads(threads)
        assert torch.equal(case.copy().prefill([100, 50], [0, 0], [[1], [2]]), expected)
    finally:
        torch.set_num_threads(before)


def test_two_python_threads_may_step_at_once() -> None:
    cases = [Case(64, 4, 128, seed=seed) for seed in range(4)]
    expected = [case.copy().prefill([64], [0], [[1]]) for case in cases]
    results: list[list[torch.Tensor]] = [[] for _ in cases]

    def work(index: int) -> None:
        results[index] = [cases[index].copy().prefill([64], [0], [[1]]) for _ in range(5)]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(out, gold) for outs, gold in zip(results, expected, strict=True) for out in outs)


def test_inference_mode() -> None:
    with torch.inference_mode():
        case = Case(20)
        case.copy().prefill([20], [0], [[1]])
        check_decode(case.rows(0, 1), [0], [1], [0])


def test_a_sick_activation_stays_visible_and_stays_at_home() -> None:
    for name in ("qkv", "gate", "beta", "out_gate"):
        case = Case(20, 2, 64)
        healthy = case.copy()
        expected = healthy.prefill([10, 10], [0, 0], [[1], [2]])
        getattr(case.x, name)[3] = float("nan")
        out = case.prefill([10, 10], [0, 0], [[1], [2]])
        assert out[3].isnan().any(), name
        assert torch.equal(out[10:], expected[10:])
        assert torch.equal(case.state[2], healthy.state[2])


@pytest.mark.parametrize("sick", SICK_INPUTS)
def test_a_sick_row_is_flagged_and_no_other(sick: str) -> None:
    check_decode_flags(Case(5, 2, 64), sick)


@pytest.mark.parametrize("sick", SICK_INPUTS)
def test_a_sick_sequence_is_flagged_from_its_sick_token_on(sick: str) -> None:
    check_prefill_flags(Case(8, 2, 64), sick)


@pytest.mark.parametrize("slot", [-1, 8, 2**31 - 1])
def test_slots_outside_the_pools_raise(slot: int) -> None:
    case = Case(1)
    before = case.copy()
    with pytest.raises(IndexError, match="8 of the pools"):
        case.decode([0], [slot], [0])
    with pytest.raises(IndexError, match="8 of the pools"):
        case.prefill([1], [0], [[slot]])
    with pytest.raises(IndexError, match="outgrows its slot table"):
        Case(20).prefill([20], [0], [[1]], 16)
    assert same_bits(case.pools.memory, before.pools.memory)


def test_blocks_may_lie_beyond_four_gigabytes() -> None:
    case = Case(40, S=5)
    case.fill(1, 9)
    near = case.copy()
    pools = near.pools
    beyond = (1 << 32) // pools.cut.block_bytes + 1
    # Only what is touched becomes real memory.
    memory = torch.from_numpy(np.zeros((beyond + len(pools.memory), pools.cut.block_bytes), dtype=np.uint8))
    memory[beyond:] = pools.memory
    far = replace(case, pools=replace(pools, memory=memory, pages=pools.pages + beyond))
    outs = [
        (each.rows(0, 2).decode([1, 0], [2, 3], [9, 0]), each.prefill([40], [10], [[2, 4]], 32)) for each in (near, far)
    ]
    assert all(torch.equal(ours, expected) for ours, expected in zip(*outs, strict=True))
    assert same_bits(memory[beyond:], near.pools.memory)


def test_empty_steps_do_nothing() -> None:
    assert Case(0).decode([], [], []).shape == (0, 128)
    assert Case(0).prefill([], [], []).shape == (0, 128)


def test_kernels_run_on_the_threads_torch_already_has() -> None:
    before = torch.get_num_threads()
    case = Case(150, 8, 128)
    try:
        torch.set_num_threads(2)
        case.copy().prefill([150], [0], [[1]])  # compiles
        (torch.randn(1 << 20) + 1).exp()
        threads = set(os.listdir("/proc/self/task"))
        for _ in range(3):
            case.copy().prefill([150], [0], [[1]])
        assert set(os.listdir("/proc/self/task")) <= threads
    finally:
        torch.set_num_threads(before)


def test_without_a_folder_for_its_cache_numba_still_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(signature: str, cache: bool = False) -> Any:
        def decorate(function: Any) -> Any:
            if cache:
                raise RuntimeError("cannot cache function: no locator available")
            return cfunc(signature)(function)

        return decorate

    monkeypatch.setattr(worker, "cfunc", refuse)
    assert worker.compile_worker(True, 64) > 0


@pytest.mark.parametrize("T", [1, 5, 130])
def test_no_sequence(T):
    check_no_sequence(Case(T, 2, 64))
