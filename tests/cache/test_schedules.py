"""Random schedules through vLLM's scheduler and our manager: a worker of hashes reads the right prefix everywhere.

As on a CPU, step by step for vLLM's first model runner, and as on a GPU, with two steps in flight for the second; and
with drafts, some right and some wrong, in every way that steps are run.
Everything is scarce. A case is two rounds of a few requests on a new scheduler, so that a failure can be repeated.
"""

from collections import Counter
from dataclasses import replace
from functools import partial

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from support.arrivals import BLOCK, Arrival, bursts, rounds
from support.drafter import Drafter
from support.hash_worker import HashWorker
from support.hashes import answer
from support.schedules import DRAFTING, MODES, SCARCE

from kimi_vllm.cache.scheduler import _StateScheduling
from serve.bench.cache import replay

CASES = 28  # each of twenty, so 560
PATHS = {
    "blocks": {"evictions", "page_evictions"},
    "host": {"evictions", "swaps_out", "swaps_in", "page_swaps_out"},
    "host-pages": {"evictions", "swaps_out", "swaps_in", "page_swaps_out", "page_swaps_in"},
    "few-blocks": {"evictions", "page_evictions", "preemptions"},
    "lru-host-priority": {"evictions", "swaps_out", "swaps_in", "page_swaps_out", "preemptions"},
}
ALWAYS = {"hits", "aborts", "pages to states", "states to pages"}
DRAFTED = {"accepted", "rejected", "two slots", "steps_without_drafts"}


@pytest.fixture(params=["step-by-step", "two-in-flight", *DRAFTING])
def mode(request):
    """As on a CPU or as on a GPU."""
    return (MODES | DRAFTING)[request.param]


def run_cases(make_server, times=1, **options):
    """Play random schedules, each so many times on one server; what was seen of what they are to show."""
    seen = Counter()

    @settings(
        max_examples=CASES, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow], **options
    )
    @given(
        rounds=rounds | st.tuples(bursts, bursts),
        reset_between=st.booleans(),
        stretch=st.sampled_from([1, 4]),
        seed=st.integers(0, 2**16),
    )
    def cases(rounds, reset_between, stretch, seed):
        server = make_server(seed=seed)
        for number, drawn in enumerate((*rounds,) * times):
            # Answers of up to three blocks: more than those who run may count on.
            schedule = [replace(arrival, max_tokens=stretch * arrival.max_tokens) for arrival in drawn]
            if number == 1 and reset_between:
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
        for counts in (
            server.seen,
            server.scheduler._counts,
            server.manager.block_pool.counts,
            server.worker.conversions,
            server.worker.seen,
        ):
            seen.update(counts)

    cases()
    return seen


@pytest.mark.parametrize("name", SCARCE)
def test_every_request_reads_its_own_prefix_and_leaves_nothing_behind(name, mode):
    # Pages come back where what was asked for long ago is asked for again.
    seen = run_cases(partial(mode.server, name), times=3 if name == "host-pages" else 1)
    assert seen["cases"] >= CASES
    wanted = PATHS[name] | ALWAYS | (DRAFTED if mode.drafts else set())
    if mode.drafts and name != "few-blocks":
        wanted -= {"preemptions"}  # too rare where answers are short of steps
    assert {path for path in wanted if not seen[path]} == set(), seen


def hits_at_once(manager, original):
    def change(*args, **kwargs):
        manager._unsettled.clear()
        return original(*args, **kwargs)

    return change


def dropped_too_early(manager, original):
    return lambda name, computed, *rest: original(name, computed + BLOCK, *rest)


def forgotten(manager, original):
    return lambda name: original(name)[1:]


@pytest.mark.parametrize("mode", [MODES["step-by-step"], MODES["two-in-flight"]])
@pytest.mark.parametrize(
    ("method", "change", "message"),
    [
        ("get_num_blocks_to_allocate", hits_at_once, "is another prefix's|lags by"),
        ("remove_skipped_blocks", dropped_too_early, "write slot . at once|reads slot"),
        ("pop_blocks_for_free", forgotten, "slots are held"),
    ],
)
def test_a_manager_that_errs_is_caught(method, change, message, mode):
    def broken(seed):
        server = mode.server("blocks", seed=seed)
        setattr(server.manager, method, change(server.manager, getattr(server.manager, method)))
        return server

    with pytest.raises(AssertionError, match=message):
        run_cases(broken, phases=[Phase.generate])


def not_folded(worker, slot, length):
    return (worker.slot(slot) or [None])[0]


def one_slot_only(worker, row):
    first = row.start // BLOCK
    return range(first, first + 1 if row.window else (row.end - 1) // BLOCK + 1)


def all_rejected(scheduler, request):
    return 0


@pytest.mark.parametrize(
    ("mode", "owner", "method", "change", "message"),
    [
        ("drafts", HashWorker, "state", not_folded, "is another prefix's"),
        ("drafts", HashWorker, "_written_blocks", one_slot_only, "is another prefix's|is copied|lags by"),
        ("drafts-in-flight", HashWorker, "state", not_folded, "is another prefix's"),
        ("drafts-in-flight", HashWorker, "_written_blocks", one_slot_only, "is another prefix's|is copied|lags by"),
        ("drafts-in-flight", _StateScheduling, "_drafts_in_flight", all_rejected, "slots? .*, and not"),
    ],
)
def test_windows_that_err_are_caught(mode, owner, method, change, message, monkeypatch):
    monkeypatch.setattr(owner, method, change)
    with pytest.raises(AssertionError, match=message):
        run_cases(partial(DRAFTING[mode].server, "blocks"), phases=[Phase.generate])


@pytest.mark.parametrize("mode", MODES | DRAFTING)
def test_an_answer_is_resumed_from_its_last_boundary(mode):
    """Drafts that count carry a request over boundaries, in its last window perhaps, and no step follows that."""
    drafts = (MODES | DRAFTING)[mode].drafts
    for length in range(BLOCK, BLOCK + 20):
        server = (MODES | DRAFTING)[mode].server("blocks")
        server.worker.drafter = Drafter(drafts, least=drafts, luck=[1])
        turn = Arrival((0,), length - BLOCK, 60, 0, None, 0)
        server.play([turn])
        answered = [*turn.prompt, *server.answers["0"]]
        server.scheduler.add_request(replay.make_request(server.scheduler, "next", [*answered, 7], 1))
        [new] = server.scheduler.schedule().scheduled_new_reqs
        assert new.num_computed_tokens >= (len(answered) - 1) // BLOCK * BLOCK
