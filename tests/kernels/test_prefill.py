"""The Triton prefill kernels against the spec in float64; in Triton's interpreter where there is no CUDA device."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from kda_case import (
    TOLERANCE,
    Tolerance,
    check_no_sequence,
    check_prefill,
    copied,
    prefill_rows,
    relative_error,
    same_bits,
)
from sick_case import SICK_INPUTS, check_prefill_flags
from triton_case import (
    DEVICE,
    DTYPES,
    EXTREME_GATES,
    LOOSE,
    ON_GPU,
    PIECES,
    POOL_DTYPES,
    compiled_kernels,
    far_away,
    tolerance_of,
    triton_case,
    without_null_blocks,
)

from kimi_vllm.kernels.cuda import launch, prefill

pytestmark = pytest.mark.triton

BLOCK = 64
LENGTHS = (1, 3, 15, 16, 17, 63, 64, 65, 129, 200)
SMALL = [*(pytest.param(1, 64, T, id=f"H1-D64-T{T}") for T in LENGTHS), pytest.param(2, 128, 17, id="H2-D128-T17")]
LARGE = [pytest.param(32, 128, T, marks=ON_GPU, id=f"H32-D128-T{T}") for T in (*LENGTHS, 1000)]
FORMS = {"exact": True, "fast": False}
FAST = Tolerance(out=2e-4, state=2e-4) if DEVICE == "cpu" else LOOSE
"""On CPU tensors the fast form's operands are float32; on CUDA they are bfloat16."""


@pytest.mark.parametrize(("H", "D", "T"), [*SMALL, *LARGE])
def test_exact_form_matches_spec(H: int, D: int, T: int) -> None:
    check_prefill(triton_case(T, H, D, exact=True), [T], [0], [[3]])


@pytest.mark.parametrize(("H", "D", "T"), [*SMALL[1:-1:3], *LARGE])
def test_fast_form_matches_spec(H: int, D: int, T: int) -> None:
    check_prefill(triton_case(T, H, D, exact=False), [T], [0], [[3]], tolerance=FAST)


@pytest.mark.parametrize("W", [2, 3, 8], ids="W{}".format)
def test_other_convolution_widths(W: int) -> None:
    case = triton_case(11, 1, W=W)
    case.fill(1, 5)
    check_prefill(case, [2, 9], [5, 0], [[1], [2]])


@pytest.mark.parametrize("T", [1, 4, 5, 130])
@pytest.mark.parametrize("form", [*FORMS, None])
def test_no_sequence(form: str | None, T: int) -> None:
    check_no_sequence(triton_case(T, 1, exact=FORMS.get(form)))


def test_exact_form_among_gates_that_forget_everything() -> None:
    case = triton_case(64, 1, A=16.0, exact=True)
    gate = case.x.gate
    gate[:] = torch.where(torch.arange(gate.numel(), device=gate.device).view_as(gate) * 7 % 61 < 8, 100.0, -8.0)
    check_prefill(case, [64], [0], [[3]])


def test_mixed_sequences() -> None:
    case = triton_case(125, 1, S=12)
    case.fill(1, 64)
    case.fill(2, 93)
    case.fill(10, 7)
    # A resumed sequence, an empty one, a fresh token, one across a boundary, a fresh one, a token after seven.
    lengths, context = [16, 0, 1, 65, 37, 1], [64, 0, 0, 93, 0, 7]
    table = [[1, 4, 9], [9, 9, 9], [5, 9, 9], [9, 2, 6], [8, 9, 9], [10, 9, 9]]
    check_prefill(case, lengths, context, table, BLOCK)  # tokens 120 to 124 belong to nobody


@pytest.mark.parametrize("form", FORMS)
def test_groups_of_sequences_one_after_another(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill, "_GROUP", 4)
    monkeypatch.setattr(prefill, "_CHUNKS", 1)  # so there are groups of four and of three
    case = triton_case(185, 1, D=64, S=12, exact=FORMS[form])
    case.fill(1, 64)
    case.fill(2, 93)
    case.fill(10, 7)
    lengths, context = [16, 0, 1, 65, 37, 1, 60], [64, 0, 0, 93, 0, 7, 0]
    table = [[1, 4, 9], [9, 9, 9], [5, 9, 9], [9, 2, 6], [8, 9, 9], [10, 9, 9], [11, 9, 9]]
    check_prefill(case, lengths, context, table, BLOCK, None if FORMS[form] else FAST)  # the last 5 are nobody's


@pytest.mark.parametrize(
    ("T", "N", "group"),
    [(8192, 256, 32), (8192, 8, 8), (1024, 64, 64), (1024, 256, 88), (4096, 256, 64), (100_000, 40, 20), (5, 5, 5)],
)
def test_groups_are_as_large_as_the_workspace_allows(T: int, N: int, group: int) -> None:
    assert prefill.sequences_at_once(T, N) == group


def test_no_smaller_step_takes_a_larger_workspace() -> None:
    sizes = {(T, N): prefill.workspace_chunks(T, N) for T in range(1, 17_000, 199) for N in range(1, min(T, 300) + 1)}
    for (T, N), chunks in sizes.items():
        assert chunks >= (T + 126 * prefill.sequences_at_once(T, N)) // 64
        assert chunks >= sizes.get((T, N - 1), 0)
        assert chunks >= sizes.get((T - 199, N), 0)


@pytest.mark.parametrize("lengths", [[66, 66, 0, 0], [0, 0, 66, 66]], ids=str)
def test_a_group_that_uses_every_chunk(lengths: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill, "sequences_at_once", lambda T, N: 2)
    monkeypatch.setattr(prefill, "workspace_chunks", lambda T, N: (T + 126 * 2) // 64)
    case = triton_case(132, 1, D=64, S=10)
    context, table = [0] * 4, [[0, 0, 0] for _ in range(4)]
    for n, length in enumerate(lengths):
        if length:
            case.fill(n + 1, 63)
            context[n], table[n] = 63, [n + 1, 5 + n, 5 + n]
    check_prefill(case, lengths, context, table, BLOCK)


@pytest.mark.parametrize("state_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(dtype: str, state_dtype: str) -> None:
    case = triton_case(20, 1, dtype=DTYPES[dtype], state_dtype=DTYPES[state_dtype])
    case.fill(1, 64)
    tolerance = tolerance_of(case.dtype, case.state_dtype)
    if dtype == "bf16" and DEVICE == "cpu":
        tolerance = replace(tolerance, out=7e-3, state=7e-3)  # the interpreter cuts off where it should round
    check_prefill(case, [20], [64], [[1, 2]], BLOCK, tolerance)


@PIECES
@POOL_DTYPES
def test_heads_in_pieces(state_dtype: torch.dtype, conv_dtype: torch.dtype, pieces: int) -> None:
    case = triton_case(70, 1, 64, R=4, dtype=conv_dtype, state_dtype=state_dtype, conv_dtype=conv_dtype, pieces=pieces)
    case.fill(1, 62)
    tolerance = tolerance_of(case.dtype, state_dtype)
    if conv_dtype == torch.bfloat16 and DEVICE == "cpu":
        tolerance = replace(tolerance, out=7e-3, state=7e-3)  # the interpreter cuts off where it should round
    # States at tokens 64 and 128 and at the end; the history of the first comes from the ring, but for two tokens.
    check_prefill(case, [70], [62], [[1, 2, 3]], BLOCK, tolerance)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("gates", "D", "T"), [*((gates, 64, 65) for gates in EXTREME_GATES), ("fast", 128, 33)])
def test_extreme_gates(gates: str, D: int, T: int, form: str) -> None:
    A, gate_mean = EXTREME_GATES[gates]
    case = triton_case(T, 1, D, A=A, gate_mean=gate_mean, exact=FORMS[form])
    case.fill(1, 4)
    check_prefill(case, [T], [4], [[1]], tolerance=None if FORMS[form] else LOOSE)


@pytest.mark.parametrize("form", FORMS)
def test_correlated_keys(form: str) -> None:
    case = triton_case(65, 1, 128, exact=FORMS[form])
    keys = case.x.qkv[:, 128:256]
    keys.copy_(0.9 * case.random(1, 128).to(DEVICE) + (1 - 0.9**2) ** 0.5 * keys)
    case.x.beta.fill_(2.944)  # its sigmoid is 0.95
    check_prefill(case, [65], [0], [[1]], tolerance=None if FORMS[form] else LOOSE)


@pytest.mark.parametrize("n", [1, 16, 64, 65], ids="n{}".format)
def test_prefill_then_decode_equals_one_prefill(n: int) -> None:
    case = triton_case(n + 4, 1)
    whole, pieces = case.copy(), case.copy()
    expected = whole.prefill([n + 4], [0], [[1]])
    out = [pieces.rows(0, n).prefill([n], [0], [[2]])]
    out += [pieces.rows(t, t + 1).decode([2], [2], [t]) for t in range(n, n + 4)]
    assert relative_error(torch.cat(out), expected) <= TOLERANCE
    assert relative_error(pieces.state[2], whole.state[1]) <= TOLERANCE


@pytest.mark.parametrize(
    "cuts",
    [[1, 63, 65, 99], *(pytest.param(cuts, marks=ON_GPU) for cuts in ([64], [5, 70], [2, 3, 127, 128, 129]))],
    ids=str,
)
def test_chunked_prefill_in_odd_pieces_equals_one_shot(cuts: list[int]) -> None:
    case = triton_case(130, 1, S=3)
    whole, pieces = case.copy(), case.copy()
    expected = whole.prefill([130], [0], [[1]])
    bounds = [0, *cuts, 130]
    out = [pieces.rows(a, b).prefill([b - a], [a], [[2, 2, 2]], BLOCK) for a, b in itertools.pairwise(bounds)]
    assert relative_error(torch.cat(out), expected) <= TOLERANCE
    assert relative_error(pieces.state[2], whole.state[1]) <= TOLERANCE
    assert torch.equal(pieces.history(2, 130), whole.history(1, 130))


def test_an_export_is_the_state_of_a_shorter_prefill() -> None:
    # Two boundaries in one prefill: `test_a_slot_named_twice_keeps_the_later_state`.
    case = triton_case(70, 1, S=6)
    exporting, continued, shorter = case.copy(), case.copy(), case.rows(0, 64).copy()
    out = exporting.prefill([70], [0], [[1, 3]], BLOCK)
    shorter.prefill([64], [0], [[4]])
    assert relative_error(exporting.state[1], shorter.state[4]) <= TOLERANCE
    assert torch.equal(exporting.history(1, 64), shorter.history(4, 64))
    assert same_bits(continued.prefill([70], [0], [[0, 5]], BLOCK), out)
    assert same_bits(continued.state[5], exporting.state[3])
    resumed = exporting.rows(64, 70)
    assert relative_error(resumed.prefill([6], [64], [[1, 4]], BLOCK), out[64:]) <= TOLERANCE
    assert relative_error(exporting.state[4], exporting.state[3]) <= TOLERANCE


def test_blocks_of_several_chunks() -> None:
    case = triton_case(150, 1)
    case.fill(1, 100)
    check_prefill(case, [150], [100], [[1, 2]], 128)


def test_a_slot_named_twice_keeps_the_later_state() -> None:
    check_prefill(triton_case(130, 1), [130], [0], [[1, 2, 1]], BLOCK)


def test_stale_table_entries_are_never_used() -> None:
    case = triton_case(10, 1)
    case.fill(1, 80)
    garbage = -(2**31)
    check_prefill(case, [10], [80], [[garbage, 1, garbage, 2**31 - 1]], BLOCK)


@pytest.mark.parametrize("target", [1, 2], ids=["in-place", "elsewhere"])
def test_a_sequence_may_overwrite_what_it_read(target: int) -> None:
    case = triton_case(70, 1)
    case.fill(1, 64)
    check_prefill(case, [70], [64], [[1, 0, target]], BLOCK)


def test_a_context_in_the_null_slot_is_a_zero_state() -> None:
    check_prefill(triton_case(20, 1), [20], [64], [[0, 1]], BLOCK)


def test_sequences_without_slots_still_produce_output() -> None:
    check_prefill(triton_case(20, 1), [20], [0], [[0]], BLOCK)


def test_a_slot_outside_the_pools_or_the_table_counts_as_none() -> None:
    case = triton_case(9, 1)
    ours, flags = case.copy(), case.flags()
    expected = case.copy().prefill([4, 5], [64, 0], [[0, 0], [0, 0]], BLOCK)
    for table in ([[-1, 8], [2**31 - 1, 1]], [[8, -1], [-(2**31), 1]], [[0], [0]]):
        assert torch.equal(ours.prefill([4, 5], [64, 0], table, BLOCK, nonfinite=flags), expected)
    assert same_bits(ours.state, case.state)
    assert same_bits(ours.conv, case.conv)
    assert not flags.any()


def test_blocks_beyond_two_to_the_31_steps() -> None:
    case = triton_case(9, 1)
    case.fill(1, 62)
    far = replace(case, pools=far_away(case.pools))
    assert same_bits(far.prefill([9], [62], [[1, 2]], BLOCK), case.prefill([9], [62], [[1, 2]], BLOCK))
    assert same_bits(far.pools.memory[-len(case.pools.memory) :], case.pools.memory)


def test_the_null_slots_blocks_are_never_used() -> None:
    case = triton_case(9, 1)
    ours = replace(case.copy(), pools=without_null_blocks(copied(case.pools)))
    step = ([4, 5], [0, 64], [[2, 0], [0, 3]], BLOCK)
    assert same_bits(ours.prefill(*step), case.prefill(*step))
    assert same_bits(ours.pools.memory, case.pools.memory)


def test_empty_steps_do_nothing() -> None:
    assert triton_case(0).prefill([], [], []).shape == (0, 128)
    out = triton_case(3).prefill([0], [0], [[1]])
    assert torch.equal(out, torch.zeros_like(out))


def test_a_block_that_ends_inside_a_chunk_is_refused() -> None:
    with pytest.raises(ValueError, match=r"block_size is 96; .* multiple of 64: set --block-size"):
        triton_case(1).prefill([1], [0], [[1]], 96)


@pytest.mark.parametrize(
    ("D", "value_block", "form", "pieces"),
    [
        (64, 32, "exact", 2),
        (128, 32, "exact", 1),
        (128, 32, "exact", 2),
        (128, 64, "exact", 4),
        (128, 128, "exact", 2),
        (128, 64, "fast", 2),
        (128, 128, "fast", 4),
    ],
)
def test_heads_split_or_whole_match_spec(D: int, value_block: int, form: str, pieces: int) -> None:
    # One stage: a whole head of 128 channels leaves shared memory for no more.
    config = replace(launch.prefill(1, D, FORMS[form]), value_block=value_block, inter_stages=1)
    case = triton_case(20, 1, D, exact=FORMS[form], prefill_config=config, pieces=pieces)
    case.fill(1, 64)
    # With a token that belongs to nobody: the norm of its own must leave zeros.
    check_prefill(case, [8, 11], [64, 0], [[1, 2], [3, 0]], BLOCK, None if FORMS[form] else FAST)


@pytest.mark.parametrize(
    ("form", "sick"),
    [
        *(("short", sick) for sick in SICK_INPUTS),
        # k and beta come to the state by the way of v, and these are slow in the interpreter.
        *(pytest.param("exact", sick, marks=[ON_GPU] * (sick in ("k", "beta"))) for sick in SICK_INPUTS),
        ("fast", "gate"),  # whose bound must not hide a NaN
        ("fast", "q"),
    ],
)
def test_a_sick_sequence_is_flagged_from_its_sick_token_on(form: str, sick: str) -> None:
    check_prefill_flags(triton_case(8, 1, exact=FORMS.get(form)), sick)


@pytest.mark.parametrize("form", FORMS)
def test_a_sick_sequence_leaves_the_others_alone(form: str) -> None:
    case = triton_case(20, 1, exact=FORMS[form])
    healthy = case.copy()
    expected = healthy.prefill([10, 10], [0, 0], [[1], [2]])
    for name in ("qkv", "gate", "beta", "out_gate"):
        getattr(case.x, name)[3] = float("nan")
    out = case.prefill([10, 10], [0, 0], [[1], [2]])
    assert out[3].isnan().all()
    assert torch.equal(out[10:], expected[10:])
    assert torch.equal(case.state[2], healthy.state[2])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("N", [1, 3], ids="N{}".format)
def test_long_sequences_of_a_whole_layer(N: int, dtype: torch.dtype) -> None:
    case = triton_case(1000, 32, 128, dtype=dtype, S=12)
    case.fill(1, 640)
    lengths, context = {1: ([1000], [640]), 3: ([700, 1, 299], [640, 0, 0])}[N]
    table = [[0] * 9 + [1, 2, 0, 3] + [0] * 6 + [4] + [0] * 5 + [5], [6] * 26, [0, 7, 0, 0, 8] * 5 + [0]][:N]
    check_prefill(case, lengths, context, table, BLOCK, None if dtype == torch.float32 else LOOSE)


@pytest.mark.gpu
def test_a_graph_replayed_with_other_slots_equals_eager() -> None:
    T = 150
    case = triton_case(T, 32, 128, dtype=torch.bfloat16, S=8)
    for slot in (1, 2, 3):
        case.fill(slot, 64)
    steps = [([0, 100, 150], [64, 0], [[1, 4, 5], [6, 0, 0]]), ([0, 7, 140], [64, 64], [[2, 2, 0], [3, 0, 7]])]
    captured = case.copy()
    rows = prefill_rows([0, 0], [0, 0], [[0, 0, 0]] * 2, BLOCK, DEVICE)
    # Rows as far apart as the case's own: other strides may be loaded, and so summed up, in another order.
    out = case.x.qkv.new_empty(T, 32 * 128 + 3)[:, :-3]

    def step() -> None:
        captured.kernels.kda_prefill(captured.x, captured.weights, captured.pools, rows, out)

    step()  # compiles; all rows belong to nobody
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for new_bounds, new_context, new_table in steps:
        rows.cu_seqlens.copy_(torch.tensor(new_bounds))
        rows.context_len.copy_(torch.tensor(new_context))
        rows.slot_table.copy_(torch.tensor(new_table))
        out.fill_(float("nan"))
        graph.replay()
        lengths = [b - a for a, b in itertools.pairwise(new_bounds)]
        assert same_bits(out, case.prefill(lengths, new_context, new_table, BLOCK))
        assert same_bits(captured.state, case.state)
        assert same_bits(captured.conv, case.conv)


@pytest.mark.gpu
def test_nothing_is_compiled_after_warm_up() -> None:
    # As in the layer: rows of the merged projection start at multiples of 16 elements, the step anywhere among them.
    case = triton_case(600, 32, 128, dtype=torch.bfloat16, filling=96)
    for T in (launch.EXTEND_TOKENS, launch.EXTEND_TOKENS + 1):
        for N in (1, 3):  # heads are split for one sequence and whole for three
            case.rows(0, T).prefill([T] + [0] * (N - 1), [0] * N, [[0] * 5] * N, BLOCK)
    before = compiled_kernels()
    assert before > 0
    for T in range(1, 301):
        N = 1 + T % 5
        lengths = [T - (N - 1) * (T // N)] + [T // N] * (N - 1)
        table = [[1 + n] * (5 + T % 3) for n in range(N)]
        case.rows(T, 2 * T).prefill(lengths, [0] * N, table, BLOCK)
    assert compiled_kernels() == before
