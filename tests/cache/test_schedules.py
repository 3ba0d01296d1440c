"""Random schedules through vLLM's scheduler and our manager: a worker of hashes reads the right prefix everywhere.

As on a CPU, step by step for vLLM's first model runner, and as on a GPU, with two steps in flight for the second.
Everything is scarce. A case is two rounds of a few requests on a new scheduler, so that a failure can be repeated.
"""

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from support.arrivals import BLOCK, rounds
from support.hash_worker import answer
from support.schedules import MODES, SCARCE

CASES = 40  # each of eight, so 320
PATHS = {
    "blocks": {"evictions", "page_evictions"},
    "host": {"evictions", "swaps_out", "swaps_in"},
    "few-blocks": {"evictions", "page_evictions", "preemptions"},
    "lru-host-priority": {"evictions", "swaps_out", "swaps_in", "preemptions"},
}
ALWAYS = {"hits", "aborts", "pages to states", "states to pages"}


@pytest.fixture(params=["step-by-step", "two-in-flight"])
def make_server(request):
    """A server by name, as on a CPU or as on a GPU."""
    return MODES[request.param].server


def run_cases(make_server, **options):
    """Play random schedules; what was seen of what they are to show."""
    seen = Counter()

    @settings(
        max_examples=CASES, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow], **options
    )
    @given(rounds=rounds, reset_between=st.booleans(), stretch=st.sampled_from([1, 4]))
    def cases(rounds, reset_between, stretch):
        server = make_server()
        for number, drawn in enumerate(rounds):
            # Answers of up to three blocks: more than those who run may count on.
            schedule = [replace(arrival, max_tokens=stretch * arrival.max_tokens) for arrival in drawn]
            if number and reset_between:
                assert server.scheduler.reset_prefix_cache()
            server.play(schedule)
            server.check_idle()
            for index, arrival in enumerate(schedule):
                ours = server.answers[str(index)]
                assert ours == answer(arrival.prompt, len(ours))
                if str(index) in server.reasons:
                    assert len(ours) == arrival.max_tokens
                else:
                    assert arrival.abort_after is not None
        seen.update(cases=1, page_evictions=server.scheduler.arena.page_evictions)
        for counts in (server.seen, server.manager.block_pool.counts, server.worker.conversions):
            seen.update(counts)

    cases()
    return seen


@pytest.mark.parametrize("name", SCARCE)
def test_every_request_reads_its_own_prefix_and_leaves_nothing_behind(name, make_server):
    seen = run_cases(lambda: make_server(name))
    assert seen["cases"] >= CASES
    assert {path for path in PATHS[name] | ALWAYS if not seen[path]} == set(), seen


def hits_at_once(manager, original):
    def change(*args, **kwargs):
        manager._unsettled.clear()
        return original(*args, **kwargs)

    return change


def dropped_too_early(manager, original):
    return lambda name, computed, *rest: original(name, computed + BLOCK, *rest)


def forgotten(manager, original):
    return lambda name: original(name)[1:]


@pytest.mark.parametrize(
    ("method", "change", "message"),
    [
        ("get_num_blocks_to_allocate", hits_at_once, "is another prefix's"),
        ("remove_skipped_blocks", dropped_too_early, "write slot . at once"),
        ("pop_blocks_for_free", forgotten, "slots are held"),
    ],
)
def test_a_manager_that_errs_is_caught(method, change, message, make_server):
    def broken():
        server = make_server("blocks")
        setattr(server.manager, method, change(server.manager, getattr(server.manager, method)))
        return server

    with pytest.raises(AssertionError, match=message):
        run_cases(broken, phases=[Phase.generate])
