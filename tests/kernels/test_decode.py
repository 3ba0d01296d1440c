"""The Triton decode kernel against the spec in float64; in Triton's interpreter where there is no CUDA device."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from kda_case import TOLERANCE, Case, check_decode, copied, decode_rows, relative_error, same_bits
from sick_case import SICK_INPUTS, check_decode_flags
from triton_case import (
    DEVICE,
    DTYPES,
    EXTREME_GATES,
    HEAD_IDS,
    HEADS,
    ON_GPU,
    PIECES,
    POOL_DTYPES,
    compiled_kernels,
    far_away,
    tolerance_of,
    triton_case,
    without_null_blocks,
)

from kimi_vllm.kernels.cuda import launch
from kimi_vllm.kernels.cuda.math import INTERPRETED

pytestmark = pytest.mark.triton


def walk(case: Case, slot: int = 1, first: int = 0, *, spec: bool = False) -> torch.Tensor:
    """Decode all tokens of the case, one step each, from position `first` on; return their outputs."""
    return torch.cat(
        [case.rows(t, t + 1).decode([slot if first + t else 0], [slot], [first + t], spec=spec) for t in range(case.T)]
    )


@pytest.mark.parametrize("W", [2, 3, 4, 8], ids="W{}".format)
@pytest.mark.parametrize(("H", "D"), HEADS, ids=HEAD_IDS)
def test_decode_matches_spec(H: int, D: int, W: int) -> None:
    case = triton_case(5, H, D, W=W, R=10)
    for slot, position in ((1, 40), (3, 1), (6, 7)):
        case.fill(slot, position)
    # A plain step, a padded row, a fresh sequence, a fork, a second plain step.
    out = check_decode(case, [1, 5, 0, 3, 6], [1, 0, 2, 4, 6], [40, 3, 0, 1, 7])
    assert torch.equal(out[1], torch.zeros_like(out[1]))


@pytest.mark.parametrize("state_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(dtype: str, state_dtype: str) -> None:
    case = triton_case(3, 1, 64, dtype=DTYPES[dtype], state_dtype=DTYPES[state_dtype])
    case.fill(1, 5)
    case.fill(2, 9)
    check_decode(case, [1, 2, 0], [1, 4, 5], [5, 9, 0], tolerance_of(case.dtype, case.state_dtype))


@PIECES
@POOL_DTYPES
def test_heads_in_pieces(state_dtype: torch.dtype, conv_dtype: torch.dtype, pieces: int) -> None:
    case = triton_case(4, 2, 64, R=4, dtype=conv_dtype, state_dtype=state_dtype, conv_dtype=conv_dtype, pieces=pieces)
    for slot, position in ((1, 5), (2, 6), (3, 4), (6, 7)):
        case.fill(slot, position)
    # Tokens of all columns of the ring: a plain step, a fork, a fresh sequence, a fork whose history wraps.
    check_decode(case, [1, 2, 0, 6], [1, 4, 5, 7], [5, 6, 0, 7], tolerance_of(case.dtype, state_dtype))


@pytest.mark.parametrize("N", [1, 3, 33, pytest.param(1000, marks=ON_GPU)], ids="N{}".format)
def test_permuted_slots(N: int) -> None:
    case = triton_case(N, 1, 64, S=N + 2)
    order = torch.randperm(N, generator=case.generator)
    slots = (order + 1).tolist()
    for n, slot in enumerate(slots):
        case.fill(slot, n)
    check_decode(case, slots, slots, list(range(N)))


@pytest.mark.parametrize("gates", EXTREME_GATES)
@pytest.mark.parametrize("D", [64, 128], ids="D{}".format)
def test_extreme_gates(D: int, gates: str) -> None:
    A, gate_mean = EXTREME_GATES[gates]
    case = triton_case(1, 2, D, A=A, gate_mean=gate_mean)
    case.fill(2, 9)
    check_decode(case, [2], [2], [9])


@pytest.mark.parametrize("slot", [-1, 8, 2**31 - 1, -(2**31)])
def test_a_slot_outside_the_pools_is_padding(slot: int) -> None:
    case = triton_case(3)
    case.fill(1, 5)
    ours, flags = case.copy(), case.flags()
    out = ours.decode([1, slot, 1], [1, 2, slot], [5, 5, 5], nonfinite=flags)
    expected = case.copy()
    assert torch.equal(out[:1], expected.rows(0, 1).decode([1], [1], [5]))
    assert torch.equal(out[1:], torch.zeros_like(out[1:]))
    assert same_bits(ours.state, expected.state)
    assert same_bits(ours.conv, expected.conv)
    assert not flags.any()


def test_a_context_in_the_null_slot_is_a_zero_state() -> None:
    check_decode(triton_case(1), [0], [2], [7])


def test_forks_leave_the_parent_alone_and_complete_the_child() -> None:
    case = triton_case(6, 1, 64)
    case.fill(1, 11)
    parent, child = case.copy(), case.copy()
    first = child.rows(0, 1).decode([1], [2], [11])
    assert same_bits(child.state[1], case.state[1])
    assert same_bits(child.conv[1], case.conv[1])
    rest = walk(child.rows(1, 6), slot=2, first=12)
    assert torch.equal(torch.cat([first, rest]), walk(parent, slot=1, first=11))


@pytest.mark.parametrize("R", [4, 5], ids="R{}".format)
def test_ring_wraps(R: int) -> None:
    case = triton_case(2 * R + 1, 1, 64, R=R, pieces=2 if R % 2 == 0 else 1)
    ours, gold = case.copy(), case.copy(torch.float64)
    assert relative_error(walk(ours), gold.prefill([case.T], [0], [[1]], spec=True)) <= TOLERANCE
    positions = range(case.T - 3, case.T)
    for position in positions:
        assert torch.equal(ours.conv[1, position % R], case.x.qkv[position])


def test_fresh_rows_ignore_what_their_slot_held() -> None:
    # Every slot is full of NaN or 1e30 here, also columns of the ring that a fresh sequence has not reached.
    for slot in (1, 2):
        ours = triton_case(4)
        assert torch.isfinite(walk(ours, slot)).all()
        assert torch.isfinite(ours.state[slot]).all()


def test_blocks_beyond_two_to_the_31_steps() -> None:
    case = triton_case(2, 1)
    case.fill(1, 9)
    far = replace(case, pools=far_away(case.pools))
    assert same_bits(far.decode([1, 0], [2, 3], [9, 0]), case.decode([1, 0], [2, 3], [9, 0]))
    assert same_bits(far.pools.memory[-len(case.pools.memory) :], case.pools.memory)


def test_the_null_slots_blocks_are_never_used() -> None:
    case = triton_case(3, 1)
    ours = replace(case.copy(), pools=without_null_blocks(copied(case.pools)))
    step = ([0, 3, 0], [2, 0, 4], [0, 3, 7])
    assert same_bits(ours.decode(*step), case.decode(*step))
    assert same_bits(ours.pools.memory, case.pools.memory)


def test_an_empty_step_does_nothing() -> None:
    assert triton_case(0).decode([], [], []).shape == (0, 128)


@pytest.mark.parametrize("state_dtype", DTYPES)
def test_decode_drifts_no_more_than_the_spec_with_such_states(state_dtype: str) -> None:
    T = 4096 if not INTERPRETED else 64
    case = triton_case(T, 1, 64, W=2, A=1.0, gate_mean=-1.0, state_dtype=DTYPES[state_dtype])
    ours, same, gold = case.copy(), case.copy(), case.copy(torch.float64)
    expected = gold.prefill([T], [0], [[1]], spec=True)
    # The interpreter cuts off what it should round to bfloat16: always towards zero, which adds up.
    factor = 20 if INTERPRETED and state_dtype == "bf16" else 2
    allowed = factor * relative_error(walk(same, spec=True), expected)
    assert relative_error(walk(ours), expected) <= max(allowed, TOLERANCE)
    allowed = factor * relative_error(same.state[1], gold.state[1])
    assert relative_error(ours.state[1], gold.state[1]) <= max(allowed, TOLERANCE)


@pytest.mark.parametrize("N", [9, pytest.param(64, marks=ON_GPU)], ids="N{}".format)
@pytest.mark.parametrize("D", [64, 128], ids="D{}".format)
def test_a_row_does_not_depend_on_the_others(D: int, N: int) -> None:
    case = triton_case(N, 1 if INTERPRETED else 32, D, S=N + 2)
    slots = list(range(1, N + 1))
    for slot in slots:
        case.fill(slot, 5)
    together = case.copy()
    out = together.decode(slots, slots, [5] * N)
    for n in (0, 4, N - 1):
        alone = case.copy()
        assert same_bits(alone.rows(n, n + 1).decode([n + 1], [n + 1], [5])[0], out[n])
        assert same_bits(alone.state[n + 1], together.state[n + 1])


@PIECES
@pytest.mark.parametrize("change", [{"rows": 16}, {"rows": 32, "fold": 1}, {"fold": 4}], ids=["16", "32-1", "4"])
@pytest.mark.parametrize("D", [64, 128], ids="D{}".format)
def test_launch_parameters_do_not_change_the_result(D: int, change: dict[str, int], pieces: int) -> None:
    config = replace(launch.decode(2, D, torch.float32), **change)
    case = triton_case(2, 1, D, decode_config=config, pieces=pieces)
    case.fill(1, 5)
    check_decode(case, [1, 0], [2, 3], [5, 0])


@pytest.mark.parametrize("sick", SICK_INPUTS)
def test_a_sick_row_is_flagged_and_no_other(sick: str) -> None:
    check_decode_flags(triton_case(5, 2, 64), sick)


def test_a_state_too_large_for_its_dtype_is_flagged() -> None:
    case = triton_case(1, 1, 64, state_dtype=torch.float16, A=1.0, gate_mean=-20.0)
    case.fill(1, 5)
    case.pools.store(1, torch.full_like(case.pools.load(1)[0], 65000.0))
    case.x.qkv[0, 128:] = 1e6  # values that the delta rule writes over the state
    for spec in (True, False):
        flags, ours = case.flags(), case.copy()
        ours.decode([1], [1], [5], spec=spec, nonfinite=flags)
        assert not ours.state[1].isfinite().all()
        assert flags.flatten().tolist() == [0, 1, 0, 0, 0, 0, 0, 0], f"spec={spec}"


@pytest.mark.gpu
@pytest.mark.parametrize("state_dtype", DTYPES)
def test_a_graph_replayed_with_other_slots_equals_eager(state_dtype: str) -> None:
    N = 5
    case = triton_case(N, 32, 128, dtype=torch.bfloat16, state_dtype=DTYPES[state_dtype], S=12)
    for slot in range(1, 12):
        case.fill(slot, 5)
    steps = [([1, 2, 3, 0, 5], [1, 2, 4, 6, 0]), ([5, 0, 7, 9, 1], [5, 2, 8, 9, 10]), ([0] * 5, [0] * 5)]
    captured = case.copy()
    rows = decode_rows([0] * N, [0] * N, [0] * N, DEVICE)
    out = case.x.qkv.new_empty(N, 32 * 128)

    def step() -> None:
        captured.kernels.kda_decode(captured.x, captured.weights, captured.pools, rows, out)

    step()  # compiles; all rows are padding
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for reads, writes in steps:
        rows.read_slot.copy_(torch.tensor(reads))
        rows.write_slot.copy_(torch.tensor(writes))
        rows.position.fill_(5)
        out.fill_(float("nan"))
        graph.replay()
        assert same_bits(out, case.decode(reads, writes, [5] * N))
        assert same_bits(captured.state, case.state)
        assert same_bits(captured.conv, case.conv)


@pytest.mark.parametrize("heads", [1, 2, 3, 8, 12, 16, 20, 24, 32, 48, 64])
@pytest.mark.parametrize(
    "choose",
    [
        partial(launch.decode, head_dim=128, state_dtype=torch.float32),
        partial(launch.decode, head_dim=128, state_dtype=torch.bfloat16),
        partial(launch.prefill, head_dim=128, exact=False),
    ],
)
def test_batch_sizes_meet_all_launch_parameters(heads, choose):
    most = 300
    met = {choose(heads * count) for count in launch.batch_sizes(heads, most)}
    assert met == {choose(heads * count) for count in range(1, most + 1)}


@pytest.mark.gpu
def test_nothing_is_compiled_after_warm_up() -> None:
    # As in the layer: rows of the merged projection start at multiples of 16 elements, the step anywhere among them.
    case = triton_case(140, 32, 128, dtype=torch.bfloat16, filling=96, S=71)
    for N in launch.batch_sizes(32, 71):
        case.rows(0, N).decode([0] * N, [0] * N, [0] * N)
    before = compiled_kernels()
    assert before > 0
    for N in range(1, 71):
        slots = list(range(1, N + 1))
        case.rows(N, 2 * N).decode([0] * N, slots, [0] * N)
    assert compiled_kernels() == before
