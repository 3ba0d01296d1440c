"""Windows on CPUs: against the spec in float64, and bit by bit against decoding of the tokens that count alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kda_case import Case, relative_error
from sick_case import SICK_INPUTS
from window_case import (
    check_alone,
    check_decoding,
    check_lagging_checkpoint,
    check_no_rows,
    check_sick_token,
    check_verify,
    check_windows,
    lag,
    ring,
)


def window_case(T: int, H: int = 2, D: int = 64, window: int = 4, **options: Any) -> Case:
    """Return a case whose pools hold records; none of any slot is valid yet."""
    return Case(T, H, D, R=ring(window, options.get("W", 4)), window=window, **options)


@pytest.mark.parametrize("pieces", [1, 2], ids="pieces{}".format)
@pytest.mark.parametrize("window", [2, 3, 4, 6, 16], ids="window{}".format)
@pytest.mark.parametrize(("H", "D"), [(1, 64), (3, 128)], ids=["H1-D64", "H3-D128"])
def test_windows_match_the_spec(H: int, D: int, window: int, pieces: int) -> None:
    check_windows(window_case, H, D, window, pieces=pieces)


@pytest.mark.parametrize("width", [2, 3, 8], ids="W{}".format)
def test_other_convolution_widths(width: int) -> None:
    case = window_case(7, window=4, W=width)
    lag(case, 1, 9, 2)
    check_verify(case, [4, 3], [9, 0], [1, 0], [1, 2], [0, 3], [2, 0])


@settings(max_examples=12, deadline=None)
@given(
    accepted=st.lists(st.integers(1, 4), min_size=1, max_size=6),
    start=st.integers(1, 70),
    block=st.sampled_from([4, 16, 64]),
    pieces=st.sampled_from([1, 2]),
    W=st.sampled_from([2, 4, 7]),
)
def test_what_counts_equals_decoding_bit_by_bit(
    accepted: list[int], start: int, block: int, pieces: int, W: int
) -> None:
    check_decoding(window_case, accepted, start, block, pieces=pieces, W=W)


def test_a_checkpoint_lags_and_forks() -> None:
    check_lagging_checkpoint(window_case)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_low_precision_activations_cost_no_more_than_their_own_rounding(dtype: torch.dtype) -> None:
    case = window_case(8, 2, 128, 4, dtype=dtype)
    lag(case, 1, 9, 3)
    arguments = [4, 4], [9, 0], [1, 0], [1, 2], [0, 0], [3, 0]
    gold = case.copy(torch.float64).verify(*arguments, spec=True)
    reference_error = relative_error(case.copy().verify(*arguments, spec=True), gold)
    assert relative_error(case.copy().verify(*arguments), gold) <= 2 * reference_error


@pytest.mark.parametrize("sick", SICK_INPUTS)
def test_the_first_sick_token_is_told(sick: str) -> None:
    check_sick_token(window_case, sick)


def test_a_slot_outside_the_pools_is_refused() -> None:
    case = window_case(4)
    with pytest.raises(IndexError, match="not among the 8"):
        case.verify([4], [0], [0], [8], [0], [0])


def test_a_step_without_rows_clears_its_tokens() -> None:
    check_no_rows(window_case)


def test_windows_of_other_slots_do_not_matter() -> None:
    check_alone(window_case)
