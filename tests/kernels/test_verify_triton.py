"""The Triton kernel of windows, and prefills that fold; in Triton's interpreter where there is no CUDA device."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from kda_case import Case, Tolerance, check_no_sequence, copied, relative_error, same_bits
from triton_case import (
    DEVICE,
    DTYPES,
    ON_GPU,
    far_away,
    tolerance_of,
    triton_case,
    without_null_blocks,
)
from window_case import (
    check_alone,
    check_decoding,
    check_lagging_checkpoint,
    check_no_rows,
    check_sick_token,
    check_verify,
    check_windows,
    lag,
    nearly,
    ring,
)

from kimi_vllm.kernels.contract import WindowRows
from kimi_vllm.kernels.cuda import launch, prefill

pytestmark = pytest.mark.triton


def windows(T: int, H: int = 1, D: int = 64, window: int = 4, **options: Any) -> Case:
    """Return a case whose pools hold records; none of any slot is valid yet."""
    return triton_case(T, H, D, **{"R": ring(window, options.get("W", 4)), "window": window} | options)


@pytest.mark.parametrize(("window", "pieces"), [(2, 1), (3, 2), (4, 1), (8, 2)])
def test_windows_match_the_spec(window: int, pieces: int) -> None:
    check_windows(windows, 1, 64, window, pieces=pieces)


@pytest.mark.parametrize("state_dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(("H", "window"), [(1, 4), pytest.param(32, 8, marks=ON_GPU)], ids=["H1", "H32"])
def test_large_heads(H: int, window: int, state_dtype: str) -> None:
    """In both forms of the launch table."""
    types = {"dtype": DTYPES[state_dtype], "state_dtype": DTYPES[state_dtype], "conv_dtype": DTYPES[state_dtype]}
    check_windows(windows, H, 128, window, tolerance=tolerance_of(types["dtype"], types["state_dtype"]), **types)


@pytest.mark.parametrize(
    ("state_dtype", "dtype"),
    [("bf16", "bf16"), ("fp16", "fp16"), ("fp32", "bf16")],
    ids=lambda name: name,
)
def test_dtypes(state_dtype: str, dtype: str) -> None:
    types = {"dtype": DTYPES[dtype], "state_dtype": DTYPES[state_dtype], "conv_dtype": DTYPES[dtype]}
    tolerance = tolerance_of(types["dtype"], types["state_dtype"])
    check_windows(windows, 1, 64, 3, tolerance=tolerance, **types)


def test_rings_that_round() -> None:
    options = {"conv_dtype": torch.bfloat16}
    tolerance = Tolerance(column=2.0**-7)
    check_windows(windows, 1, 64, 4, tolerance=tolerance, **options)


def test_another_convolution_width() -> None:
    case = windows(7, W=8)
    lag(case, 1, 9, 2)
    check_verify(case, [4, 3], [9, 0], [1, 0], [1, 2], [0, 3], [2, 0])


# The ring is as small as it may be: the newest column of a window lies where the oldest of its history did.
@pytest.mark.parametrize(
    ("accepted", "start", "resumed", "pieces", "W"),
    [([4, 1, 3], 1, 4, 1, 4), ([1, 2, 4], 60, 4, 2, 4), ([3, 2], 61, 9, 2, 2), ([2, 2], 62, 4, 1, 7)],
    ids=["fresh", "fork", "chunked", "wide"],
)
def test_what_counts_equals_decoding(accepted: list[int], start: int, resumed: int, pieces: int, W: int) -> None:
    check_decoding(windows, accepted, start, 64, resumed, nearly, pieces=pieces, W=W)


@pytest.mark.gpu
@pytest.mark.parametrize("N", [1, 8], ids="N{}".format)
def test_heads_of_the_released_model_equal_decoding(N: int) -> None:
    """With float32 states; one sequence and several."""
    case = windows(4 * N, 32, 128, S=2 * N + 1)
    slots = list(range(1, N + 1))
    for slot in slots:
        case.fill(slot, 9)
    plain, first = case.copy(), list(range(0, 4 * N, 4))
    out = case.verify([4] * N, [9] * N, slots, slots, [0] * N, [0] * N)
    for n, slot in enumerate(slots):
        for t in range(4):
            expected = plain.rows(4 * n + t, 4 * n + t + 1).decode([slot], [slot], [9 + t])[0]
            assert nearly(out[first[n] + t], expected)
    forks = [slot + N for slot in slots]
    case.verify([4] * N, [13] * N, slots, forks, [0] * N, [4] * N)
    assert all(
        nearly(case.pools.load(fork)[0], plain.pools.load(slot)[0]) for fork, slot in zip(forks, slots, strict=True)
    )


def test_a_checkpoint_lags_and_forks() -> None:
    check_lagging_checkpoint(windows, nearly)


@pytest.mark.parametrize(
    ("lengths", "pieces", "group"),
    [([3, 1], 1, 2), ([5, 35], 2, 2), ([5, 35], 2, 1)],
    ids=["extend", "chunked", "one after another"],
)
def test_prefills_fold(lengths: list[int], pieces: int, group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill, "sequences_at_once", lambda T, N: group)
    case = windows(sum(lengths), pieces=pieces)
    lag(case, 1, 62, 3)
    lag(case, 2, 30, 1)
    ours, gold = case.copy(), case.copy(torch.float64)
    # The first ends in the next block, with a state at the boundary; the second in its own, or behind it.
    table = [[1, 3], [2, 4]]
    flags, expected_flags = case.flags(), case.flags()
    out = ours.prefill(lengths, [62, 30], table, 64, num_fold=[3, 1], nonfinite=flags)
    expected = gold.prefill(lengths, [62, 30], table, 64, num_fold=[3, 1], spec=True, nonfinite=expected_flags)
    assert relative_error(out, expected) <= 1e-5
    assert torch.equal(flags, expected_flags)
    for slot in (1, 2, 3, *([4] if sum(lengths) > 4 else [])):
        assert relative_error(ours.pools.load(slot)[0], gold.pools.load(slot)[0]) <= 1e-5
    for slot in range(1, 8):
        assert same_bits(ours.pools.load_records(slot), case.pools.load_records(slot)), "a prefill writes no records"


def test_a_fresh_prefill_folds_nothing() -> None:
    """Records of the null slot, and more than a slot can hold, are not read: they are NaN here."""
    case = windows(3)
    plain = case.copy()
    expected = plain.prefill([3], [0], [[2]], 64)
    assert same_bits(case.prefill([3], [0], [[2]], 64, num_fold=[4]), expected)
    assert same_bits(case.pools.memory, plain.pools.memory)


@pytest.mark.parametrize("count", [-3, 2**31 - 1])
def test_no_more_is_folded_than_a_window_has(count: int) -> None:
    case = windows(4)
    lag(case, 1, 9, 4)
    within = [0 if count < 0 else 4]
    expected = case.copy().verify([4], [9], [1], [2], [0], within)
    assert expected.isfinite().all()
    assert same_bits(case.copy().verify([4], [9], [1], [2], [0], [count]), expected)
    prefilled = case.copy().prefill([4], [9], [[1]], 64, num_fold=within)
    assert same_bits(case.copy().prefill([4], [9], [[1]], 64, num_fold=[count]), prefilled)


@pytest.mark.parametrize("slot", [8, -(2**31)])
def test_a_slot_outside_the_pools_counts_as_none(slot: int) -> None:
    case = windows(8)
    lag(case, 1, 5, 1)
    ours, expected, flags = case.copy(), case.copy(), case.flags()
    out = ours.verify([2, 3, 3], [5, 5, 5], [1, slot, 1], [1, 2, slot], [slot, 0, 3], [1, 1, 1], nonfinite=flags)
    assert same_bits(out, expected.verify([2, 3, 3], [5, 5, 5], [1, 0, 0], [1, 2, 0], [0, 0, 0], [1, 0, 0]))
    assert not out[5:].any()
    assert same_bits(ours.pools.memory, expected.pools.memory)
    assert not flags.any()


@pytest.mark.parametrize("sick", ["k", "out_gate", "state"])
def test_the_first_sick_token_is_told(sick: str) -> None:
    check_sick_token(windows, sick)


@pytest.mark.parametrize("T", [4, 8], ids=["extend", "chunked"])
def test_flags_of_other_kernels_are_a_slots_first(T: int) -> None:
    case = windows(T)
    for slot in (2, 3):
        case.fill(slot, 9)
    case.x.qkv[0, 5] = float("nan")
    flags = case.flags()
    case.copy().rows(0, 1).decode([2], [2], [9], nonfinite=flags)
    case.copy().prefill([T], [9], [[3]], 64, nonfinite=flags)
    assert flags.nonzero().tolist() == [[2, 0], [3, 0]]


def test_a_folded_state_too_large_for_its_dtype_is_flagged() -> None:
    case = windows(2, state_dtype=torch.float16, dtype=torch.float32, conv_dtype=torch.float32)
    case.fill(1, 6)
    case.pools.store(1, torch.full_like(case.pools.load(1)[0], 65000.0))
    case.pools.store_records(1, torch.full((1, 1, 3, 64), 100.0))
    for spec in (True, False):
        flags, ours = case.flags(), case.copy()
        ours.verify([2], [6], [1], [2], [3], [1], spec=spec, nonfinite=flags)
        assert not ours.pools.load(2)[0].isfinite().all()
        assert flags.nonzero().tolist() == [[2, 0], [3, 0]], f"spec={spec}"


def test_blocks_beyond_two_to_the_31_steps() -> None:
    case = windows(6)
    lag(case, 1, 9, 2)
    far = replace(case, pools=far_away(case.pools))
    step = ([4, 2], [9, 0], [1, 0], [1, 2], [3, 0], [2, 0])
    assert same_bits(far.verify(*step), case.verify(*step))
    assert same_bits(*(each.rows(0, 3).prefill([3], [10], [[1]], 64, num_fold=[1]) for each in (far, case)))
    assert same_bits(far.pools.memory[-len(case.pools.memory) :], case.pools.memory)


def test_the_null_slots_blocks_are_never_used() -> None:
    case = windows(6)
    ours = replace(case.copy(), pools=without_null_blocks(copied(case.pools)))
    step = ([2, 2, 2], [0, 3, 7], [0, 3, 0], [2, 0, 4], [0, 0, 5], [0, 1, 3])
    assert same_bits(ours.verify(*step), case.verify(*step))
    assert same_bits(ours.pools.memory, case.pools.memory)


@pytest.mark.gpu
def test_a_graph_replayed_with_other_windows_equals_eager() -> None:
    """Rows, their lengths and the number of those that are padding change; the graph has the most of each."""
    N, window = 5, 4
    case = windows(N * window, 32, 128, S=12, dtype=torch.bfloat16)
    for slot in range(1, 12):
        lag(case, slot, 9, 2)
    steps = [
        ([4, 4, 4, 4, 4], [1, 2, 3, 0, 5], [1, 2, 4, 6, 5], [0, 0, 0, 0, 7], [2, 1, 0, 0, 2]),
        ([4, 1, 3, 0, 0], [5, 0, 8, 0, 0], [5, 2, 9, 0, 0], [0, 0, 10, 0, 0], [1, 0, 2, 0, 0]),
        ([0] * 5, [0] * 5, [0] * 5, [0] * 5, [0] * 5),
    ]
    captured = case.copy()
    ints = torch.zeros(5, N + 1, dtype=torch.int32, device=DEVICE)
    position = torch.full((N,), 9, device=DEVICE)
    rows = WindowRows(ints[0], position, *(ints[index, :N] for index in range(1, 5)))
    out = case.x.qkv.new_empty(N * window, 32 * 128)

    def step() -> None:
        captured.kernels.kda_verify(captured.x, captured.weights, captured.pools, rows, out)

    step()  # compiles; all rows are padding
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for lengths, *slots in steps:
        rows.cu_seqlens.copy_(torch.tensor([0, *lengths]).cumsum(0))
        for row, values in zip((rows.read_slot, rows.write_slot, rows.second_slot, rows.num_fold), slots, strict=True):
            row.copy_(torch.tensor(values))
        out.fill_(float("nan"))
        graph.replay()
        read, write, second, num_fold = slots
        expected = case.verify(lengths, [9] * N, read, write, second, num_fold)
        assert same_bits(out, expected)
        assert same_bits(captured.pools.memory, case.pools.memory)


def test_a_step_without_rows_clears_its_tokens() -> None:
    check_no_rows(windows)
    check_no_sequence(windows(3))


def test_windows_of_other_slots_do_not_matter() -> None:
    check_alone(windows)


@pytest.mark.parametrize(
    ("D", "rows", "columns", "pieces"),
    [(64, 16, 64, 2), (64, 32, 16, 4), (64, 16, 32, 4), (64, 64, 64, 1), (128, 64, 32, 2)],
)
def test_any_launch_parameters_match_the_spec(D: int, rows: int, columns: int, pieces: int) -> None:
    case = windows(6, D=D, windows_config=launch.Windows(rows, columns, 4), pieces=pieces, R=8)
    lag(case, 1, 62, 2)
    check_verify(case, [4, 2], [62, 0], [1, 0], [1, 4], [2, 0], [2, 0])
