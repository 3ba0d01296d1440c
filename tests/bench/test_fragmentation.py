"""The counting benchmark: exact fit is the bound, ours is near it, and growth does not preempt more than before."""

from collections import defaultdict

import pytest

from serve.bench.cache import fragmentation
from serve.bench.cache.fragmentation import EXACT, PROVIDERS, Counted, Divided, InTree, Job


@pytest.fixture(scope="module")
def found():
    rows = defaultdict(dict)
    for row in fragmentation.rows(["lognormal", "by-turns", "reasoning", "alike-4096"], 1200, 0):
        rows[row.trace][row.provider] = row
    return rows


def test_ours_runs_almost_what_bytes_allow(found):
    for trace, row in found.items():
        assert row.keys() == PROVIDERS.keys()
        assert 0.98 < row["ours"].of_exact <= 1 == row[EXACT].of_exact, trace
        assert row["ours"].of_exact > max(row["in-tree"].of_exact, row["divided"].of_exact), trace


@pytest.mark.parametrize(("trace", "ticks"), [("lognormal", 3000), ("by-turns", 3000), ("reasoning", 20_000)])
def test_no_more_is_preempted_than_where_memory_is_divided(trace, ticks):
    """Long enough that requests no longer grow in step, as they do when all begin at once."""
    ours, divided = (fragmentation.run(provider, trace, ticks, 0)[2] for provider in ("ours", "divided"))
    assert ours <= divided


def test_what_a_request_takes():
    assert InTree().size(30) == 4
    assert InTree().size(31) == 5
    memory = Counted(20, 5, reserve=1)
    assert memory.admit(0, 3)
    assert not memory.admit(1, 7), "one is left for the growth of the first"
    assert memory.admit(1, 6)
    assert memory.grow(0)
    assert not memory.grow(1)
    memory.release(0)
    assert memory.free == 9


def test_a_divided_memory_runs_out_of_slots():
    memory = Divided()
    assert all(memory.admit(who, 1) for who in range(fragmentation.DIVIDED[0]))
    assert not memory.admit(-1, 1)


def test_who_is_preempted_goes_on_with_what_it_has_written():
    one = fragmentation._Run(Counted(8, 1), iter([Job(63, 200), Job(127, 130), *[Job(10_000, 1)] * 9]))
    for now in range(200):
        one.tick(now)
    assert (one.finished, one.preemptions) == (0, 1)
    one.tick(200)
    assert one.finished == 1
