"""Steps with a NaN somewhere: which slots the kernels and the spec say are not finite."""

from __future__ import annotations

from kda_case import Case

SICK_INPUTS = ("q", "k", "v", "gate", "beta", "out_gate", "state")
"""Where `poison` may put a NaN."""


def poison(case: Case, sick: str, token: int, slot: int) -> None:
    """Put a NaN into one channel of a token's input, or of a slot's state; of the last head, so that all must look."""
    head = case.H - 1
    channel = head * case.D + 5
    nan = float("nan")
    if sick == "state":
        state, _ = case.pools.load(slot)
        state[head, 7, 5] = nan
        case.pools.store(slot, state)
    elif sick in ("q", "k", "v"):
        case.x.qkv[token, "qkv".index(sick) * case.H * case.D + channel] = nan
    else:
        getattr(case.x, sick)[token, head if sick == "beta" else channel] = nan


def check_decode_flags(case: Case, sick: str) -> None:
    """Step five rows, one of them sick, a fork; by kernel and spec only its write slot must be flagged."""
    for slot in (1, 2, 3):
        case.fill(slot, 9)
    poison(case, sick, 1, 2)
    for spec in (True, False):
        flags = case.flags()
        flags[7] = 5  # somebody's, and never cleared
        case.copy().decode([1, 2, 0, 3, 1], [1, 4, 5, 3, 0], [9, 9, 0, 9, 9], spec=spec, nonfinite=flags)
        assert flags.flatten().tolist() == [0, 0, 0, 0, int(sick != "out_gate"), 0, 0, 5], f"spec={spec}"


def check_prefill_flags(case: Case, sick: str) -> None:
    """Run two tokens of one sequence, and six of one that is sick after a boundary: only its end must be flagged."""
    for slot in (1, 2):
        case.fill(slot, 60)
    poison(case, sick, 7, 2)
    early = int(sick == "state")  # which is sick from the first token on
    late = int(sick != "out_gate")
    for spec in (True, False):
        flags = case.flags()
        flags[7] = 5
        case.copy().prefill([2, 6], [60, 60], [[1, 0], [2, 6]], 64, spec=spec, nonfinite=flags)
        assert flags.flatten().tolist() == [0, 0, early, 0, 0, 0, late, 5], f"spec={spec}"
