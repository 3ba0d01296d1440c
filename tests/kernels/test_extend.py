"""Prefills of few tokens, which run token by token in one launch, against the spec and against the chunked form."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from kda_case import check_prefill, copied, relative_error, same_bits
from triton_case import (
    DTYPES,
    HEAD_IDS,
    HEADS,
    PIECES,
    POOL_DTYPES,
    far_away,
    tolerance_of,
    triton_case,
    without_null_blocks,
)

from kimi_vllm.kernels.cuda import launch

pytestmark = pytest.mark.triton

MOST = launch.EXTEND_TOKENS


@pytest.mark.parametrize("T", [1, 2, MOST], ids="T{}".format)
@pytest.mark.parametrize(("H", "D"), HEADS, ids=HEAD_IDS)
def test_fresh_sequence(H: int, D: int, T: int) -> None:
    check_prefill(triton_case(T, H, D), [T], [0], [[3]])


@pytest.mark.parametrize("W", [2, 4, 8], ids="W{}".format)
def test_across_a_boundary_with_history(W: int) -> None:
    case = triton_case(MOST, W=W)
    case.fill(2, 61)
    # The state at token 64 goes to slot 3, the last one over the slot that was read.
    check_prefill(case, [MOST], [61], [[2, 2]], 64)
    check_prefill(case, [MOST], [61], [[2, 3]], 64)


def test_mixed_sequences() -> None:
    case = triton_case(MOST, 1)
    case.fill(1, 64)
    case.fill(2, 7)
    check_prefill(case, [2, 0, 1, 1], [64, 0, 7, 0], [[1, 4], [6, 6], [2, 6], [5, 6]], 64)  # the rest is nobody's


@pytest.mark.parametrize("state_dtype", DTYPES)
def test_dtypes(state_dtype: str) -> None:
    case = triton_case(MOST, 1, dtype=torch.bfloat16, state_dtype=DTYPES[state_dtype])
    case.fill(1, 60)
    check_prefill(case, [MOST], [60], [[1, 2]], 64, tolerance_of(case.dtype, case.state_dtype))


@PIECES
@POOL_DTYPES
def test_heads_in_pieces(state_dtype: torch.dtype, conv_dtype: torch.dtype, pieces: int) -> None:
    case = triton_case(
        MOST, 1, 64, R=4, dtype=conv_dtype, state_dtype=state_dtype, conv_dtype=conv_dtype, pieces=pieces
    )
    case.fill(1, 62)
    check_prefill(case, [MOST], [62], [[1, 2]], 64, tolerance_of(case.dtype, state_dtype))


def test_blocks_beyond_two_to_the_31_steps() -> None:
    case = triton_case(MOST, 1)
    case.fill(1, 62)
    far = replace(case, pools=far_away(case.pools))
    assert same_bits(far.prefill([MOST], [62], [[1, 2]], 64), case.prefill([MOST], [62], [[1, 2]], 64))
    assert same_bits(far.pools.memory[-len(case.pools.memory) :], case.pools.memory)


def test_the_null_slots_blocks_are_never_used() -> None:
    case = triton_case(MOST, 1)
    ours = replace(case.copy(), pools=without_null_blocks(copied(case.pools)))
    step = ([1, 2], [0, 64], [[2, 0], [0, 3]], 64)
    assert same_bits(ours.prefill(*step), case.prefill(*step))
    assert same_bits(ours.pools.memory, case.pools.memory)


def test_chunked_form_agrees() -> None:
    case = triton_case(MOST, 2)
    case.fill(1, 30)
    short, chunked = case.copy(), replace(case.copy(), kernels=triton_case(MOST, 2, exact=True).kernels)
    expected = chunked.prefill([MOST], [30], [[1]])
    assert relative_error(short.prefill([MOST], [30], [[1]]), expected) <= 1e-5
    assert relative_error(short.state[1], chunked.state[1]) <= 1e-5
