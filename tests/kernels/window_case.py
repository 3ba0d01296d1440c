"""Steps of windows against the spec, and against plain decoding of the tokens that count: on any kernels."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from kda_case import Case, Tolerance, assert_matches, relative_error, same_bits
from sick_case import poison
from torch import Tensor

from kimi_vllm.kernels.contract import Activations

W = 4

Make = Callable[..., Case]
"""Makes a case of so many tokens, heads and channels whose pools hold records of a window; none is valid yet."""


def ring(window: int, width: int = W) -> int:
    """Return the fewest columns for a window, in two pieces."""
    return (max(width, width - 2 + window) + 1) // 2 * 2


def lag(case: Case, slot: int, position: int, count: int) -> None:
    """Give a slot a state that lags `count` tokens behind `position`, and records of these; the others stay NaN."""
    case.fill(slot, position)
    records = torch.rand(count, case.H, 3, case.D, generator=case.generator).to(case.device)
    case.pools.store_records(slot, records)


def check_verify(case: Case, lengths: list[int], *rows: list[int], tolerance: Tolerance | None = None) -> torch.Tensor:
    """Run a step of windows by kernel and spec on copies; compare everything; return the kernel's output."""
    tolerance = tolerance or Tolerance()
    position, _, write, second, _ = rows
    ours, gold = case.copy(), case.copy(torch.float64)
    flags, expected_flags = case.flags(), case.flags()
    out = ours.verify(lengths, *rows, nonfinite=flags)
    expected = gold.verify(lengths, *rows, spec=True, nonfinite=expected_flags)
    assert tolerance.error(out, expected) <= tolerance.out
    assert torch.equal(flags, expected_flags)
    assert not out[sum(lengths) :].any()
    begins, ends = {}, {}
    for slots in (write, second):
        begins |= dict(zip(slots, position, strict=True))
        ends |= {slot: p + length for slot, p, length in zip(slots, position, lengths, strict=True) if slot and length}
    records = {}
    for slots in (write, second):
        for slot, length in zip(slots, lengths, strict=True):
            if slot and length:
                kept = ours.pools.load_records(slot)
                error = tolerance.error(kept[:length], gold.pools.load_records(slot)[:length])
                assert error <= tolerance.state, f"records of slot {slot}: {error}"
                assert same_bits(kept[length:], case.pools.load_records(slot)[length:]), "a record of no token"
                records[slot] = kept
    before = case.copy()
    for slot, kept in records.items():
        before.pools.store_records(slot, kept)
    # The next window can begin after any token of this one but its first.
    for back in range(case.window):
        positions = {slot: max(begins[slot] + 1, end - back) for slot, end in ends.items()}
        assert_matches(ours, gold, positions, before, tolerance)
    for one, other in zip(write, second, strict=True):
        if one and other:
            assert same_bits(ours.pools.load(one)[0], ours.pools.load(other)[0])
    return out


def decoded(case: Case, start: int, first: int, count: int, slot_of: Any) -> list[torch.Tensor]:
    """Decode `count` tokens from row `first` on, one by one, on this case's pools."""
    outs = []
    for t in range(count):
        at = start + t
        one = case.rows(first + t, first + t + 1)
        outs.append(one.decode([slot_of(at - 1)], [slot_of(at)], [at])[0])
    return outs


def with_rows(case: Case, index: list[int]) -> Case:
    """Return the case with some of its tokens, on the same pools."""
    picked = Activations(*(getattr(case.x, name)[index] for name in ("qkv", "gate", "beta", "out_gate")))
    return replace(case, T=len(index), x=picked)


def check_windows(make: Make, H: int, D: int, window: int, tolerance: Tolerance | None = None, **options: Any) -> None:
    """Six rows: in place; fresh; a fork; one without tokens; one that ends in another block; a padded row."""
    lengths = [window, 1, max(1, window - 1), 0, window, 1]
    case = make(sum(lengths) + 2, H, D, window, S=10, **options)  # two tokens belong to nobody
    lag(case, 1, 37, 1)
    lag(case, 3, 64, window)
    lag(case, 6, 126, window - 1)
    case.fill(8, 3)
    position, read, write = [37, 0, 64, 5, 126, 5], [1, 0, 3, 8, 6, 0], [1, 2, 4, 8, 6, 0]
    second, num_fold = [0, 0, 0, 0, 7, 0], [1, 0, window, 0, window - 1, 0]
    check_verify(case, lengths, position, read, write, second, num_fold, tolerance=tolerance)


def nearly(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors are equal to rounding in float32: in Triton a window's sums have another order."""
    return relative_error(x, y) < 1e-5


Equal = Callable[[Tensor, Tensor], bool]


def check_decoding(
    make: Make,
    accepted: list[int],
    start: int,
    block: int,
    resumed: int = 9,
    equal: Equal = same_bits,
    **options: Any,
) -> None:
    """Windows of four, of each a prefix counts, equal decoding; blocks change inside some; then a prefill resumes."""
    window, first_block = 4, (start - 1) // block
    case = make(64, window=window, S=16, **options)

    def slot_of(at: int) -> int:
        return 1 + at // block - first_block

    case.fill(1, start)
    plain, ours, base = case.copy(), case.copy(), {1: start}
    token, position = 0, start
    for kept in accepted:
        rows = [*range(token, token + kept), *range(40, 40 + window - kept)]
        read, write, last = slot_of(position - 1), slot_of(position), slot_of(position + window - 1)
        second = last if last != write else 0
        out = with_rows(ours, rows).verify([window], [position], [read], [write], [second], [position - base[read]])
        base |= {write: position, last: position}
        expected = decoded(plain, position, token, kept, slot_of)
        assert all(equal(out[t], expected[t]) for t in range(kept)), position
        token, position = token + kept, position + kept
    read, end = slot_of(position - 1), position + resumed
    table = [[0] * (first_block + 1) + [0] * 9]
    table[0][(position - 1) // block] = read
    table[0][(end - 1) // block] = last = slot_of(end - 1)
    outs = [
        case_.rows(token, token + resumed).prefill([resumed], [position], table, block, num_fold=fold)
        for case_, fold in ((plain, None), (ours, [position - base[read]]))
    ]
    assert equal(*outs)
    assert outs[0].isfinite().all()
    assert equal(ours.pools.load(last)[0], plain.pools.load(last)[0])


def check_lagging_checkpoint(make: Make, equal: Equal = same_bits) -> None:
    """A slot left behind inside a window is read by two, a window and a prefill, and stays as it is."""
    case = make(8, window=4, S=6)
    case.fill(1, 62)
    plain = case.copy()
    case.rows(0, 4).verify([4], [62], [1], [1], [2], [0])
    decoded(plain, 62, 0, 2, lambda at: 1)
    kept = case.copy()
    resumed = case.rows(4, 8).verify([4], [64], [1], [3], [0], [2])
    assert equal(resumed[0], plain.copy().rows(4, 5).decode([1], [4], [64])[0])
    prefilled = case.rows(4, 8).prefill([4], [64], [[1, 4]], 64, num_fold=[2])
    assert equal(prefilled, plain.rows(4, 8).prefill([4], [64], [[1, 4]], 64))
    for load in ("load", "load_records"):
        before, after = getattr(kept.pools, load)(1), getattr(case.pools, load)(1)
        pairs = zip(before, after, strict=True) if load == "load" else [(before, after)]
        assert all(same_bits(*pair) for pair in pairs)


def check_sick_token(make: Make, sick: str) -> None:
    """Poison the second row's second token, or its state: its flags are set from there on, in both its slots."""
    case = make(8, window=4, S=8)
    for slot in (1, 2):
        lag(case, slot, 62, 1)
    poison(case, sick, 5, 2)
    for spec in (True, False):
        flags = case.flags()
        flags[7] = 5  # somebody's, and never cleared
        case.copy().verify([4, 4], [62, 62], [1, 2], [1, 2], [0, 3], [1, 1], spec=spec, nonfinite=flags)
        first = None if sick == "out_gate" else int(sick != "state")
        expected = [0 if first is None else int(t >= first) for t in range(4)]
        assert flags.tolist() == [[0] * 4, [0] * 4, expected, expected, *[[0] * 4] * 3, [5] * 4], f"spec={spec}"


def check_no_rows(make: Make) -> None:
    """A step without rows clears its tokens and touches nothing."""
    case = make(3, window=4)
    before = case.copy()
    assert not case.verify([], [], [], [], [], []).any()
    assert same_bits(case.pools.memory, before.pools.memory)


def check_alone(make: Make) -> None:
    """Every window's result is what it is alone."""
    lengths = [1, 4, 3]
    case = make(sum(lengths), window=4, S=8)
    slots = [1, 2, 3]
    for slot in slots:
        lag(case, slot, 20 + slot, slot)
    together = case.copy()
    out = together.verify(lengths, [21, 22, 23], slots, slots, [0] * 3, slots)
    bounds = [0, *itertools.accumulate(lengths)]
    for n, slot in enumerate(slots):
        alone = case.copy().rows(bounds[n], bounds[n + 1])
        expected = alone.verify([lengths[n]], [20 + slot], [slot], [slot], [0], [slot])
        assert same_bits(out[bounds[n] : bounds[n + 1]], expected)
        assert same_bits(together.pools.load_records(slot), alone.pools.load_records(slot))
